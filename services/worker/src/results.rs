//! Results of tool calls, from whichever gateway: committed by whichever worker takes them.
//!
//! The acknowledgement follows the commit, never the other way round: a daemon keeps offering what was not acknowledged.

use std::sync::Arc;

use reliant_bus::{Received, ResultSubject};
use reliant_store::ResultFate;
use reliant_telemetry::{chain, metrics, sampled};
use reliant_types::{Code, Failure, pb};
use tracing::Instrument;

use crate::{engine::Engine, presence::GROUP, rounds::Settled};

/// Results committed at one time; further ones wait in the subscription's buffer, and past that at the daemon.
const PARALLEL: usize = 64;

pub async fn run(engine: Arc<Engine>) -> Result<(), reliant_bus::BusError> {
    let mut results = engine.bus.subscribe_wildcard::<ResultSubject>(Some(GROUP)).await?;
    let places = sampled::places("results", PARALLEL);
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
        tracing::warn!(daemon.id = %daemon, tool.call_id = %call, "a result does not belong to its subject; skipped");
        return;
    }
    let committed = match engine.store.commit_result(daemon, result).await {
        Ok(committed) => committed,
        Err(error) => {
            let said = chain(&error).to_string();
            let failure = Failure::from(error);
            if failure.code == Code::InvalidArgument {
                // The same result will never be a better one.
                tracing::debug!(error = said, tool.call_id = %call, "a result that no call can have was discarded");
                metrics::TOOL_RESULTS.with_label_values(&["malformed"]).inc();
                acknowledge(engine, received, pb::AckOutcome::Discarded, 0).await;
                return;
            }
            // No acknowledgement: the daemon offers it again.
            tracing::warn!(error = said, tool.call_id = %call, "a result was not committed");
            metrics::TOOL_RESULTS.with_label_values(&["failed"]).inc();
            return;
        }
    };
    let fate = committed.value;
    // By the database's clock, as the dispatch's; a result that was not applied has none.
    let stored = committed.events.first().and_then(|event| event.time.as_ref());
    let stored_ms = stored.map_or(0, |time| time.seconds * 1000 + i64::from(time.nanos / 1_000_000));
    metrics::TOOL_RESULTS.with_label_values(&[fate.label()]).inc();
    let applied = fate == ResultFate::Committed;
    let settled = match fate {
        ResultFate::Committed | ResultFate::Repeated | ResultFate::Late => engine.rounds.settle(call),
        // Who waits for another's call is not told that it ended.
        ResultFate::Foreign | ResultFate::Unknown => Settled::default(),
    };
    if applied && let Some(round_trip) = settled.round_trip {
        metrics::TOOL_ROUND_TRIP.observe(round_trip.as_secs_f64());
    }
    // The sender of the call waits for it here and asks Postgres itself: a wake would only cost.
    engine.tell_with(committed, !settled.awaited);
    acknowledge(engine, received, fate.ack(), stored_ms).await;
}

async fn acknowledge(engine: &Engine, received: Received<ResultSubject>, outcome: pb::AckOutcome, stored_ms: i64) {
    let ack = pb::ResultAck {
        call_id: received.message.call_id.clone(),
        generation: received.message.generation,
        outcome: outcome as i32,
        acknowledged_at_ms: stored_ms,
    };
    if let Err(error) = received.reply(&engine.bus, &ack).await {
        tracing::debug!(error = %chain(&error), tool.call_id = %received.topic.call, "an acknowledgement was not sent; the result comes again");
    }
}
