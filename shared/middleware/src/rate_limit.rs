//! A token bucket per caller: so many calls a second, and a burst. Who is over it is told when to come back. Who has no
//! token is counted by address; what it fails at is the matter of [`crate::attempts`].
//!
//! The map of buckets is bounded. A bucket that is full again says nothing and goes first; past that the one that was
//! used longest ago goes, which can only be generous to its owner.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    net::IpAddr,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body::Body as HttpBody;
use parking_lot::Mutex;
use reliant_telemetry::metrics::RPC_REFUSED;
use reliant_types::{Code, DaemonId, Failure, UserId};
use tokio::time::Instant;
use tonic::{body::Body, transport::server::TcpConnectInfo};
use tower::{Layer, Service};

use crate::{methods, principal::Principal, reply};

const SHARDS: usize = 16;
/// 16 of them: 65,536 callers on one replica.
const SHARD_BUCKETS_MAX: usize = 4096;

#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RateLimitConfig {
    /// Calls a second of one caller; 0: no limit.
    pub calls_per_second: f64,
    /// Calls at once after a pause.
    pub burst: u32,
}

impl Default for RateLimitConfig {
    fn default() -> Self {
        Self { calls_per_second: 200.0, burst: 1000 }
    }
}

/// Whose bucket. A daemon does not eat its owner's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    User(UserId),
    Daemon(DaemonId),
    Peer(IpAddr),
    Unknown,
}

impl Key {
    /// The address that the request came from.
    pub(crate) fn peer<B>(request: &Request<B>) -> Self {
        let peer = request.extensions().get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr);
        peer.map_or(Key::Unknown, |addr| Key::Peer(addr.ip()))
    }

    fn of<B>(request: &Request<B>) -> Self {
        if let Some(principal) = request.extensions().get::<Principal>() {
            return principal.daemon().map_or(Key::User(principal.user), Key::Daemon);
        }
        Self::peer(request)
    }
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

#[derive(Debug)]
pub(crate) struct Buckets {
    rate: f64,
    burst: f64,
    hasher: RandomState,
    shards: Vec<Mutex<HashMap<Key, Bucket>>>,
}

impl Buckets {
    pub(crate) fn new(config: &RateLimitConfig) -> Self {
        Self {
            rate: config.calls_per_second,
            burst: f64::from(config.burst.max(1)),
            hasher: RandomState::new(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
        }
    }

    /// Takes one token, or says when there will be one.
    fn take(&self, key: Key, now: Instant) -> Result<(), Duration> {
        self.with(key, now, |bucket| {
            let left = self.left(bucket)?;
            bucket.tokens = left - 1.0;
            Ok(())
        })
    }

    /// Whether there is a token, or when there will be one.
    pub(crate) fn check(&self, key: Key, now: Instant) -> Result<(), Duration> {
        self.with(key, now, |bucket| self.left(bucket).map(drop))
    }

    /// Takes one token after the fact. What was under way beyond the tokens is owed, up to one burst.
    pub(crate) fn charge(&self, key: Key, now: Instant) {
        self.with(key, now, |bucket| bucket.tokens = (bucket.tokens - 1.0).max(-self.burst));
    }

    fn left(&self, bucket: &Bucket) -> Result<f64, Duration> {
        if bucket.tokens >= 1.0 {
            return Ok(bucket.tokens);
        }
        Err(Duration::from_secs_f64(((1.0 - bucket.tokens) / self.rate).min(3600.0)))
    }

    fn with<T>(&self, key: Key, now: Instant, act: impl FnOnce(&mut Bucket) -> T) -> T {
        let shard = self.hasher.hash_one(key) as usize % SHARDS;
        let mut buckets = self.shards[shard].lock();
        if buckets.len() >= SHARD_BUCKETS_MAX && !buckets.contains_key(&key) {
            self.evict(&mut buckets, now);
        }
        let bucket = buckets.entry(key).or_insert(Bucket { tokens: self.burst, at: now });
        bucket.tokens = self.filled(bucket, now);
        bucket.at = now;
        act(bucket)
    }

    fn filled(&self, bucket: &Bucket, now: Instant) -> f64 {
        let gained = now.saturating_duration_since(bucket.at).as_secs_f64() * self.rate;
        (bucket.tokens + gained).min(self.burst)
    }

    fn evict(&self, buckets: &mut HashMap<Key, Bucket>, now: Instant) {
        buckets.retain(|_, bucket| self.filled(bucket, now) < self.burst);
        if buckets.len() < SHARD_BUCKETS_MAX {
            return;
        }
        // The older half at once, so that this pass over the shard is paid for by thousands of calls.
        let mut ages: Vec<Instant> = buckets.values().map(|bucket| bucket.at).collect();
        let middle = ages.len() / 2;
        let median = *ages.select_nth_unstable(middle).1;
        let mut room = buckets.len() - middle;
        buckets.retain(|_, bucket| {
            let goes = bucket.at <= median && room > 0;
            room -= usize::from(goes);
            !goes
        });
    }
}

#[derive(Debug, Clone)]
pub struct RateLimitLayer {
    /// `None`: no limit.
    buckets: Option<Arc<Buckets>>,
}

impl RateLimitLayer {
    pub fn new(config: &RateLimitConfig) -> Self {
        Self { buckets: (config.calls_per_second > 0.0).then(|| Arc::new(Buckets::new(config))) }
    }
}

impl<S> Layer<S> for RateLimitLayer {
    type Service = RateLimit<S>;

