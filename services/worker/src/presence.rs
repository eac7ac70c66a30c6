//! A daemon came back: its chats that waited for it are woken.

use std::sync::Arc;

use reliant_bus::PresenceSubject;
use reliant_types::pb;

use crate::engine::Engine;

/// One of all workers takes each message.
pub const GROUP: &str = "workers";

pub async fn run(engine: Arc<Engine>) -> Result<(), reliant_bus::BusError> {
    let mut presence = engine.bus.subscribe_wildcard::<PresenceSubject>(Some(GROUP)).await?;
    while let Some(received) = presence.next().await {
        let pb::Presence { connected, .. } = received.message;
        if !connected {
            continue;
        }
        let (engine, topic) = (engine.clone(), received.topic);
        let Ok(place) = engine.errands.clone().acquire_owned().await else { break };
        tokio::spawn(async move {
            let _place = place;
            match engine.store.daemon_back(topic.daemon).await {
                Ok(woken) => woken.into_iter().for_each(|committed| engine.tell(committed)),
                // Such chats are also found by the slow relay.
                Err(error) => {
                    tracing::warn!(%error, daemon.id = %topic.daemon, "chats that wait for a daemon were not woken")
                }
            }
        });
    }
    Ok(())
}
