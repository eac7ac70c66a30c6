//! A panic in a handler, or in the body of a stream, ends that call with `INTERNAL` and no other.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use http::{Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use reliant_telemetry::metrics::PANICS;
use reliant_types::{Code, Failure};
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use crate::{methods, reply};

#[derive(Debug, Clone, Copy, Default)]
pub struct CatchPanicLayer;

impl<S> Layer<S> for CatchPanicLayer {
    type Service = CatchPanic<S>;

    fn layer(&self, inner: S) -> CatchPanic<S> {
        CatchPanic { inner }
    }
}

#[derive(Debug, Clone)]
pub struct CatchPanic<S> {
    inner: S,
}

impl<S, B, R> Service<Request<B>> for CatchPanic<S>
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
        let call = match catch_unwind(AssertUnwindSafe(|| self.inner.call(request))) {
            Ok(call) => call,
            Err(panic) => return Box::pin(std::future::ready(Ok(reply::refuse(&caught(method, panic.as_ref()))))),
        };
        Box::pin(async move {
            match AssertUnwindSafe(call).catch_unwind().await {
                Ok(response) => Ok(response?.map(|body| Body::new(Caught { body: Some(Body::new(body)), method }))),
                Err(panic) => Ok(reply::refuse(&caught(method, panic.as_ref()))),
            }
        })
    }
}

fn caught(method: &'static str, panic: &(dyn Any + Send)) -> Failure {
    PANICS.inc();
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    // The panic hook has logged where it was; here is logged which call it ended.
    tracing::error!(rpc.method = method, panic = text.unwrap_or("no text"), "a handler panicked");
    Failure::new(Code::Internal, "the server failed on this call; its log says why")
}

struct Caught {
    body: Option<Body>,
    method: &'static str,
}

impl HttpBody for Caught {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        match catch_unwind(AssertUnwindSafe(|| Pin::new(body).poll_frame(cx))) {
            Ok(polled) => polled,
            Err(panic) => {
                this.body = None;
                let failure = caught(this.method, panic.as_ref());
                Poll::Ready(Some(Ok(Frame::trailers(reply::trailers(&failure)))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::StreamBody;
    use tower::{ServiceExt as _, service_fn};

    use super::*;
    use crate::observe::testing::*;

    #[tokio::test]
    async fn a_panic_in_the_handler_is_an_internal_status() {
        let service = CatchPanicLayer.layer(service_fn(|_: Request<Body>| async {
            if true {
                panic!("boom");
            }
            Ok::<_, std::convert::Infallible>(ok())
        }));
        let response = service.oneshot(request(UNARY)).await.unwrap();
        let failure = failure(&response);
        assert_eq!(failure.code, Code::Internal);
        assert!(!failure.message.contains("boom"), "a panic's text is not for the caller");
    }

    #[tokio::test]
    async fn a_panic_in_the_body_ends_the_stream_with_trailers() {
        let service = CatchPanicLayer.layer(service_fn(|_: Request<Body>| async {
            let frames = futures::stream::poll_fn(|_| -> Poll<Option<Result<Frame<Bytes>, Status>>> { panic!("boom") });
            Ok::<_, std::convert::Infallible>(Response::new(Body::new(StreamBody::new(frames))))
        }));
        let response = service.oneshot(request(STREAM)).await.unwrap();
        assert_eq!(status(response).await, tonic::Code::Internal);
    }
}
