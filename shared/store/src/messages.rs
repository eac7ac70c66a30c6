//! What people say: stored with the turn it asks for, once per client message id.

use reliant_types::{
    ChatId, Code, Failure, MessageId, TurnId, UserId, boxed, limits,
    pb::{self, chat_event::Kind, content_block::Block},
};
use std::time::Duration;
use uuid::Uuid;

use crate::{
    Committed, Result, SendMessage, Sent, Store, StoreError,
    chat_tx::{ChatTx, NewMessage},
    checks,
    pages::newest_for_people,
    rows::{ChatRow, MessageRow, turns},
};

/// When a full queue may have a place again.
const QUEUE_RETRY_AFTER: Duration = Duration::from_secs(5);

impl Store {
    /// Stores the message and its turn, which then runs, whatever dies. The same client message id in the same chat is one
    /// message: the first answer is given again.
    #[boxed]
    pub async fn send_message(&self, new: &SendMessage) -> Result<Committed<Sent>> {
        checks::message(&new.text, &new.client_message_id)?;
        self.run("send_message", async || match self.send_message_once(new).await {
            // Somebody sent it at the same time: what is stored is the answer.
            Err(StoreError::Duplicate { .. }) => self.send_message_once(new).await,
            sent => sent,
        })
        .await
    }

