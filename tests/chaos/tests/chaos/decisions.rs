//! What people decide holds, whatever restarts meanwhile.

use std::time::Duration;

use anyhow::{Context as _, Result};
use reliant_chaos::{AT_ONCE, Cast, Theatre, scripts, seat::Seat};
use reliant_devstack::Server;
use reliant_harness::{Fault, Node, TurnLook, eventually};
use reliant_types::{TurnId, pb};
use serde_json::json;
use tokio::time::Instant;

const PATIENCE: Duration = Duration::from_secs(90);
const BETWEEN_RESTARTS: Duration = Duration::from_secs(3 * 24 * 3600);
/// Longer than the relay takes until it looks at what has been left alone: half a minute.
const LOOKED_AT: Duration = Duration::from_secs(35);
/// One chat that runs what it is told, and one that asks.
const CAST: Cast = Cast { apis: 2, workers: 2, gateways: 2, stages: 1, neighbours: 0, chats: 0 };

async fn until(theatre: &Theatre, turn: TurnId, what: &str, is: impl Fn(&TurnLook) -> bool) -> Result<TurnLook> {
    eventually(what, PATIENCE, || async {
        // Postgres may be the one that is away.
        Ok(theatre.arena.observer.turn(turn).await.ok().filter(|look| is(look)))
    })
    .await
}

