//! The builds of commits: each made once, from what git has of it and nothing else, and kept.

use std::{
    fs::{self, File, TryLockError},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::SystemTime,
};

use anyhow::{Context, Result, bail, ensure};

use super::Commit;
use crate::cargo;

/// What is kept of a commit.
const BINARIES: [&str; 2] = ["reliant", "reliant-bench"];
const PACKAGES: [&str; 2] = ["reliant-cli", "reliant-bench"];
/// The least recently used build goes when there are more.
const KEPT_MAX: usize = 6;
/// A release build of everything with what it is made of.
const FREE_MIN_BYTES: u64 = 6 << 30;
/// Lines of a failed build that are shown.
const LOG_LINES: usize = 15;
const SCRATCH: &str = "reliant-compare-";

/// Where builds are made and kept; one process works here at a time.
#[derive(Debug)]
pub struct Builds {
    root: PathBuf,
    dir: PathBuf,
    _lock: File,
}

impl Builds {
    /// `$COMPARE_DIR`, or beside the other things that are built.
    pub fn usual_dir() -> Result<PathBuf> {
        if let Some(dir) = std::env::var_os("COMPARE_DIR") {
            return Ok(dir.into());
        }
        let home = std::env::var_os("HOME").context("HOME is not set; set COMPARE_DIR to a directory")?;
        Ok(Path::new(&home).join(".cache/reliant/compare"))
    }

    pub fn open(root: &Path, dir: &Path) -> Result<Self> {
        let cannot = || format!("{} cannot be used; set COMPARE_DIR to another directory", dir.display());
        fs::create_dir_all(dir).with_context(cannot)?;
        let lock = File::create(dir.join("lock")).with_context(cannot)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "another comparison is running ({} is locked); two at once would measure each other. Wait for it",
                dir.display()
            ),
            Err(TryLockError::Error(error)) => return Err(error).with_context(cannot),
        }
        let builds = Self { root: root.to_owned(), dir: dir.to_owned(), _lock: lock };
        // Of a run that was killed.
        let _ = fs::remove_dir_all(builds.source_dir());
        Ok(builds)
    }

    fn kept(&self) -> PathBuf {
        self.dir.join("kept")
    }

    fn source_dir(&self) -> PathBuf {
        self.dir.join("source")
    }

    /// The directory with the commit's programs, built now unless it is kept.
    pub fn build(&self, commit: &Commit) -> Result<PathBuf> {
        let kept = self.kept().join(&commit.sha);
        if BINARIES.iter().all(|name| kept.join(name).is_file()) {
            println!("{} is built already", commit.short());
            // Its age is when it was last used.
            let _ = File::open(&kept).and_then(|dir| dir.set_modified(SystemTime::now()));
            return Ok(kept);
        }
        let free = free_bytes(&self.dir);
        ensure!(
            free >= FREE_MIN_BYTES,
            "{} has {} MiB free; a build needs {} MiB. Remove {} or set COMPARE_DIR to another disk",
            self.dir.display(),
            free >> 20,
            FREE_MIN_BYTES >> 20,
            self.dir.join("target").display()
        );
        println!("building {} ({}) in release; some minutes, once", commit.short(), commit.asked);
        let source = self.source_dir();
        let made = self.make(commit, &source, &kept);
        // The source goes in any case, and so does what is half kept.
        let _ = fs::remove_dir_all(&source);
        made.inspect_err(|_| {
            let _ = fs::remove_dir_all(self.kept().join("half"));
        })?;
        self.prune(&kept);
        Ok(kept)
    }

    fn make(&self, commit: &Commit, source: &Path, kept: &Path) -> Result<()> {
        self.extract(commit, source)?;
        let log = self.dir.join("build.log");
        let target = self.dir.join("target");
        let mut page = Command::new("make");
        page.args(["--no-print-directory", "web"]);
        let mut program = Command::new(cargo());
        program.args(["build", "--release", "--locked"]).args(PACKAGES.iter().flat_map(|name| ["-p", name]));
        for command in [&mut page, &mut program] {
            command
                .current_dir(source)
                .env("CARGO_TARGET_DIR", &target)
                .env_remove("MAKEFLAGS")
                .env_remove("MAKELEVEL");
            run_logged(command, &log).with_context(|| {
                format!(
                    "the commit '{}' ({}) does not build; all of it: {}",
                    commit.asked,
                    commit.short(),
                    log.display()
                )
            })?;
        }
        let half = self.kept().join("half");
        let _ = fs::remove_dir_all(&half);
        fs::create_dir_all(&half).with_context(|| format!("could not make {}", half.display()))?;
        for name in BINARIES {
            fs::copy(target.join("release").join(name), half.join(name))
                .with_context(|| format!("could not keep the program {name} of {}", commit.short()))?;
        }
        fs::rename(&half, kept).with_context(|| format!("could not keep {}", commit.short()))
    }

    /// What git has of the commit, as new: cargo takes a file that is older than a build for one that the build knows.
    fn extract(&self, commit: &Commit, source: &Path) -> Result<()> {
        let _ = fs::remove_dir_all(source);
        fs::create_dir_all(source).with_context(|| format!("could not make {}", source.display()))?;
        let mut archive = Command::new("git")
            .args(["archive", "--format=tar", &commit.sha])
            .current_dir(&self.root)
            .stdout(Stdio::piped())
            .spawn()
            .context("git was not found; install it")?;
        let tar = archive.stdout.take().expect("it is piped");
        let unpacked = Command::new("tar").args(["-x", "-m", "-C"]).arg(source).stdin(tar).status();
        let archived = archive.wait().context("git was lost")?;
        let unpacked = unpacked.context("tar was not found; install it")?;
        ensure!(
            archived.success() && unpacked.success(),
            "the commit {} could not be unpacked into {}; is the disk full?",
            commit.short(),
            source.display()
        );
        Ok(())
    }

    /// Keeps the most recently used ones, `newest` among them.
    fn prune(&self, newest: &Path) {
        let Ok(entries) = fs::read_dir(self.kept()) else { return };
        let age = |path: &Path| fs::metadata(path).and_then(|data| data.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        let mut kept: Vec<PathBuf> =
            entries.flatten().map(|entry| entry.path()).filter(|path| path != newest).collect();
        kept.sort_by_key(|path| std::cmp::Reverse(age(path)));
        for old in kept.iter().skip(KEPT_MAX - 1) {
            let _ = fs::remove_dir_all(old);
        }
    }
}

