//! How late this worker's platform is, and how much the worker takes on. Work that is begun and cannot be ended in time makes
//! the next work late: past a bound new turns wait in the queue instead, in fair order, where people see that they do.
//!
//! The measure is what a round costs beside its model and its tools: pickup, context and storing. It grows with whatever is
//! short: processors, the database, Temporal.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use reliant_flows::HEARTBEAT_TIMEOUT;
use reliant_telemetry::metrics;

/// Above this the worker takes on less.
const LATE: Duration = Duration::from_millis(1000);
/// Below this it takes on more again.
const IN_TIME: Duration = Duration::from_millis(300);
/// So many model calls are taken on whatever happens: most of their time is the provider's.
const SLOTS_MIN: usize = 64;
/// Fewer rounds say nothing; they are kept for the next look.
const SAMPLES_MIN: usize = 4;
const SAMPLES_MAX: usize = 256;

pub struct Load {
    slots_max: usize,
    slots: AtomicUsize,
    rounds: Mutex<Rounds>,
}

#[derive(Default)]
struct Rounds {
    overheads: Vec<Duration>,
    median: Duration,
}

impl Load {
    pub fn new(slots_max: usize) -> Self {
        Self { slots_max, slots: AtomicUsize::new(slots_max), rounds: Mutex::default() }
    }

    /// A round is stored; `overhead` is what it took beside its model and its tools.
    pub fn observe(&self, overhead: Duration) {
        let mut rounds = self.rounds.lock();
        if rounds.overheads.len() < SAMPLES_MAX {
            rounds.overheads.push(overhead);
        }
    }

    /// Model calls that the worker takes on, as of now. To be called every some seconds.
    pub fn adjust(&self) -> usize {
        let median = {
            let mut rounds = self.rounds.lock();
            if rounds.overheads.len() >= SAMPLES_MIN {
                let mut overheads = std::mem::take(&mut rounds.overheads);
                overheads.sort_unstable();
                rounds.median = overheads[overheads.len() / 2];
            } else if rounds.overheads.is_empty() {
                // Nothing was stored: what was late may not be so any more.
                rounds.median /= 2;
            }
            rounds.median
        };
        let (slots, least) = (self.slots.load(Ordering::Relaxed), SLOTS_MIN.min(self.slots_max));
        let slots = if median > LATE {
            (slots - slots / 4).max(least)
        } else if median < IN_TIME {
            (slots + slots / 4 + 1).min(self.slots_max)
        } else {
            slots
        };
        self.slots.store(slots, Ordering::Relaxed);
        metrics::WORKER_SLOTS.set(i64::try_from(slots).unwrap_or(i64::MAX));
        metrics::WORKER_OVERHEAD.set(median.as_secs_f64());
        slots
    }

    /// What a round takes of late beside its model and its tools.
    pub fn lateness(&self) -> Duration {
        self.rounds.lock().median
    }

    /// How long Temporal is to wait for a heartbeat before it gives a burst to another worker: a late one must be able to
    /// finish. In whole seconds, so that histories differ little.
    pub fn heartbeat_timeout(&self) -> Duration {
        let late = self.lateness().as_secs();
        HEARTBEAT_TIMEOUT + Duration::from_secs(2 * late)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adjust(load: &Load, overhead: Duration, times: usize) -> usize {
        for _ in 0..times {
            (0..8).for_each(|_| load.observe(overhead));
            load.adjust();
        }
        load.slots.load(Ordering::Relaxed)
    }

    #[test]
    fn a_late_worker_takes_on_less_and_one_in_time_all_again() {
        let load = Load::new(500);
        assert_eq!(adjust(&load, Duration::from_millis(20), 3), 500);
        assert_eq!(load.heartbeat_timeout(), HEARTBEAT_TIMEOUT);
        assert_eq!(adjust(&load, Duration::from_secs(2), 1), 375);
        assert_eq!(adjust(&load, Duration::from_secs(2), 50), 64);
        assert_eq!(load.heartbeat_timeout(), HEARTBEAT_TIMEOUT + Duration::from_secs(4));
        assert_eq!(adjust(&load, Duration::from_millis(600), 5), 64, "between the bounds it stays");
        assert_eq!(adjust(&load, Duration::from_millis(50), 50), 500);
        assert_eq!(adjust(&Load::new(8), Duration::from_secs(9), 9), 8);
    }

    #[test]
    fn one_slow_round_among_many_says_nothing_and_an_idle_worker_recovers() {
        let load = Load::new(100);
        load.observe(Duration::from_secs(60));
        (0..9).for_each(|_| load.observe(Duration::from_millis(10)));
        assert_eq!(load.adjust(), 100);
        assert_eq!(adjust(&load, Duration::from_secs(8), 9), 64);
        (0..12).for_each(|_| _ = load.adjust());
        assert_eq!(load.slots.load(Ordering::Relaxed), 100);
        // So does one that has a round now and then.
        assert_eq!(adjust(&load, Duration::from_secs(8), 9), 64);
        for _ in 0..48 {
            load.observe(Duration::from_millis(10));
            load.adjust();
        }
        assert_eq!(load.slots.load(Ordering::Relaxed), 100);
    }
}
