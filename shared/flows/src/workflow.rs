//! The chat's workflow: asks what to do, does it, lingers, ends.
//!
//! Deterministic: it looks at nothing but its signals and the results of its activities. A change of the order of its
//! commands breaks the replay of open runs; `tests/replay.rs` keeps histories of each released shape.

use std::time::Duration;

use reliant_types::{ChatId, TurnId};
use serde::{Deserialize, Serialize};
use temporalio_client::RetryPolicy;
use temporalio_macros::{workflow, workflow_methods};
use temporalio_sdk::{
    ActivityOptions, CancellableFuture, ContinueAsNewOptions, LocalActivityOptions, SyncWorkflowContext,
    WorkflowContext, WorkflowContextView, WorkflowResult, workflows::select,
};

use crate::{
    activities::Activities,
    driver::{DispatchOrder, ModelOrder, Step},
    trace,
};

/// No heartbeat of a model call for so long: it is given to another worker.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(3);
/// Above any turn's own deadline, which is what really bounds a model call.
const MODEL_CALL_TIMEOUT: Duration = Duration::from_secs(2 * 60 * 60);
const STEP_TIMEOUT: Duration = Duration::from_secs(10);
const DISPATCH_TIMEOUT: Duration = Duration::from_secs(20);
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// After a local activity's own retries: the workflow waits, doubling up to this.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A look that is due at once still lets the clock go on.
const SLEEP_MIN: Duration = Duration::from_millis(20);
/// A look that is due this soon is waited for; for a later one the relay wakes.
const SLEEP_MAX: Duration = Duration::from_secs(15);
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ChatInput {
    pub chat: ChatId,
    pub linger_ms: u64,
    /// Turns of one run. It is part of the input, so that a replay decides as the run did.
    #[serde(default = "usual_run_turns")]
    pub run_turns: u32,
}

/// What runs had whose input did not say it.
fn usual_run_turns() -> u32 {
    100
}

/// "Look again." Nothing more: what is to be done is in Postgres.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Wake {
    pub traceparent: String,
}

#[workflow]
pub struct ChatWorkflow {
    input: ChatInput,
    wakes: u64,
    traceparent: String,
}

#[workflow_methods]
impl ChatWorkflow {
    #[init]
    fn new(_ctx: &WorkflowContextView, input: ChatInput) -> Self {
        Self { input, wakes: 0, traceparent: String::new() }
    }

    #[signal]
    pub fn wake(&mut self, _ctx: &mut SyncWorkflowContext<Self>, wake: Wake) {
        self.wakes += 1;
        if !wake.traceparent.is_empty() {
            self.traceparent = wake.traceparent;
        }
    }

    #[run(name = "chat")]
    pub async fn run(ctx: &mut WorkflowContext<Self>) -> WorkflowResult<()> {
        let ctx = &*ctx;
        let linger = Duration::from_millis(ctx.state(|s| s.input.linger_ms));
        let run_turns = ctx.state(|s| s.input.run_turns).max(1);
        let mut turns = 0;
        let mut newest: Option<TurnId> = None;
        // One alarm at a time: a wake leaves it running, and it only looks whether there was one. Starting and
        // cancelling a timer for each wait would cost the server two events each time.
        let mut alarm = None;
        let mut woken_since_alarm = false;
        loop {
            let mut seen = ctx.state(|s| s.wakes);
            let mut step = next_step(ctx).await;
            let sleep = loop {
                if step.turn().is_some_and(|turn| newest.replace(turn) != Some(turn)) {
                    turns += 1;
                }
                // The turns of a chat that never idles follow one another: its run ends between two steps.
                if turns > run_turns || ctx.continue_as_new_suggested() {
                    break None;
                }
                let next = match step {
                    Step::CallModel { turn, iteration } => call_model(ctx, turn, iteration, &mut seen).await,
                    Step::Dispatch { turn, calls } => dispatch(ctx, turn, calls).await,
                    Step::Wait { for_ms, .. } => break for_ms.map(Duration::from_millis),
                    Step::Idle => break None,
                };
                // A wake that came meanwhile may know better than the hint.
                step = match next {
                    Some(next) if ctx.state(|s| s.wakes) == seen => next,
                    _ => {
                        seen = ctx.state(|s| s.wakes);
                        next_step(ctx).await
                    }
                };
                if ctx.cancellation_token().is_cancelled() {
                    return Ok(());
                }
            };
            if ctx.cancellation_token().is_cancelled() {
                return Ok(());
            }
            if turns >= run_turns || ctx.continue_as_new_suggested() {
                let _ = ctx.wait_condition(|_| ctx.all_handlers_finished()).await;
                ctx.continue_as_new(ctx.state(|s| s.input.clone()), ContinueAsNewOptions::default())?;
            }
            if ctx.state(|s| s.wakes) > seen {
                continue;
            }
            if let Some(sleep) = sleep.filter(|sleep| *sleep <= SLEEP_MAX) {
                select! {
                    woken = ctx.wait_condition(|s| s.wakes > seen) => if woken.is_err() { return Ok(()) },
                    _ = ctx.timer(sleep.max(SLEEP_MIN)) => {}
                }
                woken_since_alarm = true;
                continue;
            }
            // Wait for a wake; end when an alarm's whole span passed without one.
            loop {
                let timer = alarm.get_or_insert_with(|| {
                    woken_since_alarm = false;
                    Box::pin(ctx.timer(linger))
                });
                let woken = select! {
                    woken = ctx.wait_condition(|s| s.wakes > seen) => Some(woken),
                    _ = timer.as_mut() => None,
                };
                match woken {
                    Some(Ok(())) => {
                        woken_since_alarm = true;
                        break;
                    }
                    Some(Err(_)) => return Ok(()),
                    // The completion of a run that a signal has reached is refused by the server, and the signal is
                    // then delivered: nothing is lost between this look and the end.
                    None if !woken_since_alarm => return Ok(()),
                    None => alarm = None,
                }
            }
        }
    }
}

