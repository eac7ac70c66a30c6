//! What a chat needs now, read from its rows and decided by [`crate::decide`]; here only the small transitions that a
//! decision brings are written: a call that nobody will run, a turn past its limits, a clock that stops or goes on.

use reliant_types::{
    ChatId, Code, Failure, InstanceId, ToolCallId, TurnId, UserId, boxed, limits,
    pb::{self, chat_event::Kind},
};
use sqlx::PgExecutor;
use uuid::Uuid;

use crate::{
    Committed, Look, Observed, Result, Step, Store, StoreError,
    chat_tx::{ChatTx, Key},
    decide::{Call, Daemon, Decision, Settlement, Snapshot, Turn, decide},
    places::Places,
    rows::{call_status, calls, turn_status, turn_status_text, turns},
    settle::{self, Ending, TurnEnding},
};

/// Looks one after another, each of which found something new behind it.
const LOOKS_MAX: usize = 64;
/// Transitions of one look at a chat: each ends a call, a turn or a wait, so more is a mistake.
const TRANSITIONS_MAX: usize = 512;

struct Rows {
    user: UserId,
    snapshot: Snapshot,
    status: Option<pb::TurnStatus>,
    /// Why the turn's model could not answer, where it was waited for.
    model_said: Option<Failure>,
    wanted: i64,
    seen: i64,
    /// The chat waits for a place.
    held: bool,
    burst_by: Option<InstanceId>,
}

impl Rows {
    /// The turn's status that the decision asks for, where it is another one.
    fn new_status(&self, decision: &Decision) -> Option<(TurnId, pb::TurnStatus)> {
        let turn = self.snapshot.turn.as_ref()?.id;
        let status = decision.turn_status().filter(|status| Some(*status) != self.status)?;
        Some((turn, status))
    }
}

impl Store {
    /// What the chat's oldest unfinished turn needs now. `wanted` as it was read becomes `seen`.
    #[boxed]
    pub async fn next_step(&self, chat: ChatId, look: Look) -> Result<Committed<Step>> {
        self.run("next_step", async || {
            for _ in 0..LOOKS_MAX {
                let rows = read(&self.pool, &self.places, chat).await?;
                let decision = decide(&rows.snapshot);
                let writes = matches!(decision, Decision::Settle(_) | Decision::Fail { .. });
                if writes || rows.new_status(&decision).is_some() {
                    return self.next_step_writing(chat, look).await;
                }
                // What came between the two statements woke nobody: a burst was open.
                let more = looked(&self.pool, chat, &rows, &decision, rows.wanted, look).await?;
                if !(more && rests(&decision)) {
                    return Ok(Committed::nothing(rows.user, step(decision, rows.snapshot.now_ms)));
                }
            }
            Err(StoreError::Corrupt("a chat that changes with each look"))
        })
        .await
    }

