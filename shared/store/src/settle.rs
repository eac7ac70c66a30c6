//! How calls and turns come to their end. Shared by everything that ends one.
//!
//! Invariants: a call ends once; when the last call of a round has ended, or its turn has, the round's results are stored
//! as one tool message, so that every call a model made has a result in the history.

use chrono::{DateTime, Utc};
use reliant_types::{
    Code, Failure, InstanceId, MessageId, ToolCallId, TurnId, limits,
    pb::{self, chat_event::Kind, content_block::Block},
};

use crate::{
    Result,
    chat_tx::{ChatTx, NewMessage},
    pages::shortened,
    rows::{ApprovalRow, CallRow, TurnRow, call_status_text, calls, cause_text, turn_status_text, turns},
};

/// How a call ended, where its daemon did not say it.
pub(crate) struct Ending {
    pub status: pb::ToolCallStatus,
    pub cause: pb::UnknownCause,
    pub code: String,
    /// What the model reads.
    pub result: String,
}

impl Ending {
    pub fn failed(failure: &Failure) -> Self {
        Self {
            status: pb::ToolCallStatus::Failed,
            cause: pb::UnknownCause::Unspecified,
            code: failure.code.as_str().to_owned(),
            result: failure.message.clone(),
        }
    }

    pub fn cancelled() -> Self {
        Self {
            status: pb::ToolCallStatus::Cancelled,
            cause: pb::UnknownCause::Unspecified,
            code: Code::Cancelled.as_str().to_owned(),
            result: "This call was cancelled and did not run.".into(),
        }
    }

    pub fn unknown(cause: pb::UnknownCause) -> Self {
        Self {
            status: pb::ToolCallStatus::OutcomeUnknown,
            cause,
            code: Code::OutcomeUnknown.as_str().to_owned(),
            result: unknown_text(cause).to_owned(),
        }
    }
}

pub(crate) fn unknown_text(cause: pb::UnknownCause) -> &'static str {
    match cause {
        pb::UnknownCause::JournalLost => {
            "Outcome unknown: the call was sent, and the daemon's journal was lost afterwards. It may have run in part or in \
             whole. Look at its effects before you run it again."
        }
        pb::UnknownCause::DaemonAway => {
            "Outcome unknown: the call was sent, and the daemon did not come back. It may have run in part or in whole. Look at \
             its effects before you run it again."
        }
        pb::UnknownCause::ProcessDied | pb::UnknownCause::Unspecified => {
            "Outcome unknown: the daemon or the tool's server died while the call ran. It may have run in part or in whole. Look \
             at its effects before you run it again."
        }
    }
}

/// Ends a call that is open, and logs it. None: it had ended.
pub(crate) async fn end_call(tx: &mut ChatTx, call: ToolCallId, ending: Ending) -> Result<Option<CallRow>> {
    let now = tx.now;
    let ended = calls!(
        UPDATE "status = $2, unknown_cause = $3, error_code = $4, result = $5, is_error = true, ended_at = $6"
        WHERE "c.id = $1 AND c.ended_at IS NULL",
        call.0,
        call_status_text(ending.status),
        cause_text(ending.cause),
        ending.code,
        ending.result,
        now,
    )
    .fetch_optional(tx.conn())
    .await?;
    if let Some(row) = &ended {
        tx.event(Kind::ToolCallChanged(row.changed()));
    }
    Ok(ended)
}

/// Stores the results of the call's round if it was the last one open. To be called once for each call that ended.
pub(crate) async fn close_round_of(tx: &mut ChatTx, call: &CallRow) -> Result<bool> {
    if call.turn_ended {
        return Ok(false);
    }
    let round = round(tx, TurnId(call.turn_id), call.iteration).await?;
    Ok(close_round(tx, &round))
}

async fn round(tx: &mut ChatTx, turn: TurnId, iteration: i32) -> Result<Vec<CallRow>> {
    let rows = calls!(SELECT "WHERE c.turn_id = $1 AND c.iteration = $2 ORDER BY c.index", turn.0, iteration);
    Ok(rows.fetch_all(tx.conn()).await?)
}

/// `round`: all calls of one round, in order. True: it is complete now, and its results are stored.
pub(crate) fn close_round(tx: &mut ChatTx, round: &[CallRow]) -> bool {
    if round.iter().any(CallRow::is_open) {
        return false;
    }
    store_results(tx, round)
}

fn store_results(tx: &mut ChatTx, round: &[CallRow]) -> bool {
    let Some(first) = round.first() else { return false };
    let share = limits::ROUND_RESULTS_MAX_BYTES / round.len();
    let blocks = round.iter().map(|call| {
        let open = call.is_open();
        Block::ToolResult(pb::ToolResultBlock {
            tool_call_id: call.id.to_string(),
            content: if open { RESULT_OF_OPEN.to_owned() } else { shortened(&call.result, share) },
            is_error: open || call.is_error,
        })
    });
    tx.message(NewMessage {
        id: MessageId::new(),
        turn: TurnId(first.turn_id),
        turn_ordinal: first.turn_ordinal,
        role: pb::Role::Tool,
        iteration: Some(first.iteration),
        model: String::new(),
        usage: None,
        stop_reason: pb::StopReason::Unspecified,
        client_message_id: None,
        blocks: blocks.collect(),
    });
    true
}

