//! `authorization: Bearer …` becomes a [`Principal`] in the request's extensions, or the call ends here.
//!
//! A stream outlives neither its token's expiry nor its revocation: its body ends with `UNAUTHENTICATED` then.

use std::{
    collections::HashSet,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::SystemTime,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, Request, Response, header::AUTHORIZATION};
use http_body::{Body as HttpBody, Frame, SizeHint};
use reliant_telemetry::metrics::RPC_REFUSED;
use reliant_types::{Code, Failure, code::Class};
use tonic::{Status, body::Body};
use tower::{Layer, Service};
use tracing::Span;

use crate::{
    access_log::Caller,
    attempts::{Attempt, AttemptLimits, Attempts},
    methods::{self, Method},
    principal::{Principal, missing},
    reply,
};

/// A longer token is none of ours.
pub const BEARER_MAX_BYTES: usize = 4096;

/// Says who holds a token.
#[async_trait]
pub trait Authenticator: Send + Sync + 'static {
    async fn authenticate(&self, bearer: &str) -> Result<Principal, Failure>;

    /// Whether the token was good of late. Its holder does not pay for what others try from the same address.
    fn is_known(&self, _bearer: &str) -> bool {
        false
    }

    /// Ends when the principal's token is revoked. The default is for tokens that cannot be.
    fn revoked(&self, _principal: &Principal) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
}

