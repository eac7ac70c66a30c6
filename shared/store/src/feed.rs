//! What viewers read: the logs, and snapshots in their place.

use reliant_types::{ChatId, UserId, boxed, limits, pb};
use uuid::Uuid;

use crate::{
    Result, Store, StoreError,
    pages::{fit_calls, newest_for_people},
    rows::{ApprovalRow, ChatRow, MessageRow, TurnRow, calls, turns},
    stored_events::{self, Rest},
};

impl Store {
    /// The chat's log after `after`, oldest first, as much as one read may bring; and whether there is more. Whoever calls
    /// it has asked [`Store::chat_access`] before.
    #[boxed]
    pub async fn events_after(&self, chat: ChatId, after: i64, limit: i64) -> Result<(Vec<pb::ChatEvent>, bool)> {
        self.run("events_after", async || {
            let rows = sqlx::query!(
                r#"WITH sized AS (
                       SELECT seq, row_number() OVER w AS place, sum(bytes) OVER w AS total
                       FROM (SELECT e.seq, octet_length(e.payload) + COALESCE(m.bytes, 0) + COALESCE(octet_length(k.input), 0)
                                    + COALESCE(octet_length(k.result), 0) AS bytes
                             FROM (SELECT seq, payload, about FROM events
                                   WHERE chat_id = $1 AND seq > $2 ORDER BY seq LIMIT $3) e
                             LEFT JOIN messages m ON m.id = e.about LEFT JOIN tool_calls k ON k.id = e.about) b
                       WINDOW w AS (ORDER BY seq)
                   )
                   SELECT e.seq, e.payload, e.about, c.last_seq > s.seq AS "more!", k.input AS "input?", k.result AS "result?",
                          m.id AS "message?", m.turn_id, m.ordinal AS "ordinal?", m.role AS "role?", m.iteration,
                          m.model AS "model?", m.usage, m.stop_reason AS "stop_reason?", m.client_message_id,
                          m.created_at AS "created_at?", m.turn_ordinal AS "turn_ordinal?", m.bytes AS "bytes?",
                          CASE WHEN m.id IS NOT NULL THEN
                              ARRAY(SELECT b.data FROM content_blocks b WHERE b.message_id = m.id ORDER BY b.position)
                          END AS blocks
                   FROM sized s JOIN events e ON e.chat_id = $1 AND e.seq = s.seq JOIN chats c ON c.id = $1
                        LEFT JOIN messages m ON m.id = e.about LEFT JOIN tool_calls k ON k.id = e.about
                   WHERE s.place = 1 OR s.total <= $4 ORDER BY e.seq"#,
                chat.0,
                after,
                limit,
                limits::READ_EVENTS_MAX_BYTES as i64,
            )
            .fetch_all(&self.pool)
            .await?;
            let more = rows.last().is_some_and(|row| row.more);
            let mut events = Vec::with_capacity(rows.len());
            for row in rows {
                let message = row.message.map(|id| MessageRow {
                    id,
                    chat_id: chat.0,
                    turn_id: row.turn_id,
                    ordinal: row.ordinal.unwrap_or_default(),
                    role: row.role.unwrap_or_default(),
                    iteration: row.iteration,
                    model: row.model.unwrap_or_default(),
                    usage: row.usage,
                    stop_reason: row.stop_reason.unwrap_or_default(),
                    client_message_id: row.client_message_id,
                    created_at: row.created_at.unwrap_or_default(),
                    turn_ordinal: row.turn_ordinal.unwrap_or_default(),
                    bytes: row.bytes.unwrap_or_default(),
                    blocks: row.blocks,
                });
                let rest = Rest { row: row.about, message, call: row.input.zip(row.result) };
                events.push(stored_events::whole(chat.0, row.seq, &row.payload, rest)?);
            }
            Ok((events, more))
        })
        .await
    }

    /// The user's feed after `after`, as [`Store::events_after`].
    #[boxed]
    pub async fn feed_after(&self, user: UserId, after: i64, limit: i64) -> Result<(Vec<pb::FeedEvent>, bool)> {
        self.run("feed_after", async || {
            let rows = sqlx::query!(
                r#"WITH sized AS (
                       SELECT seq, row_number() OVER w AS place, sum(bytes) OVER w AS total
                       FROM (SELECT e.seq, octet_length(e.payload) + COALESCE(octet_length(k.input), 0) AS bytes
                             FROM (SELECT seq, payload, about FROM user_events
                                   WHERE user_id = $1 AND seq > $2 ORDER BY seq LIMIT $3) e
                             LEFT JOIN tool_calls k ON k.id = e.about) b
                       WINDOW w AS (ORDER BY seq)
                   )
                   SELECT e.seq, e.payload, e.about, k.input AS "input?", u.feed_seq > s.seq AS "more!"
                   FROM sized s JOIN user_events e ON e.user_id = $1 AND e.seq = s.seq JOIN users u ON u.id = $1
                        LEFT JOIN tool_calls k ON k.id = e.about
                   WHERE s.place = 1 OR s.total <= $4 ORDER BY e.seq"#,
                user.0,
                after,
                limit,
                limits::READ_EVENTS_MAX_BYTES as i64,
            )
            .fetch_all(&self.pool)
            .await?;
            let more = rows.last().is_some_and(|row| row.more);
            let whole = rows
                .into_iter()
                .map(|row| stored_events::whole_feed(row.seq, &row.payload, row.about.map(|_| row.input)));
            let events = whole.collect::<Result<_>>()?;
            Ok((events, more))
        })
        .await
    }

    /// Where the logs of many chats end, in one query.
    #[boxed]
    pub async fn last_seqs(&self, chats: &[ChatId]) -> Result<Vec<(ChatId, i64)>> {
        let ids: Vec<Uuid> = chats.iter().map(|chat| chat.0).collect();
        self.run("last_seqs", async || {
            let rows =
                sqlx::query!("SELECT id, last_seq FROM chats WHERE id = ANY($1)", &ids).fetch_all(&self.pool).await?;
            Ok(rows.into_iter().map(|row| (ChatId(row.id), row.last_seq)).collect())
        })
        .await
    }

    #[boxed]
    pub async fn feed_seqs(&self, users: &[UserId]) -> Result<Vec<(UserId, i64)>> {
        let ids: Vec<Uuid> = users.iter().map(|user| user.0).collect();
        self.run("feed_seqs", async || {
            let rows =
                sqlx::query!("SELECT id, feed_seq FROM users WHERE id = ANY($1)", &ids).fetch_all(&self.pool).await?;
            Ok(rows.into_iter().map(|row| (UserId(row.id), row.feed_seq)).collect())
        })
        .await
    }

    /// The chat as of one moment.
    #[boxed]
    pub async fn snapshot(&self, user: UserId, chat: ChatId) -> Result<pb::ChatSnapshot> {
        self.run("snapshot", async || self.snapshot_once(user, chat).await).await
    }

    async fn snapshot_once(&self, user: UserId, chat: ChatId) -> Result<pb::ChatSnapshot> {
        let mut tx = self.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
        let row = sqlx::query_as!(
            ChatRow,
            r#"SELECT id, user_id, project_id, worktree_id, daemon_id, root_id, title, model, mode, last_seq, last_ordinal,
                      archived_at, created_at, updated_at, now() AS "now!"
               FROM chats WHERE id = $1 AND user_id = $2"#,
            chat.0,
            user.0,
        )
        .fetch_optional(&mut *tx)
        .await?
        .ok_or(StoreError::not_found("chat"))?;
        let log_epoch = sqlx::query_scalar!("SELECT log_epoch FROM log_state").fetch_one(&mut *tx).await?;
        let (count, bytes) = (limits::SNAPSHOT_MESSAGES_MAX, limits::SNAPSHOT_MESSAGES_MAX_BYTES);
        let mut messages = newest_for_people(&mut *tx, chat.0, 0, count, bytes).await?;
        messages.reverse();
        let open = turns!(SELECT "WHERE t.chat_id = $1 AND t.ended_at IS NULL ORDER BY t.ordinal", chat.0)
            .fetch_all(&mut *tx)
            .await?;
        // With the open calls those of an open turn's newest round: their cards are on the screen. Each half has an index.
        let calls = calls!(
            SELECT "WHERE c.id IN (
                        SELECT k.id FROM tool_calls k WHERE k.chat_id = $1 AND k.ended_at IS NULL
                        UNION SELECT k.id FROM turns o JOIN tool_calls k ON k.turn_id = o.id AND k.iteration = o.iteration - 1
                        WHERE o.chat_id = $1 AND o.ended_at IS NULL)
                    ORDER BY t.ended_at IS NOT NULL, t.ordinal, c.iteration, c.index LIMIT $2",
            chat.0,
            limits::SNAPSHOT_CALLS_MAX,
        )
        .fetch_all(&mut *tx)
        .await?;
        let mut calls: Vec<_> = calls.iter().map(|call| (call.changed(), call.is_open() && !call.turn_ended)).collect();
        fit_calls(&mut calls);
        let approvals = sqlx::query_as!(
            ApprovalRow,
            "SELECT a.id, a.chat_id, a.turn_id, a.tool_call_id, a.tool, c.input, a.status, a.scope, a.created_at, a.decided_at
             FROM approvals a JOIN tool_calls c ON c.id = a.tool_call_id
             WHERE c.chat_id = $1 AND c.ended_at IS NULL AND a.status = 'pending' ORDER BY a.id",
            chat.0,
        )
        .fetch_all(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(pb::ChatSnapshot {
            seq: row.last_seq,
            chat: Some(row.to_pb()),
            log_epoch,
            messages: messages.iter().map(MessageRow::to_pb).collect::<Result<_>>()?,
            turns: open.iter().map(TurnRow::to_pb).collect(),
            tool_calls: calls.into_iter().map(|(call, _)| call).collect(),
            approvals: approvals.iter().map(ApprovalRow::to_pb).collect(),
            started: open.iter().filter_map(TurnRow::started).collect(),
        })
    }
}
