//! Wakes again what nobody has looked at: the reason why a lost wake only delays.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use reliant_telemetry::{chain, metrics};
use tokio::time::Instant;

use crate::{dispatch, engine::Engine};

const UNSEEN_INTERVAL: Duration = Duration::from_secs(1);
/// A wake usually arrives within milliseconds; what is older was lost.
const UNSEEN_AGE: Duration = Duration::from_secs(2);
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
    tokio::join!(unseen(&engine), retries(&engine), held(&engine), stale(&engine), cancels(&engine), leases(&engine));
}

async fn unseen(engine: &Arc<Engine>) {
    let mut tick = ticker(UNSEEN_INTERVAL);
    loop {
        tick.tick().await;
        match engine.store.unseen_chats(UNSEEN_AGE, BATCH).await {
            Ok(wakes) => wake_all(engine, wakes, "unseen").await,
            Err(error) => tracing::debug!(error = %chain(&error), "the relay could not look for unseen chats"),
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
