//! Why a stack could not be started or steered; each sentence says the way out.

use std::{io, path::PathBuf, time::Duration};

use reliant_types::{Code, Failure};

use crate::Server;

#[derive(Debug, thiserror::Error)]
pub enum StackError {
    #[error(
        "{server} is not installed ({missing} was not found); run `make tools`, or set {} to use one that runs elsewhere",
        server.variable()
    )]
    ToolMissing { server: Server, missing: String },
    /// Another process owns the data directory. `info` is what it announced (see `Stack::announce`).
    #[error("already running on {} (process {})", data_dir.display(), pid.map_or("unknown".to_owned(), |pid| pid.to_string()))]
    AlreadyRunning { data_dir: PathBuf, pid: Option<u32>, info: Option<String> },
    #[error("{name} ended while it started{}; the last lines of {}:\n{tail}", status.as_ref().map_or(String::new(), |s| format!(" ({s})")), log.display())]
    Died { name: &'static str, status: Option<String>, log: PathBuf, tail: String },
    #[error("{name} was not ready after {} s; the last lines of {}:\n{tail}", after.as_secs(), log.display())]
    NotReady { name: &'static str, after: Duration, log: PathBuf, tail: String },
    #[error("the data directory {} was made by Postgres {found}, and only {available} is installed; install Postgres {found}, or start anew with `reliant up --reset`", dir.display())]
    PostgresVersion { dir: PathBuf, found: String, available: String },
    #[error(
        "Postgres refuses to run as root, and this machine allows neither user namespaces nor switching to another user; run as an ordinary user, or set DATABASE_URL"
    )]
    RootRefused,
    #[error("'{name}' is not a name for a database; use a-z, 0-9 and _")]
    DatabaseName { name: String },
    #[error("psql said: {message}")]
    Sql { message: String },
    #[error(
        "{server} at {address} cannot be reached: {reason}; start it, or unset {} to use a private one",
        server.variable()
    )]
    External { server: Server, address: String, reason: String },
    #[error("{server} is not a child of this process")]
    NotOurs { server: Server },
    #[error("could not {action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("could not start {program}")]
    Spawn {
        program: String,
        #[source]
        source: io::Error,
    },
    #[error("no free port found on 127.0.0.1")]
    NoPort,
}

impl StackError {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> StackError {
        let path = path.into();
        move |source| StackError::Io { action, path, source }
    }
}

impl From<StackError> for Failure {
    fn from(error: StackError) -> Failure {
        let code = match &error {
            StackError::AlreadyRunning { .. } => Code::AlreadyExists,
            StackError::DatabaseName { .. } => Code::InvalidArgument,
            StackError::ToolMissing { .. }
            | StackError::Died { .. }
            | StackError::NotReady { .. }
            | StackError::External { .. }
            | StackError::PostgresVersion { .. }
            | StackError::RootRefused
            | StackError::NotOurs { .. }
            | StackError::Spawn { .. }
            | StackError::NoPort => Code::Unavailable,
            StackError::Sql { .. } | StackError::Io { .. } => Code::Internal,
        };
        Failure::new(code, error.to_string())
    }
}
