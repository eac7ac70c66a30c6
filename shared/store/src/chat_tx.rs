//! A transaction that changes a chat. It holds the chat's row from its first statement on, gathers what is to be logged,
//! and writes messages, events and counters in its last statement: so the log is contiguous, and a user's row is held
//! for one statement only.

use chrono::{DateTime, Utc};
use prost::Message as _;
use reliant_types::{
    ApprovalId, ChatId, InstanceId, MessageId, ToolCallId, TurnId, UserId, boxed,
    pb::{self, chat_event::Kind, content_block::Block, feed_event::Kind as FeedKind},
    timestamp,
};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    Committed, Result, Store, StoreError, Wake,
    places::WORKER_SILENT_SECS,
    pool::Tx,
    rows::{ChatRow, clean, role_text, stop_text, usage_json},
    stored_events,
};

/// What names the chat.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Key {
    Chat(ChatId),
    Turn(TurnId),
    Call(ToolCallId),
    Approval(ApprovalId),
}

macro_rules! lock_chat {
    ($where:tt, $id:expr) => {
        sqlx::query_as!(
            ChatRow,
            r#"SELECT id, user_id, project_id, worktree_id, daemon_id, root_id, title, model, mode, last_seq, last_ordinal,
                      archived_at, created_at, updated_at, clock_timestamp() AS "now!"
               FROM chats "# + $where + " FOR NO KEY UPDATE",
            $id
        )
    };
}

/// A message that is written when the transaction ends.
pub(crate) struct NewMessage {
    pub id: MessageId,
    pub turn: TurnId,
    pub turn_ordinal: i32,
    pub role: pb::Role,
    pub iteration: Option<i32>,
    pub model: String,
    pub usage: Option<pb::Usage>,
    pub stop_reason: pb::StopReason,
    pub client_message_id: Option<String>,
    pub blocks: Vec<Block>,
}

#[derive(Default)]
struct Pending {
    ids: Vec<Uuid>,
    turns: Vec<Uuid>,
    ordinals: Vec<i32>,
    turn_ordinals: Vec<i32>,
    roles: Vec<String>,
    iterations: Vec<Option<i32>>,
    models: Vec<String>,
    usages: Vec<Option<serde_json::Value>>,
    stops: Vec<String>,
    client_ids: Vec<Option<String>>,
    bodies: Vec<String>,
    bytes: Vec<i32>,
    block_messages: Vec<Uuid>,
    block_positions: Vec<i32>,
    block_kinds: Vec<String>,
    block_data: Vec<Vec<u8>>,
}

pub(crate) struct ChatTx {
    tx: Tx,
    pub chat: ChatRow,
    /// The database's clock, once for all rows and events of this transaction.
    pub now: DateTime<Utc>,
    events: Vec<Kind>,
    feed: Vec<FeedKind>,
    messages: Pending,
    wake: Option<String>,
    hold: Hold,
    touched: bool,
}

/// What a transaction says of the chat's wait for a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    Unchanged,
    /// As of a turn that was accepted then. It is something to do that nobody is woken for.
    Held(DateTime<Utc>),
    Released,
}

impl ChatTx {
    /// Waits for its turn on the chat's row. None: there is no such chat.
    #[boxed]
    pub async fn open(store: &Store, key: Key) -> Result<Option<Self>> {
        let mut tx = store.begin().await?;
        let chat = match key {
            Key::Chat(id) => lock_chat!("WHERE id = $1", id.0).fetch_optional(&mut *tx).await,
            Key::Turn(id) => {
                lock_chat!("WHERE id = (SELECT chat_id FROM turns WHERE turns.id = $1)", id.0)
                    .fetch_optional(&mut *tx)
                    .await
            }
            Key::Call(id) => {
                lock_chat!("WHERE id = (SELECT chat_id FROM tool_calls WHERE tool_calls.id = $1)", id.0)
                    .fetch_optional(&mut *tx)
                    .await
            }
            Key::Approval(id) => {
                lock_chat!("WHERE id = (SELECT chat_id FROM approvals WHERE approvals.id = $1)", id.0)
                    .fetch_optional(&mut *tx)
                    .await
            }
        }?;
        Ok(chat.map(|chat| Self::with(tx, chat)))
    }

    /// On behalf of a person, who must own the chat. `entity` is what that person asked for.
    #[boxed]
    pub async fn open_owned(store: &Store, user: UserId, key: Key, entity: &'static str) -> Result<Self> {
        match Self::open(store, key).await? {
            Some(tx) if tx.chat.user_id == user.0 => Ok(tx),
            _ => Err(StoreError::not_found(entity)),
        }
    }

