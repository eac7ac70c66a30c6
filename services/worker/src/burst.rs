//! One activity: all that can be done for a chat now. Each round of a turn is a fenced attempt that ends in a commit.
//!
//! Invariants: nothing is written without the attempt's fence; a message that is committed is never made again; an
//! attempt whose pieces were seen starts again only under a new fence. A model that fails is asked again until the turn's
//! deadline, not a number of times; a wait of more than moments is a row, and no activity stands open for it. A burst ends
//! by a look that finds nothing to do: until then nobody signals its chat.

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use reliant_flows::BurstEnd;
use reliant_models::tried_again;
use reliant_store::{Claim, Look, Step, StoreError, model_never_answered};
use reliant_telemetry::{TraceContext, chain, hop, metrics};
use reliant_types::{ChatId, Code, Failure, ToolCallId, TurnId};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, field::Empty};

use crate::{
    attempt::{self, End},
    bursts::OpenBurst,
    dispatch::{self, Sent},
    engine::{Engine, EngineError},
    rounds::Waited,
};

/// A burst of a chat that never rests goes on as another one, so that its worker may drain.
const TIME_MAX: Duration = Duration::from_secs(20 * 60);
/// Attempts that broke off and are made again at once, before their round is put off.
const IN_PLACE_TRIES: u32 = 3;
/// Workers that a round may end: the first one's attempt is not marked (attempt.rs), so that one goes uncounted.
const WORKER_DEATHS_MAX: i32 = 2;
/// A longer wait is not waited for in place.
const IN_PLACE_WAIT_MAX: Duration = Duration::from_secs(1);

/// How a round went.
enum Round {
    /// Stored, or somebody else's: with the calls that are to be sent, one wave behind the other.
    Over(Vec<Vec<ToolCallId>>),
    /// The model cannot answer; Postgres says when it is asked again.
    Later,
}

/// Works until nothing can be done now. `trace`: of the wake that the burst answers.
pub async fn run(
    engine: &Arc<Engine>,
    chat: ChatId,
    stop: &CancellationToken,
    trace: TraceContext,
) -> Result<BurstEnd, EngineError> {
    let burst = Burst { engine, chat, stop, open: engine.bursts.open(chat) };
    let began = Instant::now();
    let turns_max = engine.flows.config().run_turns.max(1) as usize;
    let mut turns: Vec<TurnId> = Vec::new();
    let mut trace = trace;
    let mut step = burst.first_look(&trace).await?;
    loop {
        let turn = match step {
            Step::Wait { for_ms, .. } => return Ok(burst.end(turns.len(), for_ms)),
            Step::Idle => return Ok(burst.end(turns.len(), None)),
            Step::CallModel { turn, .. } | Step::Dispatch { turn, .. } => turn,
        };
        if turns.last() != Some(&turn) {
            if turns.len() >= turns_max {
                return Ok(burst.end(turns.len(), Some(0)));
            }
            // The burst began with a wake of its first turn; a later one has a trace of its own.
            if !turns.is_empty() {
                trace = TraceContext::from_traceparent(&engine.store.turn_trace(turn).await?);
            }
            turns.push(turn);
        }
        if burst.is_over() || began.elapsed() > TIME_MAX {
            return Ok(burst.end(turns.len(), Some(0)));
        }
        match step {
            Step::CallModel { iteration, .. } => burst.rounds(turn, iteration, &trace).await?,
            // The next look says what the results are good for.
            Step::Dispatch { calls, .. } => _ = burst.send(turn, &calls, &trace).await?,
            Step::Wait { .. } | Step::Idle => {}
        }
        step = engine.next_step(chat, Look::Last(engine.instance)).await?;
    }
}

struct Burst<'a> {
    engine: &'a Arc<Engine>,
    chat: ChatId,
    stop: &'a CancellationToken,
    open: OpenBurst<'a>,
}

