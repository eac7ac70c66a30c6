//! A rolling restart under load fails nothing: each role is asked to end, hands over, and ends by itself and well.
//!
//! A process of its own: what its clients were answered is read from its own metrics, and no test here does worse to a
//! server than to ask it to end.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result};
use reliant_chaos::{AT_ONCE, Cast, Report, Theatre, say, scripts};
use reliant_harness::{Fault, Node, eventually};
use reliant_types::pb;
use tokio::time::Instant;

const PATIENCE: Duration = Duration::from_secs(90);
const CAST: Cast = Cast { apis: 2, workers: 2, gateways: 2, stages: 0, neighbours: 1, chats: 4 };
/// What a drain may answer: come again, here or elsewhere.
const ALLOWED: &[&str] = &["OK", "UNAVAILABLE", "RESOURCE_EXHAUSTED"];
/// Of a stream, while its worker drains; much shorter than what is left of it.
const WORKER_DRAIN: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_of_every_role_fails_nothing() -> Result<()> {
    let theatre = Theatre::open(&CAST, 31).await?;
    let daemons = theatre.neighbours.iter().map(|neighbour| neighbour.host.role.clone());
    let all: Vec<_> = theatre.arena.roles.iter().cloned().chain(daemons).collect();
    let rolled = theatre
        .while_crowded(async {
            for role in all {
                let begun = Instant::now();
                let name = role.name.clone();
                theatre.fault(Node::Role(role), Fault::Terminate { back_after: AT_ONCE }).await?;
                say(&format!("  {name} ended and was back after {:?}", begun.elapsed()));
            }
            anyhow::Ok(())
        })
        .await;
    rolled?;
    assert_clean(&theatre.close().await?);
    Ok(())
}

/// A stream that is longer than its worker may drain is begun again by another one, and its viewer sees that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_stream_is_handed_over() -> Result<()> {
    let config = format!("[flows.worker]\ndrain = \"{}s\"\n", WORKER_DRAIN.as_secs());
    let theatre = Theatre::open_with(&Cast { stages: 1, ..CAST }, 33, &config).await?;
    let stage = &theatre.stages[0];
    let handed = async {
        let key = theatre.ledger.key("long");
        let rounds = vec![scripts::round(375, 25.0, Vec::new())];
        let turn = stage.auto.send(&key, &scripts::message(&key, rounds)).await?;
        let (fence, producer) = eventually("a stream", PATIENCE, || async {
            let look = theatre.arena.observer.turn(turn.turn).await?;
            let seen = stage.auto.pieces(look.fence, turn.at).is_some();
            Ok(look.producer.filter(|_| look.live && seen).map(|producer| (look.fence, producer)))
        })
        .await?;
        let worker = theatre.arena.role_at(&producer).context("a worker of the mesh")?;
        let begun = Instant::now();
        theatre.fault(Node::Role(worker), Fault::Terminate { back_after: AT_ONCE }).await?;
        let restarted = begun.elapsed();
        let ended = stage.auto.ended(turn.turn, Instant::now() + PATIENCE).await;
        assert_eq!(ended, Some(pb::TurnStatus::Succeeded));
        let (epoch, pieces) = stage.auto.pieces(fence + 1, begun).context("no other worker streamed")?;
        let after = pieces.first_at.duration_since(begun);
        say(&format!("the worker was back after {restarted:?}; epoch {fence} went on as {epoch} after {after:?}"));
        assert!(after >= WORKER_DRAIN, "the stream was cut and not handed over: {after:?}");
        anyhow::Ok(())
    };
    theatre.while_crowded(handed).await?;
    assert_clean(&theatre.close().await?);
    Ok(())
}

fn assert_clean(report: &Report) {
    let verdict = report.verdict();
    assert!(verdict.is_empty(), "{}\n{}", report.table(), verdict.join("\n"));
    assert_eq!(report.findings.unknown, 0, "a drain left calls behind: {:?}", report.findings);
    let answers = answers();
    say(&format!("attempts of clients: {answers:?}"));
    for method in ["SendMessage", "GetChat", "ListMessages"] {
        assert!(answers.keys().any(|(of, _)| of.rsplit('/').next() == Some(method)), "nobody called {method}");
    }
    let others: Vec<_> = answers.iter().filter(|((_, code), _)| !ALLOWED.contains(&code.as_str())).collect();
    assert!(others.is_empty(), "answers that no drain may give: {others:?}");
}

/// Attempts of this process's clients, those that were repeated with them, by method and status.
fn answers() -> BTreeMap<(String, String), u64> {
    let page = reliant_telemetry::metrics::render();
    let counts = page.lines().filter_map(|line| line.strip_prefix("rpc_client_call_duration_seconds_count{"));
    counts
        .map(|line| {
            let parts: Vec<&str> = line.split('"').collect();
            let [_, method, _, code, count] = parts[..] else { panic!("a strange line of metrics: {line}") };
            let count = count.trim_start_matches(['}', ' ']).parse().unwrap();
            ((method.to_owned(), code.to_owned()), count)
        })
        .collect()
}