    /// For a caller that has locked the row by a statement of its own.
    pub fn with(tx: Tx, chat: ChatRow) -> Self {
        let now = chat.now;
        Self {
            tx,
            chat,
            now,
            events: Vec::new(),
            feed: Vec::new(),
            messages: Pending::default(),
            wake: None,
            hold: Hold::Unchanged,
            touched: false,
        }
    }

    pub fn conn(&mut self) -> &mut PgConnection {
        &mut self.tx
    }

    pub fn event(&mut self, kind: Kind) {
        self.events.push(kind);
    }

    pub fn feed(&mut self, kind: FeedKind) {
        self.feed.push(kind);
    }

    /// The chat's workflow has something to do.
    pub fn want(&mut self, traceparent: &str) {
        self.wake = Some(traceparent.to_owned());
    }

    /// The chat's oldest open turn, accepted then, has something to do and no place to do it.
    pub fn hold(&mut self, accepted: DateTime<Utc>) {
        self.hold = Hold::Held(accepted);
    }

    /// The chat does not wait for a place, or no longer.
    pub fn release_hold(&mut self) {
        self.hold = Hold::Released;
    }

    /// The chat moves to the top of its owner's list.
    pub fn touch(&mut self) {
        self.touched = true;
        self.chat.updated_at = self.now;
    }

    /// Logs the chat as it is after the caller's change, in both feeds.
    pub fn chat_changed(&mut self) {
        let chat = pb::Chat { last_seq: self.next_seq(), ..self.chat.to_pb() };
        self.event(Kind::ChatChanged(chat.clone()));
        self.feed(FeedKind::ChatChanged(chat));
    }

    pub fn approval_changed(&mut self, approval: pb::Approval) {
        self.event(Kind::ApprovalChanged(approval.clone()));
        self.feed(FeedKind::ApprovalChanged(approval));
    }

    fn next_seq(&self) -> i64 {
        self.chat.last_seq + self.events.len() as i64 + 1
    }

    /// Gives the message its place, logs it, and writes it when the transaction ends.
    pub fn message(&mut self, new: NewMessage) -> pb::Message {
        self.chat.last_ordinal += 1;
        let blocks: Vec<pb::ContentBlock> =
            (0..).zip(new.blocks).map(|(position, block)| pb::ContentBlock { position, block: Some(block) }).collect();
        let rows = &mut self.messages;
        rows.ids.push(new.id.0);
        rows.turns.push(new.turn.0);
        rows.ordinals.push(self.chat.last_ordinal);
        rows.turn_ordinals.push(new.turn_ordinal);
        rows.roles.push(role_text(new.role).to_owned());
        rows.iterations.push(new.iteration);
        rows.models.push(new.model.clone());
        rows.usages.push(new.usage.as_ref().map(usage_json));
        rows.stops.push(stop_text(new.stop_reason).to_owned());
        rows.client_ids.push(new.client_message_id.clone());
        rows.bodies.push(body(&blocks));
        let bytes: usize = blocks.iter().map(prost::Message::encoded_len).sum();
        rows.bytes.push(i32::try_from(bytes).unwrap_or(i32::MAX));
        for block in &blocks {
            rows.block_messages.push(new.id.0);
            rows.block_positions.push(block.position);
            rows.block_kinds.push(kind(block).to_owned());
            rows.block_data.push(block.encode_to_vec());
        }
        let message = pb::Message {
            id: new.id.to_string(),
            chat_id: self.chat.id.to_string(),
            turn_id: new.turn.to_string(),
            ordinal: self.chat.last_ordinal,
            role: new.role as i32,
            iteration: new.iteration.unwrap_or_default(),
            model: new.model,
            blocks,
            usage: new.usage,
            stop_reason: new.stop_reason as i32,
            client_message_id: new.client_message_id.unwrap_or_default(),
            created_at: Some(timestamp(self.now)),
        };
        self.event(Kind::MessageCommitted(message.clone()));
        message
    }

    /// Nothing was changed: lets go of the row.
    pub async fn nothing<T>(self, value: T) -> Result<Committed<T>> {
        let user = self.chat.user();
        self.tx.rollback().await?;
        Ok(Committed::nothing(user, value))
    }

    /// Writes what was gathered and commits.
    pub async fn commit<T>(self, value: T) -> Result<Committed<T>> {
        Ok(self.write().await?.map(|()| value))
    }