impl Burst<'_> {
    async fn first_look(&self, trace: &TraceContext) -> Result<Step, EngineError> {
        let timer = metrics::guard(&metrics::TURN_STEP, &["next_step"]);
        let span = tracing::info_span!("turn.next_step", chat.id = %self.chat);
        trace.set_parent(&span);
        let step = self.engine.next_step(self.chat, Look::Last(self.engine.instance)).instrument(span).await;
        timer.done(if step.is_ok() { "ok" } else { "failed" });
        step
    }

    fn end(&self, turns: usize, look_after_ms: Option<u64>) -> BurstEnd {
        let turns = u32::try_from(turns).unwrap_or(u32::MAX);
        let heartbeat_timeout_ms = self.engine.load.heartbeat_timeout().as_millis() as u64;
        BurstEnd { turns, look_after_ms, heartbeat_timeout_ms }
    }

    /// A draining worker hands what is left to another one.
    fn is_over(&self) -> bool {
        self.engine.draining.is_cancelled() || self.stop.is_cancelled()
    }

    /// Runs the round, and those after it whose tools answer at once.
    ///
    /// On that short way nothing is asked in between: a dispatch and a claim check for themselves that they are still due.
    async fn rounds(&self, turn: TurnId, mut iteration: i32, trace: &TraceContext) -> Result<(), EngineError> {
        loop {
            let waves = match round(self.engine, turn, iteration, self.stop, trace).await? {
                Round::Over(waves) if !waves.is_empty() => waves,
                Round::Over(_) | Round::Later => return Ok(()),
            };
            for wave in waves {
                if self.is_over() || !self.send(turn, &wave, trace).await? {
                    return Ok(());
                }
            }
            if self.is_over() {
                return Ok(());
            }
            iteration += 1;
        }
    }

    /// Sends the calls and waits a moment for their results. True: all of them are stored.
    async fn send(&self, turn: TurnId, calls: &[ToolCallId], trace: &TraceContext) -> Result<bool, EngineError> {
        let engine = self.engine;
        let timer = metrics::guard(&metrics::TURN_STEP, &["dispatch"]);
        let span = tracing::info_span!("turn.dispatch", chat.id = %self.chat, turn.id = %turn);
        trace.set_parent(&span);
        let waiting = engine.rounds.open(calls);
        let sent = dispatch::send_all(engine, self.chat, calls).instrument(span).await;
        timer.done(if sent.is_ok() { "ok" } else { "failed" });
        if sent? != Sent::Taken {
            return Ok(false);
        }
        let deadline = Instant::now() + engine.inline_wait;
        loop {
            match waiting.wait(deadline, self.open.hinted()).await {
                Waited::All => return Ok(true),
                Waited::Late => return Ok(false),
                // Another worker has stored a result; there may be more to wait for.
                Waited::Hinted => match engine.next_step(self.chat, Look::Within(engine.instance)).await? {
                    Step::Wait { turn: of, .. } if of == turn => {}
                    _ => return Ok(false),
                },
            }
        }
    }
}

