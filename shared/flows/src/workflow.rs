//! The chat's workflow: it starts a burst of work when the chat was woken, waits for the next wake, and ends.
//!
//! Deterministic: it looks at nothing but its signals, the results of its activities and the length of its history. It
//! has no local activities: a task that they keep open while signals arrive can be decided otherwise when it is replayed.
//! A change of the order of its commands breaks the replay of open runs, which then fail and are begun anew from Postgres;
//! `tests/replay.rs` keeps histories of the current shape.

use std::time::Duration;

use reliant_types::ChatId;
use serde::{Deserialize, Serialize};
use temporalio_client::RetryPolicy;
use temporalio_macros::{workflow, workflow_methods};
use temporalio_sdk::{
    ActivityOptions, ContinueAsNewOptions, SyncWorkflowContext, WorkflowContext, WorkflowContextView, WorkflowResult,
    workflows::select,
};

use crate::{
    activities::Activities,
    driver::{BurstEnd, BurstOrder},
    trace,
};

/// Without a heartbeat for this long a burst is given to another worker.
pub const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(3);
/// A burst that was lost again and again, or whose worker is late, gets more.
const HEARTBEAT_TIMEOUT_MAX: Duration = Duration::from_secs(30);
/// Above any turn's own deadline, which is what bounds a burst.
const BURST_TIMEOUT: Duration = Duration::from_secs(2 * 60 * 60);
/// Tries of the server, without a workflow task between them; then the workflow tries on with more patience.
const SERVER_TRIES: u32 = 3;
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// The workflow's own wait between failures doubles up to this.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A look that is due at once still lets the clock go on.
const SLEEP_MIN: Duration = Duration::from_millis(20);
/// A look that is due this soon is waited for; for a later one the relay wakes.
const SLEEP_MAX: Duration = Duration::from_secs(15);
/// A run whose history has so many events goes on as a new one: whoever replays it does so within milliseconds.
const RUN_EVENTS_MAX: u32 = 300;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ChatInput {
    pub chat: ChatId,
    pub linger_ms: u64,
    /// Turns of one run. It is part of the input, so that a replay decides as the run did.
    pub run_turns: u32,
    /// Of the first burst; zero: the usual one.
    #[serde(default)]
    pub heartbeat_timeout_ms: u64,
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
        let mut input = ctx.state(|s| s.input.clone());
        let linger = Duration::from_millis(input.linger_ms);
        let (mut turns, mut failures) = (0, 0);
        // One alarm at a time: a wake leaves it running, and it only checks whether there was one. Starting and
        // cancelling a timer for each wait would cost the server two events each time.
        let mut alarm = None;
        let mut woken_since_alarm = false;
        loop {
            let observed = ctx.state(|s| s.wakes);
            let sleep = match burst(ctx, heartbeat_timeout(input.heartbeat_timeout_ms, failures)).await {
                Ok(end) => {
                    failures = 0;
                    turns += end.turns;
                    input.heartbeat_timeout_ms = end.heartbeat_timeout_ms;
                    end.look_after_ms.map(Duration::from_millis)
                }
                Err(_) if ctx.cancellation_token().is_cancelled() => return Ok(()),
                // An outage, or workers that die or are late: it must not fail the workflow.
                Err(_) => {
                    failures += 1;
                    Some(backoff(failures))
                }
            };
            // The new run begins with a burst, so that a wake that came meanwhile is answered.
            if turns >= input.run_turns.max(1)
                || ctx.history_length() >= RUN_EVENTS_MAX
                || ctx.continue_as_new_suggested()
            {
                let _ = ctx.wait_condition(|_| ctx.all_handlers_finished()).await;
                ctx.continue_as_new(input.clone(), ContinueAsNewOptions::default())?;
            }
            if ctx.state(|s| s.wakes) > observed || sleep == Some(Duration::ZERO) {
                continue;
            }
            if let Some(sleep) = sleep.filter(|sleep| *sleep <= SLEEP_MAX) {
                select! {
                    woken = ctx.wait_condition(|s| s.wakes > observed) => if woken.is_err() { return Ok(()) },
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
                    woken = ctx.wait_condition(|s| s.wakes > observed) => Some(woken),
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

/// One burst: all that can be done for the chat now.
async fn burst(ctx: &Ctx, heartbeat_timeout: Duration) -> Result<BurstEnd, temporalio_sdk::ActivityExecutionError> {
    let order = BurstOrder { chat: ctx.state(|s| s.input.chat), attempt: 0 };
    let options = ActivityOptions::with_start_to_close_timeout(BURST_TIMEOUT)
        .heartbeat_timeout(heartbeat_timeout)
        .retry_policy(
            RetryPolicy::builder()
                .initial_interval(RETRY_MIN)
                .backoff_coefficient(2.0)
                .maximum_interval(RETRY_MAX)
                .maximum_attempts(SERVER_TRIES)
                .build(),
        )
        .build();
    let traceparent = ctx.state(|s| s.traceparent.clone());
    let schedule = || ctx.execute_activity(Activities::burst, order, options);
    if traceparent.is_empty() {
        return schedule().await;
    }
    ctx.with_context_value_sync::<trace::Current, _>(trace::payload(&traceparent), schedule).await
}

/// Doubles with each failure: a worker that is starved, and not dead, must be able to finish.
fn heartbeat_timeout(usual_ms: u64, failures: u32) -> Duration {
    let usual = Duration::from_millis(usual_ms).clamp(HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MAX);
    (usual * 2u32.pow(failures.min(4))).min(HEARTBEAT_TIMEOUT_MAX)
}

fn backoff(failures: u32) -> Duration {
    (RETRY_MAX * 2u32.pow(failures.saturating_sub(1).min(4))).min(BACKOFF_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_grows_with_failures_and_is_bounded() {
        let of = |usual, failures| heartbeat_timeout(usual, failures).as_secs();
        assert_eq!([of(0, 0), of(3000, 1), of(3000, 2), of(3000, 9)], [3, 6, 12, 30]);
        assert_eq!([of(8000, 0), of(8000, 1), of(u64::MAX, 0)], [8, 16, 30]);
        assert_eq!([1, 2, 3, 4, 50].map(|failures| backoff(failures).as_secs()), [1, 2, 4, 5, 5]);
    }
}