/// Runs it with its output in a file; where it fails, the error has the output's end.
fn run_logged(command: &mut Command, log: &Path) -> Result<()> {
    let file = File::create(log).with_context(|| format!("could not write {}", log.display()))?;
    let errors = file.try_clone().context("the log cannot be written twice")?;
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(errors)
        .status()
        .with_context(|| format!("{program} could not be started"))?;
    if status.success() {
        return Ok(());
    }
    let lines: Vec<String> =
        File::open(log).map(|file| BufReader::new(file).lines().map_while(Result::ok).collect()).unwrap_or_default();
    let end = &lines[lines.len().saturating_sub(LOG_LINES)..];
    bail!("{program} ended with {status}:\n    {}", end.join("\n    "))
}

fn free_bytes(dir: &Path) -> u64 {
    rustix::fs::statvfs(dir).map_or(u64::MAX, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// A directory for what the benches' servers write; removed at the end, or by the next run where this one is killed.
/// Its path is short: a Unix socket below it has 107 bytes for all of its own.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Result<Self> {
        let temp = std::env::temp_dir();
        for entry in fs::read_dir(&temp).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let owner =
                name.to_str().and_then(|name| name.strip_prefix(SCRATCH)).and_then(|pid| pid.parse::<u32>().ok());
            if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let dir = temp.join(format!("{SCRATCH}{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("could not make {}", dir.display()))?;
        Ok(Self(dir))
    }

    pub fn dir(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
