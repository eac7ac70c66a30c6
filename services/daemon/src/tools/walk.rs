//! The walk of `glob` and `grep`. It follows no links, and opens each directory beneath the root, so that it stays
//! inside; it leaves out `.git` and what the ignore files name; and it ends, however many entries a tree has.

use std::{
    ffi::{CStr, OsStr},
    ops::ControlFlow,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, SystemTime},
};

use rustix::fs::{AtFlags, Dir, FileType};
use tokio_util::sync::CancellationToken;

use super::{ToolError, rules::Rules};
use crate::roots::Root;

/// Entries of one walk.
pub const ENTRIES_MAX: usize = 2_000_000;
/// Paths of directories that wait for their turn.
const WAITING_MAX_BYTES: usize = 64 * 1024 * 1024;

/// A file, link or special file of a walk.
pub struct Found<'a> {
    /// Relative to the root.
    pub inside: PathBuf,
    pub is_file: bool,
    dir: &'a OwnedFd,
    name: &'a CStr,
}

impl Found<'_> {
    pub fn modified(&self) -> SystemTime {
        let stat = rustix::fs::statat(self.dir, self.name, AtFlags::SYMLINK_NOFOLLOW);
        let seconds = stat.map_or(0, |s| u64::try_from(s.st_mtime).unwrap_or(0));
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }
}

/// Visits all that is below `top`, a directory relative to the root, until the visitor breaks. False: the tree is too
/// large, and part of it was not visited.
pub fn walk(
    root: &Root,
    top: &Path,
    cancel: &CancellationToken,
    mut visit: impl FnMut(Found<'_>) -> ControlFlow<()>,
) -> Result<bool, ToolError> {
    let mut above = None;
    let ancestors: Vec<&Path> = top.ancestors().skip(1).collect();
    for dir in ancestors.into_iter().rev() {
        above = Rules::enter(above, dir, &root.confine.open_dir(dir)?);
    }
    let mut entries = 0;
    let mut complete = true;
    let mut waiting = vec![(top.to_owned(), above)];
    let mut waiting_bytes = top.as_os_str().len();
    while let Some((dir, above)) = waiting.pop() {
        waiting_bytes -= dir.as_os_str().len();
        // What cannot be opened or read is left out, as a person's own search would do.
        let Ok(fd) = root.confine.open_dir(&dir) else { continue };
        let Ok(listing) = Dir::read_from(&fd) else { continue };
        let rules: Option<Rc<Rules>> = Rules::enter(above, &dir, &fd);
        for entry in listing.map_while(Result::ok) {
            if cancel.is_cancelled() {
                return Err(ToolError::Cancelled);
            }
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b".." | b".git") {
                continue;
            }
            entries += 1;
            if entries > ENTRIES_MAX {
                return Ok(false);
            }
            let kind = match entry.file_type() {
                FileType::Unknown => rustix::fs::statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_or(FileType::Unknown, |s| FileType::from_raw_mode(s.st_mode)),
                known => known,
            };
            let inside = dir.join(OsStr::from_bytes(name.to_bytes()));
            let is_dir = kind == FileType::Directory;
            if rules.as_ref().is_some_and(|rules| rules.hide(&inside, is_dir)) {
                continue;
            }
            if !is_dir {
                let found = Found { inside, is_file: kind == FileType::RegularFile, dir: &fd, name };
                if visit(found).is_break() {
                    return Ok(complete);
                }
            } else if waiting_bytes + inside.as_os_str().len() > WAITING_MAX_BYTES {
                complete = false;
            } else {
                waiting_bytes += inside.as_os_str().len();
                waiting.push((inside, rules.clone()));
            }
        }
    }
    Ok(complete)
}
