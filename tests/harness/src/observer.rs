//! Reads Postgres by itself, over its own connections and past every proxy: what a test believes of the system must not
//! come from the code it tests.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use parking_lot::Mutex;
use prost::Message as _;
use reliant_types::{ChatId, TurnId, boxed, pb};
use sqlx::{
    PgPool, Postgres, Row as _, Transaction,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use uuid::Uuid;

/// A look that takes longer tells of another moment than the one asked about.
const LOOK_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct Observer {
    pool: PgPool,
    /// Chats whose row a test holds, once per hold.
    held: Arc<Mutex<Vec<ChatId>>>,
}

/// A chat for which work was requested that no worker has looked at yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnseenChat {
    pub chat: ChatId,
    pub wanted: i64,
    pub seen: i64,
    /// A test holds its row, so no worker can write that it looked.
    pub held: bool,
}

/// A turn's rows at one moment.
#[derive(Debug, Clone, Default)]
pub struct TurnLook {
    pub status: String,
    pub iteration: i32,
    pub fence: i64,
    pub live: bool,
    /// The worker that streams, as `host:port` of its admin listener.
    pub producer: Option<String>,
    /// Of the chat: something to do was recorded that no worker has looked at.
    pub unseen: bool,
    pub older_open: bool,
    pub ended: bool,
    pub error_code: String,
    pub error_message: String,
    pub approvals_pending: Vec<Uuid>,
    /// What its clock has left, as it was when the clock stopped.
    pub deadline_left_ms: i64,
    /// Its clock runs.
    pub clock_runs: bool,
    pub calls: Vec<CallLook>,
}

#[derive(Debug, Clone, Default)]
pub struct CallLook {
    pub id: Uuid,
    pub turn: Uuid,
    pub user: Uuid,
    pub daemon: Option<Uuid>,
    pub iteration: i32,
    pub index: i32,
    pub status: String,
    pub generation: i64,
    pub input: String,
    pub unknown_cause: String,
    pub error_code: String,
    pub result: String,
    /// Unix milliseconds.
    pub dispatched_ms: Option<i64>,
    pub ended_ms: Option<i64>,
}

/// A row that is held: whoever wants to write it waits.
pub struct Hold {
    tx: Transaction<'static, Postgres>,
    pid: i32,
    _listed: ListedHold,
}

/// The chat's entry among those that are held, for as long as it lives.
struct ListedHold {
    chat: ChatId,
    held: Arc<Mutex<Vec<ChatId>>>,
}

impl ListedHold {
    fn new(chat: ChatId, held: Arc<Mutex<Vec<ChatId>>>) -> Self {
        held.lock().push(chat);
        Self { chat, held }
    }
}

impl Drop for ListedHold {
    fn drop(&mut self) {
        let mut held = self.held.lock();
        if let Some(at) = held.iter().position(|chat| *chat == self.chat) {
            held.swap_remove(at);
        }
    }
}

impl Hold {
    /// Lets the row go.
    #[boxed]
    pub async fn release(self) {
        // The server may have died meanwhile, which releases as well.
        let _ = tokio::time::timeout(LOOK_PATIENCE, self.tx.rollback()).await;
    }
}

/// A daemon's lease as it is stored.
#[derive(Debug, Clone, Copy)]
pub struct LeaseLook {
    /// The daemon's process that has it.
    pub instance: i64,
    pub epoch: i64,
}

/// A chat's log as it is stored.
#[derive(Debug, Clone)]
pub struct LogLook {
    pub id: Uuid,
    pub counter: i64,
    pub events: i64,
    pub first: i64,
    pub last: i64,
}

impl LogLook {
    pub fn is_contiguous(&self) -> bool {
        self.events == self.counter && (self.events == 0 || (self.first == 1 && self.last == self.counter))
    }
}

fn call(row: &sqlx::postgres::PgRow) -> Result<CallLook> {
    Ok(CallLook {
        id: row.try_get("id")?,
        turn: row.try_get("turn_id")?,
        user: row.try_get("user_id")?,
        daemon: row.try_get("daemon_id")?,
        iteration: row.try_get("iteration")?,
        index: row.try_get("index")?,
        status: row.try_get("status")?,
        generation: row.try_get("generation")?,
        input: row.try_get("input")?,
        unknown_cause: row.try_get("unknown_cause")?,
        error_code: row.try_get("error_code")?,
        result: row.try_get("result")?,
        dispatched_ms: row.try_get("dispatched_ms")?,
        ended_ms: row.try_get("ended_ms")?,
    })
}

