//! Who holds which daemon's seat in this gateway. One seat per daemon: a newer stream takes it from the older at once.
//! Nothing here waits while the map is locked.

use parking_lot::Mutex;
use reliant_bus::{Bus, FeedSubject, PresenceSubject};
use reliant_middleware::Principal;
use reliant_store::Store;
use reliant_telemetry::chain;
use reliant_types::{DaemonId, Incarnation, InstanceId, TokenId, UserId, pb};
use std::{collections::HashMap, sync::Arc, time::SystemTime};
use tokio::sync::watch;

use crate::requests::{Lines, Requests};

/// Why a stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The daemon closed it, or the connection broke.
    Closed,
    /// The same process opened a newer stream here.
    Replaced,
    /// A newer process of the same daemon took over.
    Outdated,
    Revoked,
    TokenExpired,
    /// Another gateway holds the daemon now.
    LeaseLost,
    /// This gateway has no NATS: a stream elsewhere serves the daemon better.
    BusAway,
    /// The deadline of a drain passed.
    Drained,
    /// The daemon sent what is no frame, or one that is too large.
    Unreadable,
}

impl End {
    /// As a metric label.
    pub fn label(self) -> &'static str {
        match self {
            End::Closed => "closed",
            End::Replaced => "replaced",
            End::Outdated => "outdated",
            End::Revoked => "revoked",
            End::TokenExpired => "token_expired",
            End::LeaseLost => "lease_lost",
            End::BusAway => "bus_away",
            End::Drained => "drained",
            End::Unreadable => "unreadable",
        }
    }

    /// What the daemon is told; nothing where it left by itself.
    pub fn go_away(self) -> Option<pb::GoAway> {
        let (reason, stop) = match self {
            End::Closed => return None,
            End::Replaced => ("this process opened a newer stream", false),
            End::Outdated => ("a newer process of this daemon took over; this one stops", true),
            End::Revoked => {
                ("this daemon or its token was revoked; register it again with 'reliant daemon register'", true)
            }
            End::TokenExpired => ("the daemon's token expired; get a new one with 'reliant daemon register'", true),
            End::LeaseLost => ("another gateway holds this daemon now", false),
            End::BusAway => ("this gateway lost its connection to NATS", false),
            End::Drained => ("this gateway stops", false),
            End::Unreadable => {
                ("a frame of this daemon was garbage, or larger than the 4 MiB that a frame may have", false)
            }
        };
        Some(pb::GoAway { reason: reason.into(), drain: false, stop })
    }

    /// Whether the lease may still be ours to give back.
    pub fn keeps_lease(self) -> bool {
        !matches!(self, End::Replaced | End::Outdated | End::LeaseLost)
    }
}

/// One daemon's stream, as the rest of the gateway sees it.
pub(crate) struct Seat {
    pub daemon: DaemonId,
    pub user: UserId,
    pub token: Option<TokenId>,
    pub expires_at: Option<SystemTime>,
    pub incarnation: Incarnation,
    pub instance: i64,
    /// The lease's epoch; orders the streams of one daemon.
    pub epoch: i64,
    end: watch::Sender<Option<End>>,
}

impl Seat {
    pub fn new(daemon: DaemonId, principal: &Principal, incarnation: Incarnation, instance: i64, epoch: i64) -> Self {
        Self {
            daemon,
            user: principal.user,
            token: principal.token(),
            expires_at: principal.expires_at,
            incarnation,
            instance,
            epoch,
            end: watch::Sender::new(None),
        }
    }

    /// Ends the stream; the first reason stands.
    pub fn end(&self, why: End) {
        self.end.send_if_modified(|end| {
            let first = end.is_none();
            end.get_or_insert(why);
            first
        });
    }

    pub async fn ended(&self) -> End {
        let mut end = self.end.subscribe();
        match end.wait_for(Option::is_some).await {
            Ok(end) => end.unwrap_or(End::Closed),
            Err(_) => End::Closed,
        }
    }
}

/// The seats of this gateway, and what every stream works with.
pub(crate) struct Hub {
    pub gateway: InstanceId,
    pub store: Store,
    pub bus: Bus,
    pub lines: Lines<Requests>,
    seats: Mutex<HashMap<DaemonId, Arc<Seat>>>,
}

impl Hub {
    pub fn new(gateway: InstanceId, store: Store, bus: Bus) -> Self {
        Self { gateway, store, bus, lines: Lines::new(), seats: Mutex::default() }
    }

