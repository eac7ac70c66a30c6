//! What `reliant daemon status|stop|logs` reads: a file in the state directory, replaced whole. Whether a daemon runs
//! is told by its lock, never by the file.

use reliant_types::boxed;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{error::DaemonError, state_dir};

const STATUS_FILE: &str = "status.json";

/// A daemon as it saw itself at `written_at`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    pub pid: u32,
    pub name: String,
    pub version: String,
    pub incarnation: String,
    /// RFC 3339.
    pub started_at: String,
    pub written_at: String,
    pub gateway: String,
    pub connected: bool,
    /// Since when it is (not) connected.
    pub since: String,
    pub daemon_id: String,
    pub gateway_id: String,
    /// Why it is not connected.
    pub last_error: String,
    /// Where its admin pages are, if it was told to have some.
    pub admin: Option<SocketAddr>,
    /// Whether shell commands run under Landlock.
    pub landlock: bool,
    pub roots: Vec<RootStatus>,
    pub tools: Vec<String>,
    pub mcp: Vec<McpStatus>,
    pub running: Vec<RunningStatus>,
    /// Results that wait for their acknowledgement.
    pub unacknowledged: usize,
    pub journal_bytes: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RootStatus {
    pub id: String,
    pub name: String,
    pub path: PathBuf,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct McpStatus {
    pub root: String,
    pub server: String,
    /// `untrusted`, `starting`, `up`, `down` or `refused`.
    pub state: String,
    pub tools: usize,
    pub error: String,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunningStatus {
    pub call_id: String,
    pub tool: String,
    pub started_at: String,
}

/// The daemon that runs with a state directory, if one does.
pub fn status(state_dir: &Path) -> Result<Option<Status>, DaemonError> {
    let Some(pid) = state_dir::owner(state_dir) else { return Ok(None) };
    let path = state_dir.join(STATUS_FILE);
    let read = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Status>(&bytes).ok());
    match read {
        Some(status) if status.pid == pid => Ok(Some(status)),
        // It has only just started, or the file is of an earlier one.
        _ => Ok(Some(Status { pid, ..Default::default() })),
    }
}

/// Asks the daemon to stop, and waits until it has. Answers its pid.
#[boxed]
pub async fn stop(state_dir: &Path, timeout: Duration) -> Result<u32, DaemonError> {
    let pid = state_dir::owner(state_dir).ok_or_else(|| DaemonError::NotRunning(state_dir.to_owned()))?;
    let target = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    if let Some(target) = target {
        let _ = rustix::process::kill_process(target, rustix::process::Signal::TERM);
    }
    let deadline = tokio::time::Instant::now() + timeout;
    while state_dir::owner(state_dir) == Some(pid) {
        if tokio::time::Instant::now() >= deadline {
            return Err(DaemonError::DoesNotStop { pid, seconds: timeout.as_secs() });
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(pid)
}

/// Where a daemon in the background writes its log.
pub fn log_path(state_dir: &Path) -> PathBuf {
    state_dir.join("daemon.log")
}

pub(crate) fn write(state_dir: &Path, status: &Status) -> std::io::Result<()> {
    let json = serde_json::to_vec_pretty(status).map_err(std::io::Error::other)?;
    state_dir::replace_file(&state_dir.join(STATUS_FILE), &json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_file_is_no_daemon() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &Status { pid: 1, connected: true, ..Default::default() }).unwrap();
        assert_eq!(status(dir.path()).unwrap(), None);
        assert!(matches!(stop(dir.path(), Duration::ZERO).await, Err(DaemonError::NotRunning(_))));
        let _lock = state_dir::StateDir::open(dir.path()).unwrap();
        let seen = status(dir.path()).unwrap().unwrap();
        assert_eq!((seen.pid, seen.connected), (std::process::id(), false));
    }
}
