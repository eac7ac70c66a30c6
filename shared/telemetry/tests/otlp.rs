//! Spans and logs reach a collector; what it refuses is counted and harms nobody. A process of its own, as telemetry
//! starts once.

use axum::{Router, body::Body, extract::State, http::Request, response::Response};
use reliant_telemetry::{TelemetryConfig, TraceContext};
use std::sync::{Arc, Mutex};
use tokio_stream::wrappers::TcpListenerStream;

type Seen = Arc<Mutex<Vec<(String, Vec<u8>)>>>;

/// Takes every export, and then answers without a message, which is a failed export.
async fn collector(seen: Seen) -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("bound");
    let routes = Router::new().fallback(answer).with_state(seen);
    let server = tonic::transport::Server::builder().add_routes(tonic::service::Routes::from(routes));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    addr
}

async fn answer(State(seen): State<Seen>, request: Request<Body>) -> Response {
    let path = request.uri().path().to_owned();
    let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap_or_default();
    seen.lock().expect("no panic").push((path, body.to_vec()));
    Response::builder()
        .header("content-type", "application/grpc")
        .header("grpc-status", "0")
        .body(Body::empty())
        .expect("a response")
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_and_logs_are_exported() {
    let seen = Seen::default();
    let addr = collector(seen.clone()).await;
    let config = TelemetryConfig {
        otlp_endpoint: Some(format!("http://{addr}")),
        service_name: "test-service".into(),
        ..Default::default()
    };
    let guard = reliant_telemetry::init(&config).expect("it starts");
    let span = tracing::info_span!(target: "reliant_test", "turn.accept", chat.id = "chat-1");
    let context = TraceContext::of(&span);
    assert!(context.is_sampled());
    span.in_scope(|| tracing::warn!(target: "reliant_test", "a line for the collector"));
    drop(span);
    tokio::task::spawn_blocking(|| guard.shutdown()).await.expect("no panic");

    let seen = seen.lock().expect("no panic");
    let bytes = |path: &str| -> Vec<u8> {
        seen.iter().filter(|(seen, _)| seen.contains(path)).flat_map(|(_, body)| body.clone()).collect()
    };
    let has = |bytes: &[u8], text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    let (traces, logs) = (bytes("TraceService"), bytes("LogsService"));
    for text in ["turn.accept", "chat.id", "chat-1", "test-service", "service.instance.id"] {
        assert!(has(&traces, text), "the trace export lacks {text}");
    }
    assert!(has(&logs, "a line for the collector"));
    assert!(reliant_telemetry::metrics::OTLP_LOST.with_label_values(&["traces"]).get() > 0);
    let trace_id = u128::from_str_radix(&context.trace_id().expect("sampled"), 16).expect("hex").to_be_bytes();
    for export in [&traces, &logs] {
        assert!(export.windows(16).any(|window| window == trace_id), "the trace id is in both");
    }
}