    /// For a worker's open bursts: notes that they will look at what is wanted of their chats, and says of which something
    /// is; and which of `turns`, whose models are being called, have ended.
    #[boxed]
    pub async fn observe_bursts(&self, worker: InstanceId, chats: &[ChatId], turns: &[TurnId]) -> Result<Observed> {
        self.run("observe_bursts", async || {
            let ids: Vec<Uuid> = chats.iter().map(|chat| chat.0).collect();
            let turns: Vec<Uuid> = turns.iter().map(|turn| turn.0).collect();
            let rows = sqlx::query!(
                r#"WITH open AS (
                       -- Chats with something new, whose burst this worker has.
                       SELECT id FROM chats WHERE id = ANY($1) AND burst_by = $2 AND wanted > seen
                       FOR NO KEY UPDATE SKIP LOCKED
                   ), marked AS (
                       UPDATE chats c SET seen = c.wanted FROM open WHERE c.id = open.id RETURNING c.id
                   )
                   SELECT m.id AS "chat?", NULL::uuid AS "turn?" FROM marked m
                   UNION ALL
                   SELECT NULL, t.id FROM turns t WHERE t.id = ANY($3) AND t.ended_at IS NOT NULL"#,
                &ids,
                worker.0,
                &turns,
            )
            .fetch_all(&self.pool)
            .await?;
            Ok(Observed {
                chats: rows.iter().filter_map(|row| row.chat.map(ChatId)).collect(),
                ended: rows.iter().filter_map(|row| row.turn.map(TurnId)).collect(),
            })
        })
        .await
    }

    /// The trace that a turn began in; empty where it is gone.
    #[boxed]
    pub async fn turn_trace(&self, turn: TurnId) -> Result<String> {
        self.run("turn_trace", async || {
            let trace = sqlx::query_scalar!("SELECT traceparent FROM turns WHERE id = $1", turn.0);
            Ok(trace.fetch_optional(&self.pool).await?.unwrap_or_default())
        })
        .await
    }

    async fn next_step_writing(&self, chat: ChatId, look: Look) -> Result<Committed<Step>> {
        let mut tx = ChatTx::open(self, Key::Chat(chat)).await?.ok_or(StoreError::not_found("chat"))?;
        let mut wanted = None;
        for _ in 0..TRANSITIONS_MAX {
            let rows = read(tx.conn(), &self.places, chat).await?;
            // What these transitions themselves ask for is answered by going on here.
            let wanted = *wanted.get_or_insert(rows.wanted);
            let decision = decide(&rows.snapshot);
            match &decision {
                Decision::Settle(settled) => {
                    for (call, settlement) in settled {
                        settle_call(&mut tx, *call, *settlement).await?;
                    }
                }
                Decision::Fail { turn, code } => {
                    let failure = match &rows.model_said {
                        Some(said) if *code == Code::TurnDeadline => model_never_answered(said),
                        _ => Failure::new(*code, limit_text(*code)),
                    };
                    let ending = TurnEnding {
                        status: pb::TurnStatus::Failed,
                        failure: Some(&failure),
                        fence: None,
                        cancels_sent: false,
                    };
                    settle::end_turn(&mut tx, *turn, ending).await?;
                }
                _ => {
                    if let Some((turn, status)) = rows.new_status(&decision) {
                        set_status(&mut tx, turn, status).await?;
                    }
                    // The chat's row is held: nothing comes between.
                    looked(tx.conn(), chat, &rows, &decision, wanted, look).await?;
                    return tx.commit(step(decision, rows.snapshot.now_ms)).await;
                }
            }
        }
        Err(StoreError::Corrupt("a chat whose transitions do not end"))
    }
}

/// Nothing can be done until something comes.
fn rests(decision: &Decision) -> bool {
    matches!(decision, Decision::Hold { .. } | Decision::Wait { .. } | Decision::Idle)
}

