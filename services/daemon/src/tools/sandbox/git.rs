//! A linked worktree keeps its repository elsewhere; git must write there to commit.
//!
//! The root's `.git` file is written by the commands that are confined, so nothing here follows a path twice: each
//! directory is opened once, looked at through its descriptor, and this descriptor becomes the rule.

use std::{
    fs::File,
    io::Read,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};

/// Of `.git` and `gitdir`: a path and a word.
const LINK_MAX_BYTES: u64 = 8 * 1024;

fn directory(at: impl AsFd, path: &Path, more: OFlags) -> Option<OwnedFd> {
    openat(at, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | more, Mode::empty()).ok()
}

/// The text of a small regular file; a pipe or a device is neither waited for nor read.
fn text(at: impl AsFd, name: &str) -> Option<String> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = openat(at, name, flags, Mode::empty()).ok()?;
    if FileType::from_raw_mode(fstat(&file).ok()?.st_mode) != FileType::RegularFile {
        return None;
    }
    let mut text = String::new();
    File::from(file).take(LINK_MAX_BYTES).read_to_string(&mut text).ok()?;
    Some(text.trim().to_owned())
}

fn same(a: impl AsFd, b: impl AsFd) -> bool {
    let of = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    let (a, b) = (fstat(a).ok().map(of), fstat(b).ok().map(of));
    a.is_some() && a == b
}

/// The repository of a root that is a linked worktree: only what git itself laid out, `<repository>/worktrees/<name>`
/// that points back to this root.
pub fn common_dir(root: &Path) -> Option<OwnedFd> {
    let root_fd = directory(CWD, root, OFlags::empty())?;
    let link = text(&root_fd, ".git")?;
    let worktree = directory(&root_fd, Path::new(link.strip_prefix("gitdir:")?.trim()), OFlags::empty())?;
    let back = PathBuf::from(text(&worktree, "gitdir")?);
    let back_root = directory(&worktree, back.parent()?, OFlags::empty())?;
    let common = directory(&worktree, Path::new("../.."), OFlags::empty())?;
    directory(&common, Path::new("objects"), OFlags::NOFOLLOW)?;
    let worktrees = directory(&common, Path::new("worktrees"), OFlags::NOFOLLOW)?;
    let above = directory(&worktree, Path::new(".."), OFlags::empty())?;
    (back.ends_with(".git") && same(&back_root, &root_fd) && same(&worktrees, &above)).then_some(common)
}

/// The top of the repository that a root lies in, where it is not the root itself.
pub fn top_above(root: &Path) -> Option<PathBuf> {
    if root.join(".git").exists() {
        return None;
    }
    root.ancestors().skip(1).find(|dir| dir.join(".git").join("HEAD").is_file()).map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn only_a_real_worktree_opens_its_repository() {
        let dir = tempfile::tempdir().unwrap();
        let git = |args: &[&str]| {
            let base = ["-c", "user.name=a", "-c", "user.email=a@b"];
            let done = Command::new("git").args(base).args(args).current_dir(dir.path()).output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        };
        git(&["init", "-q", "main"]);
        git(&["-C", "main", "commit", "-q", "--allow-empty", "-m", "x"]);
        git(&["-C", "main", "worktree", "add", "-q", "../tree"]);
        let tree = dir.path().join("tree");
        assert!(same(
            common_dir(&tree).unwrap(),
            directory(CWD, &dir.path().join("main/.git"), OFlags::empty()).unwrap()
        ));
        assert!(common_dir(&dir.path().join("main")).is_none());
        assert_eq!(top_above(&tree.join("sub")), None);
        std::fs::create_dir(dir.path().join("main/sub")).unwrap();
        assert_eq!(top_above(&dir.path().join("main/sub")), Some(dir.path().join("main")));

        // A repository that does not point back, and links that are no small files.
        let other = dir.path().join("other");
        std::fs::create_dir(&other).unwrap();
        std::fs::copy(tree.join(".git"), other.join(".git")).unwrap();
        assert!(common_dir(&other).is_none());
        std::fs::create_dir(other.join("w")).unwrap();
        std::fs::write(other.join(".git"), "gitdir: w").unwrap();
        std::os::unix::fs::symlink("/dev/zero", other.join("w/gitdir")).unwrap();
        assert!(common_dir(&other).is_none());
        std::fs::remove_file(other.join("w/gitdir")).unwrap();
        assert!(Command::new("mkfifo").arg(other.join("w/gitdir")).status().unwrap().success());
        assert!(common_dir(&other).is_none());
    }
}
