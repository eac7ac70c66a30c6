//! What comes from outside decides nothing: hostile trace contexts, collectors that are no help, tools by the thousand.

use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
    trace_service_server::{TraceService, TraceServiceServer},
};
use reliant_devstack::{RoleProcess, resident_kib};
use reliant_harness::{DaemonOptions, Person, Rig, RigOptions, eventually};
use reliant_observe::tree;
use reliant_rpc::message_service_client::MessageServiceClient;
use reliant_types::pb;
use serde_json::json;
use tokio::{io::AsyncWriteExt, net::TcpListener, sync::oneshot};
use tokio_stream::wrappers::TcpListenerStream;

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

fn roles(rig: &Rig) -> impl Iterator<Item = &RoleProcess> {
    rig.mesh.apis.iter().chain(&rig.mesh.workers).chain(&rig.mesh.gateways)
}

pub async fn metrics(rig: &Rig) -> Result<String> {
    scrape(&admins(rig)?).await
}

fn admins(rig: &Rig) -> Result<Vec<SocketAddr>> {
    roles(rig).map(|role| role.addresses().admin.context("a role has an admin listener")).collect()
}

async fn scrape(admins: &[SocketAddr]) -> Result<String> {
    let mut all = String::new();
    for admin in admins {
        all.push_str(&reliant_devstack::http_get(*admin, "/metrics").await?.1);
    }
    Ok(all)
}

/// Resident memory of each role, to be compared with what it has later.
struct Memory(Vec<(String, u32, u64)>);

impl Memory {
    /// More than what twenty turns could need once the first ones have warmed everything up.
    const GROWTH_MAX_KIB: u64 = 32 * 1024;

    fn of(rig: &Rig) -> Self {
        Self(roles(rig).map(|role| (role.name().to_owned(), role.pid(), resident_kib(role.pid()))).collect())
    }

    fn has_not_grown(&self, what: &str) -> Result<()> {
        let grown = self.0.iter().map(|(name, pid, before)| (name, resident_kib(*pid), before));
        let grown: Vec<_> = grown.map(|(name, now, before)| (name, now.saturating_sub(*before), now)).collect();
        eprintln!("{what}: roles grew by these KiB, to these: {grown:?}");
        ensure!(grown.iter().all(|(_, grown, now)| *grown < Self::GROWTH_MAX_KIB && *now > 0), "{what}: {grown:?}");
        Ok(())
    }
}

fn lost(metrics: &str) -> f64 {
    let values = metrics.lines().filter_map(|line| line.strip_prefix("reliant_otlp_lost_total{signal=\"traces\"} "));
    values.filter_map(|value| value.parse::<f64>().ok()).sum()
}

const TURNS: usize = 20;