const CALL_COLUMNS: &str = "id, turn_id, user_id, daemon_id, iteration, index, status, generation, input, unknown_cause, \
     error_code, result, (extract(epoch FROM dispatched_at) * 1000)::bigint AS dispatched_ms, \
     (extract(epoch FROM ended_at) * 1000)::bigint AS ended_ms";

impl Observer {
    #[boxed]
    pub async fn connect(url: &str) -> Result<Self> {
        let options: PgConnectOptions = url.parse()?;
        let options = options.application_name("observer").statement_cache_capacity(64);
        let pool =
            PgPoolOptions::new().max_connections(16).acquire_timeout(LOOK_PATIENCE).connect_with(options).await?;
        Ok(Self { pool, held: Arc::default() })
    }

    /// The turn now; an error while Postgres is away.
    #[boxed]
    pub async fn turn(&self, turn: TurnId) -> Result<TurnLook> {
        tokio::time::timeout(LOOK_PATIENCE, self.look(turn)).await.context("Postgres did not answer")?
    }

    async fn look(&self, turn: TurnId) -> Result<TurnLook> {
        let row = sqlx::query(
            "SELECT t.status, t.iteration, t.fence, t.live_message_id IS NOT NULL AS live, i.address AS producer,
                    c.wanted > c.seen AS unseen, t.ended_at IS NOT NULL AS ended, t.error_code, t.error_message,
                    t.deadline_left_ms, t.deadline_at IS NOT NULL AS clock_runs,
                    EXISTS (SELECT 1 FROM turns o WHERE o.chat_id = t.chat_id AND o.ordinal < t.ordinal
                            AND o.ended_at IS NULL) AS older_open,
                    ARRAY(SELECT a.id FROM approvals a WHERE a.turn_id = t.id AND a.status = 'pending') AS approvals
             FROM turns t JOIN chats c ON c.id = t.chat_id LEFT JOIN instances i ON i.id = t.producer WHERE t.id = $1",
        )
        .bind(turn.0)
        .fetch_one(&self.pool)
        .await?;
        let statement = format!("SELECT {CALL_COLUMNS} FROM tool_calls WHERE turn_id = $1 ORDER BY iteration, index");
        let calls = sqlx::query(sqlx::AssertSqlSafe(statement)).bind(turn.0).fetch_all(&self.pool).await?;
        Ok(TurnLook {
            status: row.try_get("status")?,
            iteration: row.try_get("iteration")?,
            fence: row.try_get("fence")?,
            live: row.try_get("live")?,
            producer: row.try_get("producer")?,
            unseen: row.try_get("unseen")?,
            older_open: row.try_get("older_open")?,
            ended: row.try_get("ended")?,
            error_code: row.try_get("error_code")?,
            error_message: row.try_get("error_message")?,
            approvals_pending: row.try_get("approvals")?,
            deadline_left_ms: row.try_get("deadline_left_ms")?,
            clock_runs: row.try_get("clock_runs")?,
            calls: calls.iter().map(call).collect::<Result<_>>()?,
        })
    }

    /// The gateway that holds the daemon's stream, as `host:port`.
    #[boxed]
    pub async fn gateway_of(&self, daemon: &str) -> Result<Option<String>> {
        let query = sqlx::query_scalar(
            "SELECT i.address FROM daemon_leases l JOIN instances i ON i.id = l.gateway_id
             WHERE l.daemon_id = $1::uuid AND l.expires_at > clock_timestamp()",
        );
        let asked = query.bind(daemon.to_owned()).fetch_optional(&self.pool);
        Ok(tokio::time::timeout(LOOK_PATIENCE, asked).await.context("Postgres did not answer")??)
    }

    #[boxed]
    pub async fn lease(&self, daemon: &str) -> Result<Option<LeaseLook>> {
        let query = sqlx::query("SELECT instance, epoch FROM daemon_leases WHERE daemon_id = $1::uuid");
        let row = query.bind(daemon.to_owned()).fetch_optional(&self.pool).await?;
        row.map(|row| Ok(LeaseLook { instance: row.try_get("instance")?, epoch: row.try_get("epoch")? })).transpose()
    }

    /// So much time goes by in what is stored of chats, turns, calls and leases: the only thing here that is written.
    #[boxed]
    pub async fn age(&self, by: Duration) -> Result<()> {
        for statement in [
            "UPDATE daemon_leases SET granted_at = granted_at - $1, expires_at = expires_at - $1",
            "UPDATE tool_calls SET created_at = created_at - $1, dispatched_at = dispatched_at - $1, started_at = started_at - $1,
                    not_before = not_before - $1 WHERE ended_at IS NULL",
            "UPDATE turns SET created_at = created_at - $1, started_at = started_at - $1, deadline_at = deadline_at - $1
             WHERE ended_at IS NULL",
            "UPDATE chats SET wanted_at = wanted_at - $1, relayed_at = relayed_at - $1, looked_at = looked_at - $1",
        ] {
            sqlx::query(statement).bind(by).execute(&self.pool).await?;
        }
        Ok(())
    }

