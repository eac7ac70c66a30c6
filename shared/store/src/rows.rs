//! Rows as the queries read them, and how they become protobuf messages. A status is stored as the lower-case tail of
//! its protobuf name.

use chrono::{DateTime, Utc};
use prost::Message as _;
use reliant_types::{ChatId, Incarnation, TurnId, UserId, pb, timestamp};
use uuid::Uuid;

use crate::{Result, StoreError};

macro_rules! stored_enum {
    ($($to:ident, $from:ident, $enum:ident { $($variant:ident = $text:literal,)* })*) => {$(
        pub(crate) fn $to(value: pb::$enum) -> &'static str {
            match value { $(pb::$enum::$variant => $text,)* pb::$enum::Unspecified => "" }
        }

        pub(crate) fn $from(text: &str) -> pb::$enum {
            match text { $($text => pb::$enum::$variant,)* _ => pb::$enum::Unspecified }
        }
    )*};
}

stored_enum! {
    mode_text, mode, ChatMode { Ask = "ask", Auto = "auto", Plan = "plan", }
    turn_status_text, turn_status, TurnStatus {
        Queued = "queued", Running = "running", WaitingApproval = "waiting_approval", WaitingDaemon = "waiting_daemon",
        Succeeded = "succeeded", Failed = "failed", Cancelled = "cancelled",
    }
    call_status_text, call_status, ToolCallStatus {
        Pending = "pending", WaitingApproval = "waiting_approval", WaitingDaemon = "waiting_daemon",
        Dispatched = "dispatched", Running = "running", Succeeded = "succeeded", Failed = "failed",
        Cancelled = "cancelled", TimedOut = "timed_out", OutcomeUnknown = "outcome_unknown",
    }
    cause_text, cause, UnknownCause {
        ProcessDied = "process_died", JournalLost = "journal_lost", DaemonAway = "daemon_away",
    }
    approval_status_text, approval_status, ApprovalStatus {
        Pending = "pending", Approved = "approved", Denied = "denied", Cancelled = "cancelled",
    }
    scope_text, scope, ApprovalScope { Once = "once", Session = "session", }
    role_text, role, Role { User = "user", Assistant = "assistant", Tool = "tool", Notice = "notice", }
    stop_text, stop, StopReason {
        EndTurn = "end_turn", ToolUse = "tool_use", MaxTokens = "max_tokens", ContentFilter = "content_filter",
    }
}

/// Queries of whole rows. The text after the columns, or before RETURNING, is the caller's.
macro_rules! turns {
    (SELECT $rest:tt $(, $arg:expr)* $(,)?) => {
        sqlx::query_as!(
            crate::rows::TurnRow,
            "SELECT t.id, t.chat_id, t.message_id, t.ordinal, t.status, t.iteration, t.fence, t.live_message_id, t.producer,
                    t.traceparent, t.model, t.mode, t.cancel_requested, t.error_code, t.error_message, t.usage,
                    t.created_at, t.started_at, t.ended_at, t.retry_at, t.retry_message, t.held_at, t.standing FROM turns t " + $rest $(, $arg)*
        )
    };
    (RETURNING $statement:tt $(, $arg:expr)* $(,)?) => {
        sqlx::query_as!(
            crate::rows::TurnRow,
            $statement + " RETURNING t.id, t.chat_id, t.message_id, t.ordinal, t.status, t.iteration, t.fence, t.live_message_id,
                    t.producer, t.traceparent, t.model, t.mode, t.cancel_requested, t.error_code,
                    t.error_message, t.usage, t.created_at, t.started_at, t.ended_at, t.retry_at, t.retry_message, t.held_at,
                    t.standing" $(, $arg)*
        )
    };
}
pub(crate) use turns;

