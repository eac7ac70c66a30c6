//! Model attempts: claimed under a new fence, committed under it, once per round.
//!
//! Invariants: every write of an attempt names its fence, so that a thawed zombie changes nothing; tool calls and their ids
//! are born in the commit of the message that asks for them; all attempts of a round write the same message.

use std::time::Duration;

use reliant_telemetry::TraceContext;
use reliant_types::{
    ChatId, DaemonId, Failure, InstanceId, MessageId, ToolCallId, TurnId, UserId, boxed,
    pb::{self, chat_event::Kind, content_block::Block},
};

use crate::{
    Attempt, AttemptDaemon, Claim, CommitOutcome, Committed, Lead, NewAssistant, Notice, Result, Store, StoreError,
    chat_tx::{ChatTx, Key, NewMessage},
    lead::Stamps,
    new_calls::{check, insert_calls, stored_block},
    rows::{TurnRow, clean, incarnation, mode, turns},
    settle::{self, TurnEnding},
};

impl Store {
    /// Takes the round: later writes of earlier attempts are void. Starts a queued turn, and its clock.
    /// `trace`: the attempt's own trace context, to which a later attempt links.
    #[boxed]
    pub async fn claim_attempt(
        &self,
        turn: TurnId,
        iteration: i32,
        producer: InstanceId,
        trace: &TraceContext,
    ) -> Result<Committed<Claim>> {
        self.run("claim_attempt", async || self.claim_once(turn, iteration, producer, trace).await).await
    }

