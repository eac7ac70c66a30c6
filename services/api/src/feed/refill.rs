//! When to ask a producer for a stretch of live text. One request per hole at a time; where it brought nothing, the next
//! waits longer each time. Pure: the clock is a parameter.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use uuid::Uuid;

use super::live::Hole;

const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Requests of one chat that are under way.
const IN_FLIGHT_MAX: usize = 16;

#[derive(Debug)]
struct Attempt {
    in_flight: bool,
    not_before: Instant,
    failures: u32,
}

#[derive(Debug, Default)]
pub struct Refills(HashMap<(Uuid, i32), Attempt>);

impl Refills {
    /// The holes to ask for now, of all that there are, and when to look again for those that must wait.
    pub fn due(&mut self, holes: &[Hole], now: Instant) -> (Vec<Hole>, Option<Instant>) {
        self.0.retain(|key, attempt| attempt.in_flight || holes.iter().any(|hole| (hole.target, hole.block) == *key));
        let mut in_flight = self.0.values().filter(|attempt| attempt.in_flight).count();
        let mut next: Option<Instant> = None;
        let mut due = Vec::new();
        for hole in holes {
            let attempt = self.0.entry((hole.target, hole.block)).or_insert(Attempt {
                in_flight: false,
                not_before: now,
                failures: 0,
            });
            if attempt.in_flight || in_flight >= IN_FLIGHT_MAX {
                continue;
            }
            if attempt.not_before > now {
                next = Some(next.map_or(attempt.not_before, |next| next.min(attempt.not_before)));
                continue;
            }
            attempt.in_flight = true;
            in_flight += 1;
            due.push(*hole);
        }
        (due, next)
    }

    /// A request ended; `progress`: it brought something.
    pub fn settled(&mut self, hole: &Hole, progress: bool, now: Instant) {
        if let Some(attempt) = self.0.get_mut(&(hole.target, hole.block)) {
            attempt.in_flight = false;
            attempt.failures = if progress { 0 } else { (attempt.failures + 1).min(10) };
            let wait = (RETRY_MIN * 2u32.pow(attempt.failures.saturating_sub(1))).min(RETRY_MAX);
            attempt.not_before = if progress { now } else { now + wait };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_per_hole_and_longer_waits_after_failures() {
        let mut refills = Refills::default();
        let hole = Hole { target: Uuid::from_u128(1), block: 0, from: 5, epoch: 1, producer: Uuid::from_u128(2) };
        let start = Instant::now();
        assert_eq!(refills.due(&[hole], start).0, [hole]);
        assert_eq!(refills.due(&[hole], start).0, [], "one at a time");
        let mut now = start;
        let mut waits = Vec::new();
        for _ in 0..8 {
            refills.settled(&hole, false, now);
            let (due, next) = refills.due(&[hole], now);
            assert!(due.is_empty());
            waits.push((next.unwrap() - now).as_millis());
            now = next.unwrap();
            assert_eq!(refills.due(&[hole], now).0, [hole]);
        }
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        refills.settled(&hole, true, now);
        assert_eq!(refills.due(&[hole], now).0, [hole]);
        refills.settled(&hole, true, now);
        refills.due(&[], now);
        assert!(refills.0.is_empty(), "nothing is kept of a filled hole");
    }
}
