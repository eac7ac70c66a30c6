//! Rate, errors and duration of every RPC by method and status, and how many are under way.

use std::{
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body::Body as HttpBody;
use reliant_telemetry::metrics::{GaugeGuard, RPC_SERVER_DURATION, RPC_SERVER_INFLIGHT, in_flight};
use tokio::time::Instant;
use tonic::body::Body;
use tower::{Layer, Service};

use crate::{
    methods,
    observe::{End, Guard, Observer, observe},
};

#[derive(Debug, Clone, Copy, Default)]
pub struct MetricsLayer;

impl<S> Layer<S> for MetricsLayer {
    type Service = Metrics<S>;

    fn layer(&self, inner: S) -> Metrics<S> {
        Metrics { inner }
    }
}

#[derive(Debug, Clone)]
pub struct Metrics<S> {
    inner: S,
}

impl<S, B, R> Service<Request<B>> for Metrics<S>
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
        let method = methods::of_path(request.uri().path()).name;
        let under_way = in_flight(&RPC_SERVER_INFLIGHT.with_label_values(&[method]));
        let guard = Guard::new(Measured { method, begun: Instant::now(), _under_way: under_way });
        Box::pin(observe(self.inner.call(request), guard))
    }
}

struct Measured {
    method: &'static str,
    begun: Instant,
    _under_way: GaugeGuard,
}

impl Observer for Measured {
    fn end(self, end: End) {
        record(self.method, end, self.begun.elapsed());
    }
}

fn record(method: &str, end: End, time: Duration) {
    RPC_SERVER_DURATION.with_label_values(&[method, end.label()]).observe(time.as_secs_f64());
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use tower_test::mock;

    use super::*;
    use crate::observe::testing::*;

    fn count(method: &str, code: &str) -> u64 {
        RPC_SERVER_DURATION.with_label_values(&[method, code]).get_sample_count()
    }

    fn under_way(method: &str) -> i64 {
        RPC_SERVER_INFLIGHT.with_label_values(&[method]).get()
    }

    /// One test, because the registry is the process's.
    #[tokio::test]
    async fn calls_are_counted_at_their_end() {
        let (unary, stream) = (&UNARY[1..], &STREAM[1..]);
        let (mut service, mut handle) = mock::spawn_with(|inner: Mock| MetricsLayer.layer(inner));

        assert!(service.poll_ready().is_ready());
        let call = service.call(request(UNARY));
        handle.next_request().await.unwrap().1.send_response(ok());
        assert_eq!(status(call.await.unwrap()).await, tonic::Code::Ok);
        assert_eq!((count(unary, "OK"), under_way(unary)), (1, 0));

        assert!(service.poll_ready().is_ready());
        let call = service.call(request(STREAM));
        handle.next_request().await.unwrap().1.send_response(endless());
        let mut response = call.await.unwrap();
        response.body_mut().frame().await;
        assert_eq!((count(stream, "CANCELLED"), under_way(stream)), (0, 1));
        drop(response);
        assert_eq!((count(stream, "CANCELLED"), under_way(stream)), (1, 0));

        assert!(service.poll_ready().is_ready());
        let call = service.call(request(UNARY));
        let _held = handle.next_request().await.unwrap();
        drop(call);
        assert_eq!((count(unary, "CANCELLED"), under_way(unary)), (1, 0));

        assert!(service.poll_ready().is_ready());
        let call = service.call(request("/not/a.method/of/ours"));
        let (_, reply) = handle.next_request().await.unwrap();
        reply.send_response(tonic::Status::unimplemented("no").into_http());
        call.await.unwrap();
        assert_eq!(count("_OTHER", "UNIMPLEMENTED"), 1);
    }
}