    async fn claim_once(
        &self,
        turn: TurnId,
        iteration: i32,
        producer: InstanceId,
        trace: &TraceContext,
    ) -> Result<Committed<Claim>> {
        let mut tx = ChatTx::open(self, Key::Turn(turn)).await?.ok_or(StoreError::not_found("turn"))?;
        let now = tx.now;
        let row = sqlx::query!(
            r#"WITH old AS (SELECT status, live_message_id, attempt_trace, retry_at, standing FROM turns WHERE id = $1)
               UPDATE turns t SET fence = fence + 1, producer = $3, live_message_id = COALESCE(t.live_message_id, $4),
                      status = 'running', started_at = COALESCE(t.started_at, $5), attempt_trace = $6,
                      placed_at = COALESCE(t.placed_at, $5), held_at = NULL,
                      deadline_at = COALESCE(deadline_at, $5 + deadline_left_ms * interval '1 millisecond'),
                      retry_at = NULL, standing = '', round_began_at = COALESCE(t.round_began_at, $5),
                      worker_deaths = t.worker_deaths + t.suspect::int, suspect = false
               FROM old, chats c LEFT JOIN daemons d ON d.id = c.daemon_id AND d.revoked_at IS NULL
                    LEFT JOIN LATERAL (
                        SELECT k.created_at, k.dispatched_at, k.started_at, k.ended_at, a.decided_at,
                               -- While others of the round ran that this one stood behind; those side by side count once.
                               (SELECT sum(GREATEST(interval '0', LEAST(r.ended_at, k.dispatched_at)
                                           - GREATEST(r.started_at, r.before, a.decided_at)))
                                FROM (SELECT b.started_at, b.ended_at, max(b.ended_at) OVER (
                                          ORDER BY b.started_at ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
                                      FROM tool_calls b WHERE b.turn_id = $1 AND b.iteration = $2 - 1 AND b.id <> k.id
                                        AND b.started_at IS NOT NULL AND b.ended_at IS NOT NULL) r) AS ran_before
                        FROM tool_calls k LEFT JOIN approvals a ON a.tool_call_id = k.id
                        WHERE k.turn_id = $1 AND k.iteration = $2 - 1 ORDER BY k.ended_at DESC NULLS LAST LIMIT 1
                    ) l ON true
               WHERE t.id = $1 AND c.id = t.chat_id AND t.iteration = $2 AND t.ended_at IS NULL
                 AND NOT EXISTS (SELECT FROM tool_calls k WHERE k.turn_id = $1 AND k.ended_at IS NULL)
                 AND NOT EXISTS (SELECT FROM turns o WHERE o.chat_id = c.id AND o.ended_at IS NULL AND o.ordinal < t.ordinal)
               RETURNING old.status <> 'running' AS "started!", old.live_message_id IS NOT NULL AS "restarted!",
                         (old.retry_at IS NOT NULL OR old.standing <> '') AS "waited!", t.retries, t.retry_at, t.retry_message,
                         t.id, t.chat_id, t.message_id, t.ordinal, t.status, t.iteration, t.fence, t.live_message_id,
                         t.producer, t.traceparent, t.model, t.mode, t.deadline_at AS "deadline!", t.cancel_requested,
                         t.error_code, t.error_message, t.usage, t.created_at, t.started_at, t.ended_at,
                         d.id AS "daemon?", d.incarnation, d.hostname AS "hostname?", d.os AS "os?",
                         d.declared AS "declared?", old.attempt_trace AS "before!", c.looked_at, t.held_ms, t.round_began_at, t.worker_deaths,
                         (SELECT p.ended_at FROM turns p WHERE p.chat_id = t.chat_id AND p.ordinal = t.ordinal - 1) AS freed_at,
                         l.created_at AS "called_at?", l.decided_at, l.dispatched_at, l.started_at AS ran_at,
                         l.ended_at AS settled_at, (extract(epoch FROM l.ran_before) * 1000000)::bigint AS ran_before_us"#,
            turn.0,
            iteration,
            producer.0,
            MessageId::new().0,
            now,
            trace.traceparent,
        )
        .fetch_optional(tx.conn())
        .await?;
        let Some(row) = row else {
            let current = turns!(SELECT "WHERE t.id = $1", turn.0).fetch_one(tx.conn()).await?;
            let claim = if current.iteration > iteration { Claim::AlreadyCommitted } else { Claim::Stale };
            return tx.nothing(claim).await;
        };
        let lead = Lead::of(&Stamps {
            accepted: row.created_at,
            looked: row.looked_at,
            freed: row.freed_at,
            called: row.called_at,
            decided: row.decided_at,
            dispatched: row.dispatched_at,
            ran: row.ran_at,
            ran_before: Duration::from_micros(row.ran_before_us.unwrap_or_default().max(0).unsigned_abs()),
            settled: row.settled_at,
            held: Duration::from_millis(u64::try_from(row.held_ms).unwrap_or_default()),
            began: row.round_began_at,
            claimed: now,
        });
        let current = TurnRow {
            id: row.id,
            chat_id: row.chat_id,
            message_id: row.message_id,
            ordinal: row.ordinal,
            status: row.status,
            iteration: row.iteration,
            fence: row.fence,
            live_message_id: row.live_message_id,
            producer: row.producer,
            traceparent: row.traceparent,
            model: row.model,
            mode: row.mode,
            cancel_requested: row.cancel_requested,
            error_code: row.error_code,
            error_message: row.error_message,
            usage: row.usage,
            created_at: row.created_at,
            started_at: row.started_at,
            ended_at: row.ended_at,
            retry_at: row.retry_at,
            retry_message: row.retry_message,
            held_at: None,
            standing: String::new(),
        };
        let live = current.live_message_id.ok_or(StoreError::Corrupt("an attempt without its message"))?;
        if row.started || row.waited {
            tx.event(Kind::TurnChanged(current.to_pb()));
        }
        let started = current.started().map(|started| pb::MessageStarted { restarted: row.restarted, ..started });
        tx.event(Kind::MessageStarted(started.ok_or(StoreError::Corrupt("an attempt without its producer"))?));
        tx.release_hold();
        let daemon = row.daemon.map(|id| AttemptDaemon {
            id: DaemonId(id),
            incarnation: incarnation(row.incarnation),
            hostname: row.hostname.unwrap_or_default(),
            os: row.os.unwrap_or_default(),
            declared: row.declared.unwrap_or_default(),
        });
        let attempt = Attempt {
            turn,
            chat: ChatId(current.chat_id),
            user: UserId(tx.chat.user_id),
            fence: current.fence,
            message: MessageId(live),
            iteration,
            restarted: row.restarted,
            retries: row.retries,
            worker_deaths: row.worker_deaths,
            mode: mode(&current.mode),
            model: current.model,
            traceparent: current.traceparent,
            replaces: TraceContext::from_traceparent(&row.before),
            lead,
            claimed_at: now,
            daemon,
            root_id: tx.chat.root_id.clone(),
            ordinal: current.ordinal,
            last_ordinal: tx.chat.last_ordinal,
            deadline: row.deadline,
        };
        tx.commit(Claim::Claimed(Box::new(attempt))).await
    }

    /// Stores the model's message with the calls it asks for, or without any ends the turn.
    #[boxed]
    pub async fn commit_message(&self, new: NewAssistant) -> Result<Committed<CommitOutcome>> {
        check(&new)?;
        self.run("commit_message", async || self.commit_message_once(&new).await).await
    }

    async fn commit_message_once(&self, new: &NewAssistant) -> Result<Committed<CommitOutcome>> {
        let mut tx = ChatTx::open(self, Key::Turn(new.turn)).await?.ok_or(StoreError::not_found("turn"))?;
        let (now, ends, usage) = (tx.now, new.calls.is_empty(), &new.usage);
        let row = turns!(
            RETURNING "UPDATE turns t SET iteration = iteration + 1, live_message_id = NULL, producer = NULL,
                       placed_at = NULL, held_ms = 0, round_began_at = NULL,
                       status = CASE WHEN $5 THEN 'succeeded' ELSE status END,
                       ended_at = CASE WHEN $5 THEN $6::timestamptz END,
                       deadline_at = CASE WHEN $5 THEN NULL ELSE deadline_at END,
                       retries = 0, retry_at = NULL, retry_code = '', retry_message = '', suspect = false, worker_deaths = 0,
                       usage = jsonb_build_object(
                           'input_tokens', COALESCE((usage->>'input_tokens')::bigint, 0) + $7::bigint,
                           'output_tokens', COALESCE((usage->>'output_tokens')::bigint, 0) + $8::bigint,
                           'cache_read_tokens', COALESCE((usage->>'cache_read_tokens')::bigint, 0) + $9::bigint,
                           'cache_write_tokens', COALESCE((usage->>'cache_write_tokens')::bigint, 0) + $10::bigint,
                           'reasoning_tokens', COALESCE((usage->>'reasoning_tokens')::bigint, 0) + $11::bigint,
                           'cost_microusd', COALESCE((usage->>'cost_microusd')::bigint, 0) + $12::bigint)
                       WHERE t.id = $1 AND t.fence = $2 AND t.iteration = $3 AND t.live_message_id = $4 AND t.ended_at IS NULL",
            new.turn.0,
            new.fence,
            new.iteration,
            new.message.0,
            ends,
            now,
            usage.input_tokens,
            usage.output_tokens,
            usage.cache_read_tokens,
            usage.cache_write_tokens,
            usage.reasoning_tokens,
            usage.cost_microusd,
        )
        .fetch_optional(tx.conn())
        .await?;
        let Some(turn) = row else { return tx.nothing(CommitOutcome::Fenced).await };
        let ids: Vec<ToolCallId> = new.calls.iter().map(|_| ToolCallId::new()).collect();
        tx.message(NewMessage {
            id: new.message,
            turn: new.turn,
            turn_ordinal: turn.ordinal,
            role: pb::Role::Assistant,
            iteration: Some(new.iteration),
            model: new.model.clone(),
            usage: Some(new.usage),
            stop_reason: new.stop_reason,
            client_message_id: None,
            blocks: new.blocks.iter().map(|block| stored_block(block, &new.calls, &ids)).collect(),
        });
        if ends {
            tx.touch();
        } else {
            insert_calls(&mut tx, new, &ids).await?;
        }
        tx.event(Kind::TurnChanged(turn.to_pb()));
        tx.commit(CommitOutcome::Committed { turn_ended: ends }).await
    }

    /// A notice of the platform in this turn. What was said before, as `notice` says it, is not said again.
    #[boxed]
    pub async fn add_notice(&self, turn: TurnId, fence: i64, notice: Notice, text: &str) -> Result<Committed<()>> {
        self.run("add_notice", async || {
            let mut tx = ChatTx::open(self, Key::Turn(turn)).await?.ok_or(StoreError::not_found("turn"))?;
            // The numbers in the text of a turn's notice grow from round to round: its first words tell what it is about.
            let row = sqlx::query_scalar!(
                "SELECT t.ordinal FROM turns t WHERE t.id = $1 AND t.fence = $2 AND t.ended_at IS NULL
                   AND CASE WHEN $3 THEN NOT EXISTS (
                           SELECT FROM messages m WHERE m.chat_id = t.chat_id AND m.role = 'notice' AND m.body = $4)
                       ELSE NOT EXISTS (
                           SELECT FROM messages m WHERE m.chat_id = t.chat_id AND m.turn_ordinal = t.ordinal AND m.role = 'notice'
                             AND left(m.body, 20) = left($4, 20)) END",
                turn.0,
                fence,
                notice == Notice::OfChat,
                clean(text),
            )
            .fetch_optional(tx.conn())
            .await?;
            let Some(turn_ordinal) = row else { return tx.nothing(()).await };
            tx.message(NewMessage {
                id: MessageId::new(),
                turn,
                turn_ordinal,
                role: pb::Role::Notice,
                iteration: None,
                model: String::new(),
                usage: None,
                stop_reason: pb::StopReason::Unspecified,
                client_message_id: None,
                blocks: vec![Block::Text(pb::TextBlock { text: clean(text) })],
            });
            tx.commit(()).await
        })
        .await
    }

    /// Ends the turn with an error; with a fence, only on behalf of the newest attempt. False: it had ended, or is
    /// another's.
    #[boxed]
    pub async fn fail_turn(&self, turn: TurnId, fence: Option<i64>, failure: &Failure) -> Result<Committed<bool>> {
        self.run("fail_turn", async || {
            let mut tx = ChatTx::open(self, Key::Turn(turn)).await?.ok_or(StoreError::not_found("turn"))?;
            let ending =
                TurnEnding { status: pb::TurnStatus::Failed, failure: Some(failure), fence, cancels_sent: false };
            match settle::end_turn(&mut tx, turn, ending).await? {
                Some(_) => tx.commit(true).await,
                None => tx.nothing(false).await,
            }
        })
        .await
    }

    /// The attempt stops without a message, as its model cannot answer now: the round is nobody's until `delay` has passed.
    /// False: the turn has ended, or is another's.
    #[boxed]
    pub async fn retry_later(
        &self,
        turn: TurnId,
        fence: i64,
        delay: Duration,
        failure: &Failure,
    ) -> Result<Committed<bool>> {
        self.run("retry_later", async || {
            let mut tx = ChatTx::open(self, Key::Turn(turn)).await?.ok_or(StoreError::not_found("turn"))?;
            let again = tx.now + delay;
            let row = turns!(
                RETURNING "UPDATE turns t SET producer = NULL, placed_at = NULL, retries = retries + 1, retry_at = $3, retry_code = $4,
                                  retry_message = $5
                           WHERE t.id = $1 AND t.fence = $2 AND t.ended_at IS NULL",
                turn.0,
                fence,
                again,
                failure.code.as_str(),
                clean(&failure.message),
            )
            .fetch_optional(tx.conn())
            .await?;
            let Some(row) = row else { return tx.nothing(false).await };
            tx.event(Kind::TurnChanged(row.to_pb()));
            tx.commit(true).await
        })
        .await
    }

    /// Whether the attempt is at work on what others wrote. One whose worker ends meanwhile counts against its round.
    #[boxed]
    pub async fn set_suspect(&self, turn: TurnId, fence: i64, suspect: bool) -> Result<()> {
        self.run("set_suspect", async || {
            sqlx::query!(
                "UPDATE turns SET suspect = $3 WHERE id = $1 AND fence = $2 AND ended_at IS NULL",
                turn.0,
                fence,
                suspect,
            )
            .execute(&self.pool)
            .await?;
            Ok(())
        })
        .await
    }

    /// The attempt stops without a message; another one may take the round at once.
    #[boxed]
    pub async fn release_attempt(&self, turn: TurnId, fence: i64) -> Result<Committed<()>> {
        self.run("release_attempt", async || {
            let mut tx = ChatTx::open(self, Key::Turn(turn)).await?.ok_or(StoreError::not_found("turn"))?;
            let released = sqlx::query_scalar!(
                "UPDATE turns SET producer = NULL WHERE id = $1 AND fence = $2 AND ended_at IS NULL AND producer IS NOT NULL
                 RETURNING traceparent",
                turn.0,
                fence,
            )
            .fetch_optional(tx.conn())
            .await?;
            match released {
                Some(traceparent) => {
                    tx.want(&traceparent);
                    tx.commit(()).await
                }
                None => tx.nothing(()).await,
            }
        })
        .await
    }
}
