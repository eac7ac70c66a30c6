//! What keeps a replica known and its knowledge of tokens fresh.

use std::{net::SocketAddr, time::Duration};

use reliant_bus::{ControlSubject, Subscription};
use reliant_middleware::StoreAuthenticator;
use reliant_runtime::Drain;
use reliant_store::{Heartbeat, Store};
use reliant_telemetry::{chain, metrics};
use reliant_types::{InstanceId, TokenId, pb::control::Kind};

const PLACES_INTERVAL: Duration = Duration::from_secs(1);
const BEAT_INTERVAL: Duration = Duration::from_secs(5);

/// Says that this replica lives.
pub async fn beat(store: Store, id: InstanceId, addr: SocketAddr, drain: Drain) {
    let mut ticks = tokio::time::interval(BEAT_INTERVAL);
    loop {
        ticks.tick().await;
        let beat = Heartbeat {
            id,
            role: "api",
            version: reliant_runtime::VERSION.to_owned(),
            address: addr.to_string(),
            load: serde_json::json!({ "viewers": metrics::VIEWERS.get() }),
            draining: drain.is_draining(),
        };
        if let Err(error) = store.heartbeat_instance(&beat).await {
            tracing::debug!(error = %chain(&error), "the heartbeat was not stored");
        }
    }
}

/// Keeps known how many turns of one user may be woken at once.
pub async fn places(store: Store) {
    let mut ticks = tokio::time::interval(PLACES_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Err(error) = store.refresh_places().await {
            tracing::debug!(error = %chain(&error), "places were not counted; what was known last stands");
        }
    }
}

/// Makes revoked tokens void at once. Lost words are found by the authenticator's own poll.
pub async fn hear_revocations(authenticator: StoreAuthenticator, mut control: Subscription<ControlSubject>) {
    while let Some(heard) = control.next().await {
        let _working = heard.span().entered();
        if let Some(Kind::TokenRevoked(revoked)) = heard.message.kind
            && let Ok(token) = revoked.token_id.parse::<TokenId>()
        {
            authenticator.revoke(token);
        }
    }
}
