//! Landlock for shell commands: the root and temporary files can be written, toolchains and the system can be read and
//! run, the rest of the home directory (keys, tokens, other projects) cannot be seen.
//!
//! Landlock binds a thread and what it starts. Each command is therefore started from a thread of its own that has
//! bound itself first and ends right after; no `unsafe` between fork and exec is needed.

use std::{
    io,
    path::{Path, PathBuf},
};

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus,
    path_beneath_rules,
};
use tokio::process::{Child, Command};

/// What is asked for; an older kernel gives as much of it as it has.
const ABI_WANTED: ABI = ABI::V5;

const SYSTEM_READ: &[&str] = &[
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc",
    "/opt",
    "/nix",
    "/snap",
    "/proc",
    "/sys",
    "/dev",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/nscd",
    "/run/current-system",
    "/var",
    "/home/linuxbrew",
];
const SYSTEM_WRITE: &[&str] = &[
    "/tmp",
    "/var/tmp",
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/ptmx",
    "/dev/pts",
    "/dev/shm",
    "/dev/fd",
];
/// Beneath the home directory. Caches that builds fill are writable; places with credentials are not named at all.
const HOME_READ: &[&str] = &[
    ".cargo/bin",
    ".cargo/env",
    ".cargo/config",
    ".cargo/config.toml",
    ".rustup",
    ".pyenv",
    ".nvm",
    ".volta",
    ".fnm",
    ".asdf",
    ".local/bin",
    ".local/lib",
    ".local/share/mise",
    ".local/share/uv",
    ".local/share/pnpm",
    ".local/pipx",
    ".rbenv",
    ".sdkman",
    ".jenv",
    ".goenv",
    ".deno/bin",
    ".bun",
    ".dotnet",
    ".ghcup",
    ".opam",
    ".nix-profile",
    ".juliaup",
    "go",
    ".gitconfig",
    ".config/git",
    ".gitignore",
    ".bashrc",
    ".profile",
    ".bash_profile",
];
const HOME_WRITE: &[&str] = &[
    ".cache",
    ".cargo/registry",
    ".cargo/git",
    ".cargo/.package-cache",
    ".cargo/.package-cache-mutate",
    ".cargo/.global-cache",
    ".npm",
    ".yarn",
    ".pnpm-store",
    ".bun/install/cache",
    ".gradle",
    ".m2/repository",
    "go/pkg",
    ".nuget/packages",
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Support {
    SwitchedOff,
    Absent,
    Partial,
    Full,
}

#[derive(Debug, Clone)]
pub struct Sandbox {
    support: Support,
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
}

impl Sandbox {
    /// Finds out once what the kernel gives, and says so in the log.
    pub fn probe(wanted: bool, extra_read: &[PathBuf], extra_write: &[PathBuf]) -> Self {
        let support = if wanted { probe_kernel() } else { Support::SwitchedOff };
        match support {
            Support::Full => tracing::info!("shell commands run under Landlock"),
            Support::Partial => tracing::info!("shell commands run under Landlock, as far as this kernel has it"),
            Support::Absent => {
                tracing::warn!("this system has no Landlock: shell commands can read and write what you can")
            }
            Support::SwitchedOff => {
                tracing::warn!("Landlock is switched off: shell commands can read and write what you can")
            }
        }
        let mut sandbox = Self { support, read: extra_read.to_vec(), write: extra_write.to_vec() };
        if sandbox.is_on() {
            sandbox.usual_paths();
        }
        sandbox
    }

    pub fn is_on(&self) -> bool {
        matches!(self.support, Support::Full | Support::Partial)
    }

    /// For the shell tool's description.
    pub fn sentence(&self) -> &'static str {
        if self.is_on() {
            "Commands are confined (Landlock): they can write the project root, temporary files and build caches, and \
             read the system and toolchains; the rest of the home directory is closed to them, and sudo does not work."
        } else {
            "Commands are not confined: they can do all that the daemon's user can."
        }
    }

    fn usual_paths(&mut self) {
        self.read.extend(SYSTEM_READ.iter().map(PathBuf::from));
        self.write.extend(SYSTEM_WRITE.iter().map(PathBuf::from));
        self.write.push(std::env::temp_dir());
        let home = std::env::home_dir().filter(|h| h.is_absolute());
        if let Some(home) = &home {
            self.read.extend(HOME_READ.iter().map(|p| home.join(p)));
            self.write.extend(HOME_WRITE.iter().map(|p| home.join(p)));
        }
        for name in
            ["RUSTUP_HOME", "NVM_DIR", "PYENV_ROOT", "GOROOT", "JAVA_HOME", "VIRTUAL_ENV", "CONDA_PREFIX", "VOLTA_HOME"]
        {
            self.read.extend(std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute()));
        }
        for name in ["CARGO_TARGET_DIR", "XDG_CACHE_HOME", "GOCACHE", "GOMODCACHE"] {
            self.write.extend(std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute()));
        }
        if let Some(cargo) = std::env::var_os("CARGO_HOME").map(PathBuf::from).filter(|p| p.is_absolute()) {
            for part in ["bin", "env", "config", "config.toml"] {
                self.read.push(cargo.join(part));
            }
            for part in ["registry", "git", ".package-cache", ".package-cache-mutate", ".global-cache"] {
                self.write.push(cargo.join(part));
            }
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        for dir in std::env::split_paths(&path).filter(|d| d.is_absolute()) {
            // A tool on the path brings its own lib beside its bin.
            let prefix = dir.parent().filter(|p| dir.ends_with("bin") && p.components().count() > 2);
            let is_toolchain = |p: &Path| p.join("lib").is_dir() || p.join("pyvenv.cfg").is_file();
            let named = |p: &Path| Some(p) == home.as_deref() || p.ends_with(".local") || p.ends_with(".cargo");
            let open = prefix.filter(|p| is_toolchain(p) && !named(p));
            self.read.push(open.unwrap_or(&dir).to_owned());
        }
    }

    /// Starts a command, bound to a root where Landlock is on.
    pub async fn spawn(&self, mut command: Command, root: &Path) -> io::Result<Child> {
        if !self.is_on() {
            return command.spawn();
        }
        let mut write = self.write.clone();
        write.push(root.to_owned());
        write.extend(git_dirs(root));
        let read = self.read.clone();
        let reactor = tokio::runtime::Handle::current();
        let (done, spawned) = tokio::sync::oneshot::channel();
        std::thread::Builder::new().name("sandbox".into()).spawn(move || {
            let _reactor = reactor.enter();
            let child = match bind_this_thread(&read, &write) {
                Ok(_) => command.spawn(),
                Err(e) => Err(io::Error::other(format!("Landlock refused its rules: {e}"))),
            };
            let _ = done.send(child);
        })?;
        spawned.await.unwrap_or_else(|_| Err(io::Error::other("the starting thread died")))
    }
}

