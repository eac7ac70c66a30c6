//! A CPU quota for a group of processes, by cgroup version 2 or 1, whichever this machine has and lets us use.
//!
//! Dropping a quota lifts it, hands its processes back and removes its group.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The kernel's default: a quota is so many microseconds of CPU in each of these.
const PERIOD_US: u64 = 100_000;
/// The kernel takes no smaller quota.
const QUOTA_MIN_US: u64 = 1_000;
const V2_ROOT: &str = "/sys/fs/cgroup";
const V1_ROOT: &str = "/sys/fs/cgroup/cpu";

/// Why there is no quota: load tests say it and go on without, or end.
#[derive(Debug)]
pub enum QuotaError {
    /// No cgroup hierarchy with a CPU controller is mounted.
    NoController,
    /// There is one, and this user may not use it.
    Refused { path: PathBuf, source: io::Error },
}

impl std::fmt::Display for QuotaError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoController => {
                write!(f, "this machine has no cgroup with a CPU controller; a quota needs Linux with {V2_ROOT}")
            }
            Self::Refused { path, .. } => {
                write!(f, "{} cannot be used; a CPU quota needs root or a delegated cgroup", path.display())
            }
        }
    }
}

impl std::error::Error for QuotaError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::NoController => None,
            Self::Refused { source, .. } => Some(source),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// A cgroup of our own.
#[derive(Debug)]
pub struct Quota {
    version: Version,
    parent: PathBuf,
    dir: PathBuf,
}

impl Quota {
    /// A group without a limit and without processes. Its name carries ours and this process's id.
    pub fn new(name: &str) -> Result<Self, QuotaError> {
        let (version, parent) = hierarchy(Path::new(V2_ROOT), Path::new(V1_ROOT)).ok_or(QuotaError::NoController)?;
        let dir = parent.join(format!("reliant-{name}-{}", std::process::id()));
        if version == Version::Two {
            // Already on where a service manager runs.
            write(&parent.join("cgroup.subtree_control"), "+cpu")?;
        }
        fs::create_dir(&dir).map_err(|source| QuotaError::Refused { path: dir.clone(), source })?;
        Ok(Self { version, parent, dir })
    }

    /// Moves a process with all its threads; children that it starts from now on are in the group as well.
    pub fn add(&self, pid: u32) -> Result<(), QuotaError> {
        write(&self.dir.join("cgroup.procs"), &pid.to_string())
    }

    /// At most so many cores, 0.5 being half of one; `None` lifts the limit.
    pub fn limit(&self, cores: Option<f64>) -> Result<(), QuotaError> {
        let quota = cores.map(|cores| ((cores * PERIOD_US as f64) as u64).max(QUOTA_MIN_US));
        match self.version {
            Version::Two => {
                let quota = quota.map_or_else(|| "max".to_owned(), |quota| quota.to_string());
                write(&self.dir.join("cpu.max"), &format!("{quota} {PERIOD_US}"))
            }
            Version::One => {
                write(&self.dir.join("cpu.cfs_period_us"), &PERIOD_US.to_string())?;
                let quota = quota.map_or_else(|| "-1".to_owned(), |quota| quota.to_string());
                write(&self.dir.join("cpu.cfs_quota_us"), &quota)
            }
        }
    }

    /// The processes in the group now.
    pub fn processes(&self) -> Vec<u32> {
        let list = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        list.lines().filter_map(|pid| pid.trim().parse().ok()).collect()
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        // Whatever cannot be done here was done by the kernel already, or is the end of a machine.
        let _ = self.limit(None);
        for pid in self.processes() {
            let _ = write(&self.parent.join("cgroup.procs"), &pid.to_string());
        }
        let _ = fs::remove_dir(&self.dir);
    }
}

/// Version 2 where it has the CPU controller (on mixed machines version 1 has it).
fn hierarchy(v2: &Path, v1: &Path) -> Option<(Version, PathBuf)> {
    let controllers = fs::read_to_string(v2.join("cgroup.controllers")).unwrap_or_default();
    if controllers.split_whitespace().any(|controller| controller == "cpu") {
        return Some((Version::Two, v2.to_owned()));
    }
    v1.join("cgroup.procs").is_file().then(|| (Version::One, v1.to_owned()))
}

fn write(path: &Path, text: &str) -> Result<(), QuotaError> {
    fs::write(path, text).map_err(|source| QuotaError::Refused { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::{
        process::{Child, Command, Stdio},
        time::Instant,
    };

    use super::*;
    use crate::cpu::process_ms;

    struct Spinner(Child);

    impl Spinner {
        fn new() -> Self {
            Self(Command::new("sh").args(["-c", "while :; do :; done"]).stdin(Stdio::null()).spawn().unwrap())
        }
    }

    impl Drop for Spinner {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn the_version_with_a_cpu_controller_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (v2, v1) = (dir.path().join("v2"), dir.path().join("v1"));
        fs::create_dir_all(&v2).unwrap();
        fs::create_dir_all(&v1).unwrap();
        assert!(hierarchy(&v2, &v1).is_none());
        fs::write(v1.join("cgroup.procs"), "").unwrap();
        assert_eq!(hierarchy(&v2, &v1), Some((Version::One, v1.clone())));
        fs::write(v2.join("cgroup.controllers"), "memory pids\n").unwrap();
        assert_eq!(hierarchy(&v2, &v1), Some((Version::One, v1.clone())));
        fs::write(v2.join("cgroup.controllers"), "cpuset cpu memory\n").unwrap();
        assert_eq!(hierarchy(&v2, &v1), Some((Version::Two, v2)));
    }

    /// One of two equal processes gets a tenth of a core: it falls behind the other, and catches no more than its share.
    #[test]
    fn a_limit_holds_and_is_lifted() {
        let quota = match Quota::new("test") {
            Ok(quota) => quota,
            Err(error) => {
                eprintln!("not tried: {error}");
                return;
            }
        };
        let (slow, free) = (Spinner::new(), Spinner::new());
        quota.add(slow.0.id()).unwrap();
        assert_eq!(quota.processes(), [slow.0.id()]);
        quota.limit(Some(0.1)).unwrap();
        let begun = Instant::now();
        let used = |spinner: &Spinner| process_ms(spinner.0.id());
        let (slow_before, free_before) = (used(&slow), used(&free));
        while used(&free) - free_before < 1000.0 {
            assert!(begun.elapsed().as_secs() < 120);
            std::thread::yield_now();
        }
        // By the clock it may have a tenth; on a busy machine the free one needs longer for its second.
        let most = begun.elapsed().as_secs_f64() * 100.0 + 150.0;
        let slow_used = used(&slow) - slow_before;
        assert!(slow_used < most, "{slow_used} ms of at most {most}");
        let dir = quota.dir.clone();
        drop(quota);
        assert!(!dir.exists());
        let (before, begun) = (used(&slow), Instant::now());
        while used(&slow) - before < 500.0 {
            assert!(begun.elapsed().as_secs() < 120, "the limit was not lifted");
            std::thread::yield_now();
        }
    }
}
