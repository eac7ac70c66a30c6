//! Children that die with us, without `unsafe` (no `pre_exec`).
//!
//! Where util-linux has `setpriv --pdeathsig`, the kernel kills the child when its parent ends. That signal follows
//! the *thread* that spawned it, so every child is spawned by one thread that lives as long as the process.
//! Elsewhere a shell waits for the end of a pipe that only we hold, and then kills the child's process group.

use std::{
    ffi::OsString,
    io,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        mpsc::{self, Sender},
    },
    thread,
};

/// Who the child becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Identity {
    Same,
    /// Nobody inside a user namespace of its own; outside still us, so any directory of ours will do.
    Namespace,
    /// Really nobody, who may pass our directories: where user namespaces are forbidden, as in many containers.
    Nobody,
}

/// "nobody" on every Linux.
pub(crate) const NOBODY: u32 = 65534;

/// A child and, where the kernel does not do it, the shell that watches over it.
#[derive(Debug)]
pub(crate) struct Leashed {
    pub child: Child,
    watchdog: Option<Child>,
}

impl Drop for Leashed {
    fn drop(&mut self) {
        if let Some(watchdog) = &mut self.watchdog {
            // Its child is dealt with by whoever dropped us; gone already is fine too.
            let _ = watchdog.kill();
            let _ = watchdog.wait();
        }
    }
}

/// Starts a program in its own process group, bound to this process's life.
pub(crate) fn spawn(
    identity: Identity,
    program: &OsString,
    args: &[OsString],
    setup: impl FnOnce(&mut Command) + Send + 'static,
) -> io::Result<Leashed> {
    let mut line: Vec<OsString> = Vec::new();
    if identity == Identity::Namespace {
        line.extend(["unshare", "--user", "--map-user=65534", "--map-group=65534", "--"].map(OsString::from));
    }
    if has_setpriv() {
        // Innermost, because a change of credentials takes the signal away.
        line.push("setpriv".into());
        if identity == Identity::Nobody {
            line.extend(nobody_flags().map(OsString::from));
        }
        line.extend(["--pdeathsig", "KILL", "--"].map(OsString::from));
    }
    line.push(program.clone());
    line.extend_from_slice(args);
    on_spawner(move || {
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).stdin(Stdio::null()).process_group(0);
        setup(&mut command);
        let mut child = command.spawn()?;
        let watchdog = if has_setpriv() { Ok(None) } else { watch(child.id()).map(Some) };
        match watchdog {
            Ok(watchdog) => Ok(Leashed { child, watchdog }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    })
}

fn nobody_flags() -> [&'static str; 5] {
    ["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
}

/// How a program that refuses root can be run by this process; `None`: not at all.
pub(crate) fn unprivileged() -> Option<Identity> {
    static IDENTITY: OnceLock<Option<Identity>> = OnceLock::new();
    *IDENTITY.get_or_init(|| {
        if !rustix::process::geteuid().is_root() {
            return Some(Identity::Same);
        }
        let namespace = succeeds("unshare", &["--user", "--map-user=65534", "--map-group=65534", "--", "true"]);
        if namespace {
            return Some(Identity::Namespace);
        }
        let mut args = nobody_flags().to_vec();
        args.extend(["--", "true"]);
        succeeds("setpriv", &args).then_some(Identity::Nobody)
    })
}

fn has_setpriv() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| succeeds("setpriv", &["--pdeathsig", "KILL", "--", "true"]))
}

fn succeeds(program: &str, args: &[&str]) -> bool {
    Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn watch(pid: u32) -> io::Result<Child> {
    Command::new("sh")
        .args(["-c", r#"read -r _; kill -s KILL -- "-$1" 2>/dev/null"#, "reliant-watchdog", &pid.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}

type Job = Box<dyn FnOnce() + Send>;

fn on_spawner<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    static SPAWNER: OnceLock<Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        thread::Builder::new()
            .name("devstack-spawner".into())
            .spawn(move || jobs.into_iter().for_each(|job| job()))
            .expect("a thread can be started before any server is");
        sender
    });
    let (answer, result) = mpsc::sync_channel(1);
    let job: Job = Box::new(move || {
        // The asker waits; it cannot be gone.
        let _ = answer.send(work());
    });
    spawner.send(job).map_err(|_| io::Error::other("the spawner thread ended"))?;
    result.recv().map_err(|_| io::Error::other("the spawner thread ended"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_kills_when_its_pipe_ends() {
        let mut child = Command::new("sleep").arg("60").process_group(0).spawn().expect("sleep");
        let mut watchdog = watch(child.id()).expect("watchdog");
        drop(watchdog.stdin.take());
        assert!(!child.wait().expect("wait").success());
        watchdog.wait().expect("wait");
    }
}
