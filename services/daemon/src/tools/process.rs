//! Child processes in groups of their own: started, found again after a crash, and killed whole.

use std::{
    collections::HashSet,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use reliant_types::ToolCallId;
use rustix::process::{Pid, Signal};
use sha2::{Digest, Sha256};

use super::tree::{self, Started};

/// Marks every process of a call; how its leftovers are found after a crash.
pub const CALL_ID_VAR: &str = "RELIANT_CALL_ID";
/// Marks the MCP servers of a state directory.
pub const SERVER_VAR: &str = "RELIANT_MCP_STATE";
/// Between asking a group to end and ending it.
pub const KILL_GRACE: Duration = Duration::from_millis(300);

pub fn signal_group(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // The group may have ended by itself.
        let _ = rustix::process::kill_process_group(pid, signal);
    }
}

fn kill_one(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
}

fn pid_file(dir: &Path, call: ToolCallId) -> PathBuf {
    dir.join(call.to_string())
}

/// A running call's group leader, on disk so that it survives the daemon. Not synced: it matters only after a crash
/// of the process, not of the machine. Goes when dropped.
#[derive(Debug)]
pub struct PidFile(PathBuf);

impl PidFile {
    pub fn write(dir: &Path, call: ToolCallId, pid: u32) -> io::Result<Self> {
        let path = pid_file(dir, call);
        std::fs::write(&path, format!("{pid} {}", tree::started(pid).map_or(0, |s| s.at)))?;
        Ok(Self(path))
    }

    /// The file stays: the call has ended, and processes of it run in the background.
    pub fn keep(mut self) {
        self.0 = PathBuf::new();
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            let _ = std::fs::remove_file(&self.0);
        }
    }
}

/// Forgets calls of which nothing runs any more.
pub fn forget_running(dir: &Path, calls: &[ToolCallId]) {
    for call in calls {
        let _ = std::fs::remove_file(pid_file(dir, *call));
    }
}

/// Calls whose group leader an earlier daemon wrote down and did not see end.
pub fn left_running(dir: &Path) -> Vec<ToolCallId> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// Pids whose environment has `name=value` for one of the values.
fn marked(name: &str, values: &HashSet<String>) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let prefix = format!("{name}=");
    let own = std::process::id();
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| {
            // A zombie's environment is empty: it counts as dead.
            std::fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environ| {
                environ.split(|b| *b == 0).any(|entry| {
                    entry
                        .strip_prefix(prefix.as_bytes())
                        .and_then(|value| std::str::from_utf8(value).ok())
                        .is_some_and(|value| values.contains(value))
                })
            })
        })
        .collect()
}

#[expect(clippy::disallowed_methods, reason = "its callers run it off the reactor, as its doc says")]
fn kill_marked(name: &str, values: &HashSet<String>) -> usize {
    let mut killed = HashSet::new();
    // Again until nothing is found: a process may fork while it is looked for.
    for _ in 0..20 {
        let found = marked(name, values);
        if found.is_empty() {
            break;
        }
        for pid in found {
            kill_one(pid);
            killed.insert(pid);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    killed.len()
}

/// Kills what is left of calls, wherever their processes went. Blocking. Answers how many were killed.
pub fn kill_calls(running_dir: &Path, calls: &[ToolCallId]) -> usize {
    if calls.is_empty() {
        return 0;
    }
    for call in calls {
        let file = pid_file(running_dir, *call);
        if let Ok(text) = std::fs::read_to_string(&file) {
            let mut numbers = text.split_whitespace().filter_map(|n| n.parse::<u64>().ok());
            if let (Some(pid), Some(started)) = (numbers.next(), numbers.next())
                && let Ok(pid) = u32::try_from(pid)
                && started != 0
                && tree::started(pid) == Some(Started { pid, at: started })
            {
                signal_group(pid, Signal::KILL);
            }
        }
        let _ = std::fs::remove_file(&file);
    }
    kill_marked(CALL_ID_VAR, &calls.iter().map(ToString::to_string).collect())
}

/// The mark of a state directory's servers: it tells the directory from others without naming it.
pub fn server_mark(state_dir: &Path) -> String {
    hex::encode(Sha256::digest(state_dir.as_os_str().as_encoded_bytes()))
}

/// Kills MCP servers that outlived an earlier daemon of this state directory. Blocking.
pub fn kill_servers(mark: &str) -> usize {
    kill_marked(SERVER_VAR, &HashSet::from([mark.to_owned()]))
}
