//! `write_file`, and the atomic replacing of files: a reader sees the old file or the new one, never a part.

use std::{fs::File, io::Write, path::Path};

use rustix::fs::{AtFlags, Mode, OFlags};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::{
    ToolError,
    files::{ChatFiles, FileKey, Stamp},
};
use crate::{confine::Place, roots::Root};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Args {
    path: String,
    content: String,
}

pub fn run(args: &Args, root: &Root, files: &ChatFiles, cancel: &CancellationToken) -> Result<Vec<u8>, ToolError> {
    let inside = root.confine.inside(&args.path)?;
    let place = root.confine.place(&inside)?;
    let key = FileKey::of(&place)?;
    let _held = files.hold(&key, cancel)?;
    let now = rustix::fs::statat(&place.dir, &place.name, AtFlags::SYMLINK_NOFOLLOW).ok().map(|stat| Stamp::of(&stat));
    if let (Some(last), Some(now)) = (files.last(&key), now)
        && last != now
    {
        // Known from here on: the next write is meant.
        files.record(key, now);
        return Err(ToolError::failed(format!(
            "'{}' was not written: it changed since this chat last read or wrote it; read it again and write what keeps \
             the change, or write again to overwrite it",
            args.path
        )));
    }
    let (new, after) = replace(&place, &inside, args.content.as_bytes(), cancel)?;
    files.record(key, after);
    let what = if new { "created" } else { "replaced" };
    let lines = args.content.lines().count();
    Ok(format!("{what} {} ({lines} lines, {} bytes)", inside.display(), args.content.len()).into_bytes())
}

/// Answers whether the file is new, and what it is now. An existing file keeps its permissions.
pub fn replace(
    place: &Place,
    inside: &Path,
    content: &[u8],
    cancel: &CancellationToken,
) -> Result<(bool, Stamp), ToolError> {
    let failed = |e: std::io::Error| ToolError::failed(format!("'{}' cannot be written: {e}", inside.display()));
    if cancel.is_cancelled() {
        return Err(ToolError::Cancelled);
    }
    let Place { dir, name } = place;
    let old = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).ok();
    let temporary = format!(".reliant-{}.tmp", uuid::Uuid::new_v4().simple());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd =
        rustix::fs::openat(dir, temporary.as_str(), flags, Mode::from_raw_mode(0o666)).map_err(|e| failed(e.into()))?;
    let written = (|| {
        let mut file = File::from(fd);
        file.write_all(content)?;
        if let Some(old) = &old {
            rustix::fs::fchmod(&file, Mode::from_raw_mode(old.st_mode & 0o7777))?;
        }
        file.sync_data()?;
        if cancel.is_cancelled() {
            return Ok(None);
        }
        let stamp = Stamp::of_file(&file)?;
        rustix::fs::renameat(dir, temporary.as_str(), dir, name)?;
        Ok(Some(stamp))
    })();
    match written {
        Ok(Some(stamp)) => Ok((old.is_none(), stamp)),
        other => {
            let _ = rustix::fs::unlinkat(dir, temporary.as_str(), AtFlags::empty());
            match other {
                Err(e) => Err(failed(e)),
                Ok(_) => Err(ToolError::Cancelled),
            }
        }
    }
}
