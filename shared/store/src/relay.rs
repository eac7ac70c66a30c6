//! What the workers' relay looks for: chats that were to be woken and that nobody has looked at, and things that have been
//! open for long. Any number of workers look at once; each finds others.

use std::time::Duration;

use reliant_types::{ChatId, DaemonId, ToolCallId, UserId, boxed};

use crate::{CancelCall, Result, Store, Wake};

/// Candidates that are ranked for fairness.
const WINDOW: i64 = 2000;
/// An open turn is looked at again this often, if nothing else wakes it.
const STALE_AFTER_SECS: f64 = 20.0;
/// One that waits for a person or a daemon, which wake it themselves.
const WAITING_AFTER_SECS: f64 = 300.0;
/// A cancel that was not answered by a result is sent again.
const CANCEL_AGAIN_SECS: f64 = 3.0;

impl Store {
    /// Chats with `wanted > seen` for so long that do not wait for a place. Users take turns: one's thousand chats do not delay another's first.
    #[boxed]
    pub async fn unseen_chats(&self, older_than: Duration, limit: i64) -> Result<Vec<Wake>> {
        self.run("unseen_chats", async || {
            let rows = sqlx::query!(
                r#"WITH ranked AS (
                       SELECT id, row_number() OVER (PARTITION BY user_id ORDER BY wanted_at) AS rank
                       FROM (SELECT id, user_id, wanted_at FROM chats
                             WHERE wanted > seen AND held_for IS NULL AND wanted_at < now() - $1 * interval '1 second'
                             ORDER BY wanted_at LIMIT $3) oldest
                   ), picked AS (
                       SELECT c.id, r.rank FROM chats c JOIN ranked r ON r.id = c.id
                       WHERE c.wanted > c.seen AND c.held_for IS NULL AND c.wanted_at < now() - $1 * interval '1 second'
                       ORDER BY r.rank, c.wanted_at LIMIT $2 FOR NO KEY UPDATE OF c SKIP LOCKED
                   )
                   UPDATE chats c SET wanted_at = now() FROM picked p WHERE c.id = p.id
                   RETURNING c.id, c.user_id, p.rank AS "rank!", COALESCE((SELECT t.traceparent FROM turns t
                       WHERE t.chat_id = c.id AND t.ended_at IS NULL ORDER BY t.ordinal LIMIT 1), '') AS "traceparent!""#,
                older_than.as_secs_f64(),
                limit,
                WINDOW,
            )
            .fetch_all(&self.pool)
            .await?;
            let mut wakes: Vec<_> = rows
                .into_iter()
                .map(|row| (row.rank, Wake { chat: ChatId(row.id), user: UserId(row.user_id), traceparent: row.traceparent }))
                .collect();
            wakes.sort_by_key(|(rank, _)| *rank);
            Ok(wakes.into_iter().map(|(_, wake)| wake).collect())
        })
        .await
    }

    /// Chats whose model is to be asked again by now and that nobody has looked at. The wake is wanted by its row from here
    /// on, so that one that is lost is found as any other.
    #[boxed]
    pub async fn due_retries(&self, late: Duration, limit: i64) -> Result<Vec<Wake>> {
        self.run("due_retries", async || {
            let rows = sqlx::query!(
                r#"WITH due AS (
                       SELECT c.id, t.traceparent FROM turns t JOIN chats c ON c.id = t.chat_id
                       WHERE t.retry_at < now() - $1 * interval '1 second' AND t.ended_at IS NULL AND c.wanted = c.seen
                         AND c.held_for IS NULL
                       ORDER BY t.retry_at LIMIT $2 FOR NO KEY UPDATE OF c SKIP LOCKED
                   )
                   UPDATE chats c SET wanted = wanted + 1, wanted_at = now() FROM due WHERE c.id = due.id
                   RETURNING c.id, c.user_id, due.traceparent"#,
                late.as_secs_f64(),
                limit,
            )
            .fetch_all(&self.pool)
            .await?;
            let wakes = rows.into_iter().map(|row| Wake {
                chat: ChatId(row.id),
                user: UserId(row.user_id),
                traceparent: row.traceparent,
            });
            Ok(wakes.collect())
        })
        .await
    }

    /// Chats with an open turn, or with a call that settles behind one, that the relay has not woken for long.
    #[boxed]
    pub async fn stale_open_turns(&self, limit: i64) -> Result<Vec<Wake>> {
        self.run("stale_open_turns", async || {
            let rows = sqlx::query!(
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
            let wakes = rows.into_iter().map(|row| Wake {
                chat: ChatId(row.id),
                user: UserId(row.user_id),
                traceparent: row.traceparent,
            });
            Ok(wakes.collect())
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
