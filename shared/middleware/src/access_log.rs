//! One line per call, at its end, inside the call's span. Never tokens, texts, arguments or query strings.

use std::{
    sync::{Arc, OnceLock},
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body::Body as HttpBody;
use reliant_types::UserId;
use tokio::time::Instant;
use tonic::body::Body;
use tower::{Layer, Service};
use tracing::Span;

use crate::{
    methods::{self, Method},
    observe::{End, Guard, Observer, observe},
};

/// Where the auth layer, further in, writes who called.
#[derive(Debug, Clone, Default)]
pub(crate) struct Caller(Arc<OnceLock<UserId>>);

impl Caller {
    pub(crate) fn set(&self, user: UserId) {
        // The first auth layer stands.
        let _ = self.0.set(user);
    }
}

#[derive(Debug, Clone, Copy, Default)]
pub struct AccessLogLayer;

impl<S> Layer<S> for AccessLogLayer {
    type Service = AccessLog<S>;

    fn layer(&self, inner: S) -> AccessLog<S> {
        AccessLog { inner }
    }
}

#[derive(Debug, Clone)]
pub struct AccessLog<S> {
    inner: S,
}

impl<S, B, R> Service<Request<B>> for AccessLog<S>
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

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let caller = Caller::default();
        request.extensions_mut().insert(caller.clone());
        let method = methods::of_path(request.uri().path());
        let line = Line { method, caller, begun: Instant::now(), span: Span::current() };
        Box::pin(observe(self.inner.call(request), Guard::new(line)))
    }
}

struct Line {
    method: Method,
    caller: Caller,
    begun: Instant,
    span: Span,
}

impl Observer for Line {
    fn end(self, end: End) {
        let user = self.caller.0.get().map(tracing::field::display);
        let ms = self.begun.elapsed().as_secs_f64() * 1000.0;
        let (method, status) = (self.method.name, end.label());
        // The body may be dropped anywhere; the line belongs to the call's span.
        self.span.in_scope(|| {
            if end.is_server_error() {
                tracing::warn!(rpc.method = method, rpc.response.status_code = status, ms, user.id = user, "call");
            } else if method.starts_with("grpc.") {
                tracing::debug!(rpc.method = method, rpc.response.status_code = status, ms, "call");
            } else {
                tracing::info!(rpc.method = method, rpc.response.status_code = status, ms, user.id = user, "call");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tower_test::mock;
    use tracing::{Event, Metadata, Subscriber, field::Visit, span};

    use super::*;
    use crate::observe::testing::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<String>>>);

    struct Text(String);

    impl Visit for Text {
        fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
            self.0 += &format!("{field}={value:?} ");
        }
    }

    impl Subscriber for Lines {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            span::Id::from_u64(1)
        }
        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
        fn event(&self, event: &Event<'_>) {
            let mut text = Text(String::new());
            event.record(&mut text);
            self.0.lock().unwrap().push(text.0);
        }
        fn enter(&self, _: &span::Id) {}
        fn exit(&self, _: &span::Id) {}
    }

    #[tokio::test]
    async fn one_line_says_method_status_and_user_and_no_secret() {
        let lines = Lines::default();
        let _default = tracing::subscriber::set_default(lines.clone());
        let user = UserId::new();
        let (mut service, mut handle) = mock::spawn_with(|inner: Mock| AccessLogLayer.layer(inner));
        assert!(service.poll_ready().is_ready());
        let mut sent = request(UNARY);
        sent.headers_mut().insert("authorization", "Bearer rlt_secret".parse().unwrap());
        let call = service.call(sent);
        let (received, reply) = handle.next_request().await.unwrap();
        received.extensions().get::<Caller>().unwrap().set(user);
        reply.send_response(ok());
        status(call.await.unwrap()).await;
        let lines: Vec<_> =
            lines.0.lock().unwrap().iter().filter(|line| line.contains("rpc.method")).cloned().collect();
        assert_eq!(lines.len(), 1);
        let line = &lines[0];
        assert!(line.contains("reliant.v1.ChatService/GetChat") && line.contains("\"OK\""), "{line}");
        assert!(line.contains(&user.to_string()), "{line}");
        assert!(!line.contains("rlt_secret"), "{line}");
    }
}