type Ctx = WorkflowContext<ChatWorkflow>;

/// What Postgres says. Asked for ever: a failure is an outage, and must not fail the workflow.
async fn next_step(ctx: &Ctx) -> Step {
    let mut backoff = RETRY_MAX;
    loop {
        let chat = ctx.state(|s| s.input.chat);
        let asked = traced(ctx, || ctx.execute_local_activity(Activities::next_step, chat, local(STEP_TIMEOUT)));
        match asked.await {
            Ok(step) => return step,
            Err(_) if ctx.cancellation_token().is_cancelled() => return Step::Idle,
            Err(_) => {}
        }
        ctx.timer(backoff).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

async fn dispatch(ctx: &Ctx, turn: TurnId, calls: Vec<reliant_types::ToolCallId>) -> Option<Step> {
    let order = DispatchOrder { chat: ctx.state(|s| s.input.chat), turn, calls };
    let sent = traced(ctx, || ctx.execute_local_activity(Activities::dispatch, order, local(DISPATCH_TIMEOUT)));
    match sent.await {
        Ok(next) => Some(next),
        Err(_) => {
            ctx.timer(RETRY_MAX).await;
            None
        }
    }
}

/// Runs the model call. A wake meanwhile is looked at once: the call goes on unless its turn is over.
async fn call_model(ctx: &Ctx, turn: TurnId, iteration: i32, seen: &mut u64) -> Option<Step> {
    let order = ModelOrder { chat: ctx.state(|s| s.input.chat), turn, iteration, attempt: 0 };
    let options = ActivityOptions::with_start_to_close_timeout(MODEL_CALL_TIMEOUT)
        .heartbeat_timeout(HEARTBEAT_TIMEOUT)
        .retry_policy(
            RetryPolicy::builder()
                .initial_interval(RETRY_MIN)
                .backoff_coefficient(2.0)
                .maximum_interval(RETRY_MAX)
                .build(),
        )
        .build();
    let mut call = Box::pin(traced(ctx, || ctx.execute_activity(Activities::call_model, order, options)));
    let mut looked = false;
    loop {
        let woken = select! {
            outcome = call.as_mut() => match outcome {
                // What was looked at meanwhile may be newer than the hint: ask again.
                Ok(outcome) => return outcome.next.filter(|_| !looked),
                Err(_) => {
                    ctx.timer(RETRY_MAX).await;
                    return None;
                }
            },
            woken = ctx.wait_condition(|s| s.wakes > *seen) => woken,
        };
        if woken.is_err() {
            return None;
        }
        *seen = ctx.state(|s| s.wakes);
        let step = next_step(ctx).await;
        if step.turn() != Some(turn) {
            call.as_ref().get_ref().cancel();
            return Some(step);
        }
        looked = true;
    }
}

/// Runs `schedule` so that the command's header carries the newest trace context.
fn traced<R>(ctx: &Ctx, schedule: impl FnOnce() -> R) -> R {
    let traceparent = ctx.state(|s| s.traceparent.clone());
    if traceparent.is_empty() {
        return schedule();
    }
    ctx.with_context_value_sync::<trace::Current, R>(trace::payload(&traceparent), schedule)
}

fn local(timeout: Duration) -> LocalActivityOptions {
    LocalActivityOptions::builder()
        .start_to_close_timeout(timeout)
        .retry_policy(
            RetryPolicy::builder()
                .initial_interval(RETRY_MIN)
                .backoff_coefficient(2.0)
                .maximum_interval(RETRY_MAX)
                .maximum_attempts(4)
                .build(),
        )
        .build()
}
