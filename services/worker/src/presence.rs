//! A daemon came back: its chats that waited for it are woken.

use std::sync::Arc;

use reliant_bus::PresenceSubject;
use reliant_telemetry::chain;
use tracing::Instrument as _;

use crate::engine::Engine;

/// One of all workers takes each message.
pub const GROUP: &str = "workers";

pub async fn run(engine: Arc<Engine>) -> Result<(), reliant_bus::BusError> {
    let mut presence = engine.bus.subscribe_wildcard::<PresenceSubject>(Some(GROUP)).await?;
    while let Some(received) = presence.next().await {
        let span = received.span();
        if !received.message.connected {
            continue;
        }
        let (engine, topic) = (engine.clone(), received.topic);
        let Ok(place) = engine.errands.clone().acquire_owned().await else { break };
        let work = async move {
            let _place = place;
            match engine.store.daemon_back(topic.daemon).await {
                Ok(woken) => woken.into_iter().for_each(|committed| engine.tell(committed)),
                // Such chats are also found by the slow relay.
                Err(error) => {
                    tracing::warn!(error = %chain(&error), daemon.id = %topic.daemon, "chats that wait for a daemon were not woken")
                }
            }
        };
        tokio::spawn(work.instrument(span));
    }
    Ok(())
}