/// Attempts the round until its message is committed, its turn has ended, somebody else has taken it, or its model is
/// better asked later.
async fn round(
    engine: &Arc<Engine>,
    turn: TurnId,
    iteration: i32,
    stop: &CancellationToken,
    trace: &TraceContext,
) -> Result<Round, EngineError> {
    let mut broken = 0;
    loop {
        let began = Instant::now();
        let claim =
            hop(trace, tracing::info_span!(parent: None, "turn.claim", turn.id = %turn, turn.iteration = iteration));
        let mut claimed = match engine.store.claim_attempt(turn, iteration, engine.instance, &claim).await {
            Ok(claimed) => claimed,
            Err(StoreError::NotFound { .. }) => return Ok(Round::Over(Vec::new())),
            Err(error) => return Err(error.into()),
        };
        let Claim::Claimed(attempt) = std::mem::replace(&mut claimed.value, Claim::Stale) else {
            engine.tell_with(claimed, false);
            return Ok(Round::Over(Vec::new()));
        };
        let span = tracing::info_span!(
            "turn.round",
            chat.id = %attempt.chat,
            turn.id = %attempt.turn,
            turn.iteration = attempt.iteration,
            turn.fence = attempt.fence,
            message.id = %attempt.message,
            error.type = Empty,
            otel.status_code = Empty,
        );
        claim.set_parent(&span);
        // An attempt stands beside the one that it replaces.
        if attempt.restarted {
            attempt.replaces.link(&span);
        }
        span.in_scope(|| engine.tell(claimed));
        let before = attempt.retries.unsigned_abs();
        if attempt.restarted && before == 0 && broken == 0 {
            metrics::TURN_TAKEOVERS.inc();
        }
        let deadline = Instant::now() + time_left(attempt.claimed_at, attempt.deadline);
        let (turn, fence, model) = (attempt.turn, attempt.fence, attempt.model.clone());
        let end = if attempt.worker_deaths >= WORKER_DEATHS_MAX {
            metrics::TURNS_DEADLY.inc();
            Ok(End::Failed(deadly()))
        } else {
            attempt::run(engine, *attempt, began, stop, deadline).instrument(span.clone()).await
        };
        let away = matches!(end, Ok(End::Away(_)));
        let failure = match end {
            Ok(End::Committed { waves }) => return Ok(Round::Over(waves)),
            Ok(End::Lost) => return Ok(Round::Over(Vec::new())),
            Ok(End::Failed(failure)) => failure,
            Ok(End::Broken(error) | End::Away(error)) => {
                broken += 1;
                let quick = before == 0 && !away && broken <= IN_PLACE_TRIES;
                let tries = if quick { broken } else { before + IN_PLACE_TRIES + 1 };
                let said = Failure::new(error.failure().code, error.to_string());
                match engine.models.retry_policy().delay(tries, &error) {
                    None => error.failure(),
                    Some(delay) if Instant::now() + delay >= deadline => model_never_answered(&said),
                    Some(delay) => {
                        let provider = engine.models.resolve(&model).map(|model| model.provider).unwrap_or_default();
                        tried_again(&provider, tries, delay, &error);
                        if quick && delay <= IN_PLACE_WAIT_MAX {
                            tokio::select! {
                                () = tokio::time::sleep(delay) => continue,
                                () = stop.cancelled() => return Err(release(engine, turn, fence).await),
                            }
                        }
                        let later =
                            engine.store.retry_later(turn, fence, delay, &said).instrument(span.clone()).await?;
                        let waits = later.value;
                        span.in_scope(|| engine.tell_with(later, false));
                        return Ok(if waits { Round::Later } else { Round::Over(Vec::new()) });
                    }
                }
            }
            Ok(End::Deadline) => Failure::new(Code::TurnDeadline, "the turn took longer than a turn may take"),
            Err(EngineError::Stopped) => return Err(release(engine, turn, fence).await),
            Err(error) => return Err(error),
        };
        span.record("error.type", failure.code.as_str());
        span.record("otel.status_code", "ERROR");
        span.in_scope(|| tracing::warn!(error = %chain(&failure), code = %failure.code, "a turn failed"));
        let failed = engine.store.fail_turn(turn, Some(fence), &failure).instrument(span.clone()).await?;
        span.in_scope(|| engine.tell_with(failed, false));
        return Ok(Round::Over(Vec::new()));
    }
}

/// The one exception to the rule that a turn goes on: it would end the next worker too, and everybody's turns there.
fn deadly() -> Failure {
    Failure::new(
        Code::Internal,
        "each worker that prepared this turn ended or stood still just then, so it is given up; send another message to go on, \
         and leave out what this one brought in (a file, a tool's answer, an MCP server)",
    )
}

async fn release(engine: &Arc<Engine>, turn: TurnId, fence: i64) -> EngineError {
    // Without it the next attempt takes the fence just the same.
    match engine.store.release_attempt(turn, fence).await {
        Ok(released) => engine.tell_with(released, false),
        Err(error) => tracing::debug!(error = %chain(&error), turn.id = %turn, "an attempt was not released"),
    }
    EngineError::Stopped
}

/// Both times are of the database's clock: this worker's own may be wrong.
fn time_left(claimed_at: DateTime<Utc>, deadline: DateTime<Utc>) -> Duration {
    deadline.signed_duration_since(claimed_at).to_std().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turns_time_is_told_by_the_databases_clock_alone() {
        // A database that is decades behind or ahead of this worker.
        for years in [-40, 0, 40] {
            let claimed = Utc::now() + chrono::TimeDelta::days(365 * years);
            assert_eq!(time_left(claimed, claimed + chrono::TimeDelta::minutes(7)), Duration::from_secs(420));
            assert_eq!(time_left(claimed, claimed - chrono::TimeDelta::minutes(7)), Duration::ZERO);
        }
    }
}
