//! Results from daemons' journals, committed by compare-and-set by whichever worker gets them.
//!
//! Invariants: a call takes one result, from the daemon and journal it was sent to; what comes later is recorded and never
//! applied; the same result again is answered as committed.

use reliant_types::{
    DaemonId, Failure, Incarnation, ToolCallId, UserId, boxed, limits,
    pb::{self, chat_event::Kind},
};

use crate::{
    Committed, Result, ResultFate, Store, StoreError,
    chat_tx::{ChatTx, Key},
    pages::shortened,
    rows::{CallRow, call_status_text, calls, cause_text},
    settle::{self, unknown_text},
};

const ERROR_CODE_MAX_CHARS: usize = 64;

/// A result as it is stored.
struct Stored {
    call: ToolCallId,
    status: pb::ToolCallStatus,
    cause: pb::UnknownCause,
    text: String,
    is_error: bool,
    code: String,
}

impl Store {
    /// `daemon`: who sent it, as the gateway stamped it. A result that no call can have is the caller's mistake.
    #[boxed]
    pub async fn commit_result(&self, daemon: DaemonId, result: &pb::ToolResult) -> Result<Committed<ResultFate>> {
        let stored = stored(result)?;
        self.run("commit_result", async || {
            let Some(mut tx) = ChatTx::open(self, Key::Call(stored.call)).await? else {
                // Deleted, or invented by the daemon; nobody is told.
                return Ok(Committed::nothing(UserId(uuid::Uuid::nil()), ResultFate::Unknown));
            };
            match apply(&mut tx, daemon, result, &stored).await? {
                Some(round) => {
                    let own = round.iter().find(|row| row.id == stored.call.0);
                    let own = own.ok_or(StoreError::Corrupt("a call outside its round"))?;
                    tx.event(Kind::ToolCallChanged(own.changed()));
                    tx.want(&own.traceparent);
                    if !own.turn_ended {
                        settle::close_round(&mut tx, &round);
                    }
                    tx.commit(ResultFate::Committed).await
                }
                None => {
                    let fate = too_late(&mut tx, daemon, result, &stored).await?;
                    tx.commit(fate).await
                }
            }
        })
        .await
    }
}

fn stored(result: &pb::ToolResult) -> Result<Stored, Failure> {
    let call = result.call_id.parse().map_err(|_| Failure::field("call_id", "this is not a tool call id"))?;
    let status = result.status();
    let ended = matches!(
        status,
        pb::ToolCallStatus::Succeeded
            | pb::ToolCallStatus::Failed
            | pb::ToolCallStatus::Cancelled
            | pb::ToolCallStatus::TimedOut
            | pb::ToolCallStatus::OutcomeUnknown
    );
    if !ended {
        return Err(Failure::field("status", "a result says how its call ended"));
    }
    if result.incarnation.parse::<Incarnation>().is_err() {
        return Err(Failure::field("incarnation", "a result names the journal that it is from"));
    }
    let unknown = status == pb::ToolCallStatus::OutcomeUnknown;
    let cause = match result.unknown_cause() {
        _ if !unknown => pb::UnknownCause::Unspecified,
        pb::UnknownCause::Unspecified => pb::UnknownCause::ProcessDied,
        cause => cause,
    };
    let mut text = readable(&result.content);
    if text.is_empty() {
        text = match status {
            pb::ToolCallStatus::OutcomeUnknown => unknown_text(cause).to_owned(),
            pb::ToolCallStatus::Cancelled => "The call was cancelled.".to_owned(),
            pb::ToolCallStatus::TimedOut => "The call took longer than it may and was stopped.".to_owned(),
            _ => text,
        };
    }
    let code: String = result.error_code.chars().filter(|char| *char != '\0').take(ERROR_CODE_MAX_CHARS).collect();
    let is_error = result.is_error || status != pb::ToolCallStatus::Succeeded;
    Ok(Stored { call, status, cause, text, is_error, code })
}

/// Bytes of a tool as a text that Postgres and a model can hold.
fn readable(content: &[u8]) -> String {
    let text = String::from_utf8_lossy(content).replace('\0', "\u{fffd}");
    // The daemon cuts at this limit already; what it calls bytes may grow by replacement characters.
    shortened(&text, limits::TOOL_RESULT_MAX_BYTES)
}

