//! What the workers' relay looks for: chats that were to be woken and that nobody has looked at, and things that have been
//! open for long. Any number of workers look at once; each finds others.

use std::time::Duration;

use reliant_types::{ChatId, DaemonId, ToolCallId, UserId, boxed, pb::chat_event::Kind};
use uuid::Uuid;

use crate::{
    CancelCall, Committed, Result, Store, StoreError, Unseen, Wake,
    chat_tx::{ChatTx, Key},
    places::WORKER_SILENT_SECS,
    rows::turns,
};

/// Candidates that are ranked for fairness.
const WINDOW: i64 = 2000;
/// The relay's wait between wakes of one chat grows up to so many times the first one.
const BACKOFF_FACTOR_MAX: f64 = 8.0;
/// People told at one time why their turn stands.
const STANDING_MAX: i64 = 50;
const NO_WORKER: &str = "no worker is up; the turn goes on as soon as one is";
const BUSY: &str = "no worker has taken it up yet: they are busy, or cannot reach Temporal; the turn goes on by itself";
/// Unseen chats are counted up to here.
const UNSEEN_COUNT_MAX: i64 = 10_000;
/// An open turn is looked at again this often, if nothing else wakes it.
const STALE_AFTER_SECS: f64 = 20.0;
/// One that waits for a person or a daemon, which wake it themselves.
const WAITING_AFTER_SECS: f64 = 300.0;
/// A cancel that was not answered by a result is sent again.
const CANCEL_AGAIN_SECS: f64 = 3.0;

/// A chat that a statement wants something of.
pub(crate) struct WokenRow {
    pub id: Uuid,
    pub user_id: Uuid,
    pub traceparent: String,
}

impl From<WokenRow> for Wake {
    /// Signalled, whether a burst is open or not: what the relay finds is what a burst has missed.
    fn from(row: WokenRow) -> Self {
        Wake { chat: ChatId(row.id), user: UserId(row.user_id), traceparent: row.traceparent, burst: None }
    }
}

