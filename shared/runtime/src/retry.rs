//! Back-off with jitter, bounded in delay and in time. A retry without a deadline does not exist here.

use std::{future::Future, time::Duration};

use tokio::time::Instant;

/// Delays that double from `initial` to `max`, each drawn from its upper half, so that clients that failed together do
/// not come back together.
#[derive(Debug, Clone)]
pub struct Backoff {
    initial: Duration,
    max: Duration,
    attempt: u32,
}

impl Backoff {
    pub const fn new(initial: Duration, max: Duration) -> Self {
        Self { initial, max, attempt: 0 }
    }

    /// The delay before the next attempt.
    pub fn next_delay(&mut self) -> Duration {
        let full = self.initial.saturating_mul(1 << self.attempt.min(20)).min(self.max);
        self.attempt = self.attempt.saturating_add(1);
        full.mul_f64(0.5 + rand::random::<f64>() / 2.0)
    }

    /// Waits for the next delay.
    pub async fn wait(&mut self) {
        let delay = self.next_delay();
        tokio::time::sleep(delay).await;
    }

    /// The next delay is taken from the long end: the cause will not pass soon.
    pub fn slow_down(&mut self) {
        self.attempt = u32::MAX;
    }

    /// After success.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }

    pub fn attempts(&self) -> u32 {
        self.attempt
    }
}

/// What to do after a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    No,
    /// By the back-off.
    Yes,
    /// Not before so long; the server asked for it.
    After(Duration),
}

/// Runs `attempt` until it succeeds, until `judge` says no, or until the next delay would pass `deadline`; the last
/// error is returned. At least one attempt is made.
pub async fn retry<T, E, Fut>(
    mut backoff: Backoff,
    deadline: Instant,
    judge: impl Fn(&E) -> Retry,
    mut attempt: impl FnMut() -> Fut,
) -> Result<T, E>
where
    Fut: Future<Output = Result<T, E>>,
{
    loop {
        let error = match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let delay = match judge(&error) {
            Retry::No => return Err(error),
            Retry::Yes => backoff.next_delay(),
            Retry::After(least) => backoff.next_delay().max(least),
        };
        if Instant::now() + delay >= deadline {
            return Err(error);
        }
        tokio::time::sleep(delay).await;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn delays_stay_within_their_bounds(initial_ms in 1u64..1000, factor in 1u64..100, attempts in 1usize..80) {
            let (initial, max) = (Duration::from_millis(initial_ms), Duration::from_millis(initial_ms * factor));
            let mut backoff = Backoff::new(initial, max);
            for attempt in 0..attempts {
                let delay = backoff.next_delay();
                let full = initial.saturating_mul(1 << attempt.min(20)).min(max);
                prop_assert!(delay <= full, "{delay:?} > {full:?}");
                prop_assert!(delay >= full.mul_f64(0.49), "{delay:?} < half of {full:?}");
            }
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn retries_end_at_the_deadline_with_the_last_error() {
        let begun = Instant::now();
        let mut attempts = 0;
        let result: Result<(), u32> = retry(
            Backoff::new(SECOND / 10, SECOND),
            begun + SECOND * 10,
            |_| Retry::Yes,
            || {
                attempts += 1;
                std::future::ready(Err(attempts))
            },
        )
        .await;
        assert!(begun.elapsed() <= SECOND * 10);
        assert!((10..=25).contains(&result.unwrap_err()), "{attempts} attempts");
    }

    #[tokio::test(start_paused = true)]
    async fn the_delay_that_a_server_asks_for_is_kept() {
        let begun = Instant::now();
        let mut first = true;
        let result: Result<(), ()> = retry(
            Backoff::new(SECOND / 100, SECOND),
            begun + SECOND * 60,
            |_| Retry::After(SECOND * 3),
            || std::future::ready(if std::mem::take(&mut first) { Err(()) } else { Ok(()) }),
        )
        .await;
        assert_eq!(result, Ok(()));
        assert!(begun.elapsed() >= SECOND * 3);
    }

    #[tokio::test]
    async fn what_cannot_succeed_is_tried_once() {
        let mut attempts = 0;
        let result: Result<(), &str> = retry(
            Backoff::new(SECOND, SECOND),
            Instant::now() + SECOND,
            |_| Retry::No,
            || {
                attempts += 1;
                std::future::ready(Err("bad"))
            },
        )
        .await;
        assert_eq!(result, Err("bad"));
        assert_eq!(attempts, 1);
    }
}
