//! The common order of the layers, from the outside in. A service whose front differs calls the layers itself, in its
//! own `stack.rs`, in this order.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body as HttpBody;
use tonic::body::Body;
use tower::{Layer, Service, ServiceBuilder, util::BoxCloneSyncService};

use crate::{
    access_log::AccessLogLayer,
    attempts::AttemptLimits,
    auth::{AuthLayer, Authenticator, PublicMethods},
    body_deadline::BodyDeadlineLayer,
    catch_panic::CatchPanicLayer,
    load_shed::LoadShedLayer,
    metrics::MetricsLayer,
    rate_limit::{RateLimitConfig, RateLimitLayer},
    timeout::TimeoutLayer,
    trace::TraceLayer,
};

/// Reflection calls are short, health watches few.
pub const PUBLIC_STREAMS_MAX: usize = 64;
/// The largest request over a slow line takes less.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Clone)]
pub struct StackConfig {
    /// Whether the caller's sampled flag decides; false where browsers call.
    pub trust_sampled: bool,
    /// Unary calls under way at one time.
    pub max_unary: usize,
    /// Streams open at one time.
    pub max_streams: usize,
    /// Streams of the public methods open at one time; they take no place of the others.
    pub max_public_streams: usize,
    pub unary_timeout: Duration,
    /// A stream's request must have arrived within this.
    pub request_timeout: Duration,
    pub authenticator: Arc<dyn Authenticator>,
    pub public: PublicMethods,
    pub rate_limit: RateLimitConfig,
    /// What an address may try without a known token.
    pub attempts: AttemptLimits,
}

impl StackConfig {
    /// The usual limits of one replica.
    pub fn new(authenticator: Arc<dyn Authenticator>) -> Self {
        Self {
            trust_sampled: false,
            max_unary: 4096,
            max_streams: 20_000,
            max_public_streams: PUBLIC_STREAMS_MAX,
            unary_timeout: Duration::from_secs(30),
            request_timeout: REQUEST_TIMEOUT,
            authenticator,
            public: PublicMethods::platform(),
            rate_limit: RateLimitConfig::default(),
            attempts: AttemptLimits::default(),
        }
    }
}

/// A front behind the common layers.
pub type Stack<B, E> = BoxCloneSyncService<Request<B>, Response<Body>, E>;

/// `inner` behind the common layers.
pub fn stack<S, B, R>(config: &StackConfig, inner: S) -> Stack<B, S::Error>
where
    S: Service<Request<Body>, Response = Response<R>> + Clone + Send + Sync + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<tonic::codegen::StdError>,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<tonic::codegen::StdError>,
{
    StackLayer::new(config).wrap(inner)
}

/// [`stack`] as a layer, for `tonic::transport::Server::layer`. What is counted (places, buckets) is shared by all
/// services made of one layer.
#[derive(Clone)]
pub struct StackLayer {
    trace: TraceLayer,
    load_shed: LoadShedLayer,
    timeout: TimeoutLayer,
    body_deadline: BodyDeadlineLayer,
    auth: AuthLayer,
    rate_limit: RateLimitLayer,
}

impl StackLayer {
    pub fn new(config: &StackConfig) -> Self {
        let public = Arc::new(config.public.clone());
        let (unary, streams, public_streams) = (config.max_unary, config.max_streams, config.max_public_streams);
        Self {
            trace: TraceLayer::new(config.trust_sampled),
            load_shed: LoadShedLayer::new(unary, streams, public_streams, public.clone()),
            body_deadline: BodyDeadlineLayer::new(config.request_timeout),
            timeout: TimeoutLayer::new(config.unary_timeout),
            auth: AuthLayer::new(config.authenticator.clone(), public, &config.attempts),
            rate_limit: RateLimitLayer::new(&config.rate_limit),
        }
    }

