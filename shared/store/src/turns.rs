//! Turns as their owner sees and ends them.

use reliant_types::{DaemonId, Failure, ToolCallId, TurnId, UserId, boxed, limits, pb};

use crate::{
    CancelCall, CancelOutcome, Committed, Result, Store, StoreError,
    chat_tx::{ChatTx, Key},
    checks,
    rows::{CallRow, calls, turns},
    settle::{self, TurnEnding},
};

impl Store {
    /// With the first page of its calls.
    #[boxed]
    pub async fn get_turn(&self, user: UserId, turn: TurnId) -> Result<(pb::Turn, Vec<pb::ToolCall>)> {
        self.get_turn_page(user, turn, 0, "").await.map(|(turn, calls, _)| (turn, calls))
    }

    /// The turn and a page of its calls, with the token of the next page.
    #[boxed]
    pub async fn get_turn_page(
        &self,
        user: UserId,
        turn: TurnId,
        page_size: i32,
        page_token: &str,
    ) -> Result<(pb::Turn, Vec<pb::ToolCall>, String)> {
        let size = checks::page_size(page_size, 200, 500)?;
        let (iteration, index) = place(page_token)?;
        self.run("get_turn", async || {
            let row = turns!(SELECT "WHERE t.id = $1 AND t.user_id = $2", turn.0, user.0)
                .fetch_optional(&self.pool)
                .await?
                .ok_or(StoreError::not_found("turn"))?;
            let mut calls = calls!(
                SELECT "WHERE c.id IN (
                            SELECT id FROM (
                                SELECT k.id, row_number() OVER w AS place,
                                       sum(octet_length(k.input) + octet_length(k.result)) OVER w AS total
                                FROM tool_calls k WHERE k.turn_id = $1 AND (k.iteration, k.index) > ($2, $3)
                                WINDOW w AS (ORDER BY k.iteration, k.index)
                            ) sized WHERE place = 1 OR (place <= $4::bigint + 1 AND total <= $5))
                        ORDER BY c.iteration, c.index",
                turn.0,
                iteration,
                index,
                size,
                limits::PAGE_MAX_BYTES as i64,
            )
            .fetch_all(&self.pool)
            .await?;
            let mut more = calls.len() as i64 > size;
            calls.truncate(size as usize);
            if let Some(last) = calls.last().filter(|_| !more) {
                more = sqlx::query_scalar!(
                    r#"SELECT EXISTS (SELECT FROM tool_calls WHERE turn_id = $1 AND (iteration, index) > ($2, $3)) AS "more!""#,
                    turn.0,
                    last.iteration,
                    last.index,
                )
                .fetch_one(&self.pool)
                .await?;
            }
            let last = calls.last().filter(|_| more);
            let token = last.map(|call| format!("{}.{}", call.iteration, call.index)).unwrap_or_default();
            Ok((row.to_pb(), calls.iter().map(CallRow::to_pb).collect(), token))
        })
        .await
    }

    /// Ends the turn at once. Calls that were sent settle behind it; the caller tells their daemons. Cancelling an ended
    /// turn changes nothing.
    #[boxed]
    pub async fn request_cancel(&self, user: UserId, turn: TurnId) -> Result<Committed<CancelOutcome>> {
        self.run("request_cancel", async || {
            let mut tx = ChatTx::open_owned(self, user, Key::Turn(turn), "turn").await?;
            let ending =
                TurnEnding { status: pb::TurnStatus::Cancelled, failure: None, fence: None, cancels_sent: true };
            match settle::end_turn(&mut tx, turn, ending).await? {
                Some(ended) => {
                    let calls = ended.sent.iter().filter_map(cancel_call).collect();
                    tx.commit(CancelOutcome { turn: ended.turn.to_pb(), producer: ended.producer, calls }).await
                }
                None => {
                    let row = turns!(SELECT "WHERE t.id = $1", turn.0).fetch_one(tx.conn()).await?;
                    tx.nothing(CancelOutcome { turn: row.to_pb(), producer: None, calls: Vec::new() }).await
                }
            }
        })
        .await
    }
}

/// A page's token is the place of its last call.
fn place(token: &str) -> Result<(i32, i32), Failure> {
    if token.is_empty() {
        return Ok((-1, -1));
    }
    let parsed =
        token.split_once('.').and_then(|(iteration, index)| Some((iteration.parse().ok()?, index.parse().ok()?)));
    parsed.ok_or_else(|| Failure::field("page_token", "page_token is empty or the next_page_token of the page before"))
}

pub(crate) fn cancel_call(call: &CallRow) -> Option<CancelCall> {
    let daemon = DaemonId(call.daemon_id?);
    Some(CancelCall { call: ToolCallId(call.id), generation: call.generation, daemon })
}