/// Nothing is done to it for as long as a worker takes to look at what has gone stale.
async fn stays(theatre: &Theatre, turn: TurnId, is: impl Fn(&TurnLook) -> bool) -> Result<()> {
    let deadline = Instant::now() + LOOKED_AT;
    while Instant::now() < deadline {
        let look = theatre.arena.observer.turn(turn).await?;
        anyhow::ensure!(is(&look), "it stays no longer: {look:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

fn kill() -> Fault {
    Fault::Kill { back_after: AT_ONCE }
}

async fn decide(seat: &Seat, approval: &str, approve: bool) -> Result<pb::Approval, reliant_types::Failure> {
    let request =
        pb::DecideApprovalRequest { approval_id: approval.to_owned(), approve, scope: pb::ApprovalScope::Once as i32 };
    Ok(seat.client.decide_approval(request).await?.approval.unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_approval_waits_for_days_and_across_a_restart_of_everything() -> Result<()> {
    let theatre = Theatre::open(&CAST, 41).await?;
    let stage = &theatre.stages[0];
    let key = theatre.ledger.key("waits");
    let rounds = vec![scripts::round(3, 0.0, vec![scripts::call(&key, 0.05)]), scripts::last(&key)];
    let turn = stage.ask.send(&key, &scripts::message(&key, rounds)).await?;
    let waits = |look: &TurnLook| look.status == "waiting_approval" && !look.approvals_pending.is_empty();
    let look = until(&theatre, turn.turn, "a waiting approval", waits).await?;
    let left = look.deadline_left_ms;
    let still = |look: &TurnLook| waits(look) && !look.clock_runs && look.deadline_left_ms == left;
    let roles = theatre.arena.roles.iter().cloned().chain([stage.host.role.clone()]).map(Node::Role);
    for node in Server::ALL.into_iter().map(Node::Server).chain(roles) {
        theatre.fault(node, kill()).await?;
        theatre.arena.observer.age_all(BETWEEN_RESTARTS).await?;
        until(&theatre, turn.turn, "the approval that still waits", still).await?;
    }
    // The workers have looked at it since.
    stays(&theatre, turn.turn, still).await?;
    stage.ask.approve(&look.approvals_pending[0].to_string()).await?;
    let ended = stage.ask.ended(turn.turn, Instant::now() + PATIENCE).await;
    assert_eq!(ended, Some(pb::TurnStatus::Succeeded));
    let report = theatre.close().await?;
    assert!(report.verdict().is_empty(), "{:#?}", report.verdict());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_is_final_while_every_hop_restarts() -> Result<()> {
    let theatre = Theatre::open(&CAST, 42).await?;
    let stage = &theatre.stages[0];
    let key = theatre.ledger.key("cancelled");
    let command = "echo $$ > pid; sleep 300; touch survived";
    let call = json!({ "name": "shell", "args": { "command": command, "timeout_seconds": 600 } });
    let rounds = vec![scripts::round(3, 0.0, vec![call]), scripts::last(&key)];
    let turn = stage.auto.send(&key, &scripts::message(&key, rounds)).await?;
    let runs = |look: &TurnLook| look.calls.iter().any(|call| call.status == "running");
    until(&theatre, turn.turn, "a running call", runs).await?;
    let pid = eventually("the command's pid", PATIENCE, || async {
        let text = std::fs::read_to_string(stage.host.root.join("pid")).ok();
        Ok(text.and_then(|text| text.trim().parse::<u32>().ok()))
    })
    .await?;
    // NATS and all hops are away at the moment of the cancel; api comes back by itself.
    let kinds = ["api", "worker", "gateway"];
    let nodes = theatre.arena.roles.iter().filter(|role| kinds.contains(&role.kind)).cloned().map(Node::Role);
    let nodes = nodes.chain([Node::Server(Server::Nats)]);
    let kill = Fault::Kill { back_after: Duration::from_secs(2) };
    let deaths = futures::future::try_join_all(nodes.map(|node| theatre.fault(node, kill.clone())));
    let cancel = stage.auto.client.cancel_turn(pb::CancelTurnRequest { turn_id: turn.turn.to_string() });
    let (deaths, cancelled) = tokio::join!(deaths, cancel);
    deaths?;
    assert_eq!(cancelled?.turn.context("a turn")?.status(), pb::TurnStatus::Cancelled);
    eventually("the end of the process", PATIENCE, || async {
        Ok((!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(()))
    })
    .await?;
    let settled = until(&theatre, turn.turn, "the call's end", |look| look.calls[0].ended_ms.is_some()).await?;
    assert_eq!((settled.status.as_str(), settled.calls[0].status.as_str()), ("cancelled", "cancelled"));
    assert!(!stage.host.root.join("survived").exists());
    // The chat goes on.
    let key = theatre.ledger.key("after");
    let turn = stage.auto.send(&key, &scripts::message(&key, vec![scripts::last(&key)])).await?;
    let ended = stage.auto.ended(turn.turn, Instant::now() + PATIENCE).await;
    assert_eq!(ended, Some(pb::TurnStatus::Succeeded));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decision_has_one_outcome() -> Result<()> {
    let theatre = Theatre::open(&CAST, 43).await?;
    let stage = &theatre.stages[0];
    let begin = async |name: &str| {
        let key = theatre.ledger.key(name);
        let rounds = vec![scripts::round(3, 0.0, vec![scripts::call(&key, 0.05)]), scripts::last(&key)];
        let turn = stage.ask.send(&key, &scripts::message(&key, rounds)).await?;
        let waits = |look: &TurnLook| !look.approvals_pending.is_empty();
        let look = until(&theatre, turn.turn, "a waiting approval", waits).await?;
        anyhow::Ok((turn, look.approvals_pending[0].to_string()))
    };

    // Two browsers, two opinions, at one moment: the first counts, and both are told the same.
    let (turn, approval) = begin("torn").await?;
    let (yes, no) = tokio::join!(decide(&stage.ask, &approval, true), decide(&stage.ask, &approval, false));
    let outcomes: Vec<_> = [yes, no].into_iter().filter_map(Result::ok).map(|approval| approval.status()).collect();
    assert!(!outcomes.is_empty() && outcomes.iter().all(|status| *status == outcomes[0]), "{outcomes:?}");
    assert_eq!(stage.ask.ended(turn.turn, Instant::now() + PATIENCE).await, Some(pb::TurnStatus::Succeeded));
    let ran = scripts::Marks::read(&stage.host.root).has_begun(&turn.key);
    assert_eq!(ran, outcomes[0] == pb::ApprovalStatus::Approved);
    // And again, later: nothing changes.
    for approve in [true, false] {
        if let Ok(again) = decide(&stage.ask, &approval, approve).await {
            assert_eq!(again.status(), outcomes[0]);
        }
    }

    // After a cancel nothing is decided any more.
    let (turn, approval) = begin("late").await?;
    stage.ask.client.cancel_turn(pb::CancelTurnRequest { turn_id: turn.turn.to_string() }).await?;
    if let Ok(decided) = decide(&stage.ask, &approval, true).await {
        assert_eq!(decided.status(), pb::ApprovalStatus::Cancelled);
    }
    let look =
        until(&theatre, turn.turn, "the call's end", |look| look.calls.iter().all(|c| c.ended_ms.is_some())).await?;
    assert_eq!((look.status.as_str(), look.calls[0].status.as_str()), ("cancelled", "cancelled"));
    assert!(!scripts::Marks::read(&stage.host.root).has_begun(&turn.key), "a cancelled call ran");
    Ok(())
}
