//! The layers in front of the services, and the split between gRPC and the web page.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::future::{BoxFuture, FutureExt as _, ready};
use http::{HeaderName, HeaderValue, Method, Request, Response, header, request::Parts};
use reliant_middleware::{Authenticator, PublicMethods, StackConfig, StackLayer, reply};
use reliant_types::{Code, Failure, limits};
use tonic::{body::Body, service::Routes};
use tonic_web::GrpcWebLayer;
use tower::{Service, ServiceBuilder, ServiceExt as _, util::BoxCloneSyncService};
use tower_http::cors::{AllowOrigin, CorsLayer, ExposeHeaders};

use crate::{ApiConfig, ApiError, web};

const PREFLIGHT_CACHE: Duration = Duration::from_secs(3600);

/// What the listener serves.
pub type Front = BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>;

/// All of it, from the outside in.
pub fn front(config: &ApiConfig, authenticator: Arc<dyn Authenticator>, services: Routes) -> Result<Front, ApiError> {
    let layers = StackConfig {
        // Browsers and terminals: what they ask to be sampled does not decide for us.
        trust_sampled: false,
        max_unary: config.limits.concurrent_calls,
        max_streams: config.limits.streams,
        max_public_streams: config.limits.public_streams,
        unary_timeout: config.limits.call_timeout,
        // A sign-in code is its own secret.
        public: PublicMethods::platform().with("reliant.v1.IdentityService/ExchangeLoginCode"),
        rate_limit: config.limits.rate.clone(),
        attempts: config.limits.attempts.clone(),
        ..StackConfig::new(authenticator)
    };
    let grpc = ServiceBuilder::new()
        // Next to the browser, so that every refusal below is readable there.
        .layer(GrpcWebLayer::new())
        // Trace context, metrics, access log, catch panic, load shed, timeout, authentication, rate limit.
        .layer(StackLayer::new(&layers))
        // Innermost: only the codec knows that a message was too large, and says it in its own words.
        .map_response(say_too_large)
        .service(services.prepare());
    let front = ServiceBuilder::new()
        // Outermost: without its headers a browser shows no answer at all, a page's refusal included.
        .layer(cors(&config.cors_origins)?)
        .service(Split { grpc: BoxCloneSyncService::new(grpc) });
    Ok(BoxCloneSyncService::new(front))
}

/// gRPC and gRPC-web by their content type, everything else is the web page.
#[derive(Clone)]
struct Split {
    grpc: Front,
}

impl Service<Request<Body>> for Split {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if is_grpc(&request) {
            self.grpc.clone().oneshot(request).boxed()
        } else {
            ready(Ok(web::serve(&request))).boxed()
        }
    }
}

/// The same service for axum's router, which has a body type of its own.
pub fn as_page(
    front: Front,
) -> impl Service<Request<axum::body::Body>, Response = Response<Body>, Error = Infallible, Future: Send> + Clone + Send + Sync
{
    front.map_request(|request: Request<axum::body::Body>| request.map(Body::new))
}

fn is_grpc<B>(request: &Request<B>) -> bool {
    request.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

fn say_too_large(response: Response<Body>) -> Response<Body> {
    let text = |name| response.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok()).unwrap_or("");
    // tonic's words, percent-encoded; its status alone is also given for other things.
    if text("grpc-status") != "11" || !text("grpc-message").contains("too%20large") {
        return response;
    }
    reply::refuse(&Failure::new(
        Code::MessageTooLarge,
        format!(
            "the request is larger than {} MiB; a message's text may have 1 MiB. Put long content into a file that the agent can read",
            limits::GRPC_MESSAGE_MAX_BYTES / (1024 * 1024)
        ),
    ))
}

/// The origins as browsers send them; an entry that is none is the operator's mistake.
pub fn check_origins(origins: &[String]) -> Result<Vec<HeaderValue>, ApiError> {
    origins.iter().map(|origin| checked_origin(origin).ok_or_else(|| ApiError::Origin(origin.clone()))).collect()
}

fn cors(origins: &[String]) -> Result<CorsLayer, ApiError> {
    let allowed = check_origins(origins)?;
    let headers =
        ["authorization", "content-type", "grpc-timeout", "traceparent", "tracestate", "x-grpc-web", "x-user-agent"];
    let exposed = ["grpc-status", "grpc-message", "grpc-status-details-bin"];
    Ok(CorsLayer::new()
        .allow_origin(AllowOrigin::predicate(move |origin, parts| {
            allowed.contains(origin) || same_origin(origin, parts)
        }))
        .allow_methods([Method::POST, Method::GET])
        .allow_headers(headers.map(HeaderName::from_static))
        .expose_headers(ExposeHeaders::list(exposed.map(HeaderName::from_static)))
        .max_age(PREFLIGHT_CACHE))
}

/// `scheme://host[:port]`, nothing more; never `*`, as calls carry a bearer token.
fn checked_origin(origin: &str) -> Option<HeaderValue> {
    let uri: http::Uri = origin.parse().ok()?;
    let scheme = uri.scheme_str().filter(|scheme| matches!(*scheme, "http" | "https"))?;
    let host = uri.authority()?;
    (format!("{scheme}://{host}") == origin && !origin.contains('*')).then(|| HeaderValue::from_str(origin).ok())?
}

fn same_origin(origin: &HeaderValue, parts: &Parts) -> bool {
    let host = match parts.uri.authority() {
        Some(authority) => Some(authority.as_str()),
        None => parts.headers.get(header::HOST).and_then(|host| host.to_str().ok()),
    };
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, host)| host);
    host.is_some() && host == origin
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_exact() {
        for good in ["https://console.example.com", "http://localhost:5173", "http://127.0.0.1:7440"] {
            assert!(checked_origin(good).is_some(), "{good}");
        }
        for bad in [
            "*",
            "",
            "null",
            "example.com",
            "https://example.com/",
            "https://example.com/x",
            "ftp://example.com",
            "https://*",
        ] {
            assert!(cors(&[bad.to_owned()]).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_page_of_another_site_is_not_let_in() {
        let ask = |origin: &'static str| async move {
            let layer = cors(&["https://console.example.com".to_owned()]).unwrap();
            let mut service = ServiceBuilder::new()
                .layer(layer)
                .service_fn(|_: Request<Body>| async { Ok::<_, Infallible>(Response::new(Body::empty())) });
            let request = Request::builder()
                .method("OPTIONS")
                .uri("/reliant.v1.ChatService/ListChats")
                .header("host", "127.0.0.1:7440")
                .header("origin", origin)
                .header("access-control-request-method", "POST")
                .body(Body::empty())
                .unwrap();
            let response = service.ready().await.unwrap().call(request).await.unwrap();
            response.headers().contains_key("access-control-allow-origin")
        };
        assert!(ask("https://console.example.com").await);
        assert!(ask("http://127.0.0.1:7440").await);
        assert!(!ask("https://evil.example.com").await);
        assert!(!ask("null").await);
    }

    #[test]
    fn the_codecs_refusal_becomes_our_own() {
        let refused = tonic::Status::out_of_range(
            "Error, decoded message length too large: found 10 bytes, the limit is: 4 bytes",
        );
        let response = say_too_large(refused.into_http());
        let status = tonic::Status::from_header_map(response.headers()).unwrap();
        assert_eq!(reliant_rpc::failure(&status).code, Code::MessageTooLarge);
        let other = say_too_large(tonic::Status::out_of_range("another").into_http());
        assert_eq!(tonic::Status::from_header_map(other.headers()).unwrap().code(), tonic::Code::OutOfRange);
    }
}