impl Store {
    /// Chats with `wanted > seen` that do not wait for a place and that were not woken for so long; after some times for
    /// longer each time, at random within a half, so that many do not come at once. Users take turns: one's thousand chats do not delay
    /// another's first.
    #[boxed]
    pub async fn unseen_chats(&self, older_than: Duration, limit: i64) -> Result<Vec<Unseen>> {
        self.run("unseen_chats", async || {
            let mut rows = sqlx::query!(
                r#"WITH ranked AS (
                       -- Chats that are due, those that wait longest first, and the place of each among its owner's.
                       SELECT id, row_number() OVER (PARTITION BY user_id ORDER BY woken_at) AS rank
                       FROM (SELECT id, user_id, woken_at FROM chats
                             WHERE wanted > seen AND held_for IS NULL
                               AND woken_at < now() - $1 * interval '1 second' * LEAST(power(2, GREATEST(wake_attempts - 2, 0)), $4::float8)
                                   * (1 + random() / 2 * LEAST(wake_attempts, 1))
                             ORDER BY woken_at LIMIT $3) oldest
                   ), picked AS (
                       -- Of them those that no other relay is waking at this moment.
                       SELECT c.id, r.rank FROM chats c JOIN ranked r ON r.id = c.id
                       WHERE c.wanted > c.seen AND c.held_for IS NULL AND c.woken_at < now() - $1 * interval '1 second'
                       ORDER BY r.rank, c.woken_at LIMIT $2 FOR NO KEY UPDATE OF c SKIP LOCKED
                   )
                   UPDATE chats c SET woken_at = now(), wake_attempts = c.wake_attempts + 1 FROM picked p WHERE c.id = p.id
                   RETURNING c.id, c.user_id, p.rank AS "rank!", c.wake_attempts,
                       extract(epoch FROM now() - c.wanted_at)::float8 AS "age!", COALESCE((SELECT t.traceparent FROM turns t
                       WHERE t.chat_id = c.id AND t.ended_at IS NULL ORDER BY t.ordinal LIMIT 1), '') AS "traceparent!""#,
                older_than.as_secs_f64(),
                limit,
                WINDOW,
                BACKOFF_FACTOR_MAX,
            )
            .fetch_all(&self.pool)
            .await?;
            rows.sort_by_key(|row| row.rank);
            let unseen = rows.into_iter().map(|row| Unseen {
                wake: Wake {
                    chat: ChatId(row.id),
                    user: UserId(row.user_id),
                    traceparent: row.traceparent,
                    burst: None,
                },
                attempts: row.wake_attempts.unsigned_abs(),
                age: Duration::try_from_secs_f64(row.age).unwrap_or_default(),
            });
            Ok(unseen.collect())
        })
        .await
    }

    /// Chats that something is wanted of and that nobody has looked at for longer than `older_than`.
    #[boxed]
    pub async fn count_unseen(&self, older_than: Duration) -> Result<i64> {
        self.run("count_unseen", async || {
            Ok(sqlx::query_scalar!(
                r#"SELECT count(*) AS "count!" FROM (
                       SELECT FROM chats WHERE wanted > seen AND held_for IS NULL
                         AND wanted_at < now() - $1 * interval '1 second' LIMIT $2) u"#,
                older_than.as_secs_f64(),
                UNSEEN_COUNT_MAX,
            )
            .fetch_one(&self.pool)
            .await?)
        })
        .await
    }

    /// Tells the people of those `chats` whose turn is due and that no worker has looked at for so long why that is, once.
    #[boxed]
    pub async fn tell_standing(&self, chats: &[ChatId], older_than: Duration) -> Result<Vec<Committed<()>>> {
        let ids: Vec<Uuid> = chats.iter().map(|chat| chat.0).collect();
        let due = self.run("standing_chats", async || {
            Ok(sqlx::query!(
                r#"SELECT c.id, (SELECT count(*) FROM instances i WHERE i.role = 'worker' AND i.drain_state = 'serving'
                                 AND i.seen_at > now() - $3 * interval '1 second') AS "workers!"
                   FROM chats c
                   WHERE c.id = ANY($1) AND c.wanted > c.seen AND c.held_for IS NULL
                     AND c.wanted_at < now() - $2 * interval '1 second'
                     AND EXISTS (SELECT FROM turns t WHERE t.chat_id = c.id AND t.ended_at IS NULL AND t.standing = '')
                   LIMIT $4"#,
                &ids,
                older_than.as_secs_f64(),
                WORKER_SILENT_SECS,
                STANDING_MAX,
            )
            .fetch_all(&self.pool)
            .await?)
        });
        let mut told = Vec::new();
        for row in due.await? {
            let why = if row.workers == 0 { NO_WORKER } else { BUSY };
            let telling = self.run("tell_standing", async || {
                let key = Key::Chat(ChatId(row.id));
                let mut tx = ChatTx::open(self, key).await?.ok_or(StoreError::not_found("chat"))?;
                let standing = turns!(
                    RETURNING "UPDATE turns t SET standing = $2 FROM chats c
                               WHERE c.id = $1 AND c.wanted > c.seen AND t.ended_at IS NULL AND t.standing = ''
                                 AND t.id = (SELECT o.id FROM turns o WHERE o.chat_id = $1 AND o.ended_at IS NULL
                                             ORDER BY o.ordinal LIMIT 1)",
                    row.id,
                    why,
                )
                .fetch_optional(tx.conn())
                .await?;
                let Some(turn) = standing else { return tx.nothing(()).await };
                tx.event(Kind::TurnChanged(turn.to_pb()));
                tx.commit(()).await
            });
            match telling.await {
                // Deleted meanwhile.
                Err(StoreError::NotFound { .. }) => {}
                committed => told.push(committed?),
            }
        }
        Ok(told)
    }

    /// Whether something is wanted of the chat that nobody has looked at.
    #[boxed]
    pub async fn is_unseen(&self, chat: ChatId) -> Result<bool> {
        self.run("is_unseen", async || {
            let unseen = sqlx::query_scalar!(r#"SELECT wanted > seen AS "unseen!" FROM chats WHERE id = $1"#, chat.0);
            Ok(unseen.fetch_optional(&self.pool).await?.unwrap_or_default())
        })
        .await
    }

    /// Chats whose model was being called by a worker that is gone, and that no other has taken over: their run was lost
    /// with it. The wake is wanted by its row from here on.
    #[boxed]
    pub async fn orphaned_turns(&self, limit: i64) -> Result<Vec<Wake>> {
        self.run("orphaned_turns", async || {
            let rows = sqlx::query_as!(
                WokenRow,
                r#"WITH gone AS (
                       -- Chats with a turn whose worker's heartbeat is old, and of which nothing is wanted.
                       SELECT c.id, t.traceparent FROM turns t JOIN chats c ON c.id = t.chat_id
                       WHERE t.ended_at IS NULL AND t.producer IS NOT NULL AND c.wanted = c.seen
                         AND NOT EXISTS (SELECT FROM instances i WHERE i.id = t.producer
                                         AND i.seen_at > now() - $2 * interval '1 second')
                       LIMIT $1 FOR NO KEY UPDATE OF c SKIP LOCKED
                   )
                   UPDATE chats c SET wanted = wanted + 1, wanted_at = now(), woken_at = now(), wake_attempts = 0
                   FROM gone WHERE c.id = gone.id RETURNING c.id, c.user_id, gone.traceparent"#,
                limit,
                WORKER_SILENT_SECS,
            )
            .fetch_all(&self.pool)
            .await?;
            Ok(rows.into_iter().map(Wake::from).collect())
        })
        .await
    }

    /// Chats whose model is to be asked again by now and that nobody has looked at. The wake is wanted by its row from here
    /// on, so that one that is lost is found as any other.
    #[boxed]
    pub async fn due_retries(&self, late: Duration, limit: i64) -> Result<Vec<Wake>> {
        self.run("due_retries", async || {
            let rows = sqlx::query_as!(
                WokenRow,
                r#"WITH due AS (
                       SELECT c.id, t.traceparent FROM turns t JOIN chats c ON c.id = t.chat_id
                       WHERE t.retry_at < now() - $1 * interval '1 second' AND t.ended_at IS NULL AND c.wanted = c.seen
                         AND c.held_for IS NULL
                       ORDER BY t.retry_at LIMIT $2 FOR NO KEY UPDATE OF c SKIP LOCKED
                   )
                   UPDATE chats c SET wanted = wanted + 1, wanted_at = now(), woken_at = now(), wake_attempts = 0
                   FROM due WHERE c.id = due.id
                   RETURNING c.id, c.user_id, due.traceparent"#,
                late.as_secs_f64(),
                limit,
            )
            .fetch_all(&self.pool)
            .await?;
            Ok(rows.into_iter().map(Wake::from).collect())
        })
        .await
    }

    /// Chats with an open turn, or with a call that settles behind one, that the relay has not woken for long.
    #[boxed]
    pub async fn stale_open_turns(&self, limit: i64) -> Result<Vec<Wake>> {
        self.run("stale_open_turns", async || {
            let rows = sqlx::query_as!(
                WokenRow,
                r#"WITH open AS (
                       SELECT chat_id, bool_or(status NOT IN ('waiting_approval', 'waiting_daemon') AND retry_at IS NULL) AS works
                       FROM turns WHERE ended_at IS NULL GROUP BY chat_id
                       UNION ALL
                       SELECT DISTINCT chat_id, false FROM tool_calls WHERE ended_at IS NULL AND cancel_asked_at IS NOT NULL
                   ), picked AS (
                       SELECT c.id FROM chats c
                       WHERE c.id IN (SELECT chat_id FROM open) AND c.held_for IS NULL
                         AND c.relayed_at < now() - interval '1 second' *
                             CASE WHEN EXISTS (SELECT FROM open o WHERE o.chat_id = c.id AND o.works) THEN $2::float8
                                  ELSE $3::float8 END
                       ORDER BY c.relayed_at LIMIT $1 FOR NO KEY UPDATE OF c SKIP LOCKED
                   )
                   UPDATE chats c SET relayed_at = now() FROM picked p WHERE c.id = p.id
                   RETURNING c.id, c.user_id, COALESCE((SELECT t.traceparent FROM turns t
                       WHERE t.chat_id = c.id AND t.ended_at IS NULL ORDER BY t.ordinal LIMIT 1), '') AS "traceparent!""#,
                limit,
                STALE_AFTER_SECS,
                WAITING_AFTER_SECS,
            )
            .fetch_all(&self.pool)
            .await?;
            Ok(rows.into_iter().map(Wake::from).collect())
        })
        .await
    }

    /// Cancels that no result has answered, for daemons that are here: to be sent now, and marked as sent.
    #[boxed]
    pub async fn cancels_to_resend(&self, limit: i64) -> Result<Vec<CancelCall>> {
        self.run("cancels_to_resend", async || {
            let rows = sqlx::query!(
                r#"WITH picked AS (
                       SELECT c.id FROM tool_calls c JOIN daemon_leases l ON l.daemon_id = c.daemon_id
                       WHERE c.ended_at IS NULL AND c.cancel_asked_at IS NOT NULL AND c.sent > 0 AND l.expires_at > now()
                         AND (c.cancel_sent_at IS NULL OR c.cancel_sent_at < now() - $2 * interval '1 second')
                       ORDER BY c.cancel_asked_at LIMIT $1 FOR NO KEY UPDATE OF c SKIP LOCKED
                   )
                   UPDATE tool_calls c SET cancel_sent_at = now() FROM picked p WHERE c.id = p.id
                   RETURNING c.id, c.generation, c.daemon_id AS "daemon_id!""#,
                limit,
                CANCEL_AGAIN_SECS,
            )
            .fetch_all(&self.pool)
            .await?;
            let cancels = rows.into_iter().map(|row| CancelCall {
                call: ToolCallId(row.id),
                generation: row.generation,
                daemon: DaemonId(row.daemon_id),
            });
            Ok(cancels.collect())
        })
        .await
    }
}
