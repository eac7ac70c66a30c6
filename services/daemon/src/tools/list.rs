//! `list_dir` and `glob`: what there is, bounded.

use std::{fmt::Write, ops::ControlFlow};

use reliant_types::{Code, Failure};
use rustix::fs::{AtFlags, Dir, FileType};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::{
    ToolError,
    walk::{ENTRIES_MAX as WALK_ENTRIES_MAX, walk},
};
use crate::roots::Root;

const ENTRIES_MAX: usize = 1000;
/// Entries looked at in one directory, before the listing gives up on counting.
const ENTRIES_SEEN_MAX: usize = 100_000;
const GLOB_MAX: usize = 500;
const GLOB_SEEN_MAX: usize = 50_000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListArgs {
    #[serde(default)]
    path: String,
}

pub fn list_dir(args: &ListArgs, root: &Root, cancel: &CancellationToken) -> Result<Vec<u8>, ToolError> {
    let inside = root.confine.inside(&args.path)?;
    let failed = |e: rustix::io::Errno| ToolError::failed(format!("'{}' cannot be listed: {e}", args.path));
    let fd = root.confine.open_dir(&inside)?;
    let mut dirs = Vec::new();
    let mut files = Vec::new();
    let mut seen = 0;
    for entry in Dir::read_from(&fd).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if cancel.is_cancelled() {
            return Err(ToolError::Cancelled);
        }
        let bytes = entry.file_name().to_bytes();
        if bytes == b"." || bytes == b".." {
            continue;
        }
        seen += 1;
        if seen > ENTRIES_SEEN_MAX {
            break;
        }
        let name = String::from_utf8_lossy(bytes).into_owned();
        match rustix::fs::statat(&fd, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => dirs.push(format!("{name}/")),
                FileType::Symlink => {
                    let to = rustix::fs::readlinkat(&fd, entry.file_name(), Vec::new()).unwrap_or_default();
                    files.push(format!("{name} -> {}", to.to_string_lossy()));
                }
                FileType::RegularFile => files.push(format!("{name} ({} bytes)", stat.st_size)),
                _ => files.push(format!("{name} (special file)")),
            },
            Err(_) => files.push(name),
        }
    }
    dirs.sort_unstable();
    files.sort_unstable();
    let total = dirs.len() + files.len();
    if total == 0 {
        return Ok(b"(the directory is empty)".to_vec());
    }
    let mut text = String::new();
    for line in dirs.iter().chain(&files).take(ENTRIES_MAX) {
        let _ = writeln!(text, "{line}");
    }
    if total > ENTRIES_MAX {
        let least = if seen > ENTRIES_SEEN_MAX { "at least " } else { "" };
        let _ = writeln!(text, "[{ENTRIES_MAX} of {least}{total} entries shown; use glob to find the one you need]");
    }
    Ok(text.into_bytes())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GlobArgs {
    pattern: String,
    #[serde(default)]
    path: String,
}

/// A pattern without a slash fits in every directory, as in .gitignore.
pub fn matcher(pattern: &str) -> Result<globset::GlobMatcher, globset::Error> {
    let pattern = pattern.trim_start_matches("./");
    let anywhere = if pattern.contains('/') { pattern.to_owned() } else { format!("**/{pattern}") };
    Ok(globset::GlobBuilder::new(&anywhere).literal_separator(true).build()?.compile_matcher())
}

impl GlobArgs {
    pub fn checked(self) -> Result<Self, Failure> {
        match matcher(&self.pattern) {
            Ok(_) => Ok(self),
            Err(e) => Err(Failure::new(Code::ToolArgumentsInvalid, format!("pattern: {e}"))),
        }
    }
}

pub fn glob(args: &GlobArgs, root: &Root, cancel: &CancellationToken) -> Result<Vec<u8>, ToolError> {
    let matcher = matcher(&args.pattern).map_err(|e| ToolError::failed(e.to_string()))?;
    let inside = root.confine.inside(&args.path)?;
    root.confine.open_dir(&inside)?;
    let top = root.confine.existing(&inside)?;
    let mut found = Vec::new();
    let mut seen_all = true;
    let complete = walk(root, &top, cancel, |file| {
        if file.inside.strip_prefix(&top).is_ok_and(|below| matcher.is_match(below)) {
            if found.len() >= GLOB_SEEN_MAX {
                seen_all = false;
                return ControlFlow::Break(());
            }
            found.push((file.modified(), file.inside));
        }
        ControlFlow::Continue(())
    })?;
    if found.is_empty() {
        let part = if complete { String::new() } else { format!("\n{}", too_large()) };
        return Ok(format!("no file fits {}{part}", args.pattern).into_bytes());
    }
    found.sort_unstable_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    let mut text = String::new();
    for (_, path) in found.iter().take(GLOB_MAX) {
        let _ = writeln!(text, "{}", path.display());
    }
    if found.len() > GLOB_MAX {
        let least = if seen_all { "" } else { "at least " };
        let _ = writeln!(text, "[the {GLOB_MAX} newest of {least}{} files; give a narrower pattern]", found.len());
    }
    if !complete {
        let _ = writeln!(text, "{}", too_large());
    }
    Ok(text.into_bytes())
}

/// For a walk that did not see the whole tree.
pub fn too_large() -> String {
    format!("[the tree has more than {WALK_ENTRIES_MAX} entries and was looked through in part; give a path in it]")
}
