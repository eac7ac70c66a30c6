//! Opening files inside a root and nowhere else. The kernel does the checking (`openat2` with `RESOLVE_BENEATH`), so
//! that a symlink swapped in between check and use gains nothing; where it cannot, paths are canonicalised first.
//!
//! A path from the wire is text: it is taken apart here, and never given to the file system as it is.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, Mode, OFlags, ResolveFlags},
    io::Errno,
};

#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    #[error("'{path}' is outside the root; only paths inside the root can be used")]
    Outside { path: String },
    #[error(
        "'{path}' begins as a shell's abbreviation does, and file tools expand none; give a path relative to the project \
         root, or './{path}' for a file that is named so"
    )]
    Abbreviated { path: String },
    #[error("'{path}' does not exist")]
    NotFound { path: String },
    #[error("'{path}' is not a regular file")]
    NotAFile { path: String },
    #[error("'{path}' is not a directory")]
    NotADirectory { path: String },
    #[error("'{path}' cannot be used: {source}")]
    Io { path: String, source: io::Error },
}

/// An open directory that everything stays beneath.
#[derive(Debug)]
pub struct Confine {
    path: PathBuf,
    dir: OwnedFd,
}

/// Where a file is to be written: an open directory beneath the root, and a plain name in it.
#[derive(Debug)]
pub struct Place {
    pub dir: OwnedFd,
    pub name: OsString,
}

fn err(path: &Path, e: Errno) -> ConfineError {
    let path = path.display().to_string();
    match e {
        Errno::XDEV | Errno::LOOP => ConfineError::Outside { path },
        Errno::NOENT => ConfineError::NotFound { path },
        Errno::NOTDIR => ConfineError::NotADirectory { path },
        e => ConfineError::Io { path, source: e.into() },
    }
}

/// `~`, `~user`, `$HOME`, `${HOME}`: taken as they stand, they would make a directory that a later shell command means
/// otherwise. A lower-case `$name` is none: some frameworks name files so.
fn is_abbreviated(text: &str) -> bool {
    let variable = |rest: &str| rest.starts_with(|c: char| matches!(c, '{' | '_' | 'A'..='Z'));
    text.starts_with('~') || text.strip_prefix('$').is_some_and(variable)
}

