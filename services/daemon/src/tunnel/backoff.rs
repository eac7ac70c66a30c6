//! How long to wait before the next dial. Spread by chance, so that a gateway's death does not bring all its daemons
//! back in the same instant; short after a session that was good, long after a refused token.

use std::time::Duration;

use rand::RngExt;

const MIN: Duration = Duration::from_millis(500);
const MAX: Duration = Duration::from_secs(15);
/// The first dial after a session that lasted.
const FIRST_MIN: Duration = Duration::from_millis(100);
const FIRST_MAX: Duration = Duration::from_millis(500);
/// A session of this length was good.
pub const GOOD_SESSION: Duration = Duration::from_secs(10);

/// Why there is no session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// A session of this length ended.
    Ended(Duration),
    /// No session came about.
    Failed,
    /// The token was refused.
    Refused,
    /// The gateway said when to come back.
    Told(Duration),
}

impl Why {
    /// A stream was refused with `status`, or broke with it after it had lasted so long.
    pub fn of_status(status: &tonic::Status, lasted: Option<Duration>) -> Self {
        if matches!(status.code(), tonic::Code::Unauthenticated | tonic::Code::PermissionDenied) {
            return Self::Refused;
        }
        if let Some(delay) = reliant_rpc::failure(status).retry_after {
            return Self::Told(delay);
        }
        lasted.map_or(Self::Failed, Self::Ended)
    }
}

/// One line of dials.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// How long to wait now.
    pub fn next(&mut self, why: Why) -> Duration {
        let mut rng = rand::rng();
        let mut between = |low: Duration, high: Duration| rng.random_range(low..=high.max(low));
        match why {
            Why::Ended(lasted) if lasted >= GOOD_SESSION => {
                self.failures = 0;
                between(FIRST_MIN, FIRST_MAX)
            }
            Why::Ended(_) | Why::Failed => {
                let ceiling = MAX.min(MIN * 2u32.saturating_pow(self.failures.min(8) + 1));
                self.failures += 1;
                between(MIN, ceiling)
            }
            Why::Refused => between(MAX / 2, MAX),
            Why::Told(delay) => {
                let delay = delay.clamp(MIN, MAX);
                between(delay, delay + delay / 2)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_stay_bounded_and_start_over_after_a_good_session() {
        for _ in 0..200 {
            let mut backoff = Backoff::default();
            let first = backoff.next(Why::Failed);
            assert!((MIN..=MIN * 2).contains(&first), "{first:?}");
            for _ in 0..50 {
                let delay = backoff.next(Why::Failed);
                assert!((MIN..=MAX).contains(&delay), "{delay:?}");
            }
            assert!(backoff.next(Why::Ended(Duration::from_secs(1))) >= MIN);
            let refused = backoff.next(Why::Refused);
            assert!((MAX / 2..=MAX).contains(&refused), "{refused:?}");
            let good = backoff.next(Why::Ended(GOOD_SESSION));
            assert!((FIRST_MIN..=FIRST_MAX).contains(&good), "{good:?}");
            assert!(backoff.next(Why::Failed) <= MIN * 2);
            assert!(backoff.next(Why::Told(Duration::from_secs(600))) <= MAX * 2);
        }
    }
}
