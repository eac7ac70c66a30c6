//! How much of something a daemon may still do: a rate, and a burst after a pause.

use std::time::{Duration, Instant};

pub(crate) struct Allowance {
    per_second: f64,
    burst: f64,
    left: f64,
    since: Instant,
}

impl Allowance {
    pub fn new(per_second: usize, burst: usize, now: Instant) -> Self {
        Self { per_second: per_second as f64, burst: burst as f64, left: burst as f64, since: now }
    }

    /// Takes `amount` if there is so much left.
    pub fn take(&mut self, amount: usize, now: Instant) -> bool {
        self.grow(now);
        let fits = amount as f64 <= self.left;
        if fits {
            self.left -= amount as f64;
        }
        fits
    }

    /// Takes `amount` in any case, and says how long to wait until all that was taken is there.
    pub fn owe(&mut self, amount: usize, now: Instant) -> Duration {
        self.grow(now);
        self.left -= amount as f64;
        Duration::from_secs_f64((-self.left / self.per_second).max(0.0))
    }

    fn grow(&mut self, now: Instant) {
        let grown = now.saturating_duration_since(self.since).as_secs_f64() * self.per_second;
        self.left = (self.left + grown).min(self.burst);
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_keeps_to_the_rate_and_the_burst() {
        let begun = Instant::now();
        let mut allowance = Allowance::new(8, 4, begun);
        let taken = |allowance: &mut Allowance, now| (0..100).filter(|_| allowance.take(1, now)).count();
        assert_eq!(taken(&mut allowance, begun), 4);
        assert_eq!(taken(&mut allowance, begun + Duration::from_millis(250)), 2);
        assert_eq!(taken(&mut allowance, begun + Duration::from_secs(60)), 4, "no more than a burst");
        assert!(!allowance.take(5, begun + Duration::from_secs(120)));
    }

    #[test]
    fn what_is_owed_is_waited_for() {
        let begun = Instant::now();
        let mut allowance = Allowance::new(10, 2, begun);
        let waits: Vec<_> = (0..4).map(|_| allowance.owe(1, begun)).collect();
        assert_eq!(waits, [0, 0, 100, 200].map(Duration::from_millis));
        assert_eq!(allowance.owe(10, begun), Duration::from_millis(1200));
        assert_eq!(allowance.owe(1, begun + Duration::from_secs(60)), Duration::ZERO);
    }
}
