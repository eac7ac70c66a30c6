//! Turns as their owner sees and ends them.

use reliant_types::{DaemonId, ToolCallId, TurnId, UserId, pb};

use crate::{
    CancelCall, CancelOutcome, Committed, Result, Store, StoreError,
    chat_tx::{ChatTx, Key},
    rows::{CallRow, calls, turns},
    settle::{self, TurnEnding},
};

impl Store {
    pub async fn get_turn(&self, user: UserId, turn: TurnId) -> Result<(pb::Turn, Vec<pb::ToolCall>)> {
        self.run("get_turn", async || {
            let row = turns!(SELECT "WHERE t.id = $1 AND t.user_id = $2", turn.0, user.0)
                .fetch_optional(&self.pool)
                .await?
                .ok_or(StoreError::not_found("turn"))?;
            let calls = calls!(SELECT "WHERE c.turn_id = $1 ORDER BY c.iteration, c.index", turn.0)
                .fetch_all(&self.pool)
                .await?;
            Ok((row.to_pb(), calls.iter().map(CallRow::to_pb).collect()))
        })
        .await
    }

    /// Ends the turn at once. Calls that were sent settle behind it; the caller tells their daemons. Cancelling an ended
    /// turn changes nothing.
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

pub(crate) fn cancel_call(call: &CallRow) -> Option<CancelCall> {
    let daemon = DaemonId(call.daemon_id?);
    Some(CancelCall { call: ToolCallId(call.id), generation: call.generation, daemon })
}