/// As [`turns`]; the call is `c`, its turn is `t`.
macro_rules! calls {
    (SELECT $rest:tt $(, $arg:expr)* $(,)?) => {
        sqlx::query_as!(
            crate::rows::CallRow,
            r#"SELECT c.id, c.chat_id, c.turn_id, c.iteration, c.index, c.tool, c.input, c.read_only, c.status, c.generation,
                      c.daemon_id, c.unknown_cause, c.result, c.is_error, c.error_code, c.exit_code, c.output_bytes,
                      c.created_at, c.started_at, c.ended_at, c.repeatable, c.sent, c.incarnation, c.root_id, c.timeout_ms,
                      c.cancel_asked_at, c.refusals, c.not_before, c.waiting_for,
                      t.ordinal AS turn_ordinal,
                      t.ended_at IS NOT NULL AS "turn_ended!", t.traceparent
               FROM tool_calls c JOIN turns t ON t.id = c.turn_id "# + $rest $(, $arg)*
        )
    };
    // `$set … FROM turns t` is prepended; `$where` follows "WHERE t.id = c.turn_id AND ".
    (UPDATE $set:tt WHERE $where:tt $(, $arg:expr)* $(,)?) => {
        sqlx::query_as!(
            crate::rows::CallRow,
            "UPDATE tool_calls c SET " + $set + " FROM turns t WHERE t.id = c.turn_id AND " + $where +
            r#" RETURNING c.id, c.chat_id, c.turn_id, c.iteration, c.index, c.tool, c.input, c.read_only, c.status, c.generation,
                      c.daemon_id, c.unknown_cause, c.result, c.is_error, c.error_code, c.exit_code, c.output_bytes,
                      c.created_at, c.started_at, c.ended_at, c.repeatable, c.sent, c.incarnation, c.root_id, c.timeout_ms,
                      c.cancel_asked_at, c.refusals, c.not_before, c.waiting_for,
                      t.ordinal AS turn_ordinal,
                      t.ended_at IS NOT NULL AS "turn_ended!", t.traceparent"# $(, $arg)*
        )
    };
}
pub(crate) use calls;

fn text(id: Option<Uuid>) -> String {
    id.map(|id| id.to_string()).unwrap_or_default()
}

fn time(at: Option<DateTime<Utc>>) -> Option<prost_types::Timestamp> {
    at.map(timestamp)
}

pub(crate) fn usage_json(usage: &pb::Usage) -> serde_json::Value {
    serde_json::json!({
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cache_read_tokens": usage.cache_read_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "cost_microusd": usage.cost_microusd,
    })
}

pub(crate) fn usage(json: &serde_json::Value) -> pb::Usage {
    let number = |key: &str| json.get(key).and_then(serde_json::Value::as_i64).unwrap_or_default();
    pb::Usage {
        input_tokens: number("input_tokens"),
        output_tokens: number("output_tokens"),
        cache_read_tokens: number("cache_read_tokens"),
        cache_write_tokens: number("cache_write_tokens"),
        reasoning_tokens: number("reasoning_tokens"),
        cost_microusd: number("cost_microusd"),
    }
}

/// Postgres cannot hold U+0000 in a text; what a model or a tool wrote is stored without it.
pub(crate) fn clean(text: &str) -> String {
    if text.contains('\0') { text.replace('\0', "") } else { text.to_owned() }
}

#[derive(Debug, Clone)]
pub(crate) struct ChatRow {
    pub id: Uuid,
    pub user_id: Uuid,
    pub project_id: Option<Uuid>,
    pub worktree_id: Option<Uuid>,
    pub daemon_id: Option<Uuid>,
    pub root_id: String,
    pub title: String,
    pub model: String,
    pub mode: String,
    pub last_seq: i64,
    pub last_ordinal: i32,
    pub archived_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
    /// The database's clock as the row was read.
    pub now: DateTime<Utc>,
}

impl ChatRow {
    pub fn chat(&self) -> ChatId {
        ChatId(self.id)
    }

    pub fn user(&self) -> UserId {
        UserId(self.user_id)
    }

