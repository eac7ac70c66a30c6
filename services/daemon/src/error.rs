//! Why the daemon does not start, or stops.

use std::path::PathBuf;

use reliant_types::{Code, Failure};

use crate::journal::JournalError;

/// Each text says the way out.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error("the daemon's configuration does not work: {0}")]
    Config(String),
    #[error("root '{path}' cannot be offered: {reason}")]
    Root { path: PathBuf, reason: String },
    #[error("the state directory {path} cannot be used: {reason}")]
    StateDir { path: PathBuf, reason: String },
    #[error(
        "a daemon (pid {pid}) runs already with {dir}; stop it with `reliant daemon stop`, or give another state_dir"
    )]
    AlreadyRunning { pid: u32, dir: PathBuf },
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("the gateway told this daemon to stop: {0}")]
    Stopped(String),
    #[error("no daemon runs with {0}")]
    NotRunning(PathBuf),
    #[error("the daemon (pid {pid}) did not stop within {seconds} s; end it with `kill -9 {pid}`: nothing is lost")]
    DoesNotStop { pid: u32, seconds: u64 },
    #[error("the trust file cannot be used: {0}")]
    Trust(String),
}

impl DaemonError {
    pub fn failure(&self) -> Failure {
        let code = match self {
            Self::Config(_) | Self::Root { .. } | Self::StateDir { .. } | Self::Trust(_) => Code::InvalidArgument,
            Self::AlreadyRunning { .. } => Code::AlreadyExists,
            Self::Journal(error) => return error.failure(),
            Self::Stopped(_) => Code::DaemonReplaced,
            Self::NotRunning(_) => Code::NotFound,
            Self::DoesNotStop { .. } => Code::DeadlineExceeded,
        };
        Failure::new(code, self.to_string())
    }
}