/// Writes down that the chat was looked at and whether a burst goes on, and takes the place that the decision needs, or
/// stands in line for one. All of it under the chat's lock, and only if the round that was decided on is still the one that
/// is due. Says whether more is wanted than was read.
async fn looked(
    db: impl PgExecutor<'_>,
    chat: ChatId,
    rows: &Rows,
    decision: &Decision,
    wanted: i64,
    look: Look,
) -> Result<bool> {
    let due = rows.snapshot.turn.as_ref();
    let burst = match look {
        Look::Last(worker) if rests(decision) && rows.burst_by == Some(worker) => None,
        // Another worker has taken the chat over, or it has no burst any more.
        Look::Last(_) if rests(decision) => rows.burst_by,
        Look::Within(_) if rests(decision) => rows.burst_by,
        Look::Within(worker) | Look::Last(worker) => Some(worker),
    };
    let burst_by = burst.map(|worker| worker.0);
    let more = match decision {
        Decision::CallModel { turn, iteration } if due.is_some_and(|due| !due.placed) => {
            sqlx::query_scalar!(
                r#"WITH c AS MATERIALIZED (
                     SELECT id FROM chats WHERE id = $1 FOR NO KEY UPDATE
                 ), placed AS (
                     UPDATE turns t SET placed_at = clock_timestamp(), held_at = NULL, held_ms = t.held_ms
                            + COALESCE(extract(epoch FROM clock_timestamp() - t.held_at) * 1000, 0)::bigint
                     FROM c WHERE t.id = $3 AND t.chat_id = c.id AND t.iteration = $4 AND t.placed_at IS NULL
                       AND t.ended_at IS NULL
                 )
                 UPDATE chats SET seen = GREATEST(seen, $2), looked_at = clock_timestamp(), held_for = NULL, burst_by = $5
                 FROM c WHERE chats.id = c.id RETURNING wanted > $2 AS "more!""#,
                chat.0,
                wanted,
                turn.0,
                iteration,
                burst_by,
            )
            .fetch_optional(db)
            .await?
        }
        Decision::Hold { .. } if rows.held && rows.seen >= wanted && rows.burst_by == burst => None,
        Decision::Hold { turn, iteration } => {
            sqlx::query_scalar!(
                r#"WITH c AS MATERIALIZED (
                     SELECT id FROM chats WHERE id = $1 FOR NO KEY UPDATE
                 ), held AS (
                     UPDATE turns t SET held_at = COALESCE(t.held_at, clock_timestamp())
                     FROM c WHERE t.id = $3 AND t.chat_id = c.id AND t.iteration = $4 AND t.placed_at IS NULL
                       AND t.ended_at IS NULL
                     RETURNING t.created_at
                 )
                 UPDATE chats SET seen = GREATEST(seen, $2), held_for = held.created_at, burst_by = $5
                 FROM held WHERE chats.id = $1 RETURNING wanted > $2 AS "more!""#,
                chat.0,
                wanted,
                turn.0,
                iteration,
                burst_by,
            )
            .fetch_optional(db)
            .await?
        }
        _ if rows.held || rows.seen < wanted || rows.burst_by != burst => {
            sqlx::query_scalar!(
                r#"UPDATE chats SET seen = GREATEST(seen, $2), looked_at = clock_timestamp(),
                        held_for = CASE WHEN $3 THEN NULL ELSE held_for END, burst_by = $4
                 WHERE id = $1 RETURNING wanted > $2 AS "more!""#,
                chat.0,
                wanted,
                rows.held,
                burst_by,
            )
            .fetch_optional(db)
            .await?
        }
        _ => None,
    };
    Ok(more.unwrap_or_default())
}

fn step(decision: Decision, now_ms: i64) -> Step {
    match decision {
        // Whoever gives it a place wakes the chat.
        Decision::Hold { turn, .. } => Step::Wait { turn, for_ms: None },
        Decision::CallModel { turn, iteration } => Step::CallModel { turn, iteration },
        Decision::Dispatch { turn, calls } => Step::Dispatch { turn, calls },
        Decision::Wait { turn, until_ms, .. } => {
            let for_ms = until_ms.map(|until| u64::try_from(until.saturating_sub(now_ms)).unwrap_or_default());
            Step::Wait { turn, for_ms }
        }
        Decision::Idle | Decision::Settle(_) | Decision::Fail { .. } => Step::Idle,
    }
}

fn limit_text(code: Code) -> String {
    match code {
        Code::TurnRounds => format!(
            "the turn asked the model {} times, which is as often as a turn may; send another message to go on",
            limits::TURN_ROUNDS_MAX
        ),
        _ => "the turn took longer than a turn may take; send another message to go on".into(),
    }
}

/// The turn's time is over, and its model could not answer until then: what it said last tells more than the clock does.
pub fn model_never_answered(said: &Failure) -> Failure {
    let way_out = "send another message to go on, or choose another model";
    Failure::new(
        said.code,
        format!("the model did not answer within the turn's time; the last try: {}; {way_out}", said.message),
    )
}

