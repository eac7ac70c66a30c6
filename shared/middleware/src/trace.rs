//! The server span of a call, as a child of the caller's context. It lasts until the response's body ends.

use std::task::{Context, Poll};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body::Body as HttpBody;
use reliant_telemetry::{TraceContext, hop};
use tonic::body::Body;
use tower::{Layer, Service};
use tracing::{Instrument as _, Span, field::Empty};

use crate::{
    methods::{self, Method},
    observe::{End, Guard, Observer, observe},
};

#[derive(Debug, Clone, Copy)]
pub struct TraceLayer {
    trust_sampled: bool,
}

impl TraceLayer {
    /// `trust_sampled`: whether the caller's sampled flag decides. True between our own services; false at the edge,
    /// where a browser's trace id and parent are kept and the decision is ours.
    pub fn new(trust_sampled: bool) -> Self {
        Self { trust_sampled }
    }
}

impl<S> Layer<S> for TraceLayer {
    type Service = Trace<S>;

    fn layer(&self, inner: S) -> Trace<S> {
        Trace { inner, trust_sampled: self.trust_sampled }
    }
}

#[derive(Debug, Clone)]
pub struct Trace<S> {
    inner: S,
    trust_sampled: bool,
}

impl<S, B, R> Service<Request<B>> for Trace<S>
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
        let caller = TraceContext::from_http(request.headers());
        let caller = if self.trust_sampled { caller } else { caller.at_edge() };
        let method = methods::of_path(request.uri().path());
        let caller = if caller.is_empty() { edge(method) } else { caller };
        let span = server_span(method);
        caller.set_parent(&span);
        let call = span.in_scope(|| self.inner.call(request));
        Box::pin(observe(call, Guard::new(Ended(span.clone()))).instrument(span))
    }
}

/// Where a trace begins here, it begins with a span that has ended: the call's own is open until its answer is out, and a
/// turn that hung on it would be orphaned by the death of this process.
fn edge(method: Method) -> TraceContext {
    if is_probe(method) {
        return TraceContext::default();
    }
    // reliant_telemetry::names::span::RPC_EDGE
    hop(&TraceContext::default(), tracing::info_span!(parent: None, "rpc.edge", rpc.method = method.name))
}

/// Probes come every second and say nothing.
fn is_probe(method: Method) -> bool {
    method.name.starts_with("grpc.")
}

fn server_span(method: Method) -> Span {
    macro_rules! span {
        ($level:ident) => {
            tracing::$level!(
                // reliant_telemetry::names::span::RPC_SERVER
                "rpc.server",
                otel.name = method.name,
                otel.kind = "server",
                otel.status_code = Empty,
                rpc.system.name = "grpc",
                rpc.method = method.name,
                rpc.response.status_code = Empty,
                error.type = Empty,
                user.id = Empty,
            )
        };
    }
    if is_probe(method) { span!(debug_span) } else { span!(info_span) }
}

struct Ended(Span);

impl Observer for Ended {
    fn end(self, end: End) {
        self.0.record("rpc.response.status_code", end.label());
        if end != End::Status(tonic::Code::Ok) {
            self.0.record("error.type", end.label());
        }
        if end.is_server_error() {
            self.0.record("otel.status_code", "ERROR");
        }
    }

    fn span(&self) -> Option<&Span> {
        Some(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tower_test::mock;
    use tracing::{Metadata, Subscriber, span};

    use super::*;
    use crate::observe::testing::*;

    /// Writes down names of spans, recorded fields and the end of spans.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<String>>>);

    impl Subscriber for Log {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, attributes: &span::Attributes<'_>) -> span::Id {
            self.0.lock().unwrap().push(format!("new {}", attributes.metadata().name()));
            span::Id::from_u64(1)
        }
        fn record(&self, _: &span::Id, values: &span::Record<'_>) {
            self.0.lock().unwrap().push(format!("record {values:?}"));
        }
        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
        fn event(&self, _: &tracing::Event<'_>) {}
        fn enter(&self, _: &span::Id) {}
        fn exit(&self, _: &span::Id) {}
    }

    #[tokio::test]
    async fn the_span_has_the_listed_name_and_gets_its_status_at_the_end_of_the_body() {
        let log = Log::default();
        let _default = tracing::subscriber::set_default(log.clone());
        let (mut service, mut handle) = mock::spawn_with(|inner: Mock| TraceLayer::new(false).layer(inner));
        assert!(service.poll_ready().is_ready());
        let call = service.call(request(STREAM));
        handle.next_request().await.unwrap().1.send_response(ok());
        let response = call.await.unwrap();
        let name = format!("new {}", reliant_telemetry::names::span::RPC_SERVER);
        assert!(log.0.lock().unwrap().contains(&name));
        let recorded = || log.0.lock().unwrap().iter().any(|line| line.contains("rpc.response.status_code"));
        assert!(!recorded(), "the status was recorded before the body ended");
        assert_eq!(status(response).await, tonic::Code::Ok);
        assert!(recorded());
    }
}
