//! The directory that holds what outlives the process. One daemon at a time owns it, by a lock on a file that also
//! tells its pid; the lock goes with the process, however it dies.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::FlockOperation;

use crate::error::DaemonError;

const LOCK_FILE: &str = "daemon.lock";

#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    _lock: File,
}

fn refused(path: &Path, reason: impl ToString) -> DaemonError {
    DaemonError::StateDir { path: path.to_owned(), reason: reason.to_string() }
}

impl StateDir {
    /// Makes the directory where it is missing, and takes its lock.
    pub fn open(path: &Path) -> Result<Self, DaemonError> {
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| refused(path, e))?;
        let path = path.canonicalize().map_err(|e| refused(path, e))?;
        let meta = path.metadata().map_err(|e| refused(&path, e))?;
        let uid = rustix::process::geteuid().as_raw();
        if meta.uid() != uid {
            return Err(refused(
                &path,
                format!(
                    "it belongs to user id {}, not to {uid}; start the daemon as its owner, or give another state_dir",
                    meta.uid()
                ),
            ));
        }
        for sub in ["outputs", "running"] {
            DirBuilder::new().recursive(true).mode(0o700).create(path.join(sub)).map_err(|e| refused(&path, e))?;
        }
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join(LOCK_FILE))
            .map_err(|e| refused(&path, e))?;
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            let pid = read_pid(&mut lock).unwrap_or(0);
            return Err(DaemonError::AlreadyRunning { pid, dir: path });
        }
        lock.set_len(0).map_err(|e| refused(&path, e))?;
        write!(lock, "{}", std::process::id()).map_err(|e| refused(&path, e))?;
        Ok(Self { path, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn read_pid(lock: &mut File) -> Option<u32> {
    let mut text = String::new();
    lock.read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// The pid of the daemon that owns the directory now.
pub fn owner(path: &Path) -> Option<u32> {
    let mut lock = File::open(path.join(LOCK_FILE)).ok()?;
    // A shared lock is refused exactly while a daemon holds the exclusive one; ours goes with the file.
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) {
        Ok(()) => None,
        Err(_) => Some(read_pid(&mut lock).unwrap_or(0)),
    }
}

/// Replaces a file whole, readable by its owner alone.
pub fn replace_file(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".tmp-").tempfile_in(dir)?;
    file.write_all(content)?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_daemon_owns_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateDir::open(dir.path()).unwrap();
        assert_eq!(owner(dir.path()), Some(std::process::id()));
        match StateDir::open(dir.path()) {
            Err(DaemonError::AlreadyRunning { pid, .. }) => assert_eq!(pid, std::process::id()),
            other => panic!("{other:?}"),
        }
        drop(first);
        assert_eq!(owner(dir.path()), None);
        assert!(StateDir::open(dir.path()).is_ok());
    }
}
