//! What an address without a known token may try. A failed attempt costs a token of the address's bucket; once that is
//! empty, further attempts are refused before they cost a query. Attempts that succeed cost nothing, so many people behind
//! one proxy may sign in at once, and a caller whose token was good of late is not held to this at all.

use std::{collections::HashMap, sync::Arc, time::Duration};

use http::Request;
use parking_lot::Mutex;
use reliant_telemetry::{metrics::RPC_REFUSED, sampled};
use reliant_types::{Code, Failure};
use tokio::time::Instant;

use crate::rate_limit::{Buckets, Key, RateLimitConfig};

/// What a caller waits whose address has too many attempts under way.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Attempts of one address to prove who calls: unknown tokens and sign-in codes.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AttemptLimits {
    /// Failed attempts a second; 0: no limit.
    pub failures_per_second: f64,
    /// Failed attempts at once after a pause.
    pub failure_burst: u32,
    /// Attempts whose outcome is not known yet.
    pub at_once: usize,
}

impl Default for AttemptLimits {
    fn default() -> Self {
        Self { failures_per_second: 10.0, failure_burst: 100, at_once: 512 }
    }
}

/// Clones share what is counted.
#[derive(Debug, Clone)]
pub(crate) struct Attempts(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    failures: Option<Buckets>,
    at_once: usize,
    under_way: Mutex<HashMap<Key, usize>>,
}

/// One attempt under way. Without [`Attempt::failed`] it costs nothing.
pub(crate) struct Attempt {
    attempts: Attempts,
    peer: Key,
}

impl Attempts {
    pub(crate) fn new(limits: &AttemptLimits) -> Self {
        let failures = RateLimitConfig { calls_per_second: limits.failures_per_second, burst: limits.failure_burst };
        let inner = Arc::new(Inner {
            failures: (limits.failures_per_second > 0.0).then(|| Buckets::new(&failures)),
            at_once: limits.at_once.max(1),
            under_way: Mutex::default(),
        });
        let weak = Arc::downgrade(&inner);
        sampled::watch("sign_in_attempts", limits.at_once, move || {
            weak.upgrade().map(|inner| inner.under_way.lock().values().copied().max().unwrap_or_default())
        });
        Self(inner)
    }

    /// Begins an attempt of the address that `request` came from.
    pub(crate) fn begin<B>(&self, request: &Request<B>) -> Result<Attempt, Failure> {
        self.begin_of(Key::peer(request))
    }

    fn begin_of(&self, peer: Key) -> Result<Attempt, Failure> {
        if let Some(failures) = &self.0.failures
            && let Err(delay) = failures.check(peer, Instant::now())
        {
            RPC_REFUSED.with_label_values(&["auth_failures"]).inc();
            let message = "too many sign-ins from this address failed; check the token or code, and slow down";
            return Err(Failure::new(Code::RateLimited, message).retry_after(delay));
        }
        let mut under_way = self.0.under_way.lock();
        let count = under_way.entry(peer).or_default();
        if *count >= self.0.at_once {
            sampled::refused("sign_in_attempts");
            let message = "too many sign-ins from this address at once; try again in a moment";
            return Err(Failure::new(Code::QueueFull, message).retry_after(RETRY_AFTER));
        }
        *count += 1;
        Ok(Attempt { attempts: self.clone(), peer })
    }
}

impl Attempt {
    pub(crate) fn failed(&self) {
        if let Some(failures) = &self.attempts.0.failures {
            failures.charge(self.peer, Instant::now());
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let mut under_way = self.attempts.0.under_way.lock();
        if let Some(count) = under_way.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                under_way.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    fn peer(last: u8) -> Key {
        Key::Peer(IpAddr::from(Ipv4Addr::new(192, 0, 2, last)))
    }

    fn limits() -> AttemptLimits {
        AttemptLimits { failures_per_second: 1.0, failure_burst: 3, at_once: 5 }
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_charged_and_successes_are_not() {
        let attempts = Attempts::new(&limits());
        for _ in 0..100 {
            attempts.begin_of(peer(1)).expect("an attempt that succeeds is free");
        }
        for _ in 0..3 {
            attempts.begin_of(peer(1)).expect("within the burst").failed();
        }
        let refused = attempts.begin_of(peer(1)).err().expect("the burst is used up");
        assert_eq!(refused.code, Code::RateLimited);
        attempts.begin_of(peer(2)).expect("another address has its own");
        tokio::time::advance(refused.retry_after.unwrap()).await;
        attempts.begin_of(peer(1)).expect("the delay is enough");
    }

    #[tokio::test(start_paused = true)]
    async fn failures_that_were_under_way_together_are_owed() {
        let attempts = Attempts::new(&limits());
        let together: Vec<_> = (0..5).map(|_| attempts.begin_of(peer(1)).unwrap()).collect();
        together.iter().for_each(Attempt::failed);
        assert_eq!(attempts.begin_of(peer(1)).err().unwrap().retry_after, Some(Duration::from_secs(3)));
    }

    #[tokio::test]
    async fn one_address_has_a_bounded_number_under_way() {
        let attempts = Attempts::new(&limits());
        let mut held: Vec<_> = (0..5).map(|_| attempts.begin_of(peer(1)).unwrap()).collect();
        assert_eq!(attempts.begin_of(peer(1)).err().unwrap().code, Code::QueueFull);
        attempts.begin_of(peer(2)).unwrap();
        held.pop();
        held.push(attempts.begin_of(peer(1)).unwrap());
        drop(held);
        assert!(attempts.0.under_way.lock().is_empty());
    }
}
