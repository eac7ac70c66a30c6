//! What is done again stands beside what it replaces, linked to it, and not below it. Takeovers are in `faults`, decisions
//! in `turns`.

use std::time::Duration;

use anyhow::Result;
use reliant_harness::{DaemonOptions, RigOptions, eventually};
use reliant_observe::{Span, tree};
use reliant_telemetry::names::attr;
use reliant_types::pb;
use serde_json::json;

use super::{
    bad_input::metrics,
    checked,
    faults::{RESTART, call_running, turn_of},
    named,
    subjects::all,
    succeeded, traced,
};
use crate::scripts::{MODEL, PATIENCE, one_call, session};

/// Each of these but the first links to the one before it, in the order of their beginning.
#[track_caller]
fn each_links_to_the_one_before(spans: &[Span], again: &[&Span]) {
    let mut again = again.to_vec();
    again.sort_by_key(|span| span.start_ns);
    assert!(again.len() >= 2, "nothing was done again\n{}", tree::text(spans));
    for pair in again.windows(2) {
        let linked = pair[1].links.iter().any(|link| link.span_id == pair[0].span_id);
        assert!(linked, "'{}' does not link to the one it replaces\n{}", pair[1].name, tree::text(spans));
        assert_ne!(pair[1].parent_id, pair[0].span_id, "it is below the one it replaces");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn model_calls_that_are_made_again_link_to_those_before() -> Result<()> {
    let (rig, sink) = traced(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let mut chat = session(&ada, "sim/fault?kind=503&times=3&retry_after=0.1", pb::ChatMode::Auto).await?;
    let report = chat.send_and_wait("hello", PATIENCE).await?;
    succeeded("refused three times", &report);
    let spans = checked(sink, "refused three times", &report.turn).await?;
    let calls = named(&spans, "chat");
    assert_eq!(calls.len(), 4, "{}", tree::text(&spans));
    each_links_to_the_one_before(&spans, &calls);
    assert_eq!(calls.iter().filter(|call| call.error).count(), 3, "{}", tree::text(&spans));

    // After its first piece an answer is not asked again by the same attempt: another one takes its place.
    let mut chat = session(&ada, "sim/fault?kind=cut&times=1&after=5", pb::ChatMode::Auto).await?;
    let report = chat.send_and_wait("hello", PATIENCE).await?;
    assert!(report.succeeded(), "{report:?}");
    let spans = checked(sink, "broken off", &report.turn).await?;
    let (claims, rounds) = (named(&spans, "turn.claim"), named(&spans, "turn.round"));
    assert_eq!((claims.len(), rounds.len()), (2, 2), "{}", tree::text(&spans));
    let first = claims.iter().min_by_key(|claim| claim.start_ns).map(|claim| claim.span_id.as_str());
    let linked = rounds.iter().flat_map(|round| &round.links).any(|link| Some(link.span_id.as_str()) == first);
    assert!(linked, "{}", tree::text(&spans));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_is_offered_again_links_to_its_first_offer() -> Result<()> {
    let (mut rig, sink) = traced(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let turn = turn_of(&chat.send(&one_call("shell", json!({ "command": "sleep 1" }))).await?);
    call_running(&ada, turn).await?;
    // Nobody takes the result until it is back.
    rig.mesh.workers[0].kill();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    rig.mesh.workers[0].restart(RESTART).await?;
    let ended = chat.wait_turn(turn, PATIENCE).await?;
    assert_eq!(ended.status(), pb::TurnStatus::Succeeded, "{ended:?}");
    let spans = checked(sink, "offered again", &ended).await?;
    let offers: Vec<_> = named(&spans, "request").into_iter().filter(|span| span.name.contains(".result.")).collect();
    each_links_to_the_one_before(&spans, &offers);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_comes_over_another_stream_links_to_its_first_offer() -> Result<()> {
    let (mut rig, sink) = traced(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let sent = chat.send(&one_call("shell", json!({ "command": "sleep 1" }))).await?;
    let (turn, trace) = (turn_of(&sent), sent.turn.unwrap_or_default().trace_id);
    call_running(&ada, turn).await?;
    rig.mesh.workers[0].kill();
    eventually("an offer of the result", PATIENCE, || async {
        Ok((!named(&sink.store().spans(&trace), "tool.result").is_empty()).then_some(()))
    })
    .await?;
    // Nobody took it yet, and the stream that it came over is gone.
    rig.mesh.gateways[0].kill();
    rig.mesh.gateways[0].restart(RESTART).await?;
    rig.mesh.workers[0].restart(RESTART).await?;
    let ended = chat.wait_turn(turn, PATIENCE).await?;
    assert_eq!(ended.status(), pb::TurnStatus::Succeeded, "{ended:?}");
    let spans = checked(sink, "another stream", &ended).await?;
    each_links_to_the_one_before(&spans, &named(&spans, "tool.result"));
    Ok(())
}

/// Streams are traces of their own: that of a daemon, and that of a viewer.
#[tokio::test(flavor = "multi_thread")]
async fn streams_that_are_opened_again_link_to_those_before() -> Result<()> {
    let (mut rig, sink) = traced(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    rig.mesh.gateways[0].kill();
    rig.mesh.gateways[0].restart(RESTART).await?;
    rig.connected(&ada, &daemon.id, true).await?;
    chat.subscription().disconnect();
    let report = chat.send_and_wait(&one_call("shell", json!({ "command": "true" })), PATIENCE).await?;
    succeeded("after new streams", &report);
    for (method, service) in [
        ("reliant.v1.TunnelService/Connect", "reliant-daemon"),
        ("reliant.v1.UpdateService/Subscribe", "reliant-client"),
    ] {
        eventually(&format!("a linked {method}"), PATIENCE, || async {
            let spans = all(sink.store());
            let mut calls = spans.iter().filter(|span| span.name == method && span.kind == "client");
            let ids: Vec<_> = calls.clone().map(|span| span.span_id.as_str()).collect();
            let linked = |span: &Span| span.links.iter().any(|link| ids.contains(&link.span_id.as_str()));
            Ok(calls.any(|span| span.service.starts_with(service) && linked(span)).then_some(()))
        })
        .await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_sent_again_links_to_its_first_dispatch() -> Result<()> {
    let (rig, sink) = traced(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    // A laptop that stands still answers nothing, and its stream is still there. Then it goes on, and runs the call while
    // the worker, which does not know, sends it again.
    daemon.process.pause();
    let turn = turn_of(&chat.send(&one_call("shell", json!({ "command": "sleep 6" }))).await?);
    eventually("a dispatch that nobody answered", PATIENCE, || async {
        let metrics = metrics(&rig).await?;
        Ok(metrics.contains("reliant_tool_dispatch_total{outcome=\"timeout\"} 1").then_some(()))
    })
    .await?;
    daemon.process.resume();
    let ended = chat.wait_turn(turn, PATIENCE).await?;
    assert_eq!(ended.status(), pb::TurnStatus::Succeeded, "{ended:?}");
    let spans = checked(sink, "sent again", &ended).await?;
    each_links_to_the_one_before(&spans, &named(&spans, "tool.dispatch"));
    assert_eq!(named(&spans, "execute_tool").len(), 1, "{}", tree::text(&spans));
    // Of those that the daemon got, each later one links to the one that its journal knew first.
    let mut taken = named(&spans, "tunnel.receive");
    taken.retain(|span| span.attributes.get(attr::FRAME).is_some_and(|frame| frame == "dispatch"));
    taken.sort_by_key(|span| span.start_ns);
    assert!(taken.len() >= 2, "{}", tree::text(&spans));
    for again in &taken[1..] {
        let linked = again.links.iter().any(|link| link.span_id == taken[0].span_id);
        assert!(linked, "a dispatch that came again stands for itself\n{}", tree::text(&spans));
    }
    Ok(())
}
