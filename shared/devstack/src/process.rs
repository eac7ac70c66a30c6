//! One server process: its pid, its log, its end. Zombies count as dead.

use reliant_types::boxed;
use std::{
    collections::VecDeque,
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::time::{Instant, sleep};

use crate::{
    StackError,
    leash::{self, Identity, Leashed},
};

/// How often a state is looked at that nobody announces.
pub(crate) const POLL: Duration = Duration::from_millis(10);
const TAIL_LINES: usize = 12;
const TAIL_BYTES: u64 = 16 * 1024;

#[derive(Debug)]
pub(crate) struct Process {
    name: &'static str,
    pid: Pid,
    leashed: Leashed,
    log: PathBuf,
    status: Option<String>,
    succeeded: bool,
}

#[derive(Debug)]
pub(crate) struct Launch {
    /// For errors.
    pub name: &'static str,
    pub identity: Identity,
    pub program: PathBuf,
    pub args: Vec<OsString>,
    pub env: Vec<(OsString, OsString)>,
    /// Variables of this process that the child gets; `None`: all.
    pub inherits: Option<Vec<String>>,
    pub working_dir: PathBuf,
    pub log: PathBuf,
    /// A restart keeps what the log says already.
    pub append_log: bool,
}

impl Process {
    pub fn start(launch: Launch) -> Result<Self, StackError> {
        let Launch { name, identity, program, args, env, inherits, working_dir, log, append_log } = launch;
        let out = open_log(&log, append_log)?;
        let err = out.try_clone().map_err(StackError::io("open", &log))?;
        let leashed = leash::spawn(identity, &program.clone().into_os_string(), &args, move |command| {
            if let Some(names) = inherits {
                command.env_clear();
                command.envs(names.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
            }
            command.stdout(out).stderr(err).current_dir(working_dir).envs(env);
        })
        .map_err(|source| StackError::Spawn { program: program.display().to_string(), source })?;
        let pid = Pid::from_child(&leashed.child);
        Ok(Self { name, pid, leashed, log, status: None, succeeded: false })
    }

    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Reaps it where it has ended.
    pub fn is_alive(&mut self) -> bool {
        if self.status.is_some() {
            return false;
        }
        match self.leashed.child.try_wait() {
            Ok(None) => true,
            Ok(Some(status)) => {
                self.succeeded = status.success();
                self.status = Some(status.to_string());
                false
            }
            Err(_) => {
                self.status = Some("its end was not seen".to_owned());
                false
            }
        }
    }

    /// Polls `ready` until it says yes, the process ends or the deadline passes.
    pub async fn until_ready<F>(&mut self, deadline: Instant, mut ready: impl FnMut() -> F) -> Result<(), StackError>
    where
        F: Future<Output = bool>,
    {
        let begun = Instant::now();
        loop {
            if ready().await {
                return Ok(());
            }
            if !self.is_alive() {
                return Err(self.died());
            }
            if Instant::now() >= deadline {
                return Err(self.not_ready(begun));
            }
            sleep(POLL).await;
        }
    }

    /// For a program that does one thing and ends.
    #[boxed]
    pub async fn until_success(&mut self, deadline: Instant) -> Result<(), StackError> {
        let begun = Instant::now();
        while self.is_alive() {
            if Instant::now() >= deadline {
                return Err(self.not_ready(begun));
            }
            sleep(POLL).await;
        }
        if self.succeeded { Ok(()) } else { Err(self.died()) }
    }

    /// How it ended, where it has.
    pub fn end(&mut self) -> Option<Result<(), StackError>> {
        let ended = !self.is_alive();
        ended.then(|| if self.succeeded { Ok(()) } else { Err(self.died()) })
    }

    fn died(&self) -> StackError {
        StackError::Died { name: self.name, status: self.status.clone(), tail: tail(&self.log), log: self.log.clone() }
    }

    fn not_ready(&self, begun: Instant) -> StackError {
        StackError::NotReady { name: self.name, after: begun.elapsed(), tail: tail(&self.log), log: self.log.clone() }
    }

    /// Asks it to end, waits, then forces it.
    #[boxed]
    pub async fn stop(&mut self, signal: Signal, patience: Duration) {
        if !self.is_alive() {
            return;
        }
        // A stopped (SIGSTOP) process would never see the request.
        self.resume();
        let _ = kill_process(self.pid, signal);
        let deadline = Instant::now() + patience;
        while self.is_alive() {
            if Instant::now() >= deadline {
                tracing::warn!(process = self.name, "the process did not end when asked to, and is killed");
                self.kill_now();
                return;
            }
            sleep(POLL).await;
        }
    }

    /// kill -9, and the zombie is reaped.
    pub fn kill_now(&mut self) {
        if !self.is_alive() {
            return;
        }
        let _ = kill_process_group(self.pid, Signal::KILL);
        // The group is made by the child itself; should that not have happened yet, the pid still counts.
        let _ = self.leashed.child.kill();
        let status = self.leashed.child.wait();
        self.status = Some(status.map_or_else(|error| error.to_string(), |status| status.to_string()));
    }

    /// SIGSTOP to it and to all its descendants, the parent first, so that it makes no more of them.
    pub fn pause(&self) {
        let _ = kill_process(self.pid, Signal::STOP);
        for pid in descendants(self.pid) {
            let _ = kill_process(pid, Signal::STOP);
        }
    }

    pub fn resume(&self) {
        for pid in descendants(self.pid) {
            let _ = kill_process(pid, Signal::CONT);
        }
        let _ = kill_process(self.pid, Signal::CONT);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill_now();
    }
}

fn open_log(log: &Path, append: bool) -> Result<File, StackError> {
    if let Some(dir) = log.parent() {
        fs::create_dir_all(dir).map_err(StackError::io("make the directory", dir))?;
    }
    if !append && log.exists() {
        fs::write(log, b"").map_err(StackError::io("empty", log))?;
    }
    // Append mode, because the server and its children write to one file.
    OpenOptions::new().create(true).append(true).mode(0o600).open(log).map_err(StackError::io("open", log))
}

/// The last lines of a log, for an error.
pub(crate) fn tail(log: &Path) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let mut lines = VecDeque::with_capacity(TAIL_LINES);
    for line in text.lines() {
        if lines.len() == TAIL_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }
    if lines.is_empty() { "(the log is empty)".to_owned() } else { Vec::from(lines).join("\n") }
}

/// Whether a process with this pid runs; a zombie does not.
pub(crate) fn runs(pid: Pid) -> bool {
    if rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH) {
        return false;
    }
    !matches!(stat(pid), Some((_, 'Z' | 'X')))
}

/// Parent and state, where there is a /proc.
fn stat(pid: Pid) -> Option<(i32, char)> {
    let text = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).ok()?;
    // The name in parentheses may hold anything, parentheses included.
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((fields.next()?.parse().ok()?, state))
}

fn descendants(root: Pid) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let mut parents = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw) else { continue };
        if let Some((parent, _)) = stat(pid) {
            parents.push((pid, parent));
        }
    }
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next].as_raw_pid();
        found.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    found.split_off(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zombie_counts_as_dead() {
        let mut child = std::process::Command::new("true").spawn().expect("true");
        let pid = Pid::from_child(&child);
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while runs(pid) {
            assert!(std::time::Instant::now() < deadline, "a zombie was taken for a running process");
            std::thread::yield_now();
        }
        child.wait().expect("wait");
        assert!(runs(rustix::process::getpid()));
    }

    #[test]
    fn a_tail_is_the_last_lines() {
        let file = tempfile::NamedTempFile::new().expect("file");
        fs::write(file.path(), (0..100).map(|n| format!("line {n}\n")).collect::<String>()).expect("write");
        assert!(tail(file.path()).starts_with("line 88\n"));
        assert!(tail(file.path()).ends_with("line 99"));
    }
}
