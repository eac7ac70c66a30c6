//! Tells Postgres that this gateway runs and how much it holds, for operators. Nothing decides by it.

use reliant_runtime::Drain;
use reliant_store::Heartbeat;
use reliant_telemetry::chain;
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::time::MissedTickBehavior;

use crate::hub::Hub;

const BEAT_INTERVAL: Duration = Duration::from_secs(5);

/// Beats until it is cancelled.
pub(crate) async fn beat(hub: Arc<Hub>, addr: SocketAddr, drain: Drain) {
    let mut tick = tokio::time::interval(BEAT_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let beat = Heartbeat {
            id: hub.gateway,
            role: "gateway",
            version: reliant_runtime::VERSION.to_owned(),
            address: addr.to_string(),
            load: serde_json::json!({ "daemons": hub.count() }),
            draining: drain.is_draining(),
        };
        if let Err(error) = hub.store.heartbeat_instance(&beat).await {
            tracing::debug!(error = %chain(&error), "the heartbeat was not stored");
        }
    }
}