    /// [`Observer::age`], and with it all else that waits or works: people's approvals, places, retries and processes.
    #[boxed]
    pub async fn age_all(&self, by: Duration) -> Result<()> {
        self.age(by).await?;
        for statement in [
            "UPDATE approvals SET created_at = created_at - $1 WHERE status = 'pending'",
            "UPDATE turns SET placed_at = placed_at - $1, held_at = held_at - $1, retry_at = retry_at - $1
             WHERE ended_at IS NULL",
            "UPDATE instances SET started_at = started_at - $1, seen_at = seen_at - $1",
        ] {
            sqlx::query(statement).bind(by).execute(&self.pool).await?;
        }
        Ok(())
    }

    /// Takes the chat's row, as a writer would, so that the next one waits.
    #[boxed]
    pub async fn hold_chat(&self, chat: ChatId) -> Result<Hold> {
        let listed = ListedHold::new(chat, self.held.clone());
        let held = async {
            let mut tx = self.pool.begin().await?;
            sqlx::query("SELECT 1 FROM chats WHERE id = $1 FOR NO KEY UPDATE").bind(chat.0).fetch_one(&mut *tx).await?;
            let pid = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *tx).await?;
            anyhow::Ok(Hold { tx, pid, _listed: listed })
        };
        tokio::time::timeout(LOOK_PATIENCE, held).await.context("the row was not to be had")?
    }

    /// Local ports, at Postgres' peers, of the transactions that wait for the held row.
    #[boxed]
    pub async fn waiting_for(&self, hold: &Hold) -> Result<Vec<u16>> {
        let query = sqlx::query_scalar::<_, i32>(
            "SELECT client_port FROM pg_stat_activity
             WHERE wait_event_type = 'Lock' AND $1 = ANY(pg_blocking_pids(pid)) AND client_port > 0",
        );
        let ports = query.bind(hold.pid).fetch_all(&self.pool);
        let ports = tokio::time::timeout(LOOK_PATIENCE, ports).await.context("Postgres did not answer")??;
        Ok(ports.into_iter().filter_map(|port| u16::try_from(port).ok()).collect())
    }

    // ---- what is watched while a test runs

    /// Chats with `wanted > seen` now; an error while Postgres is away.
    #[boxed]
    pub async fn unseen_chats(&self) -> Result<Vec<UnseenChat>> {
        // Read before the rows: a hold that ends meanwhile may be the reason for what they say.
        let held = self.held.lock().clone();
        let query = sqlx::query("SELECT id, wanted, seen FROM chats WHERE wanted > seen").fetch_all(&self.pool);
        let rows = tokio::time::timeout(LOOK_PATIENCE, query).await.context("Postgres did not answer")??;
        let unseen = rows.iter().map(|row| {
            let chat = ChatId(row.try_get("id")?);
            Ok(UnseenChat {
                chat,
                wanted: row.try_get("wanted")?,
                seen: row.try_get("seen")?,
                held: held.contains(&chat),
            })
        });
        unseen.collect()
    }

    /// The chat's row, its newest turns and their tool calls, as JSON for people.
    #[boxed]
    pub async fn chat_rows(&self, chat: ChatId) -> Result<String> {
        let query = sqlx::query_scalar(
            "WITH newest AS (SELECT * FROM turns WHERE chat_id = $1 ORDER BY ended_at IS NULL DESC, ordinal DESC LIMIT 20)
             SELECT jsonb_pretty(jsonb_build_object(
                 'now', clock_timestamp(),
                 'chat', (SELECT to_jsonb(c) FROM chats c WHERE c.id = $1),
                 'turns', (SELECT jsonb_agg(to_jsonb(n) ORDER BY n.ordinal) FROM newest n),
                 'tool_calls', (SELECT jsonb_agg(to_jsonb(k)) FROM tool_calls k JOIN newest n ON n.id = k.turn_id)))",
        );
        let rows = query.bind(chat.0).fetch_one(&self.pool);
        Ok(tokio::time::timeout(LOOK_PATIENCE, rows).await.context("Postgres did not answer")??)
    }

    /// Notices of the chat that say that a prompt was shortened: one per turn in which it was.
    #[boxed]
    pub async fn shortened_turns(&self, chat: ChatId) -> Result<i64> {
        let query = sqlx::query_scalar(
            "SELECT count(DISTINCT turn_id) FROM messages
             WHERE chat_id = $1 AND role = 'notice' AND body LIKE '%outgrown the model''s window%'",
        );
        Ok(query.bind(chat.0).fetch_one(&self.pool).await?)
    }

    // ---- what is checked when all is over

    /// Turns that have not ended.
    #[boxed]
    pub async fn open_turns(&self) -> Result<Vec<Uuid>> {
        Ok(sqlx::query_scalar("SELECT id FROM turns WHERE ended_at IS NULL").fetch_all(&self.pool).await?)
    }

    #[boxed]
    pub async fn all_calls(&self) -> Result<Vec<CallLook>> {
        let statement = format!("SELECT {CALL_COLUMNS} FROM tool_calls ORDER BY created_at");
        let rows = sqlx::query(sqlx::AssertSqlSafe(statement)).fetch_all(&self.pool).await?;
        rows.iter().map(call).collect()
    }

    #[boxed]
    pub async fn chat_logs(&self) -> Result<Vec<LogLook>> {
        self.logs(
            "SELECT c.id, c.last_seq AS counter, count(e.seq) AS events, COALESCE(min(e.seq), 0) AS first,
                    COALESCE(max(e.seq), 0) AS last
             FROM chats c LEFT JOIN events e ON e.chat_id = c.id GROUP BY c.id",
        )
        .await
    }

    #[boxed]
    pub async fn user_logs(&self) -> Result<Vec<LogLook>> {
        self.logs(
            "SELECT u.id, u.feed_seq AS counter, count(e.seq) AS events, COALESCE(min(e.seq), 0) AS first,
                    COALESCE(max(e.seq), 0) AS last
             FROM users u LEFT JOIN user_events e ON e.user_id = u.id GROUP BY u.id",
        )
        .await
    }

    async fn logs(&self, statement: &'static str) -> Result<Vec<LogLook>> {
        let rows = sqlx::query(statement).fetch_all(&self.pool).await?;
        rows.iter()
            .map(|row| {
                Ok(LogLook {
                    id: row.try_get("id")?,
                    counter: row.try_get("counter")?,
                    events: row.try_get("events")?,
                    first: row.try_get("first")?,
                    last: row.try_get("last")?,
                })
            })
            .collect()
    }

    /// All events of a chat, in order: each state that its rows have been in. As stored: texts are in the rows.
    #[boxed]
    pub async fn events(&self, chat: ChatId) -> Result<Vec<pb::ChatEvent>> {
        let query = sqlx::query_scalar::<_, Vec<u8>>("SELECT payload FROM events WHERE chat_id = $1 ORDER BY seq");
        let rows = query.bind(chat.0).fetch_all(&self.pool).await?;
        rows.iter().map(|row| Ok(pb::ChatEvent::decode(row.as_slice())?)).collect()
    }

    /// All messages of a chat with their blocks, as (id, role, client message id, blocks).
    #[boxed]
    pub async fn messages(&self, chat: ChatId) -> Result<Vec<StoredMessage>> {
        let rows = sqlx::query(
            "SELECT m.id, m.role, m.turn_id, m.client_message_id, b.data
             FROM messages m LEFT JOIN content_blocks b ON b.message_id = m.id
             WHERE m.chat_id = $1 ORDER BY m.ordinal, b.position",
        )
        .bind(chat.0)
        .fetch_all(&self.pool)
        .await?;
        let mut messages: Vec<StoredMessage> = Vec::new();
        for row in rows {
            let id: Uuid = row.try_get("id")?;
            if messages.last().is_none_or(|last| last.id != id) {
                messages.push(StoredMessage {
                    id,
                    role: row.try_get("role")?,
                    turn: row.try_get("turn_id")?,
                    client_message_id: row.try_get("client_message_id")?,
                    blocks: Vec::new(),
                });
            }
            if let (Some(message), Some(data)) = (messages.last_mut(), row.try_get::<Option<Vec<u8>>, _>("data")?) {
                message.blocks.push(pb::ContentBlock::decode(data.as_slice())?);
            }
        }
        Ok(messages)
    }

    /// Status and error of every turn.
    #[boxed]
    pub async fn turns(&self) -> Result<Vec<(Uuid, String, String)>> {
        let rows = sqlx::query("SELECT id, status, error_code || ' ' || error_message AS error FROM turns");
        let rows = rows.fetch_all(&self.pool).await?;
        rows.iter().map(|row| Ok((row.try_get("id")?, row.try_get("status")?, row.try_get("error")?))).collect()
    }
}

#[derive(Debug, Clone)]
pub struct StoredMessage {
    pub id: Uuid,
    pub role: String,
    pub turn: Option<Uuid>,
    pub client_message_id: Option<String>,
    pub blocks: Vec<pb::ContentBlock>,
}
