//! One activity: rounds of one turn, each a fenced attempt that ends in a commit.
//!
//! Invariants: nothing is written without the attempt's fence; a message that is committed is never made again; an
//! attempt whose pieces were seen starts again only under a new fence. A model that fails is asked again until the turn's
//! deadline, not a number of times; a wait of more than moments is a row, and no activity stands open for it.

use std::{sync::Arc, time::Duration};

use reliant_flows::{Heart, ModelOrder, Step};
use reliant_models::tried_again;
use reliant_store::{Attempt, Claim, StoreError, model_never_answered};
use reliant_telemetry::{TraceContext, chain, hop, metrics};
use reliant_types::{Code, Failure, ToolCallId, TurnId};
use tokio::time::Instant;
use tracing::{Instrument, field::Empty};

use crate::{
    attempt::{self, End},
    dispatch::{self, Sent},
    engine::{Engine, EngineError},
    rounds::Waited,
};

/// Attempts that broke off and are made again at once, before their round is put off.
const IN_PLACE_TRIES: u32 = 3;
/// A longer wait is not waited for in place.
const IN_PLACE_WAIT_MAX: Duration = Duration::from_secs(1);

/// How a round went.
enum Round {
    /// Stored, or somebody else's: with the calls that are to be sent.
    Over(Vec<ToolCallId>),
    /// The model cannot answer; it is asked again after this.
    Later(Duration),
}

/// Runs the ordered round, and those after it whose tools answer at once. Returns what is next, as Postgres says it.
///
/// On that short way nothing is asked in between: a dispatch and a claim check for themselves that they are still due.
pub async fn call_model(
    engine: &Arc<Engine>,
    order: ModelOrder,
    heart: &Heart,
    trace: &TraceContext,
) -> Result<Step, EngineError> {
    let ModelOrder { chat, turn, mut iteration, .. } = order;
    loop {
        let ready = match round(engine, turn, iteration, heart, trace).await? {
            Round::Over(ready) => ready,
            Round::Later(delay) => return Ok(Step::Wait { turn, for_ms: Some(delay.as_millis() as u64) }),
        };
        let waited = if ready.is_empty() || !goes_on(engine, heart) {
            Waited::Some
        } else {
            let span = tracing::info_span!("turn.dispatch", chat.id = %chat, turn.id = %turn);
            trace.set_parent(&span);
            let waiting = engine.rounds.open(&ready);
            match dispatch::send_all(engine, chat, &ready).instrument(span).await? {
                Sent::Taken => waiting.wait(engine.inline_wait).await,
                Sent::Changed => Waited::Some,
                Sent::Unclear => return Ok(dispatch::look_again(turn)),
            }
        };
        match waited {
            Waited::All if goes_on(engine, heart) => {
                // Nobody else says to the relay that these results were seen.
                engine.look(chat);
                iteration += 1;
            }
            Waited::None => return Ok(Step::Wait { turn, for_ms: None }),
            Waited::All | Waited::Some => match engine.next_step(chat).await? {
                // None of the calls was to run.
                Step::CallModel { turn: of, iteration: after }
                    if of == turn && after > iteration && goes_on(engine, heart) =>
                {
                    iteration = after;
                }
                next => return Ok(next),
            },
        }
    }
}

/// A draining worker hands the next round to another one.
fn goes_on(engine: &Engine, heart: &Heart) -> bool {
    !engine.inline_wait.is_zero() && !engine.draining.is_cancelled() && !heart.stop.is_cancelled()
}

/// Attempts the round until its message is committed, its turn has ended, somebody else has taken it, or its model is
/// better asked later.
async fn round(
    engine: &Arc<Engine>,
    turn: TurnId,
    iteration: i32,
    heart: &Heart,
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
        let deadline = deadline(&attempt);
        let (turn, fence, model) = (attempt.turn, attempt.fence, attempt.model.clone());
        let end = attempt::run(engine, *attempt, began, heart, deadline).instrument(span.clone()).await;
        let away = matches!(end, Ok(End::Away(_)));
        let failure = match end {
            Ok(End::Committed { ready }) => return Ok(Round::Over(ready)),
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
                                () = heart.stopped() => return Err(release(engine, turn, fence).await),
                            }
                        }
                        let later =
                            engine.store.retry_later(turn, fence, delay, &said).instrument(span.clone()).await?;
                        let waits = later.value;
                        span.in_scope(|| engine.tell_with(later, false));
                        return Ok(if waits { Round::Later(delay) } else { Round::Over(Vec::new()) });
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

async fn release(engine: &Arc<Engine>, turn: TurnId, fence: i64) -> EngineError {
    // Without it the next attempt takes the fence just the same.
    match engine.store.release_attempt(turn, fence).await {
        Ok(released) => engine.tell_with(released, false),
        Err(error) => tracing::debug!(error = %chain(&error), turn.id = %turn, "an attempt was not released"),
    }
    EngineError::Stopped
}

fn deadline(attempt: &Attempt) -> Instant {
    let left = attempt.deadline.signed_duration_since(chrono::Utc::now()).to_std().unwrap_or_default();
    Instant::now() + left
}
