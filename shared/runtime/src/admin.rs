//! The admin listener: `/health` (the process runs), `/ready` (it can do its work, or what is missing) and `/metrics`.
//!
//! It carries no secrets and no data of users, and is not for the public network.

use reliant_types::boxed;
use std::{collections::BTreeMap, future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use axum::{Json, Router, extract::State, http::StatusCode, http::header, response::IntoResponse, routing::get};
use tokio::net::TcpListener;

use crate::Drain;

/// One check may take so long; past it, it counts as failed.
pub const CHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// Something a role cannot work without.
#[async_trait]
pub trait Check: Send + Sync + 'static {
    /// As operators know it: `postgres`, `nats`, `temporal`.
    fn name(&self) -> &str;

    /// `Err` is a sentence that says what is missing. It holds no secret.
    async fn check(&self) -> Result<(), String>;
}

struct FnCheck<F> {
    name: &'static str,
    run: F,
}

#[async_trait]
impl<F, Fut, E> Check for FnCheck<F>
where
    F: Fn() -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), E>> + Send,
    E: std::fmt::Display + Send,
{
    fn name(&self) -> &str {
        self.name
    }

    async fn check(&self) -> Result<(), String> {
        (self.run)().await.map_err(|error| error.to_string())
    }
}

/// A check made of a closure.
pub fn check_fn<F, Fut, E>(name: &'static str, run: F) -> Box<dyn Check>
where
    F: Fn() -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), E>> + Send + 'static,
    E: std::fmt::Display + Send + 'static,
{
    Box::new(FnCheck { name, run })
}

/// Bound, not yet serving.
pub struct AdminServer {
    listener: TcpListener,
    addr: SocketAddr,
    checks: Arc<[Box<dyn Check>]>,
    extra: Router,
}

impl AdminServer {
    /// Port 0 takes a free one.
    #[boxed]
    pub async fn bind(addr: SocketAddr, checks: Vec<Box<dyn Check>>) -> io::Result<Self> {
        let listener = TcpListener::bind(addr).await?;
        let addr = listener.local_addr()?;
        Ok(Self { listener, addr, checks: checks.into(), extra: Router::new() })
    }

    /// Further pages of a role, for operators.
    pub fn merge(mut self, routes: Router) -> Self {
        self.extra = self.extra.merge(routes);
        self
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Serves until it is cancelled: spawn it as [`crate::TaskKind::Upkeep`], so that while draining `/health` stays good
    /// and `/ready` does not.
    #[boxed]
    pub async fn serve(self, drain: Drain) -> io::Result<()> {
        let pages = router(self.checks, drain).merge(self.extra);
        tokio::select! {
            served = axum::serve(self.listener, pages) => served,
            never = reliant_telemetry::sampled::probe_runtime() => never,
        }
    }
}

#[derive(Clone)]
struct Admin {
    checks: Arc<[Box<dyn Check>]>,
    drain: Drain,
}

/// The pages alone, for a role that serves them on a listener of its own.
pub fn router(checks: Arc<[Box<dyn Check>]>, drain: Drain) -> Router {
    Router::new()
        .route("/health", get(|| async { Json(serde_json::json!({ "status": "ok", "version": crate::VERSION })) }))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .with_state(Admin { checks, drain })
}

#[derive(serde::Serialize)]
struct Report {
    ready: bool,
    /// Names of what is missing, for a person who reads one line.
    missing: Vec<String>,
    checks: BTreeMap<String, Outcome>,
}

#[derive(serde::Serialize)]
struct Outcome {
    ok: bool,
    ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

async fn ready(State(admin): State<Admin>) -> impl IntoResponse {
    let report = run_checks(&admin.checks, admin.drain.is_draining()).await;
    (if report.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, Json(report))
}

async fn run_checks(checks: &[Box<dyn Check>], draining: bool) -> Report {
    let runs = checks.iter().map(|check| async move {
        let begun = tokio::time::Instant::now();
        let result = match tokio::time::timeout(CHECK_TIMEOUT, check.check()).await {
            Ok(result) => result,
            Err(_) => Err(format!("no answer within {} s", CHECK_TIMEOUT.as_secs())),
        };
        let outcome = Outcome { ok: result.is_ok(), ms: begun.elapsed().as_millis() as u64, error: result.err() };
        (check.name().to_owned(), outcome)
    });
    let mut checks: BTreeMap<_, _> = futures::future::join_all(runs).await.into_iter().collect();
    if draining {
        let error = Some("the process drains and takes no more work".to_owned());
        checks.insert("drain".to_owned(), Outcome { ok: false, ms: 0, error });
    }
    let missing: Vec<_> = checks.iter().filter(|(_, outcome)| !outcome.ok).map(|(name, _)| name.clone()).collect();
    Report { ready: missing.is_empty(), missing, checks }
}

async fn metrics() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], reliant_telemetry::metrics::render())
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http_body_util::BodyExt as _;
    use tower::ServiceExt as _;

    use super::*;

    async fn get_page(router: Router, path: &str) -> (StatusCode, String) {
        let request = axum::http::Request::get(path).body(Body::empty()).unwrap();
        let response = router.oneshot(request).await.unwrap();
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    fn checks(list: Vec<Box<dyn Check>>) -> Arc<[Box<dyn Check>]> {
        list.into()
    }

    fn good(name: &'static str) -> Box<dyn Check> {
        check_fn(name, || async { Ok::<_, String>(()) })
    }

    #[tokio::test]
    async fn ready_says_what_is_missing() {
        let list = checks(vec![good("postgres"), check_fn("nats", || async { Err("not connected") })]);
        let (status, body) = get_page(router(list, Drain::new()), "/ready").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["missing"], serde_json::json!(["nats"]));
        assert_eq!(body["checks"]["nats"]["error"], "not connected");
        assert_eq!(body["checks"]["postgres"]["ok"], true);
    }

    #[tokio::test(start_paused = true)]
    async fn a_check_that_hangs_counts_as_failed() {
        let list = checks(vec![good("postgres"), check_fn("temporal", std::future::pending::<Result<(), String>>)]);
        let (status, body) = get_page(router(list, Drain::new()), "/ready").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(body.contains("no answer within 2 s"), "{body}");
    }

    #[tokio::test]
    async fn a_draining_process_is_healthy_and_not_ready() {
        let drain = Drain::new();
        let pages = router(checks(vec![good("postgres")]), drain.clone());
        assert_eq!(get_page(pages.clone(), "/ready").await.0, StatusCode::OK);
        drain.begin("test");
        let (status, body) = get_page(pages.clone(), "/ready").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(body.contains("\"missing\":[\"drain\"]"), "{body}");
        assert_eq!(get_page(pages.clone(), "/health").await.0, StatusCode::OK);
        assert_eq!(get_page(pages, "/metrics").await.0, StatusCode::OK);
    }
}
