//! The small loops of a worker: refills, lengths of live text, the instance's heartbeat.
//!
//! A loop that receives does no work that waits on others: a refill is answered from memory.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use reliant_bus::{BusError, PrefixSubject};
use reliant_runtime::Drain;
use reliant_store::Heartbeat;
use reliant_telemetry::chain;
use reliant_types::limits;
use tracing::Instrument as _;

use crate::engine::Engine;

/// Places are given by workers that were heard of lately, so a dead one must be missed soon.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(2);

pub async fn prefixes(engine: Arc<Engine>) -> Result<(), BusError> {
    let mut requests = engine.bus.subscribe(&PrefixSubject { producer: engine.instance.0 }).await?;
    while let Some(received) = requests.next().await {
        let answer = async {
            let reply = engine.live.refill(&received.message);
            if let Err(error) = received.reply(&engine.bus, &reply).await {
                tracing::debug!(error = %chain(&error), "a refill was not answered; it is asked for again");
            }
        };
        answer.instrument(received.span()).await;
    }
    Ok(())
}

pub async fn lengths(engine: Arc<Engine>) {
    let mut tick = tokio::time::interval(limits::LENGTH_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        for (user, chat, lengths) in engine.live.tick() {
            engine.publisher.lengths(user, chat, lengths);
        }
    }
}

pub async fn until_forgotten(engine: &Engine) {
    let deadline = tokio::time::Instant::now() + limits::PREFIX_HOLD + limits::LENGTH_INTERVAL;
    while !engine.live.is_empty() && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

pub async fn heartbeat(engine: Arc<Engine>, address: SocketAddr, drain: Drain) {
    let mut tick = tokio::time::interval(HEARTBEAT_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let beat = Heartbeat {
            id: engine.instance,
            role: "worker",
            version: reliant_runtime::VERSION.to_owned(),
            address: address.to_string(),
            load: serde_json::json!({
                "live_messages": engine.live.len(),
                "model_slots": engine.load.adjust(),
            }),
            draining: drain.is_draining(),
        };
        let told = engine.store.heartbeat_instance(&beat).await;
        if let Err(error) = told {
            tracing::debug!(error = %chain(&error), "the instance's heartbeat was not stored");
        }
    }
}
