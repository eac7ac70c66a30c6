//! What a confined command may read and write besides its root. Places with credentials are not named at all.

use std::path::{Path, PathBuf};

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
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/nscd",
    "/run/current-system",
    "/var",
    "/home/linuxbrew",
];
/// No terminal is among the devices: what is typed into one acts for the person.
const SYSTEM_WRITE: &[&str] =
    &["/tmp", "/var/tmp", "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/shm", "/dev/fd"];
/// Beneath the home directory.
const HOME_READ: &[&str] = &[
    ".cargo/bin",
    ".cargo/env",
    ".cargo/config",
    ".cargo/config.toml",
    ".cargo/registry",
    ".cargo/git",
    ".rustup",
    ".pyenv",
    ".nvm",
    ".volta",
    ".fnm",
    ".asdf",
    ".local/bin",
    ".local/lib",
    ".local/share/mise",
    ".local/share/uv/python",
    ".local/share/uv/tools",
    ".local/share/pnpm",
    ".local/pipx",
    ".rbenv",
    ".sdkman",
    ".jenv",
    ".goenv",
    ".deno/bin",
    ".bun/bin",
    ".dotnet",
    ".ghcup/bin",
    ".opam",
    ".nix-profile",
    ".juliaup",
    ".m2/repository",
    "go/bin",
    "go/pkg",
    ".gitconfig",
    ".config/git/config",
    ".config/git/ignore",
    ".config/git/attributes",
    ".gitignore",
];
const TOOLCHAIN_VARIABLES: &[&str] = &[
    "RUSTUP_HOME",
    "NVM_DIR",
    "PYENV_ROOT",
    "GOROOT",
    "JAVA_HOME",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "VOLTA_HOME",
    "GOMODCACHE",
];
const CARGO_READ: &[&str] = &["bin", "env", "config", "config.toml", "registry", "git"];

pub fn home() -> Option<PathBuf> {
    std::env::home_dir().filter(|h| h.is_absolute())
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute())
}

/// The person's own cargo home.
pub fn cargo_home() -> Option<PathBuf> {
    variable("CARGO_HOME").or_else(|| Some(home()?.join(".cargo")))
}

/// What the programs of a directory need: a tool in a `bin` brings its own lib beside it, a package in `node_modules` the
/// others. Never the home directory or a part of it that holds more than a toolchain.
pub fn surroundings(dir: &Path) -> PathBuf {
    let home = home();
    if let Some(modules) = dir.ancestors().find(|above| above.ends_with("node_modules")) {
        return modules.to_owned();
    }
    let prefix = dir.parent().filter(|p| dir.ends_with("bin") && p.components().count() > 2);
    let is_toolchain = |p: &Path| p.join("lib").is_dir() || p.join("pyvenv.cfg").is_file();
    let named = |p: &Path| Some(p) == home.as_deref() || p.ends_with(".local") || p.ends_with(".cargo");
    prefix.filter(|p| is_toolchain(p) && !named(p)).unwrap_or(dir).to_owned()
}

pub fn readable() -> Vec<PathBuf> {
    let mut read: Vec<PathBuf> = SYSTEM_READ.iter().map(PathBuf::from).collect();
    let home = home();
    if let Some(home) = &home {
        read.extend(HOME_READ.iter().map(|p| home.join(p)));
    }
    read.extend(TOOLCHAIN_VARIABLES.iter().filter_map(|name| variable(name)));
    if let Some(cargo) = variable("CARGO_HOME") {
        read.extend(CARGO_READ.iter().map(|part| cargo.join(part)));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    for dir in std::env::split_paths(&path).filter(|d| d.is_absolute()) {
        read.push(surroundings(&dir));
    }
    read
}

pub fn writable() -> Vec<PathBuf> {
    let mut write: Vec<PathBuf> = SYSTEM_WRITE.iter().map(PathBuf::from).collect();
    write.push(std::env::temp_dir());
    write.extend(variable("CARGO_TARGET_DIR"));
    write
}
