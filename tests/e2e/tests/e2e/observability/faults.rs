//! Turns whose roles die: still one trace, no orphan, and what was done again links to what it replaces.

use std::time::Duration;

use anyhow::Result;
use reliant_client::{Approvals, ClientUpdate};
use reliant_devstack::RoleProcess;
use reliant_harness::{DaemonOptions, Person, RigOptions, eventually};
use reliant_observe::tree;
use reliant_types::{TurnId, pb};
use serde_json::json;

use super::{checked, named, phases_fill, traced};
use crate::scripts::{MODEL, PATIENCE, one_call, script, session};

pub const RESTART: Duration = Duration::from_secs(60);

pub async fn call_running(ada: &Person, turn: TurnId) -> Result<()> {
    eventually("a running call", PATIENCE, || async {
        let turn = ada.client.get_turn(pb::GetTurnRequest { turn_id: turn.to_string(), ..Default::default() }).await?;
        Ok(turn.tool_calls.iter().any(|call| call.status() == pb::ToolCallStatus::Running).then_some(()))
    })
    .await
}

pub fn turn_of(sent: &pb::SendMessageResponse) -> TurnId {
    sent.turn.as_ref().expect("the api says which turn it is").id.parse().expect("an id")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_whose_worker_was_killed_links_its_second_attempt_to_its_first() -> Result<()> {
    let (mut rig, sink) = traced(RigOptions { workers: 2, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let mut chat = session(&ada, "sim/text?tokens=300&rate=60", pb::ChatMode::Auto).await?;
    let turn = turn_of(&chat.send("hello").await?);
    while !matches!(chat.next().await?, ClientUpdate::Delta(_)) {}
    // What ended some milliseconds ago is out.
    let trace = chat
        .client()
        .get_turn(pb::GetTurnRequest { turn_id: turn.to_string(), ..Default::default() })
        .await?
        .turn
        .unwrap_or_default();
    eventually("the request's span", PATIENCE, || async {
        Ok((!named(&sink.store().spans(&trace.trace_id), "model.send").is_empty()).then_some(()))
    })
    .await?;
    // Which of the two has it is not known here.
    rig.mesh.workers.iter_mut().for_each(RoleProcess::kill);
    for worker in &mut rig.mesh.workers {
        worker.restart(RESTART).await?;
    }
    let ended = chat.wait_turn(turn, PATIENCE).await?;
    assert_eq!(ended.status(), pb::TurnStatus::Succeeded, "{ended:?}");
    let spans = checked(sink, "worker killed", &ended).await?;
    let rounds = named(&spans, "turn.round");
    let claims: Vec<_> = named(&spans, "turn.claim").iter().map(|claim| claim.span_id.as_str()).collect();
    assert!(claims.len() >= 2, "the dead attempt's claim is seen\n{}", tree::text(&spans));
    let link = rounds.iter().flat_map(|round| &round.links).find(|link| claims.contains(&link.span_id.as_str()));
    assert!(link.is_some(), "no attempt links to the one it replaces\n{}", tree::text(&spans));
    let phases = phases_fill("worker killed", &spans, &ended);
    // What a death costs is seen as that, and not as a wait for workers.
    assert!(phases["retry"] > 0.5 && phases["pickup"] < 0.5, "{phases:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_whose_gateway_was_killed_ends_in_the_same_trace() -> Result<()> {
    let (mut rig, sink) = traced(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let turn = turn_of(&chat.send(&one_call("shell", json!({ "command": "sleep 3" }))).await?);
    call_running(&ada, turn).await?;
    rig.mesh.gateways[0].kill();
    rig.mesh.gateways[0].restart(RESTART).await?;
    let ended = chat.wait_turn(turn, PATIENCE).await?;
    assert_eq!(ended.status(), pb::TurnStatus::Succeeded, "{ended:?}");
    let spans = checked(sink, "gateway killed", &ended).await?;
    assert_eq!(named(&spans, "execute_tool").len(), 1, "a call runs once\n{}", tree::text(&spans));
    phases_fill("gateway killed", &spans, &ended);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_is_away_is_not_taken_for_a_lack_of_workers() -> Result<()> {
    let (rig, sink) = traced(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let mut chat = session(&ada, "sim/fault?kind=503&times=2&retry_after=2", pb::ChatMode::Auto).await?;
    let report = chat.send_and_wait("hello", PATIENCE).await?;
    assert!(report.succeeded(), "{report:?}");
    let spans = checked(sink, "away", &report.turn).await?;
    let phases = phases_fill("away", &spans, &report.turn);
    assert!(phases["retry"] > 3.0 && phases["pickup"] < 0.5, "{phases:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approval_that_outlives_every_role_is_still_of_its_turns_trace() -> Result<()> {
    let (mut rig, sink) = traced(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut chat = session(&ada, MODEL, pb::ChatMode::Ask).await?.approvals(Approvals::Leave);
    let id = chat.chat();
    let turn = turn_of(&chat.send(&one_call("shell", json!({ "command": "true" }))).await?);
    eventually("an approval that waits", PATIENCE, || async {
        let turn =
            ada.client.get_turn(pb::GetTurnRequest { turn_id: turn.to_string(), ..Default::default() }).await?.turn;
        Ok(turn.filter(|turn| turn.status() == pb::TurnStatus::WaitingApproval))
    })
    .await?;
    for role in rig.mesh.apis.iter_mut().chain(&mut rig.mesh.workers).chain(&mut rig.mesh.gateways) {
        role.kill();
    }
    for role in rig.mesh.apis.iter_mut().chain(&mut rig.mesh.workers).chain(&mut rig.mesh.gateways) {
        role.restart(RESTART).await?;
    }
    assert_eq!(ada.client.approve_all(id).await?, 1);
    let ended = chat.wait_turn(turn, PATIENCE).await?;
    assert_eq!(ended.status(), pb::TurnStatus::Succeeded, "{ended:?}");
    let spans = checked(sink, "approval over a restart", &ended).await?;
    assert_eq!(named(&spans, "execute_tool").len(), 1, "{}", tree::text(&spans));
    let phases = tree::phases(&spans);
    assert!(phases.iter().any(|(name, seconds)| *name == "approval_wait" && *seconds > 0.0), "{phases:?}");
    Ok(())
}

/// At any moment, not only at those that were thought of; each role in turn, with several chats at work.
#[tokio::test(flavor = "multi_thread")]
async fn kills_at_random_moments_leave_no_orphans() -> Result<()> {
    let (mut rig, sink) = traced(RigOptions { workers: 2, gateways: 2, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let mut daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut ended = Vec::new();
    let kills = std::env::var("RELIANT_TEST_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(8u64);
    for round in 0..kills {
        let mut at_work = Vec::new();
        for text in [one_call("shell", json!({ "command": "sleep 0.1" })), script(json!([{ "text": "hello" }]))] {
            let chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
            let turn = turn_of(&chat.send(&text).await?);
            at_work.push((chat, turn));
        }
        tokio::time::sleep(Duration::from_millis(round * 37 % 150)).await;
        let role = match round % 4 {
            0 => &mut rig.mesh.workers[0],
            1 => &mut rig.mesh.gateways[0],
            2 => &mut rig.mesh.apis[0],
            _ => &mut daemon.process,
        };
        role.kill();
        role.restart(RESTART).await?;
        for (mut chat, turn) in at_work {
            ended.push(chat.wait_turn(turn, PATIENCE).await?);
        }
    }
    for (place, turn) in ended.iter().enumerate() {
        assert_eq!(turn.status(), pb::TurnStatus::Succeeded, "{turn:?}");
        checked(sink, &format!("killed in round {}", place / 2), turn).await?;
    }
    Ok(())
}
