//! Results of tool calls, from whichever gateway: committed by whichever worker takes them.
//!
//! The acknowledgement follows the commit, never the other way round: a daemon keeps offering what was not acknowledged.

use std::sync::Arc;

use reliant_bus::{Received, ResultSubject};
use reliant_telemetry::{chain, metrics};
use reliant_types::pb;
use tokio::sync::Semaphore;
use tracing::Instrument;

use crate::{engine::Engine, presence::GROUP};

/// Results committed at one time; further ones wait in the subscription's buffer, and past that at the daemon.
const PARALLEL: usize = 64;

pub async fn run(engine: Arc<Engine>) -> Result<(), reliant_bus::BusError> {
    let mut results = engine.bus.subscribe_wildcard::<ResultSubject>(Some(GROUP)).await?;
    let places = Arc::new(Semaphore::new(PARALLEL));
    loop {
        let received = tokio::select! {
            received = results.next() => received,
            () = engine.draining.cancelled() => break,
        };
        let Some(received) = received else { break };
        let Ok(place) = places.clone().acquire_owned().await else { break };
        let engine = engine.clone();
        tokio::spawn(async move {
            let _place = place;
            let span = received.span();
            commit(&engine, received).instrument(span).await;
        });
    }
    // Other workers take what comes from now on; what was taken here is finished.
    results.unsubscribe().await;
    let _ = places.acquire_many(PARALLEL as u32).await;
    Ok(())
}

async fn commit(engine: &Arc<Engine>, received: Received<ResultSubject>) {
    let ResultSubject { daemon, call } = received.topic;
    let result = &received.message;
    if result.call_id != call.to_string() || result.daemon_id != daemon.to_string() {
        tracing::warn!(%daemon, %call, "a result does not belong to its subject; skipped");
        return;
    }
    let committed = match engine.store.commit_result(daemon, result).await {
        Ok(committed) => committed,
        Err(error) => {
            // No acknowledgement: the daemon offers it again.
            tracing::warn!(error = %chain(&error), tool.call_id = %call, "a result was not committed");
            metrics::TOOL_RESULTS.with_label_values(&["failed"]).inc();
            return;
        }
    };
    let ack = pb::ResultAck {
        call_id: result.call_id.clone(),
        generation: result.generation,
        outcome: committed.value as i32,
    };
    let settled = engine.rounds.settle(call);
    let applied = committed.value == pb::AckOutcome::Committed;
    metrics::TOOL_RESULTS.with_label_values(&[if applied { "committed" } else { "discarded" }]).inc();
    if applied && let Some(round_trip) = settled.round_trip {
        metrics::TOOL_ROUND_TRIP.observe(round_trip.as_secs_f64());
    }
    // The sender of the call waits for it here and asks Postgres itself: a wake would only cost.
    engine.tell_with(committed, !settled.awaited);
    if let Err(error) = received.reply(&engine.bus, &ack).await {
        tracing::debug!(error = %chain(&error), tool.call_id = %call, "an acknowledgement was not sent; the result comes again");
    }
}
