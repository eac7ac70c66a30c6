//! One process per data directory.
//!
//! The lock is the kernel's (flock), so it ends with its holder, however that one ends; the file beside it only says
//! who holds it.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::StackError;

const LOCK_FILE: &str = "lock";
const INFO_FILE: &str = "running.json";

#[derive(Debug, Serialize, Deserialize)]
struct Info {
    pid: u32,
    info: Option<String>,
}

/// Held as long as it lives.
#[derive(Debug)]
pub struct DataDirLock {
    dir: PathBuf,
    file: File,
}

impl DataDirLock {
    /// Makes the directory (0700) where it is absent.
    pub fn acquire(dir: &Path) -> Result<Self, StackError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(StackError::io("make the directory", dir))?;
        let path = dir.join(LOCK_FILE);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(StackError::io("open", &path))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let info = read(dir);
            return Err(StackError::AlreadyRunning {
                data_dir: dir.to_owned(),
                pid: info.as_ref().map(|info| info.pid),
                info: info.and_then(|info| info.info),
            });
        }
        let lock = Self { dir: dir.to_owned(), file };
        lock.write(None)?;
        Ok(lock)
    }

    /// What a second process on this directory is told.
    pub fn announce(&self, info: &str) -> Result<(), StackError> {
        self.write(Some(info.to_owned()))
    }

    fn write(&self, info: Option<String>) -> Result<(), StackError> {
        let path = self.dir.join(INFO_FILE);
        let text = serde_json::to_vec(&Info { pid: std::process::id(), info }).expect("strings and numbers encode");
        write_private(&path, &text)
    }
}

impl Drop for DataDirLock {
    fn drop(&mut self) {
        // Best effort: an information file without the lock says nothing.
        let _ = fs::remove_file(self.dir.join(INFO_FILE));
        // A child that another thread is just starting holds the file too, until it runs its own program.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

fn read(dir: &Path) -> Option<Info> {
    serde_json::from_slice(&fs::read(dir.join(INFO_FILE)).ok()?).ok()
}

/// What the process that holds `dir` announced; `None` when nobody holds it.
pub fn running_info(dir: &Path) -> Option<(u32, Option<String>)> {
    let file = OpenOptions::new().write(true).open(dir.join(LOCK_FILE)).ok()?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
        return None;
    }
    read(dir).map(|info| (info.pid, info.info))
}

/// Whole or not at all, readable by the owner alone.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), StackError> {
    let draft = path.with_extension("draft");
    let write = || {
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&draft)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&draft, path)
    };
    write().map_err(StackError::io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_told_about_the_first() {
        let dir = tempfile::tempdir().expect("tempdir");
        let lock = DataDirLock::acquire(dir.path()).expect("first");
        lock.announce("http://127.0.0.1:7440").expect("announce");
        match DataDirLock::acquire(dir.path()) {
            Err(StackError::AlreadyRunning { pid, info, .. }) => {
                assert_eq!(pid, Some(std::process::id()));
                assert_eq!(info.as_deref(), Some("http://127.0.0.1:7440"));
            }
            other => panic!("{other:?}"),
        }
        assert!(running_info(dir.path()).is_some());
        drop(lock);
        assert!(running_info(dir.path()).is_none());
        DataDirLock::acquire(dir.path()).expect("free again");
    }
}