    /// Takes the daemon's seat. False: a newer stream has it already.
    pub fn enter(&self, seat: &Arc<Seat>) -> bool {
        enter(&mut self.seats.lock(), seat)
    }

    /// Gives the seat up, if it is still this one's.
    pub fn leave(&self, seat: &Arc<Seat>) {
        let mut seats = self.seats.lock();
        if seats.get(&seat.daemon).is_some_and(|held| Arc::ptr_eq(held, seat)) {
            seats.remove(&seat.daemon);
        }
    }

    pub fn seats(&self) -> Vec<Arc<Seat>> {
        self.seats.lock().values().cloned().collect()
    }

    pub fn count(&self) -> usize {
        self.seats.lock().len()
    }

    pub fn seat(&self, daemon: DaemonId) -> Option<Arc<Seat>> {
        self.seats.lock().get(&daemon).cloned()
    }

    pub fn end_all(&self, why: End) -> usize {
        let seats = self.seats();
        for seat in &seats {
            seat.end(why);
        }
        seats.len()
    }

    /// Tells api and workers. A hint: nobody depends on it.
    pub async fn announce(&self, seat: &Seat, connected: bool) {
        let topic = PresenceSubject { user: seat.user, daemon: seat.daemon };
        let presence = pb::Presence {
            daemon_id: seat.daemon.to_string(),
            user_id: seat.user.to_string(),
            connected,
            gateway_id: self.gateway.to_string(),
            incarnation: seat.incarnation.to_string(),
        };
        if let Err(error) = self.bus.publish(&topic, &presence).await {
            tracing::debug!(error = %chain(&error), daemon.id = %seat.daemon, "presence was not published");
        }
    }

    /// Hints for viewers of the user's feed; the rows are in Postgres.
    pub async fn publish_feed(&self, user: UserId, events: Vec<pb::FeedEvent>) {
        if events.is_empty() {
            return;
        }
        if let Err(error) = self.bus.publish(&FeedSubject { user }, &pb::FeedUpdate { events }).await {
            tracing::debug!(error = %chain(&error), user.id = %user, "a feed hint was not published");
        }
    }
}

fn enter(seats: &mut HashMap<DaemonId, Arc<Seat>>, seat: &Arc<Seat>) -> bool {
    if let Some(held) = seats.get(&seat.daemon) {
        if held.epoch > seat.epoch {
            return false;
        }
        held.end(if held.instance < seat.instance { End::Outdated } else { End::Replaced });
    }
    seats.insert(seat.daemon, seat.clone());
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seat(daemon: DaemonId, instance: i64, epoch: i64) -> Arc<Seat> {
        let principal = Principal::person(UserId::new());
        Arc::new(Seat::new(daemon, &principal, Incarnation::new(), instance, epoch))
    }

    #[tokio::test]
    async fn a_newer_stream_takes_the_seat_and_an_older_one_does_not() {
        let (daemon, mut seats) = (DaemonId::new(), HashMap::new());
        let (first, again, newer) = (seat(daemon, 1, 1), seat(daemon, 1, 2), seat(daemon, 2, 3));
        assert!(enter(&mut seats, &first));
        assert!(enter(&mut seats, &again));
        assert_eq!(first.ended().await, End::Replaced);
        assert!(!enter(&mut seats, &seat(daemon, 1, 1)));
        assert!(enter(&mut seats, &newer));
        assert_eq!(again.ended().await, End::Outdated);
        assert!(enter(&mut seats, &seat(DaemonId::new(), 1, 1)));
        assert_eq!(seats.len(), 2);
    }

    #[tokio::test]
    async fn the_first_reason_to_end_stands() {
        let seat = seat(DaemonId::new(), 1, 1);
        seat.end(End::Revoked);
        seat.end(End::BusAway);
        assert_eq!(seat.ended().await, End::Revoked);
    }

    #[test]
    fn only_what_cannot_come_back_is_told_to_stop() {
        for end in [End::Replaced, End::LeaseLost, End::BusAway, End::Drained, End::Unreadable] {
            assert!(end.go_away().is_some_and(|away| !away.stop && !away.drain), "{end:?}");
        }
        for end in [End::Outdated, End::Revoked, End::TokenExpired] {
            assert!(end.go_away().is_some_and(|away| away.stop), "{end:?}");
        }
        assert_eq!(End::Closed.go_away(), None);
    }
}
