//! Sees a call to its end: to its status, to a transport error, or to the caller's leaving. A stream ends with its body.
//!
//! An observer is told exactly once. What is dropped unsettled was cancelled, and is never lost.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::Response;
use http_body::{Body as HttpBody, Frame, SizeHint};
use reliant_telemetry::code_label;
use tonic::{Code, Status, body::Body};

use crate::reply;

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Status(Code),
    /// The caller left before the end.
    Cancelled,
    /// The inner service or its body failed without a status.
    Broken,
}

impl End {
    /// The status as metrics and logs name it.
    pub(crate) fn label(self) -> &'static str {
        match self {
            End::Status(code) => code_label(code),
            End::Cancelled => "CANCELLED",
            End::Broken => "UNKNOWN",
        }
    }

    /// Whether the server, not its caller, is at fault.
    pub(crate) fn is_server_error(self) -> bool {
        match self {
            End::Status(code) => matches!(
                code,
                Code::Unknown
                    | Code::DeadlineExceeded
                    | Code::Unimplemented
                    | Code::Internal
                    | Code::Unavailable
                    | Code::DataLoss
            ),
            End::Cancelled => false,
            End::Broken => true,
        }
    }
}

pub(crate) trait Observer: Send + Unpin + 'static {
    fn end(self, end: End);

    /// Held while the body is polled.
    fn span(&self) -> Option<&tracing::Span> {
        None
    }
}

/// Tells its observer once.
pub(crate) struct Guard<O: Observer>(Option<O>);

impl<O: Observer> Guard<O> {
    pub(crate) fn new(observer: O) -> Self {
        Self(Some(observer))
    }

    fn end(&mut self, end: End) {
        if let Some(observer) = self.0.take() {
            observer.end(end);
        }
    }
}

impl<O: Observer> Drop for Guard<O> {
    fn drop(&mut self) {
        self.end(End::Cancelled);
    }
}

/// Awaits the response and hands the guard on to its body.
pub(crate) async fn observe<F, B, E, O>(future: F, mut guard: Guard<O>) -> Result<Response<Body>, E>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<tonic::codegen::StdError>,
    O: Observer,
{
    let response = match future.await {
        Ok(response) => response,
        Err(error) => {
            guard.end(End::Broken);
            return Err(error);
        }
    };
    let (head, body) = response.into_parts();
    // What is no gRPC (a page, a probe) has its HTTP status alone.
    let fallback = if head.status.is_success() { Code::Ok } else { Code::Unknown };
    if let Some(code) = reply::code(&head.headers) {
        guard.end(End::Status(code));
    }
    if body.is_end_stream() {
        guard.end(End::Status(fallback));
        return Ok(Response::from_parts(head, Body::new(body)));
    }
    let body = Observed { body: Body::new(body), guard, fallback };
    Ok(Response::from_parts(head, Body::new(body)))
}

struct Observed<O: Observer> {
    body: Body,
    guard: Guard<O>,
    fallback: Code,
}

impl<O: Observer> HttpBody for Observed<O> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let polled = {
            let _entered = this.guard.0.as_ref().and_then(Observer::span).map(tracing::Span::enter);
            Pin::new(&mut this.body).poll_frame(cx)
        };
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(trailers) = frame.trailers_ref() {
                    this.guard.end(End::Status(reply::code(trailers).unwrap_or(this.fallback)));
                }
            }
            Poll::Ready(Some(Err(_))) => this.guard.end(End::Broken),
            Poll::Ready(None) => this.guard.end(End::Status(this.fallback)),
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<O: Observer> Drop for Observed<O> {
    fn drop(&mut self) {
        // A server need not poll past the last frame of a body that says it is at its end.
        if self.body.is_end_stream() {
            self.guard.end(End::Status(self.fallback));
        }
    }
}

/// A body that holds `T` until its end.
pub(crate) struct Holding<T> {
    body: Body,
    held: Option<T>,
}

