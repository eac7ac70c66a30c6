//! What our own exporter sends arrives whole and is shown; only to who asks this machine by its own name.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::net::SocketAddr;

use reliant_observe::{Observe, ObserveConfig, tree};
use reliant_telemetry::{TelemetryConfig, TraceContext, hop_span};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn get(addr: SocketAddr, host: &str, path: &str) -> (u16, String) {
    let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_and_logs_arrive_and_are_shown() {
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let observe = Observe::start(ObserveConfig { listen, ..ObserveConfig::default() }).await.unwrap();
    let telemetry = TelemetryConfig {
        otlp_endpoint: Some(observe.url()),
        service_name: "reliant-test".into(),
        ..TelemetryConfig::default()
    };
    let guard = reliant_telemetry::init(&telemetry).unwrap();
    let root = tracing::info_span!(target: "reliant_test", "turn.round", chat.id = "c-1", turn.iteration = 3);
    let trace = TraceContext::of(&root).trace_id().unwrap();
    root.in_scope(|| {
        tracing::info_span!(target: "reliant_test", "chat", otel.kind = "client").in_scope(|| {
            tracing::warn!(target: "reliant_test", "<b>a line</b>");
        });
        let _ = hop_span(tracing::info_span!(target: "reliant_test", "tool.dispatch", otel.kind = "producer"));
    });
    drop(root);
    tokio::task::spawn_blocking(|| guard.shutdown()).await.unwrap();

    let spans = observe.store().spans(&trace);
    assert_eq!(spans.len(), 3, "{spans:?}");
    assert!(tree::orphans(&spans).is_empty());
    let round = spans.iter().find(|span| span.name == "turn.round").unwrap();
    assert_eq!((round.service.as_str(), round.text("chat.id")), ("reliant-test", "c-1"));
    assert_eq!(round.attributes["turn.iteration"], 3);
    assert_eq!(observe.store().logs(&trace)[0].message, "<b>a line</b>");

    let own = observe.addr().to_string();
    let (status, page) = get(observe.addr(), &own, "/").await;
    assert!(status == 200 && page.contains("content-security-policy") && !page.contains("://"), "{page}");
    let (status, shown) = get(observe.addr(), &own, &format!("/api/traces/{}", &trace[..12])).await;
    assert!(status == 200 && shown.contains("tool.dispatch") && shown.contains("\"critical\""), "{shown}");
    let (status, printed) = get(observe.addr(), &own, &format!("/api/traces/{trace}/text")).await;
    assert!(status == 200 && printed.contains("3 spans in ") && !printed.contains("\"spans\""), "{printed}");
    for nowhere in ["/api/traces/ffff", "/api/traces/ffff/text"] {
        assert_eq!(get(observe.addr(), &own, nowhere).await.0, 404);
    }
    let (status, list) = get(observe.addr(), &own, "/api/traces?search=c-1&all=true").await;
    assert!(status == 200 && list.contains(&trace), "{list}");
    // A page of another site that points its name at this machine.
    assert_eq!(get(observe.addr(), "evil.example.com", "/api/traces").await.0, 403);
}

#[tokio::test]
async fn it_is_not_for_other_machines() {
    let listen = SocketAddr::from(([0, 0, 0, 0], 0));
    let refused = Observe::start(ObserveConfig { listen, ..ObserveConfig::default() }).await;
    assert!(refused.is_err_and(|error| error.to_string().contains("127.0.0.1")));
}
