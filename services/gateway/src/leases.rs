//! What keeps a gateway's daemons its own: one renewal for all leases, and the rule that a gateway without NATS holds
//! nobody. Whoever lost a lease is told to go away; nobody is evicted for a renewal that merely failed.

use reliant_telemetry::{chain, metrics};
use reliant_types::limits;
use std::{collections::HashSet, sync::Arc, time::Duration};
use tokio::time::MissedTickBehavior;

use crate::hub::{End, Hub, Seat};

/// Without NATS for so long, the daemons are better served elsewhere.
pub(crate) const BUS_AWAY: Duration = Duration::from_secs(3);
const BUS_LOOK: Duration = Duration::from_millis(100);

/// Renews until it is cancelled.
pub(crate) async fn renew(hub: Arc<Hub>) {
    let mut tick = tokio::time::interval(limits::LEASE_RENEW_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if hub.bus.disconnected_for().is_some_and(|away| away >= BUS_AWAY) {
            metrics::LEASE_RENEWALS.with_label_values(&["bus_away"]).inc();
            continue;
        }
        let seats = hub.seats();
        if seats.is_empty() {
            continue;
        }
        let leases: Vec<_> = seats.iter().map(|seat| (seat.daemon, seat.instance, seat.epoch)).collect();
        match hub.store.renew_leases(hub.gateway, &leases).await {
            Ok(renewed) => {
                metrics::LEASE_RENEWALS.with_label_values(&["ok"]).inc();
                let held: HashSet<_> = renewed.held.into_iter().collect();
                for seat in seats.iter().filter(|seat| !held.contains(&seat.daemon)) {
                    metrics::LEASE_CONFLICTS.inc();
                    seat.end(End::LeaseLost);
                }
                for back in renewed.back {
                    let daemon = back.value;
                    tracing::info!(daemon.id = %daemon, "a lease had run out and is good again");
                    hub.publish_feed(back.user, back.feed).await;
                    if let Some(seat) = seats.iter().find(|seat| seat.daemon == daemon) {
                        hub.announce(seat, true).await;
                    }
                }
            }
            Err(error) => {
                metrics::LEASE_RENEWALS.with_label_values(&["failed"]).inc();
                tracing::warn!(error = %chain(&error), daemons = seats.len(), "leases were not renewed; tried again");
            }
        }
    }
}

/// Watches NATS until it is cancelled: away for long ends all streams; back again, everybody's presence is said anew,
/// as requests in between were told that nobody listens.
pub(crate) async fn watch_bus(hub: Arc<Hub>) {
    let mut look = tokio::time::interval(BUS_LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut connections = hub.bus.connections();
    let mut told = false;
    loop {
        look.tick().await;
        match hub.bus.disconnected_for() {
            Some(away) if away >= BUS_AWAY => {
                if !std::mem::replace(&mut told, true) {
                    let daemons = hub.end_all(End::BusAway);
                    tracing::error!(daemons, "NATS is away; all daemons were sent elsewhere");
                }
            }
            Some(_) => {}
            None => {
                told = false;
                if std::mem::replace(&mut connections, hub.bus.connections()) != hub.bus.connections() {
                    let seats = hub.seats();
                    tracing::info!(daemons = seats.len(), "NATS is back; presence is announced again");
                    announce_all(&hub, &seats).await;
                }
            }
        }
    }
}

async fn announce_all(hub: &Hub, seats: &[Arc<Seat>]) {
    for seat in seats {
        hub.announce(seat, true).await;
    }
}