    pub fn to_pb(&self) -> pb::Chat {
        pb::Chat {
            id: self.id.to_string(),
            title: self.title.clone(),
            project_id: text(self.project_id),
            worktree_id: text(self.worktree_id),
            daemon_id: text(self.daemon_id),
            root_id: self.root_id.clone(),
            model: self.model.clone(),
            mode: mode(&self.mode) as i32,
            last_seq: self.last_seq,
            archived: self.archived_at.is_some(),
            created_at: Some(timestamp(self.created_at)),
            updated_at: Some(timestamp(self.updated_at)),
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct TurnRow {
    pub id: Uuid,
    pub chat_id: Uuid,
    pub message_id: Uuid,
    pub ordinal: i32,
    pub status: String,
    pub iteration: i32,
    pub fence: i64,
    pub live_message_id: Option<Uuid>,
    pub producer: Option<Uuid>,
    pub traceparent: String,
    pub model: String,
    pub mode: String,
    pub cancel_requested: bool,
    pub error_code: String,
    pub error_message: String,
    pub usage: serde_json::Value,
    pub created_at: DateTime<Utc>,
    pub started_at: Option<DateTime<Utc>>,
    pub ended_at: Option<DateTime<Utc>>,
    pub retry_at: Option<DateTime<Utc>>,
    pub retry_message: String,
    /// It waits for a place.
    pub held_at: Option<DateTime<Utc>>,
    /// Why it does not move though it is due.
    pub standing: String,
}

impl TurnRow {
    pub fn turn(&self) -> TurnId {
        TurnId(self.id)
    }

    pub fn to_pb(&self) -> pb::Turn {
        let waits = self.retry_at.filter(|_| self.ended_at.is_none());
        pb::Turn {
            id: self.id.to_string(),
            chat_id: self.chat_id.to_string(),
            message_id: self.message_id.to_string(),
            status: turn_status(&self.status) as i32,
            iteration: self.iteration,
            fence: self.fence,
            cancel_requested: self.cancel_requested,
            error_code: self.error_code.clone(),
            error_message: self.error_message.clone(),
            trace_id: self.traceparent.split('-').nth(1).unwrap_or_default().to_owned(),
            created_at: Some(timestamp(self.created_at)),
            started_at: time(self.started_at),
            ended_at: time(self.ended_at),
            usage: Some(usage(&self.usage)),
            waiting_for: self.waiting_for(waits.is_some()).to_owned(),
            retry_at: time(waits),
        }
    }

    fn waiting_for(&self, model: bool) -> &str {
        match () {
            () if self.ended_at.is_some() => "",
            () if model => &self.retry_message,
            () if self.held_at.is_some() => HELD,
            () => &self.standing,
        }
    }
}

/// A turn that waits for a place.
const HELD: &str = "as many turns as may be are at work; this one is taken up in its turn";

impl TurnRow {
    /// The model attempt under way.
    pub fn started(&self) -> Option<pb::MessageStarted> {
        let (message, producer) = (self.live_message_id?, self.producer?);
        Some(pb::MessageStarted {
            message_id: message.to_string(),
            turn_id: self.id.to_string(),
            iteration: self.iteration,
            epoch: self.fence,
            producer: producer.to_string(),
            restarted: false,
            model: self.model.clone(),
        })
    }
}

#[derive(Debug, Clone)]
pub(crate) struct CallRow {
    pub id: Uuid,
    pub chat_id: Uuid,
    pub turn_id: Uuid,
    pub iteration: i32,
    pub index: i32,
    pub tool: String,
    pub input: String,
    pub read_only: bool,
    pub status: String,
    pub generation: i64,
    pub daemon_id: Option<Uuid>,
    pub unknown_cause: String,
    pub result: String,
    pub is_error: bool,
    pub error_code: String,
    pub exit_code: Option<i32>,
    pub output_bytes: i64,
    pub created_at: DateTime<Utc>,
    pub started_at: Option<DateTime<Utc>>,
    pub ended_at: Option<DateTime<Utc>>,
    pub repeatable: bool,
    pub sent: i64,
    pub incarnation: Option<Uuid>,
    pub root_id: String,
    pub timeout_ms: i64,
    pub cancel_asked_at: Option<DateTime<Utc>>,
    pub refusals: i32,
    pub not_before: Option<DateTime<Utc>>,
    pub waiting_for: String,
    // Of its turn:
    pub turn_ordinal: i32,
    pub turn_ended: bool,
    pub traceparent: String,
}

impl CallRow {
    pub fn is_open(&self) -> bool {
        self.ended_at.is_none()
    }

    pub fn to_pb(&self) -> pb::ToolCall {
        pb::ToolCall {
            id: self.id.to_string(),
            chat_id: self.chat_id.to_string(),
            turn_id: self.turn_id.to_string(),
            iteration: self.iteration,
            index: self.index,
            tool: self.tool.clone(),
            input_json: self.input.clone(),
            read_only: self.read_only,
            status: call_status(&self.status) as i32,
            generation: self.generation,
            daemon_id: text(self.daemon_id),
            unknown_cause: cause(&self.unknown_cause) as i32,
            result: self.result.clone(),
            is_error: self.is_error,
            error_code: self.error_code.clone(),
            exit_code: self.exit_code,
            output_bytes: self.output_bytes,
            created_at: Some(timestamp(self.created_at)),
            started_at: time(self.started_at),
            ended_at: time(self.ended_at),
            waiting_for: if self.is_open() { self.waiting_for.clone() } else { String::new() },
        }
    }

    pub fn changed(&self) -> pb::ToolCallChanged {
        let running = matches!(self.status.as_str(), "dispatched" | "running");
        let producer = if running { text(self.daemon_id) } else { String::new() };
        pb::ToolCallChanged { tool_call: Some(self.to_pb()), producer }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct MessageRow {
    pub id: Uuid,
    pub chat_id: Uuid,
    pub turn_id: Option<Uuid>,
    pub ordinal: i32,
    pub role: String,
    pub iteration: Option<i32>,
    pub model: String,
    pub usage: Option<serde_json::Value>,
    pub stop_reason: String,
    pub client_message_id: Option<String>,
    pub created_at: DateTime<Utc>,
    pub turn_ordinal: i32,
    /// Of the content.
    pub bytes: i32,
    /// Encoded content blocks, in order.
    pub blocks: Option<Vec<Vec<u8>>>,
}

impl MessageRow {
    pub fn to_pb(&self) -> Result<pb::Message> {
        let blocks = self.blocks.iter().flatten().map(|data| pb::ContentBlock::decode(data.as_slice()));
        let blocks = blocks.collect::<Result<_, _>>().map_err(|_| StoreError::Corrupt("a content block"))?;
        Ok(pb::Message {
            id: self.id.to_string(),
            chat_id: self.chat_id.to_string(),
            turn_id: text(self.turn_id),
            ordinal: self.ordinal,
            role: role(&self.role) as i32,
            iteration: self.iteration.unwrap_or_default(),
            model: self.model.clone(),
            blocks,
            usage: self.usage.as_ref().map(usage),
            stop_reason: stop(&self.stop_reason) as i32,
            client_message_id: self.client_message_id.clone().unwrap_or_default(),
            created_at: Some(timestamp(self.created_at)),
        })
    }
}

#[derive(Debug, Clone)]
pub(crate) struct ApprovalRow {
    pub id: Uuid,
    pub chat_id: Uuid,
    pub turn_id: Uuid,
    pub tool_call_id: Uuid,
    pub tool: String,
    pub input: String,
    pub status: String,
    pub scope: String,
    pub created_at: DateTime<Utc>,
    pub decided_at: Option<DateTime<Utc>>,
}

impl ApprovalRow {
    pub fn to_pb(&self) -> pb::Approval {
        pb::Approval {
            id: self.id.to_string(),
            chat_id: self.chat_id.to_string(),
            turn_id: self.turn_id.to_string(),
            tool_call_id: self.tool_call_id.to_string(),
            tool: self.tool.clone(),
            input_json: self.input.clone(),
            status: approval_status(&self.status) as i32,
            scope: scope(&self.scope) as i32,
            created_at: Some(timestamp(self.created_at)),
            decided_at: time(self.decided_at),
        }
    }
}

pub(crate) fn declarations(data: &[u8]) -> pb::Declarations {
    // What a newer version wrote still decodes; what is broken offers nothing until the daemon declares anew.
    pb::Declarations::decode(data).unwrap_or_default()
}

pub(crate) fn incarnation(id: Option<Uuid>) -> Option<Incarnation> {
    id.map(Incarnation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_round_trip() {
        for number in 1..=10 {
            let status = pb::ToolCallStatus::try_from(number).unwrap();
            assert_eq!(call_status(call_status_text(status)), status);
            assert!(status.as_str_name().to_lowercase().ends_with(call_status_text(status)));
        }
        for number in 1..=7 {
            let status = pb::TurnStatus::try_from(number).unwrap();
            assert_eq!(turn_status(turn_status_text(status)), status);
        }
        for number in 1..=3 {
            let cause_ = pb::UnknownCause::try_from(number).unwrap();
            assert_eq!(cause(cause_text(cause_)), cause_);
        }
    }

    #[test]
    fn usage_survives_its_json() {
        let one = pb::Usage { input_tokens: 3, output_tokens: i64::MAX, cost_microusd: 7, ..Default::default() };
        assert_eq!(usage(&usage_json(&one)), one);
    }
}
