//! At most so many calls and so many streams under way; one more is refused at once, with a delay to come back after.
//! Nothing queues here: a queue in front of a full server only makes every answer late.
//!
//! Streams that need no token (reflection, health watches) have places of their own, so that nobody without a token can
//! take the place of somebody with one.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body::Body as HttpBody;
use reliant_telemetry::{metrics::RPC_REFUSED, sampled};
use reliant_types::{Code, Failure};
use tokio::sync::Semaphore;
use tonic::body::Body;
use tower::{Layer, Service};

use crate::{
    auth::PublicMethods,
    methods::{self, Method},
    observe::Holding,
    reply,
};

/// What a refused caller is told to wait.
pub const RETRY_AFTER: Duration = Duration::from_millis(500);

#[derive(Debug, Clone)]
pub struct LoadShedLayer {
    unary: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    public_streams: Arc<Semaphore>,
    public: Arc<PublicMethods>,
}

impl LoadShedLayer {
    /// Calls and streams are counted apart: streams stay, and must not take the places of calls.
    pub fn new(max_unary: usize, max_streams: usize, max_public_streams: usize, public: Arc<PublicMethods>) -> Self {
        Self {
            unary: sampled::places("calls", max_unary),
            streams: sampled::places("call_streams", max_streams),
            public_streams: sampled::places("public_streams", max_public_streams),
            public,
        }
    }

    /// The places that a method takes one of, their name in the metrics, and what they are for in a refusal.
    fn places(&self, method: Method) -> (&Arc<Semaphore>, &'static str, &'static str) {
        if !method.streaming {
            (&self.unary, "calls", "calls")
        } else if self.public.contains(method) {
            (&self.public_streams, "public_streams", "streams without a token")
        } else {
            (&self.streams, "call_streams", "streams")
        }
    }
}

impl<S> Layer<S> for LoadShedLayer {
    type Service = LoadShed<S>;

    fn layer(&self, inner: S) -> LoadShed<S> {
        LoadShed { inner, layer: self.clone() }
    }
}

#[derive(Debug, Clone)]
pub struct LoadShed<S> {
    inner: S,
    layer: LoadShedLayer,
}

impl<S, B, R> Service<Request<B>> for LoadShed<S>
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
        if method.is_probe() {
            let call = self.inner.call(request);
            return Box::pin(async move { Ok(call.await?.map(Body::new)) });
        }
        let (places, queue, what) = self.layer.places(method);
        let Ok(place) = places.clone().try_acquire_owned() else {
            RPC_REFUSED.with_label_values(&["load_shed"]).inc();
            sampled::refused(queue);
            let message = format!("the server is at its limit of {what}; try again in a moment");
            let failure = Failure::new(Code::QueueFull, message);
            return Box::pin(std::future::ready(Ok(reply::refuse(&failure.retry_after(RETRY_AFTER)))));
        };
        let call = self.inner.call(request);
        Box::pin(async move { Ok(call.await?.map(|body| Holding::wrap(body, place))) })
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use tower_test::mock;

    use super::*;
    use crate::observe::testing::*;

    fn spawn(unary: usize, streams: usize) -> (mock::Spawn<LoadShed<Mock>>, Handle) {
        mock::spawn_with(move |inner| {
            LoadShedLayer::new(unary, streams, 1, Arc::new(PublicMethods::platform())).layer(inner)
        })
    }

    #[tokio::test]
    async fn one_call_too_many_is_refused_with_a_delay_and_a_place_comes_back() {
        let (mut service, mut handle) = spawn(1, 0);
        assert!(service.poll_ready().is_ready());
        let first = service.call(request(UNARY));
        let (_, reply) = handle.next_request().await.unwrap();
        assert!(service.poll_ready().is_ready());
        let refused = failure(&service.call(request(UNARY)).await.unwrap());
        assert_eq!((refused.code, refused.retry_after), (Code::QueueFull, Some(RETRY_AFTER)));
        reply.send_response(ok());
        assert_eq!(status(first.await.unwrap()).await, tonic::Code::Ok);
        assert!(service.poll_ready().is_ready());
        let _third = service.call(request(UNARY));
        assert!(handle.next_request().await.is_some());
    }

    #[tokio::test]
    async fn a_stream_holds_its_place_until_its_body_is_dropped_and_takes_none_of_a_call() {
        let (mut service, mut handle) = spawn(1, 1);
        assert!(service.poll_ready().is_ready());
        let stream = service.call(request(STREAM));
        handle.next_request().await.unwrap().1.send_response(endless());
        let mut response = stream.await.unwrap();
        response.body_mut().frame().await;

        assert!(service.poll_ready().is_ready());
        assert_eq!(failure(&service.call(request(STREAM)).await.unwrap()).code, Code::QueueFull);
        assert!(service.poll_ready().is_ready());
        let _call = service.call(request(UNARY));
        assert!(handle.next_request().await.is_some());

        drop(response);
        assert!(service.poll_ready().is_ready());
        let _stream = service.call(request(STREAM));
        assert!(handle.next_request().await.is_some());
    }

    #[tokio::test]
    async fn streams_without_a_token_take_no_place_of_those_with_one() {
        let (mut service, mut handle) = spawn(0, 1);
        let reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
        let mut held = Vec::new();
        for path in [reflection, STREAM] {
            assert!(service.poll_ready().is_ready());
            let stream = service.call(request(path));
            handle.next_request().await.expect("each kind has a place of its own").1.send_response(endless());
            held.push(stream.await.unwrap());
        }
        for path in [reflection, "/grpc.health.v1.Health/Watch", STREAM] {
            assert!(service.poll_ready().is_ready());
            let refused = failure(&service.call(request(path)).await.unwrap());
            assert_eq!((refused.code, refused.retry_after), (Code::QueueFull, Some(RETRY_AFTER)), "{path}");
        }
    }

    #[tokio::test]
    async fn probes_pass_a_full_server() {
        let (mut service, mut handle) = spawn(0, 0);
        assert!(service.poll_ready().is_ready());
        let _call = service.call(request("/grpc.health.v1.Health/Check"));
        assert!(handle.next_request().await.is_some());
    }
}
