//! Places: which model rounds may be at work, so that one user's thousand turns do not delay another's first.
//!
//! Invariants: a place belongs to an open turn, from the decision that its model is to be called until the round's message
//! is committed, its model is to be asked later, or the turn ends, so that nothing but a turn's own progress gives it back. A user without a place gets one
//! at once. A chat that is held is woken by whoever places it, and counts as unseen from then on; so a lost wake, or the
//! death of the placer, only delays. Places may be passed by as many as there are connections to the database, never by
//! more: they are counted before they are taken, and nobody waits for a lock.

use std::sync::atomic::{AtomicI64, Ordering};

use reliant_telemetry::metrics;
use reliant_types::{ChatId, UserId, boxed, limits};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Result, Store, Wake};

/// A worker that was not heard of for longer gives no places.
pub(crate) const WORKER_SILENT_SECS: f64 = 7.0;
/// Users with held chats that one look considers; the next look goes on with those after them.
const USERS_MAX: i64 = 500;
/// Held chats are counted up to here.
const HELD_COUNT_MAX: i64 = 10_000;
const UNKNOWN: i64 = -1;

/// How model calls are shared out between users.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TurnsConfig {
    /// Model calls that one user may have at work at one time, however idle the workers are.
    pub user_at_work_max: u32,
    /// Per cent of the workers' model slots that are kept for users who have nothing at work yet.
    pub reserve_percent: u32,
}

impl Default for TurnsConfig {
    fn default() -> Self {
        Self { user_at_work_max: limits::USER_TURNS_AT_WORK_MAX, reserve_percent: 20 }
    }
}

/// What this process knows of places; a second old at most.
#[derive(Debug)]
pub(crate) struct Places {
    config: TurnsConfig,
    room: AtomicI64,
    share: AtomicI64,
}

impl Places {
    pub fn new(config: TurnsConfig) -> Self {
        Self { config, room: AtomicI64::new(UNKNOWN), share: AtomicI64::new(i64::MAX) }
    }

    /// Places of all users together; None until a worker was seen.
    pub fn room(&self) -> Option<i64> {
        Some(self.room.load(Ordering::Relaxed)).filter(|room| *room != UNKNOWN)
    }

    /// Of one user while somebody waits.
    pub fn share(&self) -> i64 {
        self.share.load(Ordering::Relaxed)
    }

    /// Of one user at any time.
    pub fn most(&self) -> i64 {
        i64::from(self.config.user_at_work_max.max(1))
    }

    /// Where no worker is up, what was known last stands: somebody will take over.
    fn learn(&self, slots: i64, users: i64) {
        if slots > 0 {
            let room = room(slots, self.config.reserve_percent);
            self.room.store(room, Ordering::Relaxed);
        }
        let share = self.room().map_or(i64::MAX, |room| (room / users.max(1)).max(1));
        self.share.store(share, Ordering::Relaxed);
    }
}

fn room(slots: i64, reserve_percent: u32) -> i64 {
    let reserve = (slots.saturating_mul(i64::from(reserve_percent.min(100))) + 99) / 100;
    (slots - reserve).max(1)
}

/// What a look for held chats did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placed {
    /// To be woken, in fair order.
    pub wakes: Vec<Wake>,
    /// Where the next look goes on: there were more users than one look considers.
    pub after: Option<UserId>,
}

