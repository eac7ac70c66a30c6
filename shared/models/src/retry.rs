//! When a failed attempt is made again: with back-off and jitter, not before the time the provider asked for, and until the
//! caller's deadline, not a number of times. Here only before the first event of an answer.

use std::time::Duration;

use reliant_telemetry::{TraceContext, chain, metrics::MODEL_RETRIES};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep_until};

use crate::{ModelError, ModelRequest, ModelStream, Models, client::Prepared};

/// Garbage is seldom better the next time.
const GARBAGE_ATTEMPTS_MAX: u32 = 3;
/// A provider that asks for no delay at all still gets one.
const DELAY_MIN: Duration = Duration::from_millis(50);

/// Delays double from `initial` to `max`, each drawn from its upper half.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetryPolicy {
    #[serde(with = "humantime_serde")]
    pub initial: Duration,
    #[serde(with = "humantime_serde")]
    pub max: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { initial: Duration::from_millis(250), max: Duration::from_secs(30) }
    }
}

impl RetryPolicy {
    /// The wait after failed attempt number `attempt` (from 1); `None`: the same request will not succeed later.
    pub fn delay(&self, attempt: u32, error: &ModelError) -> Option<Duration> {
        let given_up = matches!(error, ModelError::Garbage { .. }) && attempt >= GARBAGE_ATTEMPTS_MAX;
        if !error.retryable() || given_up {
            return None;
        }
        let spread = rand::random::<f64>();
        Some(match error.retry_after() {
            // A little later than asked, so that those who were told the same time do not come together.
            Some(asked) => asked.max(DELAY_MIN).mul_f64(1.0 + spread / 10.0),
            None => {
                let full = self.initial.saturating_mul(1 << attempt.saturating_sub(1).min(20)).min(self.max);
                full.mul_f64(0.5 + spread / 2.0)
            }
        })
    }
}

impl Models {
    /// Like [`Models::stream`], but tries again until the first event is there, no further attempt has a chance, or the next
    /// one would begin past `deadline`; then the last error is returned. An error after the first event is the caller's: the
    /// pieces were seen by then.
    pub async fn stream_with_retry(&self, request: ModelRequest, deadline: Instant) -> Result<ModelStream, ModelError> {
        let prepared = self.prepare(&request)?;
        drop(request);
        let mut attempt = 0;
        let mut before = TraceContext::default();
        loop {
            attempt += 1;
            let error = match self.begin(&prepared, &mut before).await {
                Ok(stream) => return Ok(stream),
                Err(error) => error,
            };
            let Some(delay) = self.retry_policy().delay(attempt, &error) else { return Err(error) };
            let next = Instant::now() + delay;
            if next >= deadline {
                return Err(error);
            }
            tried_again(prepared.provider_label(), attempt, delay, &error);
            sleep_until(next).await;
        }
    }

    async fn begin(&self, prepared: &Prepared, before: &mut TraceContext) -> Result<ModelStream, ModelError> {
        let mut stream = self.attempt(prepared, before).await?;
        stream.first().await?;
        Ok(stream)
    }
}

/// Counts and logs that a failed attempt is made again, here or by whoever waits for longer.
pub fn tried_again(provider: &str, attempt: u32, delay: Duration, error: &ModelError) {
    MODEL_RETRIES.with_label_values(&[provider, error.reason()]).inc();
    tracing::warn!(
        provider,
        attempt,
        delay_ms = delay.as_millis() as u64,
        reason = error.reason(),
        error = %chain(error),
        "the model call is tried again"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_their_bound_and_do_not_end() {
        let policy = RetryPolicy { initial: Duration::from_secs(1), max: Duration::from_secs(3) };
        let error = ModelError::CutStream;
        let secs = |attempt| policy.delay(attempt, &error).map(|delay| delay.as_secs_f64());
        assert!((0.5..=1.0).contains(&secs(1).unwrap()));
        assert!((1.0..=2.0).contains(&secs(2).unwrap()));
        assert!((1.5..=3.0).contains(&secs(3).unwrap()));
        for attempt in [4, 9, 1000, u32::MAX] {
            assert!((1.5..=3.0).contains(&secs(attempt).unwrap()), "{attempt}");
        }
        assert_eq!(policy.delay(1, &ModelError::Rejected { status: 400, message: String::new() }), None);
        assert_eq!(policy.delay(3, &ModelError::garbage("x")), None);
    }

    #[test]
    fn the_provider_is_obeyed() {
        let error = ModelError::RateLimited { retry_after: Some(Duration::from_secs(10)) };
        let delay = RetryPolicy::default().delay(1, &error).unwrap();
        assert!((10.0..=11.0).contains(&delay.as_secs_f64()), "{delay:?}");
    }
}
