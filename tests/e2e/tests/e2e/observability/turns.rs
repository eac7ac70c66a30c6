//! Turns on a healthy mesh: every hop, in order, and where the time went.

use std::time::Duration;

use anyhow::Result;
use reliant_client::{Approvals, TurnReport};
use reliant_harness::{DaemonOptions, RigOptions};
use reliant_observe::{Span, tree};
use reliant_telemetry::{
    metrics::Phase,
    names::{attr, span},
};
use reliant_types::pb;
use serde_json::json;

use super::{Hop, checked, named, succeeded, traced, way};
use crate::{
    mcp,
    scripts::{MODEL, PATIENCE, one_call, script, session},
};

const SEND: &str = "reliant.v1.MessageService/SendMessage";
const UPDATE: &str = "process reliant.v1.update.{user}.{chat}";
const ASK: Hop = ("client.send_message", "internal", "client");
const CALL: Hop = (SEND, "client", "client");
const ACCEPT: Hop = ("turn.accept", "internal", "api");
const WAKE: Hop = ("turn.wake", "producer", "api");
const CLAIM: Hop = ("turn.claim", "internal", "worker");
const ROUND: Hop = ("turn.round", "internal", "worker");
const DISPATCH: Hop = ("tool.dispatch", "producer", "worker");
const TO_DAEMON: Hop = ("tunnel.send", "producer", "gateway");
const AT_DAEMON: Hop = ("tunnel.receive", "consumer", "daemon");
const RESULT: Hop = ("tool.result", "producer", "daemon");
const FROM_DAEMON: Hop = ("tunnel.receive", "consumer", "gateway");
const TO_WORKER: Hop = ("request reliant.v1.result.{daemon}.{call}", "producer", "gateway");
const COMMIT: Hop = ("process reliant.v1.result.{daemon}.{call}", "consumer", "worker");

/// What every turn has: there, to the model, and back to the viewer.
#[track_caller]
fn common(spans: &[Span]) {
    way(spans, &[ASK, CALL, (SEND, "server", "api")]);
    way(spans, &[ASK, CALL, ACCEPT, WAKE, ("turn.next_step", "internal", "worker")]);
    way(spans, &[WAKE, (span::TEMPORAL_WAKE, "client", "api")]);
    way(spans, &[WAKE, ("turn.burst", "internal", "worker")]);
    way(spans, &[ACCEPT, WAKE, CLAIM, ROUND, ("chat default", "client", "worker")]);
    way(spans, &[CLAIM, ("model.send", "producer", "worker"), ("model_sim.answer", "server", "model-sim")]);
    let publish = ("publish reliant.v1.update.{user}.{chat}", "producer", "worker");
    way(spans, &[CLAIM, publish, (UPDATE, "consumer", "api"), ("update.fanout", "internal", "api")]);
    way(spans, &[ROUND, ("db commit_message", "client", "worker")]);
}

/// What every call has: to the process, and back.
#[track_caller]
fn tool(spans: &[Span], execute: &str) {
    way(spans, &[DISPATCH, TO_DAEMON, AT_DAEMON, (execute, "internal", "daemon")]);
    way(spans, &[AT_DAEMON, ("tool.send", "producer", "daemon")]);
    way(spans, &[AT_DAEMON, RESULT, FROM_DAEMON, TO_WORKER, COMMIT, ("db commit_result", "client", "worker")]);
}

/// The phases make the turn: from the call's arrival at the api until its end was given to the viewer, within 5%.
#[track_caller]
fn phases_add_up(what: &str, spans: &[Span], report: &TurnReport) -> Vec<(&'static str, f64)> {
    let phases = tree::phases(spans);
    let sum: f64 = phases.iter().map(|(_, seconds)| seconds).sum();
    let arrived = way(spans, &[CALL, (SEND, "server", "api")]).start_ns;
    let is_end = |span: &&Span| span.attributes.contains_key(attr::phase(Phase::Fanout));
    let given = spans.iter().find(is_end).map_or(arrived, |span| span.end_ns);
    let turn = given.saturating_sub(arrived) as f64 / 1e9;
    let off = (sum - turn).abs() / turn;
    let seen = (report.ended_at - report.sent_at).as_secs_f64();
    eprintln!("{what}: the phases make {sum:.4} s of {turn:.4} s; the client waited {seen:.4} s");
    assert!(off < 0.05, "{what}: the phases make {sum:.4} s of {turn:.4} s\n{}", tree::text(spans));
    phases
}