    #[boxed]
    async fn write(mut self) -> Result<Committed<()>> {
        let (user, chat) = (self.chat.user(), self.chat.chat());
        let mut events: Vec<pb::ChatEvent> = (self.chat.last_seq + 1..)
            .zip(self.events)
            .map(|(seq, kind)| pb::ChatEvent {
                chat_id: self.chat.id.to_string(),
                seq,
                time: Some(timestamp(self.now)),
                kind: Some(kind),
            })
            .collect();
        let mut feed: Vec<pb::FeedEvent> = self
            .feed
            .into_iter()
            .map(|kind| pb::FeedEvent { seq: 0, time: Some(timestamp(self.now)), kind: Some(kind) })
            .collect();
        let rows = self.messages;
        let held_for = match self.hold {
            Hold::Held(accepted) => Some(accepted),
            Hold::Unchanged | Hold::Released => None,
        };
        let wanted = i64::from(self.wake.is_some() || held_for.is_some());
        let (mut pending, mut burst) = (false, None);
        if !events.is_empty() || !feed.is_empty() || wanted > 0 || self.touched {
            let kinds: Vec<String> = events.iter().map(|event| event_kind(event).to_owned()).collect();
            let (payloads, about): (Vec<Vec<u8>>, Vec<Option<Uuid>>) = events.iter().map(stored_events::stored).unzip();
            let feed_kinds: Vec<String> = feed.iter().map(|event| feed_kind(event).to_owned()).collect();
            let (feed_payloads, feed_about): (Vec<Vec<u8>>, Vec<Option<Uuid>>) =
                feed.iter().map(stored_events::stored_feed).unzip();
            let written = sqlx::query!(
                r#"
                WITH before AS (
                    -- Whether a wake is under way already, and the worker that has a burst of the chat.
                    SELECT o.wanted > o.seen AND o.held_for IS NULL AS pending, i.id AS burst
                    FROM chats o LEFT JOIN instances i ON i.id = o.burst_by AND i.seen_at > now() - $30 * interval '1 second'
                    WHERE o.id = $1
                ), c AS (
                    UPDATE chats SET last_seq = last_seq + $2, last_ordinal = last_ordinal + $3, wanted = wanted + $4,
                           wanted_at = CASE WHEN $4 > 0 AND NOT before.pending THEN now() ELSE wanted_at END,
                           woken_at = CASE WHEN $4 > 0 AND NOT before.pending THEN now() ELSE woken_at END,
                           wake_attempts = CASE WHEN $4 > 0 AND NOT before.pending THEN 0 ELSE wake_attempts END,
                           updated_at = CASE WHEN $5 THEN $6 ELSE updated_at END,
                           held_for = CASE WHEN $28 THEN $29::timestamptz ELSE held_for END
                    FROM before WHERE id = $1 RETURNING user_id, last_seq
                ), m AS (
                    INSERT INTO messages (id, chat_id, turn_id, ordinal, turn_ordinal, role, iteration, model, usage,
                                          stop_reason, client_message_id, body, bytes, created_at)
                    SELECT id, $1, turn_id, ordinal, turn_ordinal, role, iteration, model, usage, stop, client_id, body, bytes, $6
                    FROM UNNEST($7::uuid[], $8::uuid[], $9::int[], $10::int[], $11::text[], $12::int[], $13::text[],
                                $14::jsonb[], $15::text[], $16::text[], $17::text[], $27::int[])
                         AS u (id, turn_id, ordinal, turn_ordinal, role, iteration, model, usage, stop, client_id, body, bytes)
                ), b AS (
                    INSERT INTO content_blocks (message_id, position, kind, data)
                    SELECT * FROM UNNEST($18::uuid[], $19::int[], $20::text[], $21::bytea[])
                ), e AS (
                    INSERT INTO events (chat_id, seq, kind, payload, about, created_at)
                    SELECT $1, c.last_seq - $2 + u.n, u.kind, u.payload, u.about, $6
                    FROM c, UNNEST($22::text[], $23::bytea[], $31::uuid[]) WITH ORDINALITY AS u (kind, payload, about, n)
                ), f AS (
                    UPDATE users SET feed_seq = feed_seq + $24 FROM c WHERE users.id = c.user_id AND $24 > 0
                    RETURNING users.id, users.feed_seq
                ), g AS (
                    INSERT INTO user_events (user_id, seq, kind, payload, about, created_at)
                    SELECT f.id, f.feed_seq - $24 + u.n, u.kind, u.payload, u.about, $6
                    FROM f, UNNEST($25::text[], $26::bytea[], $32::uuid[]) WITH ORDINALITY AS u (kind, payload, about, n)
                )
                SELECT c.last_seq AS "last_seq!", (SELECT f.feed_seq FROM f) AS feed_seq,
                       before.pending AS "pending!", before.burst AS "burst?"
                FROM c, before
                "#,
                self.chat.id,
                events.len() as i64,
                rows.ids.len() as i32,
                wanted,
                self.touched,
                self.now,
                &rows.ids,
                &rows.turns,
                &rows.ordinals,
                &rows.turn_ordinals,
                &rows.roles,
                &rows.iterations as &[Option<i32>],
                &rows.models,
                &rows.usages as &[Option<serde_json::Value>],
                &rows.stops,
                &rows.client_ids as &[Option<String>],
                &rows.bodies,
                &rows.block_messages,
                &rows.block_positions,
                &rows.block_kinds,
                &rows.block_data,
                &kinds,
                &payloads,
                feed.len() as i64,
                &feed_kinds,
                &feed_payloads,
                &rows.bytes,
                self.hold != Hold::Unchanged,
                held_for,
                WORKER_SILENT_SECS,
                &about as &[Option<Uuid>],
                &feed_about as &[Option<Uuid>],
            )
            .fetch_one(&mut *self.tx)
            .await?;
            (pending, burst) = (written.pending, written.burst.map(InstanceId));
            let first = written.last_seq - events.len() as i64 + 1;
            for (seq, event) in (first..).zip(&mut events) {
                event.seq = seq;
            }
            let first = written.feed_seq.unwrap_or_default() - feed.len() as i64 + 1;
            for (seq, event) in (first..).zip(&mut feed) {
                event.seq = seq;
            }
        }
        self.tx.commit().await?;
        // One wake is enough for all that is wanted until somebody looks. A burst is told of each: it may wait for this one.
        let wake = self.wake.filter(|_| burst.is_some() || !pending);
        let wake = wake.map(|traceparent| Wake { chat, user, traceparent, burst });
        Ok(Committed { value: (), user, events, feed, wake })
    }
}