/// One statement, so that everything is of one moment.
async fn read(db: impl PgExecutor<'_>, places: &Places, chat: ChatId) -> Result<Rows> {
    let rows = sqlx::query!(
        r#"SELECT c.user_id, c.wanted, c.seen, c.held_for IS NOT NULL AS "held!", c.burst_by, (extract(epoch FROM clock_timestamp()) * 1000)::bigint AS "now_ms!",
                  t.id AS "turn?", t.status AS "turn_status?", t.iteration AS "iteration?",
                  (extract(epoch FROM t.deadline_at) * 1000)::bigint AS deadline_ms, t.placed AS "placed?", t.free,
                  (extract(epoch FROM t.retry_at) * 1000)::bigint AS retry_ms,
                  t.retry_code AS "retry_code?", t.retry_message AS "retry_message?",
                  k.id AS "call?", k.turn_id AS "call_turn?", k.index AS "index?", k.read_only AS "read_only?", k.status AS "call_status?", k.sent AS "sent?",
                  (extract(epoch FROM k.dispatched_at) * 1000)::bigint AS dispatched_ms,
                  (extract(epoch FROM k.not_before) * 1000)::bigint AS not_before_ms,
                  k.timeout_ms AS "timeout_ms?", k.repeatable AS "repeatable?", k.cancel_asked_at,
                  d.id AS "daemon?", l.expires_at > clock_timestamp() AS here, d.incarnation = k.incarnation AS same_journal
           FROM chats c
           LEFT JOIN LATERAL (
               SELECT o.id, o.status, o.iteration, o.deadline_at, o.retry_at, o.retry_code, o.retry_message,
                      o.placed_at IS NOT NULL AS placed,
                      CASE WHEN o.placed_at IS NULL
                                AND NOT EXISTS (SELECT FROM tool_calls q WHERE q.turn_id = o.id AND q.ended_at IS NULL)
                           THEN place_is_free(c.user_id, $2, $3, $4) END AS free
               FROM turns o
               WHERE o.chat_id = c.id AND o.ended_at IS NULL ORDER BY o.ordinal LIMIT 1
           ) t ON true
           LEFT JOIN tool_calls k ON k.chat_id = c.id AND k.ended_at IS NULL
           LEFT JOIN daemons d ON d.id = CASE WHEN k.sent > 0 THEN k.daemon_id ELSE c.daemon_id END AND d.revoked_at IS NULL
           LEFT JOIN daemon_leases l ON l.daemon_id = d.id
           WHERE c.id = $1 ORDER BY k.turn_id, k.index"#,
        chat.0,
        places.room(),
        places.share(),
        places.most(),
    )
    .fetch_all(db)
    .await?;
    let first = rows.first().ok_or(StoreError::not_found("chat"))?;
    let turn = first.turn.map(|id| Turn {
        id: TurnId(id),
        iteration: first.iteration.unwrap_or_default(),
        deadline_ms: first.deadline_ms,
        not_before_ms: first.retry_ms,
        placed: first.placed.unwrap_or_default(),
    });
    let said = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let model_said = said(&first.retry_code).zip(said(&first.retry_message));
    let calls = rows.iter().filter_map(|row| {
        let sent = row.sent? > 0;
        let daemon = match (row.daemon, row.here) {
            (None, _) => Daemon::None,
            (Some(_), Some(true)) if sent && row.same_journal != Some(true) => Daemon::OtherJournal,
            (Some(_), Some(true)) => Daemon::Here,
            (Some(_), _) => Daemon::Away,
        };
        Some(Call {
            id: ToolCallId(row.call?),
            turn: TurnId(row.call_turn?),
            index: row.index?,
            read_only: row.read_only?,
            status: call_status(row.call_status.as_deref()?),
            sent,
            dispatched_ms: row.dispatched_ms,
            not_before_ms: row.not_before_ms,
            timeout_ms: row.timeout_ms?,
            repeatable: row.repeatable?,
            cancel_asked: row.cancel_asked_at.is_some(),
            daemon,
        })
    });
    Ok(Rows {
        user: UserId(first.user_id),
        snapshot: Snapshot {
            now_ms: first.now_ms,
            turn,
            calls: calls.collect(),
            rounds_max: limits::TURN_ROUNDS_MAX,
            place_free: first.free.unwrap_or_default(),
        },
        status: first.turn_status.as_deref().map(turn_status),
        model_said: model_said.map(|(code, text)| Failure::new(Code::parse(&code), text)),
        wanted: first.wanted,
        seen: first.seen,
        held: first.held,
        burst_by: first.burst_by.map(InstanceId),
    })
}

