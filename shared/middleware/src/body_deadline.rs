//! A stream's request must arrive: the whole of it where only the server streams, its first bytes where the caller streams
//! too. Headers without a body would otherwise hold a place for ever.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use http_body::{Body as HttpBody, Frame, SizeHint};
use reliant_telemetry::metrics::RPC_REFUSED;
use reliant_types::{Code, Failure};
use tokio::time::Sleep;
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use crate::methods;

#[derive(Debug, Clone, Copy)]
pub struct BodyDeadlineLayer {
    limit: Duration,
}

impl BodyDeadlineLayer {
    pub fn new(limit: Duration) -> Self {
        Self { limit }
    }
}

impl<S> Layer<S> for BodyDeadlineLayer {
    type Service = BodyDeadline<S>;

    fn layer(&self, inner: S) -> BodyDeadline<S> {
        BodyDeadline { inner, limit: self.limit }
    }
}

#[derive(Debug, Clone)]
pub struct BodyDeadline<S> {
    inner: S,
    limit: Duration,
}

impl<S, B> Service<Request<B>> for BodyDeadline<S>
where
    S: Service<Request<Body>>,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<tonic::codegen::StdError>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> S::Future {
        let method = methods::of_path(request.uri().path());
        let limit = self.limit;
        self.inner.call(request.map(|body| {
            if !method.streaming || body.is_end_stream() {
                return Body::new(body);
            }
            let deadline = Some(Box::pin(tokio::time::sleep(limit)));
            Body::new(Awaited { body: Body::new(body), deadline, limit, to_its_end: !method.client_streaming })
        }))
    }
}

/// A body that must arrive before its deadline.
struct Awaited {
    body: Body,
    /// `None`: it has arrived.
    deadline: Option<Pin<Box<Sleep>>>,
    limit: Duration,
    to_its_end: bool,
}

impl HttpBody for Awaited {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if !this.to_its_end && frame.data_ref().is_some_and(|data| !data.is_empty()) {
                    this.deadline = None;
                }
            }
            Poll::Ready(None | Some(Err(_))) => this.deadline = None,
            Poll::Pending => {}
        }
        // Also where bytes trickle in: a request that never ends does not arrive.
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            this.deadline = None;
            RPC_REFUSED.with_label_values(&["timeout"]).inc();
            let message = format!("the stream's request did not arrive within {:?}; open the stream again", this.limit);
            return Poll::Ready(Some(Err(reliant_rpc::status(&Failure::new(Code::DeadlineExceeded, message)))));
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
mod tests {
    use futures::StreamExt as _;
    use http_body_util::{BodyExt as _, StreamBody};
    use tower::{ServiceExt as _, service_fn};

    use super::*;
    use crate::observe::testing::*;

    const LIMIT: Duration = Duration::from_secs(10);
    const CONNECT: &str = "/reliant.v1.TunnelService/Connect";

    /// Sends `frames`, one each half limit, then nothing; the codes of what the handler reads in a hundred limits.
    async fn read(path: &str, frames: usize) -> (usize, Option<tonic::Code>) {
        let sent = futures::stream::iter(0..frames).then(|_| async {
            tokio::time::sleep(LIMIT / 2).await;
            Ok::<_, Status>(Frame::data(Bytes::from_static(b"x")))
        });
        let body = Body::new(StreamBody::new(Box::pin(sent.chain(futures::stream::pending()))));
        let handler = service_fn(|request: Request<Body>| async move {
            let (mut body, mut seen) = (request.into_body(), 0);
            let ended = tokio::time::timeout(LIMIT * 100, async {
                loop {
                    match body.frame().await {
                        Some(Ok(_)) => seen += 1,
                        Some(Err(status)) => return status.code(),
                        None => return tonic::Code::Ok,
                    }
                }
            });
            let ended = ended.await.ok();
            Ok::<_, std::convert::Infallible>((seen, ended))
        });
        let request = Request::post(path).body(body).unwrap();
        BodyDeadlineLayer::new(LIMIT).layer(handler).oneshot(request).await.unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_whose_request_does_not_arrive_is_ended() {
        assert_eq!(read(STREAM, 0).await, (0, Some(tonic::Code::DeadlineExceeded)));
        let (seen, ended) = read(STREAM, 100).await;
        assert!(seen <= 2 && ended == Some(tonic::Code::DeadlineExceeded), "{seen} {ended:?}: it trickles in");
        assert_eq!(read(CONNECT, 0).await, (0, Some(tonic::Code::DeadlineExceeded)));
        assert_eq!(read(CONNECT, 5).await, (5, None), "a caller that streams has begun");
        assert_eq!(read(UNARY, 0).await, (0, None), "calls have their own limit");
    }
}