    fn wrap<S, B, R>(&self, inner: S) -> Stack<B, S::Error>
    where
        S: Service<Request<Body>, Response = Response<R>> + Clone + Send + Sync + 'static,
        S::Future: Send + 'static,
        S::Error: Send + 'static,
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<tonic::codegen::StdError>,
        R: HttpBody<Data = Bytes> + Send + 'static,
        R::Error: Into<tonic::codegen::StdError>,
    {
        let service = ServiceBuilder::new()
            // First, so that all that follows is inside the call's span.
            .layer(self.trace)
            // Before anything that refuses, so that refusals are counted and logged too.
            .layer(MetricsLayer)
            .layer(AccessLogLayer)
            // Outside everything that may panic.
            .layer(CatchPanicLayer)
            // Before any work: a full server must refuse cheaply.
            .layer(self.load_shed.clone())
            // Covers authentication, which asks the store.
            .layer(self.timeout)
            // The same for what streams: its request must arrive.
            .layer(self.body_deadline)
            .layer(self.auth.clone())
            // Needs to know who calls.
            .layer(self.rate_limit.clone())
            .service(inner);
        BoxCloneSyncService::new(service)
    }
}

/// tonic asks for a layer that names its service's type; this one is the same for every request body.
#[derive(Clone)]
pub struct Stacked<S> {
    layer: StackLayer,
    inner: S,
}

impl<S> Layer<S> for StackLayer {
    type Service = Stacked<S>;

    fn layer(&self, inner: S) -> Stacked<S> {
        Stacked { layer: self.clone(), inner }
    }
}

impl<S, B, R> Service<Request<B>> for Stacked<S>
where
    S: Service<Request<Body>, Response = Response<R>> + Clone + Send + Sync + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<tonic::codegen::StdError>,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<tonic::codegen::StdError>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = <Stack<B, S::Error> as Service<Request<B>>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // The service that was polled ready goes into the call; its clone stays.
        let clone = self.inner.clone();
        let ready = std::mem::replace(&mut self.inner, clone);
        self.layer.wrap(ready).call(request)
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use reliant_types::{Code, Failure, UserId};
    use tower::{ServiceExt as _, service_fn};

    use super::*;
    use crate::{observe::testing::*, principal::Principal};

    struct Anyone;

    #[async_trait]
    impl Authenticator for Anyone {
        async fn authenticate(&self, bearer: &str) -> Result<Principal, Failure> {
            match bearer {
                "panic" => panic!("a bug in authentication"),
                "hang" => std::future::pending().await,
                _ => Ok(Principal::person(UserId(uuid::Uuid::nil()))),
            }
        }
    }

    async fn call(bearer: Option<&str>, path: &str) -> Response<Body> {
        let mut config = StackConfig::new(Arc::new(Anyone));
        config.rate_limit.burst = 1;
        config.rate_limit.calls_per_second = 0.001;
        let service = StackLayer::new(&config)
            .layer(service_fn(|_: Request<Body>| async { Ok::<_, std::convert::Infallible>(ok()) }));
        let mut request = request(path);
        if let Some(bearer) = bearer {
            request.headers_mut().insert("authorization", format!("Bearer {bearer}").parse().unwrap());
        }
        let response = service.clone().oneshot(request).await.unwrap();
        if bearer == Some("twice") {
            let mut second = self::request(path);
            second.headers_mut().insert("authorization", "Bearer twice".parse().unwrap());
            return service.oneshot(second).await.unwrap();
        }
        response
    }

    #[tokio::test(start_paused = true)]
    async fn each_layer_answers_in_its_place() {
        assert_eq!(status(call(Some("good"), UNARY).await).await, tonic::Code::Ok);
        assert_eq!(failure(&call(None, UNARY).await).code, Code::TokenMissing);
        assert_eq!(failure(&call(Some("panic"), UNARY).await).code, Code::Internal);
        assert_eq!(failure(&call(Some("hang"), UNARY).await).code, Code::DeadlineExceeded);
        assert_eq!(failure(&call(Some("twice"), UNARY).await).code, Code::RateLimited);
        assert_eq!(status(call(None, "/grpc.health.v1.Health/Check").await).await, tonic::Code::Ok);
    }
}
