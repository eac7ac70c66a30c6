//! How many streams each daemon has open here, whatever they are at: a daemon's token must not take the gateway's places
//! with streams that never say who they are.

use parking_lot::Mutex;
use reliant_telemetry::sampled;
use reliant_types::DaemonId;
use std::{collections::HashMap, sync::Arc};

/// A daemon has one stream, a second one while it moves, and for some seconds those whose connections broke unseen.
pub(crate) const DAEMON_STREAMS_MAX: usize = 8;

pub(crate) struct Streams(Mutex<HashMap<DaemonId, usize>>);

/// One stream, until it is dropped.
pub(crate) struct Open {
    daemon: DaemonId,
    streams: Arc<Streams>,
}

impl Streams {
    pub fn new() -> Arc<Self> {
        let streams = Arc::new(Self(Mutex::default()));
        let weak = Arc::downgrade(&streams);
        sampled::watch("daemon_streams", DAEMON_STREAMS_MAX, move || {
            weak.upgrade().map(|streams| streams.0.lock().values().copied().max().unwrap_or_default())
        });
        streams
    }

    /// `None`: the daemon has as many as it may.
    pub fn enter(self: &Arc<Self>, daemon: DaemonId) -> Option<Open> {
        let mut open = self.0.lock();
        let count = open.entry(daemon).or_default();
        if *count >= DAEMON_STREAMS_MAX {
            sampled::refused("daemon_streams");
            return None;
        }
        *count += 1;
        Some(Open { daemon, streams: self.clone() })
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut open = self.streams.0.lock();
        if let Some(count) = open.get_mut(&self.daemon) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.daemon);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_daemon_has_a_few_streams_and_takes_no_other_ones() {
        let (streams, one, other) = (Streams::new(), DaemonId::new(), DaemonId::new());
        let mut held: Vec<_> = std::iter::from_fn(|| streams.enter(one)).take(100).collect();
        assert_eq!(held.len(), DAEMON_STREAMS_MAX);
        assert!(streams.enter(other).is_some());
        held.pop();
        assert!(streams.enter(one).is_some());
        drop(held);
        assert!(streams.0.lock().is_empty());
    }
}