fn bind_this_thread(read: &[PathBuf], write: &[PathBuf]) -> Result<RulesetStatus, landlock::RulesetError> {
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI_WANTED))?
        .create()?
        .add_rules(path_beneath_rules(read, AccessFs::from_read(ABI_WANTED)))?
        .add_rules(path_beneath_rules(write, AccessFs::from_all(ABI_WANTED)))?
        .restrict_self()?;
    Ok(status.ruleset)
}

/// On a thread that ends right after, since there is no way back.
fn probe_kernel() -> Support {
    let probe = std::thread::spawn(|| bind_this_thread(&[], &[PathBuf::from("/tmp")]));
    match probe.join() {
        Ok(Ok(RulesetStatus::FullyEnforced)) => Support::Full,
        Ok(Ok(RulesetStatus::PartiallyEnforced)) => Support::Partial,
        _ => Support::Absent,
    }
}

/// A linked worktree keeps its repository elsewhere; git must write there to commit.
fn git_dirs(root: &Path) -> Vec<PathBuf> {
    let link = root.join(".git");
    if !link.is_file() {
        return Vec::new();
    }
    let Some(dir) =
        std::fs::read_to_string(&link).ok().and_then(|t| Some(t.trim().strip_prefix("gitdir:")?.trim().to_owned()))
    else {
        return Vec::new();
    };
    let dir = root.join(dir);
    // Only what git itself laid out: <repository>/.git/worktrees/<name> that points back to this root.
    let back = std::fs::read_to_string(dir.join("gitdir")).unwrap_or_default();
    let points_back = Path::new(back.trim()).canonicalize().ok() == link.canonicalize().ok();
    let common = dir.canonicalize().ok().and_then(|d| Some(d.parent()?.parent()?.to_owned()));
    match common {
        Some(common) if points_back && common.join("objects").is_dir() => vec![common],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn shell(sandbox: &Sandbox, root: &Path, script: &str) -> bool {
        let mut command = Command::new("bash");
        command.arg("-c").arg(script).current_dir(root).stderr(std::process::Stdio::null());
        sandbox.spawn(command, root).await.unwrap().wait().await.unwrap().success()
    }

    #[tokio::test]
    async fn a_command_writes_its_root_and_sees_no_secret() {
        let home = std::env::home_dir().unwrap();
        let Ok(elsewhere) = tempfile::Builder::new().prefix(".reliant-test-").tempdir_in(&home) else { return };
        std::fs::write(elsewhere.path().join("id_ed25519"), "key").unwrap();
        let root = elsewhere.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let sandbox = Sandbox::probe(true, &[], &[]);
        if !sandbox.is_on() {
            return;
        }
        assert!(
            shell(&sandbox, &root, "echo hi > file && cat file && mkdir d && mv file d/ && ls /usr >/dev/null").await
        );
        assert!(shell(&sandbox, &root, "f=$(mktemp) && echo x > $f && rm $f && echo > /dev/null").await);
        assert!(!shell(&sandbox, &root, "cat ../id_ed25519").await);
        assert!(!shell(&sandbox, &root, "echo x > ../new").await);
        assert!(!shell(&sandbox, &root, "echo x > /etc/reliant-test").await);
        // What it starts is bound too, and the daemon itself is not.
        assert!(!shell(&sandbox, &root, "setsid python3 -c \"open('../id_ed25519')\"").await);
        assert!(std::fs::read(elsewhere.path().join("id_ed25519")).is_ok());

        let open = Sandbox::probe(false, &[], &[]);
        assert!(shell(&open, &root, "cat ../id_ed25519").await);
        let extra = Sandbox::probe(true, &[elsewhere.path().to_owned()], &[]);
        assert!(shell(&extra, &root, "cat ../id_ed25519").await);
        assert!(!shell(&extra, &root, "echo x > ../new").await);
    }
}