/// Writes down how a call is settled without its daemon.
pub(crate) async fn settle_call(tx: &mut ChatTx, call: ToolCallId, settlement: Settlement) -> Result<()> {
    let ending = match settlement {
        Settlement::Again => return start_over(tx, call).await,
        Settlement::JournalLost => Ending::unknown(pb::UnknownCause::JournalLost),
        Settlement::DaemonAway => Ending::unknown(pb::UnknownCause::DaemonAway),
        Settlement::Cancelled => Ending::cancelled(),
        Settlement::NoDaemon => Ending::failed(&Failure::new(
            Code::DaemonNone,
            "This chat has no daemon to run tools on, so the call did not run. The user can choose one.",
        )),
    };
    if let Some(row) = settle::end_call(tx, call, ending).await? {
        settle::close_round_of(tx, &row).await?;
    }
    Ok(())
}

/// The call may run twice, and its journal is gone: as if it had not been sent.
async fn start_over(tx: &mut ChatTx, call: ToolCallId) -> Result<()> {
    let row = calls!(
        UPDATE "status = 'pending', sent = 0, incarnation = NULL, dispatched_at = NULL"
        WHERE "c.id = $1 AND c.ended_at IS NULL AND c.repeatable",
        call.0
    )
    .fetch_optional(tx.conn())
    .await?;
    if let Some(row) = row {
        tx.event(Kind::ToolCallChanged(row.changed()));
    }
    Ok(())
}

/// Enters a state, and stops or starts the turn's clock with it.
async fn set_status(tx: &mut ChatTx, turn: TurnId, status: pb::TurnStatus) -> Result<()> {
    let (now, running) = (tx.now, status == pb::TurnStatus::Running);
    let row = turns!(
        RETURNING "UPDATE turns t SET status = $2, started_at = COALESCE(started_at, $3),
                          deadline_left_ms = CASE WHEN $4 OR deadline_at IS NULL THEN deadline_left_ms
                              ELSE GREATEST(0, extract(epoch FROM deadline_at - $3) * 1000)::bigint END,
                          deadline_at = CASE WHEN $4
                              THEN COALESCE(deadline_at, $3 + deadline_left_ms * interval '1 millisecond') END
                   WHERE t.id = $1 AND t.ended_at IS NULL",
        turn.0,
        turn_status_text(status),
        now,
        running,
    )
    .fetch_optional(tx.conn())
    .await?;
    if let Some(row) = row {
        tx.event(Kind::TurnChanged(row.to_pb()));
    }
    if status == pb::TurnStatus::WaitingDaemon {
        let daemon = tx.chat.daemon_id;
        let mut waiting = calls!(
            UPDATE "status = 'waiting_daemon', daemon_id = $2" WHERE "c.turn_id = $1 AND c.status = 'pending' AND c.sent = 0",
            turn.0,
            daemon,
        )
        .fetch_all(tx.conn())
        .await?;
        waiting.sort_by_key(|call| call.index);
        for call in waiting {
            tx.event(Kind::ToolCallChanged(call.changed()));
        }
    }
    Ok(())
}
