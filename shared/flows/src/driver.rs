//! What the workflow asks of its host: the seam between Temporal and everything else.

use async_trait::async_trait;
use reliant_telemetry::trace::TraceContext;
use reliant_types::ChatId;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

/// Ids only: it is stored in Temporal's history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BurstOrder {
    pub chat: ChatId,
    /// Which try of Temporal's this is, from 1. Not a fence: that is Postgres'.
    #[serde(default)]
    pub attempt: u32,
}

/// Nothing more can be done for the chat now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BurstEnd {
    /// Turns that were worked on.
    pub turns: u32,
    /// The next look is due after so many milliseconds, though nobody wakes the chat; zero: there is more to do at once.
    pub look_after_ms: Option<u64>,
    /// What the worker asks for, by how late it is; zero: the usual one.
    #[serde(default)]
    pub heartbeat_timeout_ms: u64,
}

/// Why a burst broke off; it is tried again. The text holds no secret, no prompt and no file content.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct DriverError(pub String);

impl DriverError {
    pub fn new(reason: impl std::fmt::Display) -> Self {
        Self(reason.to_string())
    }
}

/// Done by the worker over Postgres, NATS and the model providers.
#[async_trait]
pub trait Driver: Send + Sync + 'static {
    /// Does what the chat needs until nothing can be done now. It may be called twice for the same chat, also at once.
    /// `stop`: Temporal gave the burst up, or this worker is at the end of its drain. Heartbeats are sent for it.
    async fn burst(
        &self,
        order: BurstOrder,
        stop: CancellationToken,
        trace: TraceContext,
    ) -> Result<BurstEnd, DriverError>;
}
