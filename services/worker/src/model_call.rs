//! One activity: rounds of one turn, each a fenced attempt that ends in a commit.
//!
//! Invariants: nothing is written without the attempt's fence; a message that is committed is never made again; an
//! attempt whose pieces were seen starts again only under a new fence. Waits are bounded by the turn's deadline.

use std::{sync::Arc, time::Duration};

use reliant_flows::{Heart, ModelOrder, Step};
use reliant_runtime::Backoff;
use reliant_store::{Attempt, Claim, StoreError};
use reliant_telemetry::{
    TraceContext,
    metrics::{self, Phase},
};
use reliant_types::{Code, Failure, TurnId, pb};
use tokio::time::Instant;
use tracing::Instrument;

use crate::{
    attempt::{self, End},
    dispatch::{self, Sent},
    engine::{Engine, EngineError, between},
};

/// Attempts of one round that broke after their first piece; before it the provider's own policy counts.
const BROKEN_MAX: u32 = 8;
const BACKOFF_MIN: Duration = Duration::from_millis(250);
const BACKOFF_MAX: Duration = Duration::from_secs(20);

/// Runs the ordered round, and those after it whose tools answer at once. Returns what is next.
pub async fn call_model(
    engine: &Arc<Engine>,
    order: ModelOrder,
    heart: &Heart,
    trace: &TraceContext,
) -> Result<Step, EngineError> {
    let ModelOrder { chat, turn, mut iteration, .. } = order;
    loop {
        round(engine, turn, iteration, heart, trace).await?;
        let mut next = engine.next_step(chat).await?;
        if let Step::Dispatch { turn: of, calls } = &next
            && *of == turn
            && goes_on(engine, heart)
        {
            let span = tracing::info_span!("turn.dispatch", chat.id = %chat, turn.id = %turn);
            trace.set_parent(&span);
            let waiting = engine.rounds.open(calls);
            next = match dispatch::send_all(engine, calls).instrument(span).await? {
                Sent::Unclear => return Ok(dispatch::look_again(turn)),
                Sent::Taken if !waiting.wait(engine.inline_wait).await => return Ok(Step::Wait { turn, for_ms: None }),
                Sent::Taken | Sent::Changed => engine.next_step(chat).await?,
            };
        }
        match next {
            Step::CallModel { turn: of, iteration: after }
                if of == turn && after > iteration && goes_on(engine, heart) =>
            {
                iteration = after;
            }
            next => return Ok(next),
        }
    }
}

/// A draining worker hands the next round to another one.
fn goes_on(engine: &Engine, heart: &Heart) -> bool {
    !engine.inline_wait.is_zero() && !engine.draining.is_cancelled() && !heart.stop.is_cancelled()
}

/// Attempts the round until its message is committed, its turn has ended, or somebody else has taken it.
async fn round(
    engine: &Arc<Engine>,
    turn: TurnId,
    iteration: i32,
    heart: &Heart,
    trace: &TraceContext,
) -> Result<(), EngineError> {
    let mut backoff = Backoff::new(BACKOFF_MIN, BACKOFF_MAX);
    let mut broken = 0;
    loop {
        let mut claimed = match engine.store.claim_attempt(turn, iteration, engine.instance).await {
            Ok(claimed) => claimed,
            Err(StoreError::NotFound { .. }) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let Claim::Claimed(attempt) = std::mem::replace(&mut claimed.value, Claim::Stale) else {
            engine.tell_with(claimed, false);
            return Ok(());
        };
        let span = tracing::info_span!(
            "turn.round",
            chat.id = %attempt.chat,
            turn.id = %attempt.turn,
            turn.iteration = attempt.iteration,
            turn.fence = attempt.fence,
            message.id = %attempt.message,
        );
        let stored = TraceContext::from_traceparent(&attempt.traceparent);
        if stored.is_empty() { trace } else { &stored }.set_parent(&span);
        measure_pickup(&attempt, &claimed.events);
        span.in_scope(|| engine.tell(claimed));
        if attempt.restarted {
            metrics::TURN_TAKEOVERS.inc();
        }
        let deadline = deadline(&attempt);
        let (turn, fence) = (attempt.turn, attempt.fence);
        let end = attempt::run(engine, *attempt, heart, deadline).instrument(span.clone()).await;
        let failure = match end {
            Ok(End::Committed | End::Lost) => return Ok(()),
            Ok(End::Failed(failure)) => failure,
            Ok(End::Broken(error)) if broken < BROKEN_MAX => {
                broken += 1;
                let delay = backoff.next_delay().max(error.retry_after().unwrap_or_default());
                if Instant::now() + delay < deadline {
                    tracing::warn!(%error, %turn, "the model's answer broke off; it is asked again");
                    tokio::select! {
                        () = tokio::time::sleep(delay) => continue,
                        () = heart.stopped() => return Err(release(engine, turn, fence).await),
                    }
                }
                error.failure()
            }
            Ok(End::Broken(error)) => error.failure(),
            Ok(End::Deadline) => Failure::new(Code::TurnDeadline, "the turn took longer than a turn may take"),
            Err(EngineError::Stopped) => return Err(release(engine, turn, fence).await),
            Err(error) => return Err(error),
        };
        let failed = engine.store.fail_turn(turn, Some(fence), &failure).instrument(span.clone()).await?;
        span.in_scope(|| engine.tell_with(failed, false));
        return Ok(());
    }
}

/// From the accepted message to the claim of its first round, by the database's clock.
fn measure_pickup(attempt: &Attempt, events: &[pb::ChatEvent]) {
    if attempt.iteration > 0 || attempt.restarted {
        return;
    }
    let turn = attempt.turn.to_string();
    let message =
        attempt.history.iter().rev().find(|message| message.role() == pb::Role::User && message.turn_id == turn);
    let asked = message.and_then(|message| message.created_at.as_ref());
    if let Some(time) = between(asked, events.last().and_then(|event| event.time.as_ref())) {
        Phase::Pickup.observe(time);
    }
}

async fn release(engine: &Arc<Engine>, turn: TurnId, fence: i64) -> EngineError {
    // Without it the next attempt takes the fence just the same.
    match engine.store.release_attempt(turn, fence).await {
        Ok(released) => engine.tell_with(released, false),
        Err(error) => tracing::debug!(%error, %turn, "an attempt was not released"),
    }
    EngineError::Stopped
}

fn deadline(attempt: &Attempt) -> Instant {
    let left = attempt.deadline.signed_duration_since(chrono::Utc::now()).to_std().unwrap_or_default();
    Instant::now() + left
}