impl Store {
    /// Reads how many places there are, and how many users want some. To be called each second in a process that
    /// accepts or drives turns. Gives the number of held chats.
    #[boxed]
    pub async fn refresh_places(&self) -> Result<i64> {
        self.run("refresh_places", async || {
            let row = sqlx::query!(
                r#"WITH RECURSIVE waiting AS (
                       (SELECT user_id FROM chats WHERE held_for IS NOT NULL ORDER BY user_id LIMIT 1)
                       UNION ALL
                       SELECT (SELECT c.user_id FROM chats c WHERE c.held_for IS NOT NULL AND c.user_id > w.user_id
                               ORDER BY c.user_id LIMIT 1)
                       FROM waiting w WHERE w.user_id IS NOT NULL
                   )
                   SELECT (SELECT COALESCE(sum((load->>'model_slots')::bigint), 0)::bigint FROM instances
                           WHERE role = 'worker' AND drain_state = 'serving'
                             AND seen_at > now() - $1 * interval '1 second') AS "slots!",
                          (SELECT count(*) FROM (
                               (SELECT user_id FROM waiting WHERE user_id IS NOT NULL LIMIT $2)
                               UNION SELECT user_id FROM turns WHERE placed_at IS NOT NULL AND ended_at IS NULL) u) AS "users!",
                          (SELECT count(*) FROM turns WHERE placed_at IS NOT NULL AND ended_at IS NULL) AS "placed!",
                          (SELECT count(*) FROM (SELECT FROM chats WHERE held_for IS NOT NULL LIMIT $3) h) AS "held!""#,
                WORKER_SILENT_SECS,
                USERS_MAX,
                HELD_COUNT_MAX,
            )
            .fetch_one(&self.pool)
            .await?;
            self.places.learn(row.slots, row.users);
            metrics::TURNS_HELD.set(row.held);
            metrics::MODEL_PLACES.with_label_values(&["taken"]).set(row.placed);
            metrics::MODEL_PLACES.with_label_values(&["room"]).set(self.places.room().unwrap_or_default());
            Ok(row.held)
        })
        .await
    }

    /// Gives free places to held chats: who has least at work comes first, then who waited longest. Several may look at
    /// once: they choose the same chats, and each chat is placed by one of them.
    #[boxed]
    pub async fn place_held(&self, after: Option<UserId>, limit: i64) -> Result<Placed> {
        self.run("place_held", async || {
            let rows = sqlx::query!(
                r#"WITH RECURSIVE waiting AS (
                       (SELECT user_id FROM chats WHERE held_for IS NOT NULL AND user_id > $1 ORDER BY user_id LIMIT 1)
                       UNION ALL
                       SELECT (SELECT c.user_id FROM chats c WHERE c.held_for IS NOT NULL AND c.user_id > w.user_id
                               ORDER BY c.user_id LIMIT 1)
                       FROM waiting w WHERE w.user_id IS NOT NULL
                   ), people AS MATERIALIZED (
                       SELECT user_id FROM waiting WHERE user_id IS NOT NULL LIMIT $2
                   ), active AS MATERIALIZED (
                       SELECT user_id, count(*) AS places FROM turns WHERE placed_at IS NOT NULL AND ended_at IS NULL GROUP BY user_id
                   ), room AS MATERIALIZED (
                       SELECT GREATEST(0, $3::bigint - COALESCE(sum(places), 0))::bigint AS free FROM active
                   ), ranked AS (
                       SELECT h.id, h.held_for, COALESCE(a.places, 0) + h.nth AS place
                       FROM people p LEFT JOIN active a ON a.user_id = p.user_id
                       CROSS JOIN LATERAL (
                           SELECT o.id, o.held_for, row_number() OVER (ORDER BY o.held_for, o.id) AS nth FROM (
                               SELECT c.id, c.held_for FROM chats c WHERE c.user_id = p.user_id AND c.held_for IS NOT NULL
                               ORDER BY c.held_for, c.id
                               LIMIT LEAST($4, GREATEST(1, (SELECT free FROM room)))
                           ) o
                       ) h
                       WHERE COALESCE(a.places, 0) + h.nth <= $5
                   ), chosen AS (
                       SELECT id, place, held_for FROM (
                           SELECT id, place, held_for, row_number() OVER (ORDER BY place, held_for, id) AS nth FROM ranked
                       ) r WHERE nth <= (SELECT free FROM room) OR place = 1
                       ORDER BY place, held_for, id LIMIT $4
                   ), picked AS MATERIALIZED (
                       SELECT c.id, x.place, x.held_for FROM chats c JOIN chosen x ON x.id = c.id
                       WHERE c.held_for IS NOT NULL FOR NO KEY UPDATE OF c SKIP LOCKED
                   ), placed AS (
                       UPDATE turns t SET placed_at = clock_timestamp(), held_at = NULL, held_ms = t.held_ms
                              + COALESCE(extract(epoch FROM clock_timestamp() - t.held_at) * 1000, 0)::bigint
                       FROM picked p
                       WHERE t.id = (SELECT o.id FROM turns o WHERE o.chat_id = p.id AND o.ended_at IS NULL
                                     ORDER BY o.ordinal LIMIT 1)
                         AND t.ended_at IS NULL AND t.placed_at IS NULL
                       RETURNING t.chat_id, t.traceparent
                   ), woken AS (
                       UPDATE chats c SET held_for = NULL, wanted = GREATEST(c.wanted, c.seen + 1), wanted_at = now(),
                              woken_at = now(), wake_attempts = 0
                       FROM picked p WHERE c.id = p.id
                       RETURNING c.id, c.user_id, p.place, p.held_for
                   )
                   SELECT w.id AS "id?", w.user_id AS "user_id?", COALESCE(t.traceparent, '') AS "traceparent!",
                          (SELECT p.user_id FROM people p WHERE (SELECT count(*) FROM people) = $2
                           ORDER BY p.user_id DESC LIMIT 1) AS after
                   FROM (SELECT) one LEFT JOIN woken w ON true LEFT JOIN placed t ON t.chat_id = w.id
                   ORDER BY w.place, w.held_for"#,
                after.map_or(Uuid::nil(), |user| user.0),
                USERS_MAX,
                self.places.room().unwrap_or(i64::MAX),
                limit,
                self.places.most(),
            )
            .fetch_all(&self.pool)
            .await?;
            let after = rows.first().and_then(|row| row.after).map(UserId);
            let wakes = rows.into_iter().filter_map(|row| {
                Some(Wake { chat: ChatId(row.id?), user: UserId(row.user_id?), traceparent: row.traceparent, burst: None })
            });
            Ok(Placed { wakes: wakes.collect(), after })
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserve_is_kept_and_somebody_always_has_room() {
        assert_eq!([500, 8, 4, 1, 0].map(|slots| room(slots, 20)), [400, 6, 3, 1, 1]);
        assert_eq!((room(10, 0), room(10, 100), room(10, 1000)), (10, 1, 1));
    }

    #[test]
    fn what_was_known_last_stands_while_no_worker_is_up() {
        let places = Places::new(TurnsConfig::default());
        assert_eq!((places.room(), places.share()), (None, i64::MAX));
        places.learn(0, 3);
        assert_eq!((places.room(), places.share()), (None, i64::MAX));
        places.learn(10, 2);
        assert_eq!((places.room(), places.share()), (Some(8), 4));
        places.learn(0, 100);
        assert_eq!((places.room(), places.share()), (Some(8), 1));
    }
}
