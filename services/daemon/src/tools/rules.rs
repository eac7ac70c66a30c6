//! What `.gitignore`, `.ignore` and `.git/info/exclude` leave out of a walk. A repository's author wrote these files, so
//! they are read within limits, and only where they are regular files: no link is followed, and no pipe or device is
//! opened. Files above the root have no say in it, and neither has the user's own git configuration.

use std::{
    fs::File,
    io::Read,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    rc::Rc,
};

use ignore::{
    Match,
    gitignore::{Gitignore, GitignoreBuilder},
};
use rustix::fs::{AtFlags, FileType, Mode, OFlags};

/// Of one file; what follows is not read.
const FILE_MAX_BYTES: u64 = 256 * 1024;
/// A longer line is no pattern that a person wrote.
const LINE_MAX_BYTES: usize = 4096;
/// Of a directory and all above it; files below that have no say.
const CHAIN_MAX_BYTES: u64 = 1024 * 1024;

/// The rules of one directory, and of those above it.
pub struct Rules {
    dir: PathBuf,
    ignore: Gitignore,
    gitignore: Gitignore,
    exclude: Gitignore,
    /// The directory is a repository's top: git's rules from above do not reach into it.
    repository: bool,
    chain_bytes: u64,
    above: Option<Rc<Rules>>,
}

impl Rules {
    /// The rules for what is in `dir`, which is open as `fd`.
    pub fn enter(above: Option<Rc<Self>>, dir: &Path, fd: &OwnedFd) -> Option<Rc<Self>> {
        let mut chain_bytes = above.as_ref().map_or(0, |a| a.chain_bytes);
        let mut rules = |file: Option<File>| parse(file, &mut chain_bytes);
        let ignore = rules(regular(fd, ".ignore"));
        let gitignore = rules(regular(fd, ".gitignore"));
        let repository = rustix::fs::statat(fd, ".git", AtFlags::SYMLINK_NOFOLLOW).is_ok();
        let exclude = rules(if repository { exclude_file(fd) } else { None });
        if ignore.is_empty() && gitignore.is_empty() && exclude.is_empty() && !repository {
            return above;
        }
        Some(Rc::new(Self { dir: dir.to_owned(), ignore, gitignore, exclude, repository, chain_bytes, above }))
    }

    /// Whether a path, relative to the root as `dir` is, is left out. The nearest directory's word counts, and that of
    /// `.ignore` before that of git's files.
    pub fn hide(&self, path: &Path, is_dir: bool) -> bool {
        let (mut ignore, mut gitignore, mut exclude) = (Match::None, Match::None, Match::None);
        let mut git_counts = true;
        let mut level = Some(self);
        while let Some(rules) = level {
            let relative = path.strip_prefix(&rules.dir).unwrap_or(path);
            if ignore.is_none() {
                ignore = rules.ignore.matched(relative, is_dir);
            }
            if git_counts && gitignore.is_none() {
                gitignore = rules.gitignore.matched(relative, is_dir);
            }
            if git_counts && exclude.is_none() {
                exclude = rules.exclude.matched(relative, is_dir);
            }
            git_counts &= !rules.repository;
            level = rules.above.as_deref();
        }
        ignore.or(gitignore).or(exclude).is_ignore()
    }
}

/// Opens a regular file of an open directory, and nothing else.
fn regular(dir: &OwnedFd, name: &str) -> Option<File> {
    let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return None;
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(dir, name, flags, Mode::empty()).ok()?);
    // It may have been swapped since.
    file.metadata().is_ok_and(|meta| meta.is_file()).then_some(file)
}

fn exclude_file(dir: &OwnedFd) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let git = rustix::fs::openat(dir, ".git", flags, Mode::empty()).ok()?;
    let info = rustix::fs::openat(&git, "info", flags, Mode::empty()).ok()?;
    regular(&info, "exclude")
}

fn parse(file: Option<File>, chain_bytes: &mut u64) -> Gitignore {
    let Some(file) = file else { return Gitignore::empty() };
    let mut bytes = Vec::new();
    let room = FILE_MAX_BYTES.min(CHAIN_MAX_BYTES - *chain_bytes);
    if file.take(room).read_to_end(&mut bytes).is_err() {
        return Gitignore::empty();
    }
    *chain_bytes += bytes.len() as u64;
    // A line that was cut off would be another pattern.
    if bytes.len() as u64 == room {
        bytes.truncate(bytes.iter().rposition(|b| *b == b'\n').unwrap_or(0));
    }
    let mut builder = GitignoreBuilder::new("");
    for line in bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&bytes).split(|b| *b == b'\n') {
        if line.len() <= LINE_MAX_BYTES {
            let line = String::from_utf8_lossy(line);
            // A pattern that is wrong costs itself only.
            let _ = builder.add_line(None, line.strip_suffix('\r').unwrap_or(&line));
        }
    }
    builder.build().unwrap_or_else(|_| Gitignore::empty())
}