    async fn send_message_once(&self, new: &SendMessage) -> Result<Committed<Sent>> {
        let mut tx = self.begin().await?;
        // The counts are as of before a wait for the row: limits may be passed by a few, never by many.
        let row = sqlx::query!(
            r#"SELECT c.id, c.user_id, project_id, worktree_id, daemon_id, root_id, title, model, mode, last_seq, last_ordinal,
                      archived_at, c.created_at, updated_at, clock_timestamp() AS "now!", c.held_for IS NOT NULL AS "held!",
                      (SELECT m.id FROM messages m WHERE m.chat_id = $1 AND m.client_message_id = $3) AS earlier,
                      (SELECT count(*) FROM (SELECT FROM turns t WHERE t.chat_id = $1 AND t.ended_at IS NULL LIMIT $4) q)
                          AS "chat_open!",
                      (SELECT count(*) FROM (SELECT FROM turns t WHERE t.user_id = $2 AND t.ended_at IS NULL LIMIT $5) q)
                          AS "user_open!"
               FROM chats c WHERE c.id = $1 AND c.user_id = $2 FOR NO KEY UPDATE"#,
            new.chat.0,
            new.user.0,
            new.client_message_id,
            limits::CHAT_QUEUED_TURNS_MAX + 1,
            limits::USER_OPEN_TURNS_MAX,
        )
        .fetch_optional(&mut *tx)
        .await?
        .ok_or(StoreError::not_found("chat"))?;
        let stamped = Some(std::time::Instant::now());
        if let Some(earlier) = row.earlier {
            tx.rollback().await?;
            return self.sent_before(new, MessageId(earlier)).await;
        }
        if row.archived_at.is_some() {
            let text = "the chat is archived and takes no messages; take it out of the archive first";
            return Err(Failure::new(Code::ChatArchived, text).into());
        }
        if row.chat_open > limits::CHAT_QUEUED_TURNS_MAX {
            let text = "this chat has as many waiting messages as it may have; wait for some answers";
            return Err(Failure::new(Code::QueueFull, text).retry_after(QUEUE_RETRY_AFTER).into());
        }
        if row.user_open >= limits::USER_OPEN_TURNS_MAX {
            let text = "you have as many open turns as a user may have; wait for some to end";
            return Err(Failure::new(Code::QueueFull, text).retry_after(QUEUE_RETRY_AFTER).into());
        }
        let chat = ChatRow {
            id: row.id,
            user_id: row.user_id,
            project_id: row.project_id,
            worktree_id: row.worktree_id,
            daemon_id: row.daemon_id,
            root_id: row.root_id,
            title: row.title,
            model: row.model,
            mode: row.mode,
            last_seq: row.last_seq,
            last_ordinal: row.last_ordinal,
            archived_at: row.archived_at,
            created_at: row.created_at,
            updated_at: row.updated_at,
            now: row.now,
        };
        let mut tx = ChatTx::with(tx, chat);
        let message = MessageId::new();
        let (chat, now) = (tx.chat.clone(), tx.now);
        // The newest turn's number is read from an index, under the chat's lock. A turn that others of its chat are before
        // needs no place yet.
        let turn = turns!(
            RETURNING "WITH due AS MATERIALIZED (
                           SELECT NOT EXISTS (SELECT FROM turns o WHERE o.chat_id = $2 AND o.ended_at IS NULL) AS first
                       ), place AS MATERIALIZED (
                           SELECT first, CASE WHEN first THEN place_is_free($3, $10, $11, $12) END AS free FROM due
                       )
                       INSERT INTO turns AS t (id, chat_id, user_id, message_id, ordinal, status, traceparent, model, mode,
                                               deadline_left_ms, created_at, placed_at, held_at)
                       SELECT $1, $2, $3, $4, COALESCE((SELECT max(o.ordinal) FROM turns o WHERE o.chat_id = $2), 0) + 1,
                              'queued', $5, $6, $7, $8, $9::timestamptz, CASE WHEN place.free THEN $9::timestamptz END,
                              CASE WHEN NOT place.free THEN $9::timestamptz END
                       FROM place",
            TurnId::new().0,
            chat.id,
            chat.user_id,
            message.0,
            new.traceparent,
            chat.model,
            chat.mode,
            i64::try_from(new.deadline.as_millis()).unwrap_or(i64::MAX / 1000),
            now,
            self.places.room(),
            self.places.share(),
            self.places.most(),
        )
        .fetch_one(tx.conn())
        .await?;
        let message = tx.message(NewMessage {
            id: message,
            turn: turn.turn(),
            turn_ordinal: turn.ordinal,
            role: pb::Role::User,
            iteration: None,
            model: String::new(),
            usage: None,
            stop_reason: pb::StopReason::Unspecified,
            client_message_id: Some(new.client_message_id.clone()),
            blocks: vec![Block::Text(pb::TextBlock { text: new.text.clone() })],
        });
        tx.event(Kind::TurnChanged(turn.to_pb()));
        tx.touch();
        // Beyond the user's share nobody is woken: the chat is when it gets a place.
        if turn.held_at.is_some() {
            tx.hold(turn.created_at);
        } else if !row.held {
            tx.want(&turn.traceparent);
        }
        tx.commit(Sent { message, turn: turn.to_pb(), duplicate: false, stamped }).await
    }

    async fn sent_before(&self, new: &SendMessage, message: MessageId) -> Result<Committed<Sent>> {
        let message =
            self.messages_by(&[message.0]).await?.pop().ok_or(StoreError::Corrupt("a message that was there"))?;
        let turn = turns!(SELECT "WHERE t.id = $1", message.turn_id)
            .fetch_optional(&self.pool)
            .await?
            .ok_or(StoreError::Corrupt("a message without its turn"))?;
        let sent = Sent { message: message.to_pb()?, turn: turn.to_pb(), duplicate: true, stamped: None };
        Ok(Committed::nothing(new.user, sent))
    }

    async fn messages_by(&self, ids: &[Uuid]) -> Result<Vec<MessageRow>> {
        Ok(sqlx::query_as!(
            MessageRow,
            r#"SELECT m.id, m.chat_id, m.turn_id, m.ordinal, m.role, m.iteration, m.model, m.usage, m.stop_reason,
                      m.client_message_id, m.created_at, m.turn_ordinal, m.bytes,
                      ARRAY(SELECT b.data FROM content_blocks b WHERE b.message_id = m.id ORDER BY b.position) AS blocks
               FROM messages m WHERE m.id = ANY($1) ORDER BY m.ordinal"#,
            ids,
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// Oldest first, and whether there are older ones. `before_ordinal` 0: the newest. As many as fit one answer.
    #[boxed]
    pub async fn list_messages(
        &self,
        user: UserId,
        chat: ChatId,
        page_size: i32,
        before_ordinal: i32,
    ) -> Result<(Vec<pb::Message>, bool)> {
        let count = checks::page_size(page_size, 100, 500)?;
        if before_ordinal < 0 {
            return Err(Failure::field("before_ordinal", "before_ordinal is 0 or an ordinal of a message").into());
        }
        self.chat_access(user, chat).await?;
        self.run("list_messages", async || {
            let rows = newest_for_people(&self.pool, chat.0, before_ordinal, count, limits::PAGE_MAX_BYTES).await?;
            // Places in a chat begin with 1 and have no gaps.
            let more = rows.last().is_some_and(|oldest| oldest.ordinal > 1);
            let messages = rows.iter().rev().map(MessageRow::to_pb).collect::<Result<_>>()?;
            Ok((messages, more))
        })
        .await
    }
}
