//! A unary call ends within the server's limit, or within its caller's `grpc-timeout` if that is shorter. Streams are
//! never cut here: they have heartbeats.

use std::{
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use http_body::Body as HttpBody;
use reliant_telemetry::metrics::RPC_REFUSED;
use reliant_types::{Code, Failure};
use tonic::body::Body;
use tower::{Layer, Service};

use crate::{methods, reply};

#[derive(Debug, Clone, Copy)]
pub struct TimeoutLayer {
    limit: Duration,
}

impl TimeoutLayer {
    pub fn new(limit: Duration) -> Self {
        Self { limit }
    }
}

impl<S> Layer<S> for TimeoutLayer {
    type Service = Timeout<S>;

    fn layer(&self, inner: S) -> Timeout<S> {
        Timeout { inner, limit: self.limit }
    }
}

#[derive(Debug, Clone)]
pub struct Timeout<S> {
    inner: S,
    limit: Duration,
}

impl<S, B, R> Service<Request<B>> for Timeout<S>
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
        let streaming = methods::of_path(request.uri().path()).streaming;
        let limit = asked(request.headers()).map_or(self.limit, |asked| asked.min(self.limit));
        let call = self.inner.call(request);
        Box::pin(async move {
            let response = if streaming {
                call.await?
            } else {
                match tokio::time::timeout(limit, call).await {
                    Ok(response) => response?,
                    Err(_) => return Ok(reply::refuse(&too_slow(limit))),
                }
            };
            Ok(response.map(Body::new))
        })
    }
}

fn too_slow(limit: Duration) -> Failure {
    RPC_REFUSED.with_label_values(&["timeout"]).inc();
    Failure::new(
        Code::DeadlineExceeded,
        format!("the call took longer than {limit:?}; it may still have had an effect"),
    )
}

/// The caller's own deadline: at most 8 digits and a unit. Malformed: none.
fn asked(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tower_test::mock;

    use super::*;
    use crate::observe::testing::*;

    const LIMIT: Duration = Duration::from_secs(10);

    async fn ends_after(path: &str, asked: Option<&str>) -> Option<Duration> {
        let (mut service, mut handle) = mock::spawn_with(|inner: Mock| TimeoutLayer::new(LIMIT).layer(inner));
        assert!(service.poll_ready().is_ready());
        let mut request = request(path);
        if let Some(asked) = asked {
            request.headers_mut().insert("grpc-timeout", asked.parse().unwrap());
        }
        let call = service.call(request);
        let _held = handle.next_request().await.unwrap();
        let begun = tokio::time::Instant::now();
        let response = tokio::time::timeout(LIMIT * 10, call).await.ok()?.unwrap();
        assert_eq!(failure(&response).code, Code::DeadlineExceeded);
        Some(begun.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn calls_are_cut_and_streams_are_not() {
        let close = |took: Option<Duration>, expected: Duration| {
            let took = took.expect("the call was cut");
            assert!(took >= expected && took < expected + Duration::from_millis(10), "{took:?}, not {expected:?}");
        };
        close(ends_after(UNARY, None).await, LIMIT);
        close(ends_after(UNARY, Some("2S")).await, LIMIT / 5);
        close(ends_after(UNARY, Some("1H")).await, LIMIT);
        for malformed in ["", "S", "-1S", "1x", "123456789S", "1 S"] {
            close(ends_after(UNARY, Some(malformed)).await, LIMIT);
        }
        assert_eq!(ends_after(STREAM, None).await, None);
        assert_eq!(ends_after(STREAM, Some("1S")).await, None);
    }
}