    fn layer(&self, inner: S) -> RateLimit<S> {
        RateLimit { inner, buckets: self.buckets.clone() }
    }
}

#[derive(Debug, Clone)]
pub struct RateLimit<S> {
    inner: S,
    buckets: Option<Arc<Buckets>>,
}

impl<S, B, R> Service<Request<B>> for RateLimit<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<tonic::codegen::StdError>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let method = methods::of_path(request.uri().path());
        // A call without a principal that is no stream signs in: [`crate::attempts`] counts those that fail.
        let signs_in = !method.streaming && request.extensions().get::<Principal>().is_none();
        if let Some(buckets) = self.buckets.as_ref().filter(|_| !signs_in)
            && let Err(delay) = buckets.take(Key::of(&request), Instant::now())
        {
            RPC_REFUSED.with_label_values(&["rate_limit"]).inc();
            let failure = Failure::new(Code::RateLimited, "too many calls at once; slow down").retry_after(delay);
            return Box::pin(std::future::ready(Ok(reply::refuse(&failure))));
        }
        let call = self.inner.call(request);
        Box::pin(async move { Ok(call.await?.map(Body::new)) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tower_test::mock;

    use super::*;
    use crate::observe::testing::*;

    fn config(calls_per_second: f64, burst: u32) -> RateLimitConfig {
        RateLimitConfig { calls_per_second, burst }
    }

    #[tokio::test(start_paused = true)]
    async fn over_the_burst_a_caller_is_refused_with_a_delay_that_is_enough() {
        let buckets = Buckets::new(&config(2.0, 3));
        let key = Key::User(UserId::new());
        for _ in 0..3 {
            assert_eq!(buckets.take(key, Instant::now()), Ok(()));
        }
        let delay = buckets.take(key, Instant::now()).unwrap_err();
        assert_eq!(delay, Duration::from_millis(500));
        assert_eq!(buckets.take(Key::User(UserId::new()), Instant::now()), Ok(()), "another caller has its own");
        tokio::time::advance(delay).await;
        assert_eq!(buckets.take(key, Instant::now()), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn the_map_stays_bounded() {
        let buckets = Buckets::new(&config(0.001, 1));
        for _ in 0..SHARDS * SHARD_BUCKETS_MAX + 20_000 {
            let _ = buckets.take(Key::User(UserId::new()), Instant::now());
        }
        let most = buckets.shards.iter().map(|shard| shard.lock().len()).max().unwrap();
        assert!(most <= SHARD_BUCKETS_MAX, "{most}");
    }

    proptest! {
        /// Whatever the arrivals, no caller gets more than its burst and what its rate gives.
        #[test]
        fn never_more_than_burst_plus_rate(
            rate in 0.1f64..1000.0, burst in 1u32..100, gaps_us in prop::collection::vec(0u64..100_000, 1..500),
        ) {
            let buckets = Buckets::new(&config(rate, burst));
            let begun = Instant::now();
            let (mut now, mut granted) = (begun, 0u32);
            for gap in gaps_us {
                now += Duration::from_micros(gap);
                granted += u32::from(buckets.take(Key::Unknown, now).is_ok());
                let most = f64::from(burst) + (now - begun).as_secs_f64() * rate;
                prop_assert!(f64::from(granted) <= most + 1e-6, "{granted} > {most}");
            }
        }
    }

    #[tokio::test]
    async fn a_refusal_is_a_status_with_its_delay_and_probes_pass() {
        let (mut service, mut handle) =
            mock::spawn_with(|inner: Mock| RateLimitLayer::new(&config(1.0, 1)).layer(inner));
        for path in [STREAM, "/grpc.health.v1.Health/Check"] {
            assert!(service.poll_ready().is_ready());
            let _call = service.call(request(path));
            assert!(handle.next_request().await.is_some());
        }
        for path in [STREAM, "/grpc.health.v1.Health/Watch"] {
            assert!(service.poll_ready().is_ready());
            let refused = failure(&service.call(request(path)).await.unwrap());
            assert_eq!(refused.code, Code::RateLimited, "{path}");
            assert!(refused.retry_after.is_some());
        }
    }
}