fn phase(phases: &[(&'static str, f64)], name: &str) -> f64 {
    phases.iter().find(|(of, _)| *of == name).map_or(0.0, |(_, seconds)| *seconds)
}

fn shell(command: &str) -> String {
    one_call("shell", json!({ "command": command }))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_turn_is_one_trace_from_the_click_to_the_process_and_back() -> Result<()> {
    let (rig, sink) = traced(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let files = mcp::time_server()?;
    let options = DaemonOptions { files, trust_mcp: true, ..Default::default() };
    let _daemon = rig.daemon(&ada, "laptop", options).await?;
    mcp::offered(&ada, "mcp__time__").await?;

    let mut chat = session(&ada, "sim/text?tokens=80&rate=100&ttft_ms=300", pb::ChatMode::Auto).await?;
    let report = chat.send_and_wait("hello", PATIENCE).await?;
    succeeded("plain", &report);
    let spans = checked(sink, "plain", &report.turn).await?;
    // A model that no list knows has no name of its own: names are few.
    way(&spans, &[ASK, CALL, ACCEPT, WAKE, CLAIM, ROUND, ("chat other", "client", "worker")]);
    assert!(report.deltas > 10, "{}", report.deltas);
    assert!(spans.len() < 45, "deltas make no spans of their own: {}\n{}", spans.len(), tree::text(&spans));
    let phases = phases_add_up("plain", &spans, &report);
    assert!(phase(&phases, "model_first_token") >= 0.3 && phase(&phases, "model_stream") >= 0.7, "{phases:?}");

    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let report = chat.send_and_wait(&shell("echo context=$TRACEPARENT; sleep 0.6"), PATIENCE).await?;
    succeeded("shell", &report);
    let spans = checked(sink, "shell", &report.turn).await?;
    common(&spans);
    tool(&spans, "execute_tool shell");
    let process = way(&spans, &[("execute_tool shell", "internal", "daemon"), ("process.run", "internal", "daemon")]);
    assert_eq!(process.attributes.get(attr::PROCESS_EXIT_CODE), Some(&json!(0)), "{process:?}");
    assert!(!process.error);
    let told = &named(&spans, "tool.send")[0].span_id;
    let given = format!("context=00-{}-{told}-01", report.turn.trace_id);
    assert!(report.tool_calls[0].result.contains(&given), "{given}: {}", report.tool_calls[0].result);
    let phases = phases_add_up("shell", &spans, &report);
    assert!((0.6..0.9).contains(&phase(&phases, "tool_run")), "{phases:?}");

    // What fails is seen where it failed.
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let report = chat.send_and_wait(&shell("exit 3"), PATIENCE).await?;
    succeeded("exit 3", &report);
    let spans = checked(sink, "exit 3", &report.turn).await?;
    let process = named(&spans, "process.run")[0];
    assert_eq!(process.attributes.get(attr::PROCESS_EXIT_CODE), Some(&json!(3)), "{process:?}");
    assert!(process.error && named(&spans, "execute_tool")[0].error, "{}", tree::text(&spans));
    assert!(spans.iter().filter(|span| span.error).count() == 2, "{}", tree::text(&spans));

    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let time = one_call("mcp__time__get_current_time", json!({ "timezone": "UTC" }));
    let report = chat.send_and_wait(&time, PATIENCE).await?;
    succeeded("mcp", &report);
    let spans = checked(sink, "mcp", &report.turn).await?;
    common(&spans);
    tool(&spans, "execute_tool mcp__time__get_current_time");

    // Calls that may change something run one behind the other, and count together.
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let calls: Vec<_> = [0.2, 1.0, 0.5]
        .map(|seconds| json!({ "name": "shell", "args": { "command": format!("sleep {seconds}") } }))
        .into();
    let report = chat.send_and_wait(&script(json!([{ "tools": calls }, { "text": "done" }])), PATIENCE).await?;
    succeeded("three calls", &report);
    let spans = checked(sink, "three calls", &report.turn).await?;
    assert_eq!(named(&spans, "execute_tool").len(), 3);
    let phases = phases_add_up("three calls", &spans, &report);
    assert!((1.7..2.1).contains(&phase(&phases, "tool_run")), "{phases:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_that_waits_for_a_person_is_one_trace_and_says_so() -> Result<()> {
    let (rig, sink) = traced(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut chat = session(&ada, MODEL, pb::ChatMode::Ask).await?.approvals(Approvals::Leave);
    let id = chat.chat();
    let client = ada.client.clone();
    let decide = tokio::spawn(async move {
        let asked = reliant_harness::eventually("an approval", PATIENCE, || async {
            let request = pb::ListApprovalsRequest {
                chat_id: id.to_string(),
                include_decided: false,
                page_size: 10,
                ..Default::default()
            };
            Ok(client.list_approvals(request).await?.approvals.pop())
        });
        asked.await?;
        // A person thinks.
        tokio::time::sleep(Duration::from_secs(1)).await;
        anyhow::Ok(client.approve_all(id).await?)
    });
    let report = chat.send_and_wait(&shell("true"), PATIENCE).await?;
    assert_eq!(decide.await??, 1);
    succeeded("approval", &report);
    let spans = checked(sink, "approval", &report.turn).await?;
    tool(&spans, "execute_tool shell");
    let phases = phases_add_up("approval", &spans, &report);
    assert!((1.0..1.5).contains(&phase(&phases, "approval_wait")), "{phases:?}");
    // The decision is a call of its own; the wake that it caused links to it.
    let linked = named(&spans, "turn.wake").into_iter().flat_map(|wake| &wake.links);
    assert!(linked.into_iter().any(|link| link.trace_id != report.turn.trace_id), "{}", tree::text(&spans));
    Ok(())
}

/// What people and programs say is in no span and in no log.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_was_said_or_kept_secret_is_traced_or_logged() -> Result<()> {
    let config = "[telemetry]\nlog = \"debug\"\n".to_owned();
    let (rig, sink) = traced(RigOptions { config, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let files = vec![("notes.txt", "marked-content-of-a-file".to_owned())];
    let daemon = rig.daemon(&ada, "laptop", DaemonOptions { files, ..Default::default() }).await?;
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let calls = json!([
        { "name": "shell", "args": { "command": "echo marked-argument; cat notes.txt" } },
        { "name": "read_file", "args": { "path": "notes.txt" } },
    ]);
    let text = script(json!([{ "text": "marked-answer", "tools": calls }, { "text": "marked-answer" }]));
    let report = chat.send_and_wait(&format!("marked-question\n{text}"), PATIENCE).await?;
    succeeded("marked", &report);
    assert!(report.tool_calls[0].result.contains("marked-content"), "{:?}", report.tool_calls);
    let spans = checked(sink, "marked", &report.turn).await?;
    let mut said = format!("{spans:?}{:?}", sink.logs(&report.turn.trace_id));
    let mut logs = 0;
    for entry in std::fs::read_dir(rig.dir().join("logs"))? {
        said.push_str(&String::from_utf8_lossy(&std::fs::read(entry?.path())?));
        logs += 1;
    }
    said.push_str(&std::fs::read_to_string(daemon.state_dir.join("daemon.log")).unwrap_or_default());
    assert!(logs >= 4 && said.contains("a daemon connected"), "the logs were found");
    for secret in
        ["marked-question", "marked-answer", "marked-argument", "marked-content", &ada.token, &daemon.token, "Bearer "]
    {
        let at = said.find(secret);
        assert!(at.is_none(), "'{secret}' was said: {}", at.map_or("", |at| &said[at.saturating_sub(300)..at]));
    }
    Ok(())
}
