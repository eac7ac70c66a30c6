//! What comes from outside decides nothing: hostile trace contexts, collectors that are no help, tools by the thousand.

use std::time::Duration;

use anyhow::{Context as _, Result};
use reliant_harness::{DaemonOptions, Person, Rig, RigOptions, eventually};
use reliant_observe::tree;
use reliant_rpc::message_service_client::MessageServiceClient;
use reliant_types::pb;
use serde_json::json;
use tokio::{io::AsyncWriteExt, net::TcpListener};

use super::{named, succeeded, traced, well_formed};
use crate::{
    mcp,
    scripts::{MODEL, PATIENCE, script, server_of_tools, session},
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// Sends a message as a foreign client, with these headers, and waits for the turn's end.
async fn send_with(ada: &Person, headers: &[(&'static str, &str)]) -> Result<pb::Turn> {
    let mut chat = session(ada, "sim/text?tokens=5", pb::ChatMode::Auto).await?;
    let mut request = tonic::Request::new(pb::SendMessageRequest {
        chat_id: chat.chat().to_string(),
        client_message_id: "one".into(),
        text: "hello".into(),
    });
    assert!(reliant_rpc::authorize(&mut request, &ada.token));
    for (name, value) in headers {
        request.metadata_mut().insert(*name, value.parse().context("a header")?);
    }
    let sent = MessageServiceClient::new(ada.client.channel()).send_message(request).await?.into_inner();
    let turn = sent.turn.context("no turn")?.id.parse()?;
    Ok(chat.wait_turn(turn, PATIENCE).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_trace_context_is_continued_and_does_not_decide() -> Result<()> {
    let (rig, sink) = traced(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    // Its flag says: not sampled. We sample all.
    let turn = send_with(&ada, &[("traceparent", &format!("00-{TRACE}-00f067aa0ba902b7-00"))]).await?;
    assert_eq!(turn.trace_id, TRACE);
    let spans = well_formed(sink, "foreign", TRACE).await?;
    // The client sends its span to nobody here; nothing else may be missing.
    assert!(
        tree::orphans(&spans).iter().all(|orphan| orphan.parent_id == "00f067aa0ba902b7"),
        "{}",
        tree::text(&spans)
    );
    assert!(!named(&spans, "turn.round").is_empty(), "{}", tree::text(&spans));

    let long = "a=1,".repeat(500);
    for bad in [
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "ff-4bf92f3577b34da6a3ce929d0e0e4737-00f067aa0ba902b7-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4737-00f067aa0ba902b7-01",
        "'; DROP TABLE turns; --",
    ] {
        let turn = send_with(&ada, &[("traceparent", bad), ("tracestate", &long)]).await?;
        let spans = well_formed(sink, bad, &turn.trace_id).await?;
        let roots: Vec<_> = spans.iter().filter(|span| span.parent_id.is_empty()).collect();
        assert_eq!((roots.len(), roots[0].name.as_str()), (1, "rpc.edge"), "{bad}\n{}", tree::text(&spans));
        assert!(tree::orphans(&spans).is_empty(), "{bad}\n{}", tree::text(&spans));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sampled_flag_from_outside_makes_nobody_export() -> Result<()> {
    let sink = reliant_harness::sink()?;
    let env = vec![
        ("RELIANT_TELEMETRY__OTLP_ENDPOINT".to_owned(), sink.url().to_owned()),
        ("RELIANT_TELEMETRY__SAMPLE_RATIO".to_owned(), "0".to_owned()),
    ];
    let rig = Rig::start(RigOptions { env, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let forced = "5bf92f3577b34da6a3ce929d0e0e4736";
    let turn = send_with(&ada, &[("traceparent", &format!("00-{forced}-00f067aa0ba902b7-01"))]).await?;
    assert_eq!((turn.status(), turn.trace_id.as_str()), (pb::TurnStatus::Succeeded, forced));
    // A clean stop sends whatever there is.
    let mut rig = rig;
    rig.mesh.stop(Duration::from_secs(10)).await;
    assert!(sink.store().spans(forced).is_empty(), "{}", tree::text(&sink.store().spans(forced)));
    Ok(())
}

pub async fn metrics(rig: &Rig) -> Result<String> {
    let mut all = String::new();
    for role in rig.mesh.apis.iter().chain(&rig.mesh.workers).chain(&rig.mesh.gateways) {
        let admin = role.addresses().admin.context("a role has an admin listener")?;
        all.push_str(&reliant_devstack::http_get(admin, "/metrics").await?.1);
    }
    Ok(all)
}

fn lost(metrics: &str) -> f64 {
    let values = metrics.lines().filter_map(|line| line.strip_prefix("reliant_otlp_lost_total{signal=\"traces\"} "));
    values.filter_map(|value| value.parse::<f64>().ok()).sum()
}

/// The mesh works on, and what is lost is counted.
async fn works_with(collector: String, what: &str) -> Result<()> {
    let env = vec![("RELIANT_TELEMETRY__OTLP_ENDPOINT".to_owned(), collector)];
    let rig = Rig::start(RigOptions { env, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let mut chat = session(&ada, "sim/text?tokens=20", pb::ChatMode::Auto).await?;
    for _ in 0..5 {
        let report = chat.send_and_wait("hello", PATIENCE).await?;
        succeeded(what, &report);
    }
    eventually(&format!("counted losses with {what}"), PATIENCE, || async {
        Ok((lost(&metrics(&rig).await?) > 0.0).then_some(()))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_slow_or_broken_costs_counted_spans_and_nothing_else() -> Result<()> {
    let away = reliant_devstack::free_port(0)?;
    works_with(format!("http://127.0.0.1:{away}"), "a collector that is away").await?;

    let hangs = TcpListener::bind("127.0.0.1:0").await?;
    let address = hangs.local_addr()?;
    let task = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = hangs.accept().await {
            held.push(stream);
        }
    });
    works_with(format!("http://{address}"), "a collector that never answers").await?;
    task.abort();

    let broken = TcpListener::bind("127.0.0.1:0").await?;
    let address = broken.local_addr()?;
    let task = tokio::spawn(async move {
        while let Ok((mut stream, _)) = broken.accept().await {
            let _ = stream.write_all(b"HTTP/1.1 500 no\r\ncontent-length: 0\r\n\r\n").await;
        }
    });
    works_with(format!("http://{address}"), "a collector that answers errors").await?;
    task.abort();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_tools_make_no_label_and_no_id_is_one() -> Result<()> {
    let (rig, sink) = traced(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let server = rig.dir().join("many.py");
    std::fs::write(&server, server_of_tools(10_000, "tool_%d"))?;
    let servers = json!({ "mcpServers": { "many": { "command": "python3", "args": [server] } } });
    let files = vec![(".mcp.json", servers.to_string())];
    let daemon = rig.daemon(&ada, "laptop", DaemonOptions { files, trust_mcp: true, ..Default::default() }).await?;
    let offered = mcp::offered(&ada, "mcp__many__").await?;
    assert!(offered.len() <= reliant_types::limits::DAEMON_TOOLS_MAX, "{}", offered.len());
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let calls = json!([{ "name": offered[0], "args": {} }, { "name": "tool_8999", "args": {} }]);
    let report = chat.send_and_wait(&script(json!([{ "tools": calls }, { "text": "done" }])), PATIENCE).await?;
    succeeded("one of many tools", &report);
    let before = metrics(&rig).await?.lines().count();

    let calls: Vec<_> = offered.iter().take(60).map(|name| json!({ "name": name, "args": {} })).collect();
    let unknown: Vec<_> = (9000..9030).map(|n| json!({ "name": format!("tool_{n}"), "args": {} })).collect();
    let rounds = json!([{ "tools": calls }, { "tools": unknown }, { "text": "done" }]);
    let report = chat.send_and_wait(&script(rounds), PATIENCE).await?;
    succeeded("many tools", &report);
    assert_eq!(report.tool_calls.len(), 90);

    let scraped = metrics(&rig).await?;
    let series = scraped.lines().filter(|line| !line.starts_with('#'));
    for line in series {
        let labels =
            line.split_once('{').map_or("", |(_, rest)| rest.rsplit_once('}').map_or("", |(labels, _)| labels));
        let numbered = |rest: &str| rest.starts_with(|next: char| next.is_ascii_digit());
        assert!(!labels.split("tool_").skip(1).any(numbered), "a tool's name is a label: {line}");
        for id in [&ada.user.to_string(), &chat.chat().to_string(), &daemon.id, &report.turn.id, &report.turn.trace_id]
        {
            assert!(!labels.contains(id.as_str()), "an id is a label: {line}");
        }
    }
    // Series are born with the first use of a label's value, not with each call.
    let after = scraped.lines().count();
    assert!(after < before + 150, "{before} lines of metrics became {after}");
    assert!(!sink.store().spans(&report.turn.trace_id).is_empty());
    // Whoever scrapes often is served, and the mesh works on.
    for _ in 0..50 {
        assert!(metrics(&rig).await?.contains("reliant_turn_phase_seconds"));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let report = chat.send_and_wait(&script(json!([{ "text": "done" }])), PATIENCE).await?;
    succeeded("scraped", &report);
    Ok(())
}
