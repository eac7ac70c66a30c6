//! A chat that nobody looks at is found while it stands still, and what explains it is saved.

use std::time::Duration;

use anyhow::{Context as _, Result};
use reliant_chaos::{Cast, Theatre, scripts};
use reliant_harness::eventually;
use reliant_types::pb;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;

/// Thirty seconds, and twice as much for a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);
const CAST: Cast = Cast { apis: 1, workers: 1, gateways: 1, stages: 0, neighbours: 1, chats: 1 };

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_that_stands_still_is_found_with_its_history() -> Result<()> {
    let theatre = Theatre::open(&CAST, 61).await?;
    let seat = &theatre.neighbours[0].seats[0];
    let key = theatre.ledger.key("stuck");
    let first = seat.send(&key, &scripts::message(&key, vec![scripts::last(&key)])).await?;
    assert_eq!(seat.ended(first.turn, Instant::now() + PATIENCE).await, Some(pb::TurnStatus::Succeeded));
    // Nobody claims the worker, so no fault is known: as if it had stopped to look by itself.
    let worker = theatre.arena.roles_of("worker").pop().context("a worker")?;
    let pid = Pid::from_raw(worker.pid().await.try_into()?).context("a pid")?;
    kill_process(pid, Signal::STOP)?;
    let key = theatre.ledger.key("stuck");
    let turn = seat.send(&key, &scripts::message(&key, vec![scripts::last(&key)])).await?;
    let dir = theatre.arena.dir().to_owned();
    let saved = dir.join("evidence").join(format!("stuck-{}", seat.chat));
    let found = eventually("what is saved of the chat", PATIENCE, || async {
        Ok((theatre.tally.stuck_chats() > 0).then_some(()))
    })
    .await;
    kill_process(pid, Signal::CONT)?;
    found?;
    let history = std::fs::read_to_string(saved.join("history.json"))?;
    assert!(history.contains("WorkflowExecutionStarted"), "{history}");
    let rows = std::fs::read_to_string(saved.join("rows.json"))?;
    assert!(rows.contains(&turn.turn.to_string()) && rows.contains(&seat.chat.to_string()), "{rows}");
    assert!(!std::fs::read_to_string(saved.join("worker-0.log"))?.is_empty());
    assert_eq!(seat.ended(turn.turn, Instant::now() + PATIENCE).await, Some(pb::TurnStatus::Succeeded));
    let report = theatre.close().await?;
    let verdict = report.verdict();
    assert_eq!(verdict.len(), 1, "{verdict:#?}");
    assert!(verdict[0].starts_with("seed 61: stuck: chat "), "{verdict:#?}");
    assert_eq!(report.json()["stuck_turns"], 1);
    assert!(report.json()["histories"].as_u64() > Some(0));
    // Kept for the finding, which was meant.
    std::fs::remove_dir_all(dir)?;
    Ok(())
}