impl Confine {
    /// `path` is canonicalised; a root that is replaced later is still the directory it was.
    pub fn new(path: &Path) -> io::Result<Self> {
        let path = path.canonicalize()?;
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
        let dir = rustix::fs::open(&path, flags, Mode::empty())?;
        Ok(Self { path, dir })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path inside the root that a text means, `..` taken apart as text. Empty is the root itself.
    pub fn inside(&self, text: &str) -> Result<PathBuf, ConfineError> {
        let outside = || ConfineError::Outside { path: text.to_owned() };
        if text.contains('\0') {
            return Err(outside());
        }
        if is_abbreviated(text) {
            return Err(ConfineError::Abbreviated { path: text.to_owned() });
        }
        let path = Path::new(text);
        let relative = if path.is_absolute() { path.strip_prefix(&self.path).map_err(|_| outside())? } else { path };
        let mut inside = PathBuf::new();
        for part in relative.components() {
            match part {
                Component::Normal(name) => inside.push(name),
                Component::CurDir => {}
                Component::ParentDir if inside.pop() => {}
                Component::ParentDir | Component::RootDir | Component::Prefix(_) => return Err(outside()),
            }
        }
        Ok(inside)
    }

    fn open_beneath(&self, inside: &Path, flags: OFlags) -> Result<OwnedFd, ConfineError> {
        let name = if inside.as_os_str().is_empty() { Path::new(".") } else { inside };
        let flags = match flags.contains(OFlags::PATH) {
            true => flags | OFlags::CLOEXEC,
            // A pipe or a terminal must not hold the reader.
            false => flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK,
        };
        match beneath(&self.dir, name, flags) {
            Ok(fd) => Ok(fd),
            // An absolute link, or a kernel without the call: look where it leads, and go there by a plain path.
            Err(Errno::XDEV | Errno::NOSYS | Errno::PERM | Errno::LOOP) => {
                let real = self.real(inside)?;
                let name = if real.as_os_str().is_empty() { Path::new(".") } else { &real };
                match beneath(&self.dir, name, flags) {
                    Err(Errno::NOSYS | Errno::PERM) => {
                        rustix::fs::openat(&self.dir, name, flags | OFlags::NOFOLLOW, Mode::empty())
                            .map_err(|e| err(inside, e))
                    }
                    other => other.map_err(|e| err(inside, e)),
                }
            }
            Err(e) => Err(err(inside, e)),
        }
    }

    /// The path with its links resolved, if it is inside.
    fn real(&self, inside: &Path) -> Result<PathBuf, ConfineError> {
        let text = inside.display().to_string();
        match self.path.join(inside).canonicalize() {
            Ok(real) => match real.strip_prefix(&self.path) {
                Ok(real) => Ok(real.to_owned()),
                Err(_) => Err(ConfineError::Outside { path: text }),
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(ConfineError::Outside { path: text }),
            Err(source) => Err(ConfineError::Io { path: text, source }),
        }
    }

    /// A regular file, to be read.
    pub fn open_file(&self, inside: &Path) -> Result<File, ConfineError> {
        let file = File::from(self.open_beneath(inside, OFlags::RDONLY)?);
        let path = || inside.display().to_string();
        match file.metadata() {
            Ok(meta) if meta.is_file() => Ok(file),
            Ok(_) => Err(ConfineError::NotAFile { path: path() }),
            Err(source) => Err(ConfineError::Io { path: path(), source }),
        }
    }

    pub fn open_dir(&self, inside: &Path) -> Result<OwnedFd, ConfineError> {
        self.open_beneath(inside, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// The path inside the root, its links resolved, of something that exists.
    pub fn existing(&self, inside: &Path) -> Result<PathBuf, ConfineError> {
        if inside.as_os_str().is_empty() {
            return Ok(PathBuf::new());
        }
        // Opening tells "outside" from "not there", as canonicalising does not.
        let flags = if cfg!(target_os = "linux") { OFlags::PATH } else { OFlags::RDONLY };
        drop(self.open_beneath(inside, flags)?);
        self.real(inside)
    }

    /// Where to write `inside`; missing directories are made. A link to a file inside is followed, so that it stays
    /// a link; a link to anywhere else, or to nothing, is refused.
    pub fn place(&self, inside: &Path) -> Result<Place, ConfineError> {
        let text = || inside.display().to_string();
        let Some(name) = inside.file_name() else { return Err(ConfineError::NotAFile { path: text() }) };
        let dir = self.make_dirs(inside.parent().unwrap_or(Path::new("")))?;
        match rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
                rustix::fs::FileType::RegularFile => {}
                rustix::fs::FileType::Symlink => {
                    let real = self.real(inside)?;
                    // Resolved: no link is left in it, so this goes one level deep at most.
                    return match self.path.join(&real).symlink_metadata() {
                        Ok(meta) if meta.is_file() => self.place(&real),
                        _ => Err(ConfineError::NotAFile { path: text() }),
                    };
                }
                _ => return Err(ConfineError::NotAFile { path: text() }),
            },
            Err(Errno::NOENT) => {}
            Err(e) => return Err(err(inside, e)),
        }
        Ok(Place { dir, name: name.to_owned() })
    }

    fn make_dirs(&self, inside: &Path) -> Result<OwnedFd, ConfineError> {
        match self.open_dir(inside) {
            Err(ConfineError::NotFound { .. }) => {}
            other => return other,
        }
        let mut reached = PathBuf::new();
        let mut dir = self.open_dir(&reached)?;
        for part in inside.components() {
            reached.push(part);
            dir = match self.open_dir(&reached) {
                Err(ConfineError::NotFound { .. }) => {
                    match rustix::fs::mkdirat(&dir, part.as_os_str(), Mode::from_raw_mode(0o777)) {
                        Ok(()) => {}
                        // A link to nothing: whatever it names is not ours to make.
                        Err(Errno::EXIST) => return Err(ConfineError::Outside { path: reached.display().to_string() }),
                        Err(e) => return Err(err(&reached, e)),
                    }
                    self.open_dir(&reached)?
                }
                other => other?,
            };
        }
        Ok(dir)
    }
}

#[cfg(target_os = "linux")]
fn beneath(dir: &OwnedFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..4 {
        match rustix::fs::openat2(dir, path, flags, Mode::empty(), resolve) {
            // A rename raced with the walk.
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    }
    Err(Errno::AGAIN)
}

#[cfg(not(target_os = "linux"))]
fn beneath(_: &OwnedFd, _: &Path, _: OFlags) -> Result<OwnedFd, Errno> {
    Err(Errno::NOSYS)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// root/{a.txt, dir/b.txt, links…}, and a secret beside the root.
    fn fixture() -> (tempfile::TempDir, Confine) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("dir")).unwrap();
        std::fs::write(root.join("a.txt"), "a").unwrap();
        std::fs::write(root.join("dir/b.txt"), "b").unwrap();
        std::fs::write(dir.path().join("secret"), "s").unwrap();
        symlink("../secret", root.join("out")).unwrap();
        symlink(dir.path().join("secret"), root.join("out-absolute")).unwrap();
        symlink(root.join("dir/b.txt"), root.join("in-absolute")).unwrap();
        symlink("dir", root.join("dir-link")).unwrap();
        symlink("..", root.join("up")).unwrap();
        symlink("/etc", root.join("etc")).unwrap();
        symlink(dir.path().join("fresh"), root.join("dangling-out")).unwrap();
        symlink("nothing", root.join("dangling-in")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let confine = Confine::new(&root).unwrap();
        (dir, confine)
    }

    fn read(confine: &Confine, text: &str) -> Result<String, ConfineError> {
        let inside = confine.inside(text)?;
        let file = confine.open_file(&inside)?;
        Ok(io::read_to_string(file).unwrap())
    }

    #[test]
    fn what_is_inside_is_read() {
        let (_dir, confine) = fixture();
        for (path, content) in
            [("a.txt", "a"), ("./dir/../a.txt", "a"), ("dir/b.txt", "b"), ("dir-link/b.txt", "b"), ("in-absolute", "b")]
        {
            assert_eq!(read(&confine, path).unwrap(), content, "{path}");
        }
        let absolute = confine.path().join("a.txt");
        assert_eq!(read(&confine, absolute.to_str().unwrap()).unwrap(), "a");
    }

    #[test]
    fn what_is_outside_is_not() {
        let (_dir, confine) = fixture();
        for path in [
            "../secret",
            "/etc/passwd",
            "dir/../../secret",
            "out",
            "out-absolute",
            "up/secret",
            "etc/passwd",
            "dangling-out",
            "a\0b",
            "/",
            "..",
        ] {
            let got = read(&confine, path);
            assert!(matches!(got, Err(ConfineError::Outside { .. })), "{path}: {got:?}");
        }
        assert!(read(&confine, "loop").is_err());
        assert!(matches!(read(&confine, "missing"), Err(ConfineError::NotFound { .. })));
        assert!(matches!(read(&confine, "dir"), Err(ConfineError::NotAFile { .. })));
        assert!(matches!(read(&confine, "a.txt/b"), Err(ConfineError::NotADirectory { .. })));
    }

    #[test]
    fn a_shells_abbreviations_are_refused() {
        let (_dir, confine) = fixture();
        for path in ["~", "~/x", "~me/x", "~+/x", "$HOME/x", "${HOME}/x", "$_X", "$PWD"] {
            let got = confine.inside(path);
            assert!(matches!(got, Err(ConfineError::Abbreviated { .. })), "{path}: {got:?}");
        }
        for (path, inside) in [("./~x", "~x"), ("a/~/b", "a/~/b"), ("$id.tsx", "$id.tsx"), ("./$HOME", "$HOME")] {
            assert_eq!(confine.inside(path).unwrap(), Path::new(inside));
        }
    }

    #[test]
    fn nothing_is_written_outside() {
        let (dir, confine) = fixture();
        for path in ["out", "out-absolute", "up/new", "etc/new", "dangling-out", "dangling-in", "dangling-out/x/y", ""]
        {
            let place = confine.place(&confine.inside(path).unwrap());
            assert!(place.is_err(), "{path}: {place:?}");
        }
        assert!(confine.inside("../new").is_err());
        assert!(!dir.path().join("fresh").exists());
        assert!(confine.place(Path::new("new/deep/file")).is_ok());
        assert!(confine.path().join("new/deep").is_dir());
        assert_eq!(confine.place(Path::new("in-absolute")).unwrap().name, "b.txt");
        assert!(confine.place(Path::new("dir")).is_err());
    }

    #[test]
    fn a_pipe_does_not_hang_the_reader() {
        let (_dir, confine) = fixture();
        let fifo = confine.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        assert!(matches!(read(&confine, "fifo"), Err(ConfineError::NotAFile { .. })));
    }
}
