//! Requests that were sent to one daemon and await its answer. Only a frame from the daemon answers; what it never
//! answers is forgotten, and the one who asked has its own timeout.

use reliant_bus::{PrefixSubject, Received, ToolSubject};
use reliant_telemetry::{
    metrics::{self, CallGuard, GaugeGuard},
    sampled,
};
use reliant_types::limits;
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Longer than anybody waits for an answer.
pub(crate) const FORGET_AFTER: Duration = Duration::from_secs(2 * limits::NATS_REQUEST_TIMEOUT.as_secs());

/// What was asked; the answer must be of the same kind and of the same call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Dispatch { call_id: String, generation: i64 },
    Cancel { call_id: String },
    Output,
    Prefix,
}

impl Kind {
    pub fn label(&self) -> &'static str {
        match self {
            Kind::Dispatch { .. } => "dispatch",
            Kind::Cancel { .. } => "cancel",
            Kind::Output => "output",
            Kind::Prefix => "prefix",
        }
    }
}

/// Who asked.
pub(crate) enum Asker {
    Tool(Received<ToolSubject>),
    Prefix(Received<PrefixSubject>),
}

pub(crate) struct Entry<A = Asker> {
    pub kind: Kind,
    pub asker: A,
    pub timer: CallGuard,
    since: Instant,
    _counted: GaugeGuard,
    _place: Option<OwnedSemaphorePermit>,
}

pub(crate) struct Pending<A = Asker> {
    last: u64,
    places: Arc<Semaphore>,
    entries: HashMap<u64, Entry<A>>,
}

impl<A> Pending<A> {
    pub fn new() -> Self {
        let places = sampled::places("tunnel_pending", limits::GATEWAY_PENDING_MAX);
        Self { last: 0, places, entries: HashMap::new() }
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn is_full(&self) -> bool {
        self.places.available_permits() == 0
    }

    /// The request's id on the stream, from 1.
    pub fn add(&mut self, kind: Kind, asker: A) -> u64 {
        self.last += 1;
        let timer = metrics::guard(&metrics::DAEMON_REQUEST, &[kind.label()]);
        let counted = metrics::in_flight(&metrics::DAEMON_PENDING);
        // Whoever adds has asked whether there is room.
        let place = self.places.clone().try_acquire_owned().ok();
        let entry = Entry { kind, asker, timer, since: Instant::now(), _counted: counted, _place: place };
        self.entries.insert(self.last, entry);
        self.last
    }

    /// The request that an answer with this id belongs to, if `fits` says that it does.
    pub fn answer(&mut self, id: u64, fits: impl FnOnce(&Kind) -> bool) -> Option<Entry<A>> {
        if !fits(&self.entries.get(&id)?.kind) {
            return None;
        }
        let entry = self.entries.remove(&id);
        // A burst must not pin its memory to an idle stream.
        if self.entries.is_empty() && self.entries.capacity() > 64 {
            self.entries = HashMap::new();
        }
        entry
    }

    /// Takes a request back that could not be sent.
    pub fn withdraw(&mut self, id: u64) {
        self.entries.remove(&id);
    }

    pub fn forget_old(&mut self) {
        self.forget(FORGET_AFTER);
    }

    fn forget(&mut self, after: Duration) {
        let old: Vec<u64> =
            self.entries.iter().filter(|(_, entry)| entry.since.elapsed() >= after).map(|(id, _)| *id).collect();
        for id in old {
            if let Some(entry) = self.entries.remove(&id) {
                entry.timer.done("unanswered");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_must_fit_its_request_and_comes_once() {
        let mut pending = Pending::new();
        let call = |call: &str| Kind::Cancel { call_id: call.into() };
        let first = pending.add(call("a"), "worker a");
        let second = pending.add(Kind::Prefix, "api");
        assert_ne!(first, second);
        assert!(pending.answer(first, |kind| *kind == call("b")).is_none());
        assert!(pending.answer(first + 100, |_| true).is_none());
        assert_eq!(pending.answer(first, |kind| *kind == call("a")).map(|entry| entry.asker), Some("worker a"));
        assert!(pending.answer(first, |_| true).is_none());
        assert!(!pending.is_empty());
    }

    #[test]
    fn it_is_bounded_and_forgets() {
        let mut pending = Pending::new();
        while !pending.is_full() {
            pending.add(Kind::Output, ());
        }
        assert_eq!(pending.entries.len(), limits::GATEWAY_PENDING_MAX);
        pending.forget_old();
        assert!(pending.is_full());
        pending.forget(Duration::ZERO);
        assert!(pending.is_empty());
    }
}