/// The calls of the round, in order, this one settled. None: the result is not one to apply.
async fn apply(
    tx: &mut ChatTx,
    daemon: DaemonId,
    result: &pb::ToolResult,
    stored: &Stored,
) -> Result<Option<Vec<CallRow>>> {
    let now = tx.now;
    let settled = sqlx::query_scalar!(
        "UPDATE tool_calls SET status = $4, unknown_cause = $5, result = $6, is_error = $7, error_code = $8, exit_code = $9,
                output_bytes = $10, ended_at = $11,
                started_at = CASE WHEN $12::float8 > 0
                    THEN LEAST($11, GREATEST(dispatched_at, $11::timestamptz - $12::float8 * interval '1 microsecond'))
                    ELSE COALESCE(started_at, $11) END
         WHERE id = $1 AND daemon_id = $2 AND generation >= $3 AND sent > 0 AND ended_at IS NULL AND incarnation::text = $13
         RETURNING turn_id",
        stored.call.0,
        daemon.0,
        result.generation,
        call_status_text(stored.status),
        cause_text(stored.cause),
        stored.text,
        stored.is_error,
        stored.code,
        result.exit_code,
        result.output_bytes.max(0),
        now,
        result.run_us.clamp(0, 366 * 86_400 * 1_000_000) as f64,
        result.incarnation,
    )
    .fetch_optional(tx.conn())
    .await?;
    if settled.is_none() {
        return Ok(None);
    }
    let round = calls!(
        SELECT "JOIN tool_calls own ON own.turn_id = c.turn_id AND own.iteration = c.iteration
                WHERE own.id = $1 ORDER BY c.index",
        stored.call.0,
    )
    .fetch_all(tx.conn())
    .await?;
    Ok(Some(round))
}

/// Tells the same result again from one that must be recorded only.
async fn too_late(tx: &mut ChatTx, daemon: DaemonId, result: &pb::ToolResult, stored: &Stored) -> Result<ResultFate> {
    let row = calls!(SELECT "WHERE c.id = $1", stored.call.0).fetch_one(tx.conn()).await?;
    let its_own = row.daemon_id == Some(daemon.0) && row.sent > 0;
    if !its_own || row.is_open() {
        // Counted by its fate; a daemon that makes them up must not fill the log.
        tracing::debug!(
            tool.call_id = %stored.call,
            daemon.id = %daemon,
            tool.generation = result.generation,
            "a result does not fit its call's daemon, journal or generation; discarded"
        );
        return Ok(ResultFate::Foreign);
    }
    if row.status == call_status_text(stored.status) && row.result == stored.text {
        return Ok(ResultFate::Repeated);
    }
    sqlx::query!(
        "UPDATE tool_calls SET late_result = $2 WHERE id = $1 AND late_result IS NULL",
        stored.call.0,
        format!("{}: {}", call_status_text(stored.status), stored.text),
    )
    .execute(tx.conn())
    .await?;
    Ok(ResultFate::Late)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_become_a_text_that_can_be_stored() {
        assert_eq!(readable(b"a\0b\xff"), "a\u{fffd}b\u{fffd}");
        let long = vec![0xffu8; limits::TOOL_RESULT_MAX_BYTES * 2];
        assert!(readable(&long).len() <= limits::TOOL_RESULT_MAX_BYTES);
    }

    #[test]
    fn an_unknown_outcome_always_has_a_cause_of_the_list() {
        let result = pb::ToolResult {
            call_id: ToolCallId::new().to_string(),
            status: pb::ToolCallStatus::OutcomeUnknown as i32,
            incarnation: Incarnation::new().to_string(),
            ..Default::default()
        };
        let stored = stored(&result).unwrap();
        assert_eq!(stored.cause, pb::UnknownCause::ProcessDied);
        assert!(stored.is_error && stored.text.starts_with("Outcome unknown"));
        let running = pb::ToolResult { status: pb::ToolCallStatus::Running as i32, ..result.clone() };
        assert!(super::stored(&running).is_err());
        assert!(super::stored(&pb::ToolResult { incarnation: "\0".into(), ..result }).is_err());
    }
}
