//! The HTTP surface: both wire formats, the list of models, and what the server did.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, State},
    http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header},
    response::IntoResponse,
    routing::{get, post},
};
use reliant_telemetry::trace::TraceContext;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tracing::Span;

use crate::{
    Stats,
    answer::Answer,
    anthropic::{self, AnthropicWriter},
    ask::{Ask, Refusal},
    fault::{FaultKind, Faults},
    openai::{self, OpenAiWriter},
    script,
    stream::{self, Writer},
};

const BODY_MAX_BYTES: usize = 64 * 1024 * 1024;
/// A head that stalls comes some time.
const STALL_HEAD: Duration = Duration::from_secs(3600);

#[derive(Clone)]
struct Server {
    faults: Arc<Faults>,
    stats: Arc<Stats>,
}

#[derive(Clone, Copy, PartialEq)]
enum Format {
    OpenAi,
    Anthropic,
}

pub fn router(stats: Arc<Stats>) -> Router {
    let server = Server { faults: Arc::default(), stats };
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/messages", post(messages))
        .route("/v1/models", get(models))
        .route("/health", get(|| async { "ok" }))
        .route("/stats", get(stats_json))
        .layer(DefaultBodyLimit::max(BODY_MAX_BYTES))
        .with_state(server)
}

async fn chat(State(server): State<Server>, headers: HeaderMap, body: Bytes) -> Response<Body> {
    server.respond(Format::OpenAi, &headers, &body).await
}

async fn messages(State(server): State<Server>, headers: HeaderMap, body: Bytes) -> Response<Body> {
    server.respond(Format::Anthropic, &headers, &body).await
}

async fn models() -> Json<Value> {
    let data: Vec<Value> = script::SCRIPTS
        .iter()
        .map(|name| json!({ "id": name, "object": "model", "type": "model", "display_name": name, "created": 0, "owned_by": "sim" }))
        .collect();
    Json(json!({ "object": "list", "data": data, "has_more": false }))
}

async fn stats_json(State(server): State<Server>) -> Json<Value> {
    let stats = &server.stats;
    Json(json!({ "requests": stats.requests(), "refused": stats.refused(), "open_streams": stats.open_streams() }))
}

impl Server {
    async fn respond(&self, format: Format, headers: &HeaderMap, body: &[u8]) -> Response<Body> {
        let begun = Instant::now();
        self.stats.requests.fetch_add(1, Ordering::Relaxed);
        let parsed = match format {
            Format::OpenAi => openai::parse(body),
            Format::Anthropic if !headers.contains_key("anthropic-version") => {
                Err(Refusal::invalid("anthropic-version: header is required"))
            }
            Format::Anthropic => anthropic::parse(body),
        };
        let answered = parsed.and_then(|ask| script::answer(&ask, &self.faults).map(|answer| (ask, answer)));
        let (ask, answer) = match answered {
            Ok(answered) => answered,
            Err(refusal) => {
                self.stats.refused.fetch_add(1, Ordering::Relaxed);
                tracing::info!(status = refusal.status, reason = refusal.message, "refused");
                return refuse(format, &refusal);
            }
        };
        match answer.fault.as_ref().map(|fault| (fault, fault.kind)) {
            Some((fault, FaultKind::Status(status))) => return refuse(format, &fault.refusal(status)),
            Some((_, FaultKind::Html)) => {
                let page = "<!doctype html><html><body>Please sign in to the network.</body></html>";
                return ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], page).into_response();
            }
            Some((_, FaultKind::StallHead)) => sleep(STALL_HEAD).await,
            _ => {}
        }
        let span = span(headers, &ask);
        let id = ask.hash();
        if ask.stream {
            let writer: Box<dyn Writer> = match format {
                Format::OpenAi => Box::new(OpenAiWriter::new(&ask, id)),
                Format::Anthropic => Box::new(AnthropicWriter::new(&ask, id)),
            };
            let usage = answer.usage(ask.bytes);
            let body = stream::body(writer, answer, usage, begun, self.stats.clone(), span);
            let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
            return (headers, Body::from_stream(body)).into_response();
        }
        self.whole(format, &ask, id, &answer, begun).await
    }

    async fn whole(&self, format: Format, ask: &Ask, id: u64, answer: &Answer, begun: Instant) -> Response<Body> {
        let usage = answer.usage(ask.bytes);
        tokio::time::sleep_until(begun + answer.pace.due(usage.output)).await;
        let body = match format {
            Format::OpenAi => openai::whole(ask, id, &answer.blocks, answer.stop(), usage),
            Format::Anthropic => anthropic::whole(ask, id, &answer.blocks, answer.stop(), usage),
        };
        Json(body).into_response()
    }
}

fn refuse(format: Format, refusal: &Refusal) -> Response<Body> {
    let body = match format {
        Format::OpenAi => openai::error(refusal.kind, &refusal.message),
        Format::Anthropic => anthropic::error(refusal.kind, &refusal.message),
    };
    let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = (status, Json(body)).into_response();
    if let Some(seconds) = refusal.retry_after {
        let headers = response.headers_mut();
        // As OpenAI does: whole seconds for everybody, milliseconds for those who look.
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(0.0).ceil() as u64));
        let millis = HeaderName::from_static("retry-after-ms");
        headers.insert(millis, HeaderValue::from((seconds.max(0.0) * 1000.0) as u64));
    }
    response
}

/// Joins the caller's trace, if it sent one.
fn span(headers: &HeaderMap, ask: &Ask) -> Span {
    let context = TraceContext::from_http(headers);
    if context.is_empty() {
        return Span::none();
    }
    let script = ask.model.split('?').next().unwrap_or_default();
    let span = tracing::info_span!("model_sim.answer", otel.kind = "server", gen_ai.request.model = script);
    context.set_parent(&span);
    span
}
