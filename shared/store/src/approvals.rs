//! What people let through. The first decision stands.

use reliant_types::{
    ApprovalId, ChatId, Code, Failure, ToolCallId, UserId, boxed, limits,
    pb::{self, chat_event::Kind},
};

use crate::{
    Committed, Result, Store, StoreError,
    chat_tx::{ChatTx, Key},
    checks,
    rows::{ApprovalRow, approval_status_text, calls, scope_text},
    settle::{self, Ending},
};

const DENIED: &str = "The user denied this call. Do not try it again without asking.";

impl Store {
    /// Newest first, older than `before`; and whether there are more.
    #[boxed]
    pub async fn list_approvals(
        &self,
        user: UserId,
        chat: Option<ChatId>,
        include_decided: bool,
        page_size: i32,
        before: Option<ApprovalId>,
    ) -> Result<(Vec<pb::Approval>, bool)> {
        let size = checks::page_size(page_size, 50, 200)?;
        if let Some(chat) = chat {
            self.chat_access(user, chat).await?;
        }
        self.run("list_approvals", async || {
            let rows = sqlx::query!(
                r#"WITH candidates AS (
                       SELECT a.id, row_number() OVER w AS place, sum(octet_length(c.input)) OVER w AS total
                       FROM (SELECT * FROM approvals
                             WHERE user_id = $1 AND ($2::uuid IS NULL OR chat_id = $2) AND ($3 OR status = 'pending')
                               AND ($5::uuid IS NULL OR (created_at, id) < (SELECT b.created_at, b.id FROM approvals b
                                                                            WHERE b.id = $5 AND b.user_id = $1))
                             ORDER BY created_at DESC, id DESC LIMIT $4::bigint + 1) a
                       JOIN tool_calls c ON c.id = a.tool_call_id
                       WINDOW w AS (ORDER BY a.created_at DESC, a.id DESC)
                   )
                   SELECT a.id, a.chat_id, a.turn_id, a.tool_call_id, a.tool, c.input, a.status, a.scope, a.created_at,
                          a.decided_at, (SELECT count(*) FROM candidates) > f.place AS "more!"
                   FROM candidates f JOIN approvals a ON a.id = f.id JOIN tool_calls c ON c.id = a.tool_call_id
                   WHERE f.place = 1 OR (f.place <= $4 AND f.total <= $6) ORDER BY f.place"#,
                user.0,
                chat.map(|chat| chat.0),
                include_decided,
                size,
                before.map(|before| before.0),
                limits::PAGE_MAX_BYTES as i64,
            )
            .fetch_all(&self.pool)
            .await?;
            let more = rows.last().is_some_and(|row| row.more);
            let approvals = rows.into_iter().map(|row| {
                let row = ApprovalRow {
                    id: row.id,
                    chat_id: row.chat_id,
                    turn_id: row.turn_id,
                    tool_call_id: row.tool_call_id,
                    tool: row.tool,
                    input: row.input,
                    status: row.status,
                    scope: row.scope,
                    created_at: row.created_at,
                    decided_at: row.decided_at,
                };
                row.to_pb()
            });
            Ok((approvals.collect(), more))
        })
        .await
    }

    /// A later decision is answered with the first. Approving for the session also lets the chat's other waiting calls of
    /// that tool through.
    #[boxed]
    pub async fn decide_approval(
        &self,
        user: UserId,
        approval: ApprovalId,
        approve: bool,
        scope: pb::ApprovalScope,
    ) -> Result<Committed<pb::Approval>> {
        let session = approve && scope == pb::ApprovalScope::Session;
        let scope = if session { pb::ApprovalScope::Session } else { pb::ApprovalScope::Once };
        let status = if approve { pb::ApprovalStatus::Approved } else { pb::ApprovalStatus::Denied };
        self.run("decide_approval", async || {
            let mut tx = ChatTx::open_owned(self, user, Key::Approval(approval), "approval").await?;
            let now = tx.now;
            let decided = sqlx::query_as!(
                ApprovalRow,
                "UPDATE approvals a SET status = $2, scope = $3, decided_by = $4, decided_at = $5
                 FROM tool_calls c, approvals asked
                 WHERE c.id = a.tool_call_id AND asked.id = $1 AND asked.status = 'pending' AND a.status = 'pending'
                   AND (a.id = $1 OR ($6 AND a.chat_id = asked.chat_id AND a.tool = asked.tool))
                 RETURNING a.id, a.chat_id, a.turn_id, a.tool_call_id, a.tool, c.input, a.status, a.scope, a.created_at,
                           a.decided_at",
                approval.0,
                approval_status_text(status),
                scope_text(scope),
                user.0,
                now,
                session,
            )
            .fetch_all(tx.conn())
            .await?;
            let Some(answer) = decided.iter().find(|row| row.id == approval.0).map(ApprovalRow::to_pb) else {
                let first = first_decision(&mut tx, approval).await?;
                return tx.nothing(first).await;
            };
            for row in &decided {
                tx.approval_changed(row.to_pb());
            }
            for row in &decided {
                let call = ToolCallId(row.tool_call_id);
                let changed = if approve { approved(&mut tx, call).await? } else { denied(&mut tx, call).await? };
                if let Some(traceparent) = changed {
                    tx.want(&traceparent);
                }
            }
            tx.commit(answer).await
        })
        .await
    }
}

async fn first_decision(tx: &mut ChatTx, approval: ApprovalId) -> Result<pb::Approval> {
    let row = sqlx::query_as!(
        ApprovalRow,
        "SELECT a.id, a.chat_id, a.turn_id, a.tool_call_id, a.tool, c.input, a.status, a.scope, a.created_at, a.decided_at
         FROM approvals a JOIN tool_calls c ON c.id = a.tool_call_id WHERE a.id = $1",
        approval.0,
    )
    .fetch_optional(tx.conn())
    .await?
    .ok_or(StoreError::not_found("approval"))?;
    Ok(row.to_pb())
}

async fn approved(tx: &mut ChatTx, call: ToolCallId) -> Result<Option<String>> {
    let row = calls!(
        UPDATE "status = 'pending'" WHERE "c.id = $1 AND c.status = 'waiting_approval'",
        call.0
    )
    .fetch_optional(tx.conn())
    .await?;
    Ok(row.map(|row| {
        tx.event(Kind::ToolCallChanged(row.changed()));
        row.traceparent
    }))
}

async fn denied(tx: &mut ChatTx, call: ToolCallId) -> Result<Option<String>> {
    let ending = Ending::failed(&Failure::new(Code::ApprovalDenied, DENIED));
    let Some(row) = settle::end_call(tx, call, ending).await? else { return Ok(None) };
    settle::close_round_of(tx, &row).await?;
    Ok(Some(row.traceparent))
}