impl<T: Send + Unpin + 'static> Holding<T> {
    pub(crate) fn wrap<B>(body: B, held: T) -> Body
    where
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<tonic::codegen::StdError>,
    {
        Body::new(Self { body: Body::new(body), held: Some(held) })
    }
}

impl<T: Send + Unpin + 'static> HttpBody for Holding<T> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            this.held = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Bodies and services for the tests of the layers.

    use http::HeaderMap;
    use http_body_util::{BodyExt as _, StreamBody};

    use super::*;

    pub(crate) const UNARY: &str = "/reliant.v1.ChatService/GetChat";
    pub(crate) const STREAM: &str = "/reliant.v1.UpdateService/Subscribe";

    pub(crate) type Mock = tower_test::mock::Mock<http::Request<Body>, Response<Body>>;
    pub(crate) type Handle = tower_test::mock::Handle<http::Request<Body>, Response<Body>>;

    pub(crate) fn request(path: &str) -> http::Request<Body> {
        http::Request::post(path).body(Body::empty()).unwrap()
    }

    /// One data frame, then OK in trailers.
    pub(crate) fn ok() -> Response<Body> {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
        let frames = [Ok::<_, Status>(Frame::data(Bytes::from_static(b"x"))), Ok(Frame::trailers(trailers))];
        Response::new(Body::new(StreamBody::new(futures::stream::iter(frames))))
    }

    /// One data frame, then nothing for ever.
    pub(crate) fn endless() -> Response<Body> {
        use futures::StreamExt as _;
        let first = futures::stream::iter([Ok::<_, Status>(Frame::data(Bytes::from_static(b"x")))]);
        Response::new(Body::new(StreamBody::new(first.chain(futures::stream::pending()))))
    }

    /// The gRPC status of a whole response.
    pub(crate) async fn status(response: Response<Body>) -> Code {
        if let Some(code) = reply::code(response.headers()) {
            return code;
        }
        let collected = response.into_body().collect().await.unwrap();
        collected.trailers().and_then(reply::code).expect("a gRPC response has a status")
    }

    /// The failure of a trailers-only response, with its details.
    pub(crate) fn failure(response: &Response<Body>) -> reliant_types::Failure {
        reliant_rpc::failure(&Status::from_header_map(response.headers()).expect("a refusal carries a status"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use http_body_util::BodyExt as _;

    use super::{testing::*, *};

    #[derive(Clone, Default)]
    struct Seen(Arc<Mutex<Vec<End>>>);

    impl Observer for Seen {
        fn end(self, end: End) {
            self.0.lock().unwrap().push(end);
        }
    }

    async fn check(response: Result<Response<Body>, &'static str>, read: bool, expected: End) {
        let seen = Seen::default();
        if let Ok(mut response) = observe(std::future::ready(response), Guard::new(seen.clone())).await {
            if read {
                while response.body_mut().frame().await.is_some() {}
            } else {
                response.body_mut().frame().await;
            }
        }
        assert_eq!(*seen.0.lock().unwrap(), [expected]);
    }

    #[tokio::test]
    async fn each_end_is_told_once() {
        check(Ok(ok()), true, End::Status(Code::Ok)).await;
        check(Ok(ok()), false, End::Cancelled).await;
        check(Ok(endless()), false, End::Cancelled).await;
        check(Ok(Status::not_found("no").into_http()), true, End::Status(Code::NotFound)).await;
        check(Err("broken"), true, End::Broken).await;
        let page = Response::new(Body::new(http_body_util::Full::new(Bytes::from_static(b"page"))));
        check(Ok(page), false, End::Status(Code::Ok)).await;
    }

    #[tokio::test]
    async fn a_dropped_call_is_told_as_cancelled() {
        let seen = Seen::default();
        let call = std::future::pending::<Result<Response<Body>, &str>>();
        drop(Box::pin(observe(call, Guard::new(seen.clone()))));
        assert_eq!(*seen.0.lock().unwrap(), [End::Cancelled]);
    }
}
