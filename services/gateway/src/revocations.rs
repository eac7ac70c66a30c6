//! Ends the streams of revoked daemons and tokens within a second: by the message that says so, and by asking Postgres
//! each second, as a message may be lost.

use reliant_bus::{ControlSubject, Subscription};
use reliant_telemetry::chain;
use reliant_types::{DaemonId, TokenId, pb::control::Kind};
use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};
use tokio::time::MissedTickBehavior;

use crate::hub::{End, Hub};

const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// A transaction commits later than its time says.
const OVERLAP: Duration = Duration::from_secs(60);

/// Follows the messages until the bus is closed.
pub(crate) async fn listen(hub: Arc<Hub>, mut control: Subscription<ControlSubject>) {
    while let Some(received) = control.next().await {
        received.span().in_scope(|| revoke(&hub, received.message.kind));
    }
}

fn revoke(hub: &Hub, kind: Option<Kind>) {
    match kind {
        Some(Kind::DaemonRevoked(revoked)) => {
            if let Ok(daemon) = revoked.daemon_id.parse::<DaemonId>()
                && let Some(seat) = hub.seat(daemon)
            {
                seat.end(End::Revoked);
            }
        }
        Some(Kind::TokenRevoked(revoked)) => {
            if let Ok(token) = revoked.token_id.parse::<TokenId>() {
                end_tokens(hub, &HashSet::from([token]));
            }
        }
        None => {}
    }
}

/// Asks Postgres until it is cancelled.
pub(crate) async fn poll(hub: Arc<Hub>) {
    let mut tick = tokio::time::interval(POLL_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut since = Instant::now();
    loop {
        tick.tick().await;
        let now = Instant::now();
        match hub.store.revoked_within(since.elapsed() + OVERLAP).await {
            Ok(tokens) => {
                since = now;
                end_tokens(&hub, &tokens.into_iter().collect());
            }
            Err(error) => tracing::debug!(error = %chain(&error), "revocations could not be read"),
        }
        end_expired(&hub, SystemTime::now());
    }
}

fn end_tokens(hub: &Hub, tokens: &HashSet<TokenId>) {
    if tokens.is_empty() {
        return;
    }
    for seat in hub.seats() {
        if seat.token.is_some_and(|token| tokens.contains(&token)) {
            seat.end(End::Revoked);
        }
    }
}

fn end_expired(hub: &Hub, now: SystemTime) {
    for seat in hub.seats() {
        if seat.expires_at.is_some_and(|at| at <= now) {
            seat.end(End::TokenExpired);
        }
    }
}