/// Logs to a user's feed where no chat is concerned. To be called last: it holds the user's row.
pub(crate) async fn log_feed(tx: &mut PgConnection, user: UserId, kinds: Vec<FeedKind>) -> Result<Vec<pb::FeedEvent>> {
    if kinds.is_empty() {
        return Ok(Vec::new());
    }
    let now = Utc::now();
    let mut feed: Vec<pb::FeedEvent> =
        kinds.into_iter().map(|kind| pb::FeedEvent { seq: 0, time: Some(timestamp(now)), kind: Some(kind) }).collect();
    let names: Vec<String> = feed.iter().map(|event| feed_kind(event).to_owned()).collect();
    let payloads: Vec<Vec<u8>> = feed.iter().map(|event| event.encode_to_vec()).collect();
    let last = sqlx::query_scalar!(
        r#"
        WITH f AS (
            UPDATE users SET feed_seq = feed_seq + $2 WHERE id = $1 RETURNING id, feed_seq
        ), g AS (
            INSERT INTO user_events (user_id, seq, kind, payload, created_at)
            SELECT f.id, f.feed_seq - $2 + u.n, u.kind, u.payload, $5
            FROM f, UNNEST($3::text[], $4::bytea[]) WITH ORDINALITY AS u (kind, payload, n)
        )
        SELECT feed_seq AS "seq!" FROM f
        "#,
        user.0,
        feed.len() as i64,
        &names,
        &payloads,
        now,
    )
    .fetch_optional(tx)
    .await?
    .ok_or(StoreError::not_found("user"))?;
    let first = last - feed.len() as i64 + 1;
    for (seq, event) in (first..).zip(&mut feed) {
        event.seq = seq;
    }
    Ok(feed)
}

/// The text that a search finds.
fn body(blocks: &[pb::ContentBlock]) -> String {
    let mut body = String::new();
    for block in blocks {
        if let Some(Block::Text(text)) = &block.block {
            if !body.is_empty() {
                body.push('\n');
            }
            body.push_str(&text.text);
        }
    }
    clean(&body)
}

fn kind(block: &pb::ContentBlock) -> &'static str {
    match &block.block {
        Some(Block::Text(_)) | None => "text",
        Some(Block::Thinking(_)) => "thinking",
        Some(Block::ToolUse(_)) => "tool_use",
        Some(Block::ToolResult(_)) => "tool_result",
        Some(Block::Image(_)) => "image",
    }
}

fn event_kind(event: &pb::ChatEvent) -> &'static str {
    match &event.kind {
        Some(Kind::MessageCommitted(_)) => "message_committed",
        Some(Kind::MessageStarted(_)) => "message_started",
        Some(Kind::TurnChanged(_)) => "turn_changed",
        Some(Kind::ToolCallChanged(_)) => "tool_call_changed",
        Some(Kind::ApprovalChanged(_)) => "approval_changed",
        Some(Kind::ChatChanged(_)) => "chat_changed",
        None => "",
    }
}

fn feed_kind(event: &pb::FeedEvent) -> &'static str {
    match &event.kind {
        Some(FeedKind::ChatChanged(_)) => "chat_changed",
        Some(FeedKind::ApprovalChanged(_)) => "approval_changed",
        Some(FeedKind::DaemonChanged(_)) => "daemon_changed",
        None => "",
    }
}
