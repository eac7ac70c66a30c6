//! Where Temporal is and how a worker of it is sized.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

/// The connection to Temporal.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FlowsConfig {
    /// `http://host:port`, or `https://…` for TLS. A bare `host:port` means `http://`.
    pub address: String,
    pub namespace: String,
    pub task_queue: String,
    /// A file that holds an API key; its content is never logged.
    pub api_key_file: Option<PathBuf>,
    /// Limit of each call to Temporal.
    #[serde(with = "humantime_serde")]
    pub rpc_timeout: Duration,
    /// How long the workflow of an idle chat stays open for the next wake; it closes after one to two times that.
    #[serde(with = "humantime_serde")]
    pub linger: Duration,
    /// After so many turns the workflow of a chat that never idles goes on as a new run, so that its history stays short.
    /// At least 1; Temporal's own suggestion is followed earlier.
    pub run_turns: u32,
    pub worker: WorkerTuning,
}

impl Default for FlowsConfig {
    fn default() -> Self {
        Self {
            address: "http://127.0.0.1:7233".to_owned(),
            namespace: "default".to_owned(),
            task_queue: "reliant".to_owned(),
            api_key_file: None,
            rpc_timeout: Duration::from_secs(5),
            linger: Duration::from_secs(4),
            run_turns: 25,
            worker: WorkerTuning::default(),
        }
    }
}

/// Slots and pollers of a worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerTuning {
    /// Workflows kept in memory between their tasks.
    pub cached_workflows: usize,
    /// Workflow tasks at one time.
    pub workflow_slots: usize,
    /// Bursts of chats, and so model calls, at one time.
    pub activity_slots: usize,
    pub workflow_pollers: usize,
    pub activity_pollers: usize,
    /// A draining worker lets model calls run so long, then they are tried again elsewhere.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
}

impl Default for WorkerTuning {
    fn default() -> Self {
        Self {
            cached_workflows: 1000,
            workflow_slots: 200,
            activity_slots: 500,
            workflow_pollers: 6,
            activity_pollers: 4,
            drain: Duration::from_secs(60),
        }
    }
}