/// A turn may end before the calls that it sent.
const RESULT_OF_OPEN: &str =
    "The turn ended while this call ran. It was told to stop; how far it came is not known here.";

pub(crate) struct Ended {
    pub turn: TurnRow,
    /// Who was writing the model's message.
    pub producer: Option<InstanceId>,
    /// Sent calls, which settle behind the turn.
    pub sent: Vec<CallRow>,
}

pub(crate) struct TurnEnding<'a> {
    pub status: pb::TurnStatus,
    pub failure: Option<&'a Failure>,
    /// Only if this is still the newest attempt.
    pub fence: Option<i64>,
    /// The caller tells the daemons at once; else the relay does.
    pub cancels_sent: bool,
}

/// Ends the turn with everything that is open in it. None: it had ended, or belongs to a newer attempt.
pub(crate) async fn end_turn(tx: &mut ChatTx, turn: TurnId, ending: TurnEnding<'_>) -> Result<Option<Ended>> {
    let now = tx.now;
    let cancelled = ending.status == pb::TurnStatus::Cancelled;
    let row = turns!(
        RETURNING "UPDATE turns t SET status = $2, ended_at = $3, deadline_at = NULL, cancel_requested = cancel_requested OR $4,
                          error_code = $5, error_message = $6
                   WHERE t.id = $1 AND t.ended_at IS NULL AND ($7::bigint IS NULL OR t.fence = $7)",
        turn.0,
        turn_status_text(ending.status),
        now,
        cancelled,
        ending.failure.map_or("", |failure| failure.code.as_str()),
        ending.failure.map_or("", |failure| failure.message.as_str()).replace('\0', ""),
        ending.fence,
    )
    .fetch_optional(tx.conn())
    .await?;
    let Some(row) = row else { return Ok(None) };
    tx.event(Kind::TurnChanged(row.to_pb()));
    let mut sent = Vec::new();
    if row.iteration > 0 {
        cancel_approvals(tx, turn, now).await?;
        sent = end_calls(tx, turn, now, ending.cancels_sent).await?;
        let stored = sqlx::query_scalar!(
            "SELECT id FROM messages WHERE turn_id = $1 AND iteration = $2 AND role = 'tool'",
            turn.0,
            row.iteration - 1
        )
        .fetch_optional(tx.conn())
        .await?;
        if stored.is_none() {
            let round = round(tx, turn, row.iteration - 1).await?;
            store_results(tx, &round);
        }
    }
    // It leaves the line at once, before anybody looks at the chat: others are not to stand behind what has ended.
    if row.held_at.is_some() {
        tx.release_hold();
    }
    tx.touch();
    tx.want(&row.traceparent);
    let producer = row.producer.map(InstanceId);
    Ok(Some(Ended { turn: row, producer, sent }))
}

async fn cancel_approvals(tx: &mut ChatTx, turn: TurnId, now: DateTime<Utc>) -> Result<()> {
    let cancelled = sqlx::query_as!(
        ApprovalRow,
        "UPDATE approvals a SET status = 'cancelled', decided_at = $2 FROM tool_calls c
         WHERE a.turn_id = $1 AND a.status = 'pending' AND c.id = a.tool_call_id
         RETURNING a.id, a.chat_id, a.turn_id, a.tool_call_id, a.tool, c.input, a.status, a.scope, a.created_at, a.decided_at",
        turn.0,
        now,
    )
    .fetch_all(tx.conn())
    .await?;
    for approval in cancelled {
        tx.approval_changed(approval.to_pb());
    }
    Ok(())
}

/// What was not sent is cancelled; what was sent is asked to stop. Returns the latter.
async fn end_calls(tx: &mut ChatTx, turn: TurnId, now: DateTime<Utc>, told: bool) -> Result<Vec<CallRow>> {
    let Ending { status, code, result, .. } = Ending::cancelled();
    let mut rows = calls!(
        UPDATE "status = CASE WHEN sent > 0 THEN c.status ELSE $3 END,
                error_code = CASE WHEN sent > 0 THEN c.error_code ELSE $4 END,
                result = CASE WHEN sent > 0 THEN result ELSE $5 END,
                is_error = (sent = 0), ended_at = CASE WHEN sent > 0 THEN NULL ELSE $2::timestamptz END,
                cancel_asked_at = COALESCE(cancel_asked_at, $2), cancel_sent_at = CASE WHEN $6 THEN $2::timestamptz END"
        WHERE "c.turn_id = $1 AND c.ended_at IS NULL",
        turn.0,
        now,
        call_status_text(status),
        code,
        result,
        told,
    )
    .fetch_all(tx.conn())
    .await?;
    rows.sort_by_key(|call| call.index);
    for call in rows.iter().filter(|call| !call.is_open()) {
        tx.event(Kind::ToolCallChanged(call.changed()));
    }
    rows.retain(CallRow::is_open);
    Ok(rows)
}
