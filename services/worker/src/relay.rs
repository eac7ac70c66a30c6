//! The relay wakes chats that no worker has looked at since they were woken, so that a lost wake only delays. A chat whose run
//! does not answer gets a new run: Postgres has all that it needs.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use reliant_flows::{FAILED_TASKS_MAX, RunState};
use reliant_store::Unseen;
use reliant_telemetry::{TraceContext, chain, hop, metrics, sampled};
use tokio::time::Instant;

use crate::{dispatch, engine::Engine};

const UNSEEN_INTERVAL: Duration = Duration::from_secs(1);
/// A wake usually arrives within milliseconds; what is older was lost.
const UNSEEN_AGE: Duration = Duration::from_secs(2);
/// From here on it is counted as standing still.
const UNSEEN_LONG: Duration = Duration::from_secs(10);
/// A run that is open and was woken more often than this, and did nothing, is deaf.
const WAKES_MAX: u32 = 2;
/// A workflow task takes milliseconds: a worker that holds one for longer than this, beside what it is late, is gone.
const TASK_HELD: Duration = Duration::from_millis(1200);
const ORPHAN_INTERVAL: Duration = Duration::from_secs(2);
/// A chat whose model is to be asked again wakes by its own timer where that is soon; for the rest this looks.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
const RETRY_LATE: Duration = Duration::from_millis(500);
/// Held chats are looked for this often, if no place becomes free here before.
const HELD_INTERVAL: Duration = Duration::from_secs(1);
/// Places that become free one after another are given out together.
const HELD_GATHER: Duration = Duration::from_millis(10);
const STALE_INTERVAL: Duration = Duration::from_secs(30);
const CANCEL_INTERVAL: Duration = Duration::from_secs(2);
const LEASE_INTERVAL: Duration = Duration::from_secs(3);
/// Chats woken in one round.
const BATCH: i64 = 200;
/// Signals under way at one time.
const PARALLEL: usize = 16;

pub async fn run(engine: Arc<Engine>) {
    tokio::join!(
        unseen(&engine),
        orphans(&engine),
        retries(&engine),
        held(&engine),
        stale(&engine),
        cancels(&engine),
        leases(&engine)
    );
}

async fn unseen(engine: &Arc<Engine>) {
    let mut tick = ticker(UNSEEN_INTERVAL);
    loop {
        tick.tick().await;
        match engine.store.count_unseen(UNSEEN_LONG).await {
            Ok(count) => metrics::CHATS_UNSEEN.set(count),
            Err(error) => tracing::debug!(error = %chain(&error), "the relay could not count unseen chats"),
        }
        match engine.store.unseen_chats(UNSEEN_AGE, BATCH).await {
            Ok(chats) => {
                futures::stream::iter(chats).for_each_concurrent(PARALLEL, |chat| answer_for(engine, chat)).await;
            }
            Err(error) => tracing::debug!(error = %chain(&error), "the relay could not look for unseen chats"),
        }
    }
}