/// Methods that anybody may call, by full name (`package.Service/Method`).
#[derive(Debug, Clone)]
pub struct PublicMethods(HashSet<&'static str>);

impl PublicMethods {
    /// Health and reflection.
    pub fn platform() -> Self {
        Self(HashSet::from([
            "grpc.health.v1.Health/Check",
            "grpc.health.v1.Health/Watch",
            "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ]))
    }

    pub fn none() -> Self {
        Self(HashSet::new())
    }

    pub fn with(mut self, method: &'static str) -> Self {
        self.0.insert(method);
        self
    }

    pub(crate) fn contains(&self, method: Method) -> bool {
        self.0.contains(method.name)
    }
}

#[derive(Clone)]
pub struct AuthLayer {
    authenticator: Arc<dyn Authenticator>,
    public: Arc<PublicMethods>,
    attempts: Attempts,
}

impl AuthLayer {
    pub fn new(authenticator: Arc<dyn Authenticator>, public: Arc<PublicMethods>, limits: &AttemptLimits) -> Self {
        Self { authenticator, public, attempts: Attempts::new(limits) }
    }
}

impl<S> Layer<S> for AuthLayer {
    type Service = Auth<S>;

    fn layer(&self, inner: S) -> Auth<S> {
        Auth { inner, layer: self.clone() }
    }
}

#[derive(Clone)]
pub struct Auth<S> {
    inner: S,
    layer: AuthLayer,
}

impl<S, B, R> Service<Request<B>> for Auth<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: Send + 'static,
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
        let method = methods::of_path(request.uri().path());
        if self.layer.public.contains(method) {
            // A sign-in proves who calls by what it carries, so it is an attempt as an unknown token is.
            let attempt = match (!method.streaming && !method.is_probe()).then(|| self.layer.attempts.begin(&request)) {
                Some(Err(failure)) => return Box::pin(std::future::ready(Ok(reply::refuse(&failure)))),
                attempt => attempt.and_then(Result::ok),
            };
            let call = self.inner.call(request);
            return Box::pin(async move {
                let response = call.await?;
                if let Some(attempt) = attempt
                    && reply::code(response.headers()).is_some_and(is_callers_fault)
                {
                    attempt.failed();
                }
                Ok(response.map(Body::new))
            });
        }
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let authenticator = self.layer.authenticator.clone();
        let attempt = match bearer(request.headers()) {
            Ok(bearer) if !authenticator.is_known(bearer) => self.layer.attempts.begin(&request).map(Some),
            _ => Ok(None),
        };
        Box::pin(async move {
            let principal = match (attempt, bearer(request.headers())) {
                (Ok(attempt), Ok(bearer)) => {
                    let answer = authenticator.authenticate(bearer).await;
                    let failed = |failure: &Failure| failure.code.class() == Class::Unauthenticated;
                    attempt.filter(|_| answer.as_ref().is_err_and(failed)).iter().for_each(Attempt::failed);
                    answer
                }
                (Err(failure), _) | (_, Err(failure)) => Err(failure),
            };
            let principal = match principal {
                Ok(principal) => principal,
                Err(failure) => {
                    RPC_REFUSED.with_label_values(&["auth"]).inc();
                    return Ok(reply::refuse(&failure));
                }
            };
            if let Some(caller) = request.extensions().get::<Caller>() {
                caller.set(principal.user);
            }
            Span::current().record("user.id", tracing::field::display(principal.user));
            let end = method.streaming.then(|| token_end(authenticator.as_ref(), &principal));
            request.extensions_mut().insert(principal);
            let response = inner.call(request).await?;
            Ok(match end {
                Some(end) => response.map(|body| Body::new(WhileValid { body: Some(Body::new(body)), end })),
                None => response.map(Body::new),
            })
        })
    }
}

/// Whether a sign-in failed by what it carried, and not by the server's state.
fn is_callers_fault(code: tonic::Code) -> bool {
    use tonic::Code;
    matches!(code, Code::InvalidArgument | Code::NotFound | Code::Unauthenticated | Code::PermissionDenied)
}

fn bearer(headers: &HeaderMap) -> Result<&str, Failure> {
    let value = headers.get(AUTHORIZATION).ok_or_else(missing)?;
    let invalid = || Failure::new(Code::TokenInvalid, "the authorization header must read 'Bearer <token>'");
    if value.len() > BEARER_MAX_BYTES {
        return Err(invalid());
    }
    let text = value.to_str().map_err(|_| invalid())?;
    let (scheme, token) = text.split_once(' ').ok_or_else(invalid)?;
    let token = token.trim();
    if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() || token.contains(char::is_whitespace) {
        return Err(invalid());
    }
    Ok(token)
}

/// Resolves to the reason once the token is good no more.
fn token_end(authenticator: &dyn Authenticator, principal: &Principal) -> BoxFuture<'static, Failure> {
    let revoked = authenticator.revoked(principal);
    let left = principal.expires_at.map(|at| at.duration_since(SystemTime::now()).unwrap_or_default());
    Box::pin(async move {
        let expired = async {
            match left {
                Some(left) => tokio::time::sleep(left).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = revoked => Failure::new(Code::TokenRevoked, "the token was revoked; make a new one"),
            () = expired => Failure::new(Code::TokenExpired, "the token has expired; sign in again"),
        }
    })
}

/// A stream's body, until the token ends.
struct WhileValid {
    body: Option<Body>,
    end: BoxFuture<'static, Failure>,
}

impl HttpBody for WhileValid {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        if let Poll::Ready(failure) = this.end.as_mut().poll(cx) {
            this.body = None;
            return Poll::Ready(Some(Ok(Frame::trailers(reply::trailers(&failure)))));
        }
        Pin::new(body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering::SeqCst},
        time::Duration,
    };

    use http_body_util::BodyExt as _;
    use reliant_types::UserId;
    use tokio_util::sync::CancellationToken;
    use tower_test::mock;

    use super::*;
    use crate::{observe::testing::*, principal::PrincipalKind};

    struct One {
        principal: Principal,
        revoked: CancellationToken,
        asked: AtomicUsize,
    }

    #[async_trait]
    impl Authenticator for One {
        async fn authenticate(&self, bearer: &str) -> Result<Principal, Failure> {
            self.asked.fetch_add(1, SeqCst);
            if bearer == "good" {
                return Ok(self.principal.clone());
            }
            Err(Failure::new(Code::TokenInvalid, "no"))
        }

        fn is_known(&self, bearer: &str) -> bool {
            bearer == "good"
        }

        fn revoked(&self, _: &Principal) -> BoxFuture<'static, ()> {
            Box::pin(self.revoked.clone().cancelled_owned())
        }
    }

    fn one(expires_at: Option<SystemTime>) -> Arc<One> {
        let principal = Principal { user: UserId::new(), kind: PrincipalKind::Person, expires_at };
        Arc::new(One { principal, revoked: CancellationToken::new(), asked: AtomicUsize::new(0) })
    }

    fn spawn(one: &Arc<One>) -> (mock::Spawn<Auth<Mock>>, Handle) {
        let public = PublicMethods::platform().with("reliant.v1.IdentityService/ExchangeLoginCode");
        let layer =
            AuthLayer::new(one.clone(), Arc::new(public), &AttemptLimits { failure_burst: 20, ..Default::default() });
        mock::spawn_with(move |inner| layer.layer(inner))
    }

    fn with_header(path: &str, value: &str) -> Request<Body> {
        let mut request = request(path);
        request.headers_mut().insert(AUTHORIZATION, value.parse().unwrap());
        request
    }

    #[tokio::test]
    async fn bad_headers_are_refused_with_a_code() {
        let one = one(None);
        let (mut service, _handle) = spawn(&one);
        let long = format!("Bearer {}", "x".repeat(BEARER_MAX_BYTES));
        let mut check = async |request: Request<Body>, code| {
            assert!(service.poll_ready().is_ready());
            let response = service.call(request).await.unwrap();
            assert_eq!(failure(&response).code, code);
        };
        check(request(UNARY), Code::TokenMissing).await;
        for value in ["good", "Bearer", "Bearer ", "Basic good", "Bearer good bad", "Bearer other", &long] {
            check(with_header(UNARY, value), Code::TokenInvalid).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_refused_before_they_are_looked_up_and_good_tokens_are_not() {
        let one = one(None);
        let (mut service, mut handle) = spawn(&one);
        let mut codes = Vec::new();
        for _ in 0..30 {
            assert!(service.poll_ready().is_ready());
            codes.push(failure(&service.call(with_header(UNARY, "Bearer other")).await.unwrap()).code);
        }
        let looked_up = codes.iter().filter(|code| **code == Code::TokenInvalid).count();
        assert_eq!((looked_up, one.asked.load(SeqCst)), (20, 20), "{codes:?}");
        assert!(codes[20..].iter().all(|code| *code == Code::RateLimited));
        // The address has used up its failures; the holder of a token that was good of late is let in.
        assert!(service.poll_ready().is_ready());
        let call = tokio::spawn(service.call(with_header(UNARY, "Bearer good")));
        handle.next_request().await.expect("a known token").1.send_response(ok());
        assert_eq!(status(call.await.unwrap().unwrap()).await, tonic::Code::Ok);
    }

    #[tokio::test(start_paused = true)]
    async fn sign_ins_that_fail_are_charged_and_those_that_do_not_are_not() {
        let one = one(None);
        let (mut service, mut handle) = spawn(&one);
        let mut sign_in = async |answer: Response<Body>| {
            assert!(service.poll_ready().is_ready());
            let call = tokio::spawn(service.call(request("/reliant.v1.IdentityService/ExchangeLoginCode")));
            tokio::select! {
                Some((_, reply)) = handle.next_request() => reply.send_response(answer),
                () = tokio::time::sleep(Duration::from_millis(1)) => {}
            }
            status(call.await.unwrap().unwrap()).await
        };
        for _ in 0..50 {
            assert_eq!(sign_in(ok()).await, tonic::Code::Ok);
            let away = Status::unavailable("the database is away").into_http();
            assert_eq!(sign_in(away).await, tonic::Code::Unavailable);
        }
        for _ in 0..20 {
            assert_eq!(sign_in(Status::not_found("no such code").into_http()).await, tonic::Code::NotFound);
        }
        assert_eq!(sign_in(ok()).await, tonic::Code::ResourceExhausted);
    }

    #[tokio::test]
    async fn the_handler_sees_the_principal() {
        let one = one(None);
        let (mut service, mut handle) = spawn(&one);
        assert!(service.poll_ready().is_ready());
        let call = tokio::spawn(service.call(with_header(UNARY, "bearer good")));
        let (received, reply) = handle.next_request().await.unwrap();
        assert_eq!(received.extensions().get::<Principal>().unwrap().user, one.principal.user);
        reply.send_response(ok());
        assert_eq!(status(call.await.unwrap().unwrap()).await, tonic::Code::Ok);
    }

    #[tokio::test]
    async fn public_methods_need_no_token() {
        let one = one(None);
        for path in ["/grpc.health.v1.Health/Check", "/reliant.v1.IdentityService/ExchangeLoginCode"] {
            let (mut service, mut handle) = spawn(&one);
            assert!(service.poll_ready().is_ready());
            let call = tokio::spawn(service.call(request(path)));
            let (received, reply) = handle.next_request().await.unwrap();
            assert!(received.extensions().get::<Principal>().is_none());
            reply.send_response(ok());
            assert_eq!(status(call.await.unwrap().unwrap()).await, tonic::Code::Ok);
        }
    }

    async fn open_stream(one: &Arc<One>) -> Response<Body> {
        let (mut service, mut handle) = spawn(one);
        assert!(service.poll_ready().is_ready());
        let call = tokio::spawn(service.call(with_header(STREAM, "Bearer good")));
        handle.next_request().await.unwrap().1.send_response(endless());
        let mut response = call.await.unwrap().unwrap();
        assert!(response.body_mut().frame().await.unwrap().unwrap().is_data());
        response
    }

    async fn ended_by(mut response: Response<Body>) -> Code {
        let trailers = response.body_mut().frame().await.unwrap().unwrap().into_trailers().unwrap();
        assert!(response.body_mut().frame().await.is_none());
        reliant_rpc::failure(&Status::from_header_map(&trailers).unwrap()).code
    }

    #[tokio::test]
    async fn a_stream_ends_when_its_token_is_revoked() {
        let one = one(None);
        let response = open_stream(&one).await;
        one.revoked.cancel();
        assert_eq!(ended_by(response).await, Code::TokenRevoked);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_ends_when_its_token_expires() {
        let one = one(Some(SystemTime::now() + Duration::from_secs(60)));
        assert_eq!(ended_by(open_stream(&one).await).await, Code::TokenExpired);
    }
}