/// The mesh works on, and holds no more and more of what nobody takes. Also the traces of its turns.
async fn works_with(collector: String, what: &str) -> Result<(Rig, HashSet<String>)> {
    let env = vec![
        ("RELIANT_TELEMETRY__OTLP_ENDPOINT".to_owned(), collector),
        ("RELIANT_TELEMETRY__SAMPLE_RATIO".to_owned(), "1.0".to_owned()),
    ];
    let rig = Rig::start(RigOptions { env, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let mut chat = session(&ada, "sim/text?tokens=20", pb::ChatMode::Auto).await?;
    succeeded(what, &chat.send_and_wait("hello", PATIENCE).await?);
    let memory = Memory::of(&rig);
    let mut traces = HashSet::new();
    for _ in 0..TURNS {
        let report = chat.send_and_wait("hello", PATIENCE).await?;
        succeeded(what, &report);
        traces.insert(report.turn.trace_id);
    }
    memory.has_not_grown(what)?;
    Ok((rig, traces))
}

/// And what is lost is counted.
async fn loses_with(collector: String, what: &str) -> Result<()> {
    let (rig, _) = works_with(collector, what).await?;
    eventually(&format!("counted losses with {what}"), PATIENCE, || async {
        Ok((lost(&metrics(&rig).await?) > 0.0).then_some(()))
    })
    .await
}

/// Takes all, but each batch only after most of the time that an exporter waits.
#[derive(Clone, Default)]
struct Slow(Arc<Mutex<HashSet<String>>>);

const SLOWNESS: Duration = Duration::from_secs(4);

#[tonic::async_trait]
impl TraceService for Slow {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        tokio::time::sleep(SLOWNESS).await;
        let resources = request.into_inner().resource_spans.into_iter();
        let spans = resources.flat_map(|resource| resource.scope_spans).flat_map(|scope| scope.spans);
        let traces = spans.map(|span| span.trace_id.iter().map(|byte| format!("{byte:02x}")).collect());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(traces);
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_slow_or_broken_costs_counted_spans_and_nothing_else() -> Result<()> {
    let away = reliant_devstack::free_port(0)?;
    loses_with(format!("http://127.0.0.1:{away}"), "a collector that is away").await?;

    let hangs = TcpListener::bind("127.0.0.1:0").await?;
    let address = hangs.local_addr()?;
    let task = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = hangs.accept().await {
            held.push(stream);
        }
    });
    loses_with(format!("http://{address}"), "a collector that never answers").await?;
    task.abort();

    let broken = TcpListener::bind("127.0.0.1:0").await?;
    let address = broken.local_addr()?;
    let task = tokio::spawn(async move {
        while let Ok((mut stream, _)) = broken.accept().await {
            let _ = stream.write_all(b"HTTP/1.1 500 no\r\ncontent-length: 0\r\n\r\n").await;
        }
    });
    loses_with(format!("http://{address}"), "a collector that answers errors").await?;
    task.abort();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_answers_late_gets_all_and_nobody_waits_for_it() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let slow = Slow::default();
    let server = tonic::transport::Server::builder()
        .add_service(TraceServiceServer::new(slow.clone()))
        .serve_with_incoming(TcpListenerStream::new(listener));
    let task = tokio::spawn(server);
    let (rig, traces) = works_with(format!("http://{address}"), "a collector that answers late").await?;
    // An answer that a busy machine delays past the exporter's patience is a loss, and counted.
    eventually("all traces at a slow collector", PATIENCE, || async {
        let has_all = slow.0.lock().unwrap_or_else(PoisonError::into_inner).is_superset(&traces);
        Ok((has_all || lost(&metrics(&rig).await?) > 0.0).then_some(()))
    })
    .await?;
    ensure!(!slow.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty(), "it got nothing");
    task.abort();
    Ok(())
}

/// Asks every role for its metrics ten times a second until it is told to stop; how often it was answered.
fn scraping(admins: Vec<SocketAddr>, mut stop: oneshot::Receiver<()>) -> tokio::task::JoinHandle<Result<usize>> {
    tokio::spawn(async move {
        let mut pace = tokio::time::interval(Duration::from_millis(100));
        let mut answers = 0;
        loop {
            tokio::select! {
                _ = &mut stop => return Ok(answers),
                _ = pace.tick() => {}
            }
            let text = scrape(&admins).await?;
            ensure!(text.contains("reliant_turn_phase_seconds"), "scraped: {text}");
            answers += 1;
        }
    })
}

/// Distinct names of tools that run.
const CALLED: usize = 400;

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_tools_make_no_label_and_no_id_is_one() -> Result<()> {
    let (rig, sink) = traced(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let server = rig.dir().join("many.py");
    std::fs::write(&server, server_of_tools(10_000, "tool_%d"))?;
    // Of each server's ten thousand, the daemon offers 128: four of them make hundreds of names.
    let start = json!({ "command": "python3", "args": [server] });
    let servers = json!({ "mcpServers": { "many_a": start, "many_b": start, "many_c": start, "many_d": start } });
    let files = vec![(".mcp.json", servers.to_string())];
    let daemon = rig.daemon(&ada, "laptop", DaemonOptions { files, trust_mcp: true, ..Default::default() }).await?;
    let offered = eventually("hundreds of tools on offer", PATIENCE, || async {
        Ok(Some(mcp::offered(&ada, "mcp__many_").await?).filter(|offered| offered.len() >= CALLED))
    })
    .await?;
    assert!(offered.len() <= reliant_types::limits::DAEMON_TOOLS_MAX, "{}", offered.len());
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let calls = json!([{ "name": offered[0], "args": {} }, { "name": "tool_8999", "args": {} }]);
    let report = chat.send_and_wait(&script(json!([{ "tools": calls }, { "text": "done" }])), PATIENCE).await?;
    succeeded("one of many tools", &report);
    let before = metrics(&rig).await?.lines().count();

    // Hundreds of names, as many at once as a message may call.
    let called: Vec<_> = offered.iter().take(CALLED).map(|name| json!({ "name": name, "args": {} })).collect();
    let unknown = (9000..9030).map(|n| json!({ "name": format!("tool_{n}"), "args": {} })).collect::<Vec<_>>();
    let mut rounds: Vec<_> = called.chunks(CALLED / 4).map(|calls| json!({ "tools": calls })).collect();
    rounds.extend([json!({ "tools": unknown }), json!({ "text": "done" })]);
    let report = chat.send_and_wait(&script(json!(rounds)), PATIENCE).await?;
    succeeded("many tools", &report);
    let ran = report.tool_calls.iter().filter(|call| call.status() == pb::ToolCallStatus::Succeeded).count();
    assert_eq!((report.tool_calls.len(), ran), (CALLED + 30, CALLED));

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
    // Series are born with the first use of a label's value, not with each call: some are new after any work, and a name's
    // would be as many as the names.
    let after = scraped.lines().count();
    assert!(after < before + CALLED, "{before} lines of metrics became {after}");
    assert!(!sink.store().spans(&report.turn.trace_id).is_empty());

    // Whoever scrapes often is served while the mesh works on, and neither costs the roles memory.
    let memory = Memory::of(&rig);
    let (stop, stopped) = oneshot::channel();
    let scraping = scraping(admins(&rig)?, stopped);
    for name in offered.iter().take(TURNS) {
        let calls = json!([{ "name": name, "args": {} }]);
        let report = chat.send_and_wait(&script(json!([{ "tools": calls }, { "text": "done" }])), PATIENCE).await?;
        succeeded("scraped", &report);
    }
    let _ = stop.send(());
    let answers = scraping.await??;
    assert!(answers >= TURNS / 2, "{TURNS} turns were scraped only {answers} times");
    memory.has_not_grown("scraped ten times a second")
}
