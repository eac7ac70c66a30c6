//! What the workflow asks of its host: the seam between Temporal and everything else.

use async_trait::async_trait;
use reliant_telemetry::trace::TraceContext;
use reliant_types::{ChatId, ToolCallId, TurnId};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

/// What a chat's oldest unfinished turn needs now. Ids only: it is stored in Temporal's history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Step {
    CallModel {
        turn: TurnId,
        iteration: i32,
    },
    /// Send these calls to their daemon.
    Dispatch {
        turn: TurnId,
        calls: Vec<ToolCallId>,
    },
    /// Nothing until the next wake, or until so many milliseconds have passed.
    Wait {
        turn: TurnId,
        for_ms: Option<u64>,
    },
    /// No turn is open.
    Idle,
}

impl Step {
    pub fn turn(&self) -> Option<TurnId> {
        match self {
            Step::CallModel { turn, .. } | Step::Dispatch { turn, .. } | Step::Wait { turn, .. } => Some(*turn),
            Step::Idle => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelOrder {
    pub chat: ChatId,
    pub turn: TurnId,
    pub iteration: i32,
    /// Which try of Temporal's this is, from 1. Not a fence: that is Postgres'.
    #[serde(default)]
    pub attempt: u32,
}

/// The end of a model call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelOutcome {
    /// What Postgres said is next, read right after the commit; `None`: ask.
    pub next: Option<Step>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DispatchOrder {
    pub chat: ChatId,
    pub turn: TurnId,
    pub calls: Vec<ToolCallId>,
}

/// Why a step could not be done now; it is tried again. The text holds no secret, no prompt and no file content.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct DriverError(pub String);

impl DriverError {
    pub fn new(reason: impl std::fmt::Display) -> Self {
        Self(reason.to_string())
    }
}

/// A model call's tie to Temporal. Heartbeats are sent for it; what is left is to listen for the order to stop.
#[derive(Debug, Clone, Default)]
pub struct Heart {
    pub stop: CancellationToken,
}

impl Heart {
    /// Temporal gave the attempt up, or this worker is at the end of its drain.
    pub async fn stopped(&self) {
        self.stop.cancelled().await;
    }
}

/// Done by the worker over Postgres, NATS and the model providers. Every method may be called twice for the same order.
#[async_trait]
pub trait Driver: Send + Sync + 'static {
    async fn next_step(&self, chat: ChatId, trace: TraceContext) -> Result<Step, DriverError>;

    async fn call_model(
        &self,
        order: ModelOrder,
        heart: Heart,
        trace: TraceContext,
    ) -> Result<ModelOutcome, DriverError>;

    /// Sends the calls and says what is next; `Wait` where all of them were taken.
    async fn dispatch(&self, order: DispatchOrder, trace: TraceContext) -> Result<Step, DriverError>;
}