/// What is to be done for a chat that no worker has looked at.
#[derive(Debug, PartialEq, Eq)]
enum Remedy {
    /// Signal its run, or begin one.
    Wake,
    /// Its run goes on by itself.
    Leave,
    /// Its worker may be dead: Temporal is asked again a little later.
    AskAgain,
    /// End its run and begin another.
    BeginAnew { cause: &'static str },
}

fn remedy(state: &RunState, attempts: u32) -> Remedy {
    let begin_anew = |cause| Remedy::BeginAnew { cause };
    match state {
        RunState::None => Remedy::Wake,
        // It was woken again and again, and did not begin a burst.
        RunState::Waiting if attempts > WAKES_MAX => begin_anew("deaf"),
        RunState::Waiting => Remedy::Wake,
        RunState::Foreign { .. } => begin_anew("foreign"),
        RunState::TaskScheduled { attempt } | RunState::TaskStarted { attempt, .. } if *attempt >= FAILED_TASKS_MAX => {
            begin_anew("failing_tasks")
        }
        RunState::TaskStarted { .. } => Remedy::AskAgain,
        // A wake is pending; another would only add to the queue.
        RunState::TaskScheduled { .. } | RunState::BurstScheduled { .. } | RunState::BurstStarted => Remedy::Leave,
    }
}

async fn answer_for(engine: &Arc<Engine>, unseen: Unseen) {
    let chat = unseen.wake.chat;
    let state = match engine.flows.run_state(chat).await {
        Ok(state) => state,
        Err(error) => {
            metrics::CHATS_UNSEEN_FOUND.with_label_values(&["unknown"]).inc();
            tracing::debug!(error = %chain(&error), chat.id = %chat, "the run of an unseen chat is not known");
            return;
        }
    };
    metrics::CHATS_UNSEEN_FOUND.with_label_values(&[state.name()]).inc();
    match remedy(&state, unseen.attempts) {
        Remedy::Leave => {}
        Remedy::Wake => {
            metrics::RELAY_REWAKES.with_label_values(&["unseen"]).inc();
            engine.wake(&unseen.wake).await;
        }
        Remedy::BeginAnew { cause } => begin_anew(engine, &unseen, &state, cause).await,
        Remedy::AskAgain => {
            let Ok(permit) = engine.errands.clone().try_acquire_owned() else { return sampled::refused("errands") };
            let engine = engine.clone();
            tokio::spawn(async move {
                let _permit = permit;
                tokio::time::sleep(TASK_HELD + engine.load.lateness()).await;
                if engine.flows.run_state(chat).await.is_ok_and(|now| now == state) {
                    begin_anew(&engine, &unseen, &state, "lost_task").await;
                }
            });
        }
    }
}

async fn begin_anew(engine: &Arc<Engine>, unseen: &Unseen, state: &RunState, cause: &'static str) {
    let chat = unseen.wake.chat;
    // It may have been looked at by now.
    if !engine.store.is_unseen(chat).await.unwrap_or(true) {
        return;
    }
    let span = tracing::info_span!("turn.wake", otel.kind = "producer", chat.id = %chat);
    let trace = hop(&TraceContext::from_traceparent(&unseen.wake.traceparent), span);
    match engine.flows.begin_anew(chat, &trace.traceparent).await {
        Ok(()) => {
            metrics::RUNS_BEGUN_ANEW.with_label_values(&[cause]).inc();
            tracing::warn!(
                chat.id = %chat,
                cause,
                state = ?state,
                unseen_seconds = unseen.age.as_secs(),
                "a chat's run did not answer; it was ended, and a new one goes on from Postgres"
            );
        }
        Err(error) => tracing::debug!(error = %chain(&error), chat.id = %chat, "a run was not begun anew; tried again"),
    }
}

/// Turns whose worker died and whose run was lost with it.
async fn orphans(engine: &Arc<Engine>) {
    let mut tick = ticker(ORPHAN_INTERVAL);
    loop {
        tick.tick().await;
        match engine.store.orphaned_turns(BATCH).await {
            Ok(wakes) => wake_all(engine, wakes, "orphaned").await,
            Err(error) => tracing::debug!(error = %chain(&error), "the relay could not look for orphaned turns"),
        }
    }
}

async fn retries(engine: &Arc<Engine>) {
    let mut tick = ticker(RETRY_INTERVAL);
    loop {
        tick.tick().await;
        match engine.store.due_retries(RETRY_LATE, BATCH).await {
            Ok(wakes) => wake_all(engine, wakes, "retry").await,
            Err(error) => {
                tracing::debug!(error = %chain(&error), "the relay could not look for models that are to be asked again")
            }
        }
    }
}

/// Gives places to held chats, and wakes them. A commit here that frees a place calls for it at once; what other processes
/// free is found by the next look.
async fn held(engine: &Arc<Engine>) {
    let mut after = None;
    let mut looked: Option<Instant> = None;
    loop {
        let due = looked.map_or_else(Instant::now, |at| at + HELD_INTERVAL);
        tokio::select! {
            () = tokio::time::sleep_until(due) => {
                looked = Some(Instant::now());
                match engine.store.refresh_places().await {
                    Ok(held) => engine.freed.set_waited_for(held > 0),
                    Err(error) => tracing::debug!(error = %chain(&error), "the relay could not count places"),
                }
                if !engine.freed.is_waited_for() {
                    continue;
                }
            }
            () = engine.freed.wait() => tokio::time::sleep(HELD_GATHER).await,
        }
        match engine.store.place_held(after, BATCH).await {
            Ok(placed) => {
                after = placed.after;
                wake_all(engine, placed.wakes, "held").await;
            }
            Err(error) => tracing::debug!(error = %chain(&error), "the relay could not give places"),
        }
    }
}

async fn stale(engine: &Arc<Engine>) {
    let mut tick = ticker(STALE_INTERVAL);
    loop {
        tick.tick().await;
        match engine.store.stale_open_turns(BATCH).await {
            Ok(wakes) => wake_all(engine, wakes, "stale").await,
            Err(error) => tracing::debug!(error = %chain(&error), "the relay could not look for open turns"),
        }
    }
}

/// Cancels that no daemon has answered yet.
async fn cancels(engine: &Arc<Engine>) {
    let mut tick = ticker(CANCEL_INTERVAL);
    loop {
        tick.tick().await;
        match engine.store.cancels_to_resend(BATCH).await {
            Ok(calls) => {
                let send = |call| async move { dispatch::cancel(engine, call).await };
                futures::stream::iter(calls).for_each_concurrent(PARALLEL, send).await;
            }
            Err(error) => tracing::debug!(error = %chain(&error), "the relay could not look for cancels"),
        }
    }
}

/// Daemons whose gateway died with their stream: nobody else tells their people that they are away.
async fn leases(engine: &Arc<Engine>) {
    let mut tick = ticker(LEASE_INTERVAL);
    loop {
        tick.tick().await;
        match engine.store.expired_leases(BATCH).await {
            Ok(expired) => expired.into_iter().for_each(|committed| engine.tell(committed)),
            Err(error) => tracing::debug!(error = %chain(&error), "the relay could not look for expired leases"),
        }
    }
}

async fn wake_all(engine: &Arc<Engine>, wakes: Vec<reliant_store::Wake>, reason: &'static str) {
    if wakes.is_empty() {
        return;
    }
    metrics::RELAY_REWAKES.with_label_values(&[reason]).inc_by(wakes.len() as u64);
    futures::stream::iter(wakes)
        .for_each_concurrent(PARALLEL, |wake| async move {
            engine.wake(&wake).await;
        })
        .await;
}

fn ticker(period: Duration) -> tokio::time::Interval {
    let mut tick = tokio::time::interval(period);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    tick
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_run_that_does_not_answer_is_begun_anew() {
        let started = |attempt| RunState::TaskStarted { attempt, task: String::new() };
        let anew = |cause| Remedy::BeginAnew { cause };
        for (state, attempts, expected) in [
            (RunState::None, 1, Remedy::Wake),
            (RunState::None, 9, Remedy::Wake),
            (RunState::Waiting, 1, Remedy::Wake),
            (RunState::Waiting, 2, Remedy::Wake),
            (RunState::Waiting, 3, anew("deaf")),
            (RunState::Foreign { workflow_type: "x".into() }, 1, anew("foreign")),
            (RunState::TaskScheduled { attempt: 1 }, 9, Remedy::Leave),
            (RunState::TaskScheduled { attempt: 3 }, 1, anew("failing_tasks")),
            (started(1), 1, Remedy::AskAgain),
            (started(3), 1, anew("failing_tasks")),
            (RunState::BurstScheduled { attempt: 1 }, 9, Remedy::Leave),
            (RunState::BurstStarted, 9, Remedy::Leave),
        ] {
            assert_eq!(remedy(&state, attempts), expected, "{state:?} after {attempts}");
        }
    }
}
