//! The requests for a daemon. One subscription serves all streams that one daemon has on this gateway: NATS delivers a request
//! once for each subscription, and lets an answer pass only where the request was delivered to its connection once. The
//! streams take it in turn; what comes while it changes hands waits in it.

use parking_lot::Mutex;
use reliant_bus::{Bus, BusError, PrefixSubject, Subscription, ToolSubject};
use reliant_types::DaemonId;
use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};
use tokio::sync::{MutexGuard, OnceCell};

use crate::hub::{End, Seat};

pub(crate) struct Requests {
    pub tool: Subscription<ToolSubject>,
    pub prefix: Subscription<PrefixSubject>,
}

/// What the streams of one daemon share; `T` is [`Requests`] outside of tests.
pub(crate) struct Line<T>(OnceCell<tokio::sync::Mutex<T>>);

impl<T> Line<T> {
    /// Waits until the stream before has let go. `Err`: this one was ended meanwhile.
    pub async fn take(&self, seat: &Seat) -> Result<MutexGuard<'_, T>, End> {
        // A line is given out only once it is open.
        let Some(requests) = self.0.get() else { return Err(End::BusAway) };
        tokio::select! {
            biased;
            end = seat.ended() => Err(end),
            requests = requests.lock() => Ok(requests),
        }
    }
}

/// The lines of this gateway's daemons. A line ends with the last stream that holds it.
pub(crate) struct Lines<T>(Mutex<HashMap<DaemonId, Weak<Line<T>>>>);

impl<T> Lines<T> {
    pub fn new() -> Self {
        Self(Mutex::default())
    }

    /// The daemon's line, opened by `open` where there is none.
    pub async fn get<E>(&self, daemon: DaemonId, open: impl AsyncFnOnce() -> Result<T, E>) -> Result<Arc<Line<T>>, E> {
        let line = self.entry(daemon);
        line.0.get_or_try_init(async || open().await.map(tokio::sync::Mutex::new)).await?;
        Ok(line)
    }

    fn entry(&self, daemon: DaemonId) -> Arc<Line<T>> {
        let mut lines = self.0.lock();
        if let Some(line) = lines.get(&daemon).and_then(Weak::upgrade) {
            return line;
        }
        // Bounded by the streams that are open; the dead are cleared out when the map would grow.
        if lines.len() == lines.capacity() {
            lines.retain(|_, line| line.strong_count() > 0);
        }
        let line = Arc::new(Line(OnceCell::new()));
        lines.insert(daemon, Arc::downgrade(&line));
        line
    }
}

pub(crate) async fn subscribe(bus: &Bus, daemon: DaemonId) -> Result<Requests, BusError> {
    Ok(Requests {
        tool: bus.subscribe(&ToolSubject { daemon }).await?,
        prefix: bus.subscribe(&PrefixSubject { producer: daemon.0 }).await?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;
    use reliant_middleware::Principal;
    use reliant_types::{Incarnation, UserId};
    use std::{convert::Infallible, sync::atomic::AtomicUsize, sync::atomic::Ordering::SeqCst};

    fn seat(daemon: DaemonId) -> Seat {
        Seat::new(daemon, &Principal::person(UserId::new()), Incarnation::new(), 1, 1)
    }

    #[tokio::test]
    async fn streams_that_overlap_share_one_subscription_and_take_it_in_turn() {
        let (lines, opened, daemon) = (Lines::new(), AtomicUsize::new(0), DaemonId::new());
        let open = async || Ok::<_, Infallible>(opened.fetch_add(1, SeqCst));
        let (older, newer) = futures::try_join!(lines.get(daemon, open), lines.get(daemon, open)).unwrap();
        assert_eq!(opened.load(SeqCst), 1);
        let (first, second) = (seat(daemon), seat(daemon));
        let held = older.take(&first).await.unwrap();
        assert!(newer.take(&second).now_or_never().is_none(), "the older stream has it");
        drop(held);
        assert!(newer.take(&second).await.is_ok());
        drop((older, newer));
        lines.get(daemon, open).await.unwrap();
        assert_eq!(opened.load(SeqCst), 2, "the subscription ended with its last stream");
        for _ in 0..1000 {
            lines.get(DaemonId::new(), open).await.unwrap();
        }
        assert!(lines.0.lock().len() < 100);
    }

    #[tokio::test]
    async fn a_stream_that_was_ended_meanwhile_does_not_take_it() {
        let (lines, daemon) = (Lines::new(), DaemonId::new());
        let line = lines.get(daemon, async || Ok::<_, Infallible>(())).await.unwrap();
        let seat = seat(daemon);
        let _held = line.take(&self::seat(daemon)).await.unwrap();
        seat.end(End::Replaced);
        assert_eq!(line.take(&seat).await.err(), Some(End::Replaced));
    }
}
