//! Whole roles and servers that go and come back while people work.

use std::time::Duration;

use anyhow::Result;
use reliant_chaos::{AT_ONCE, Cast, Report, Theatre, scripts};
use reliant_devstack::Server;
use reliant_harness::{Fault, Node};
use tokio::time::Instant;

pub const CAST: Cast = Cast { apis: 2, workers: 2, gateways: 2, stages: 0, neighbours: 1, chats: 4 };

fn assert_clean(report: &Report) {
    let verdict = report.verdict();
    assert!(verdict.is_empty(), "{}\n{}", report.table(), verdict.join("\n"));
}

/// One after another, under load: no failed turn, no call that the client library could not repair, no unknown outcome.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_of_every_role_fails_nothing() -> Result<()> {
    let theatre = Theatre::open(&CAST, 31).await?;
    let daemons = theatre.neighbours.iter().map(|neighbour| neighbour.host.role.clone());
    let all: Vec<_> = theatre.arena.roles.iter().cloned().chain(daemons).collect();
    let rolled = theatre
        .while_crowded(async {
            for role in all {
                theatre.fault(Node::Role(role), Fault::Terminate { back_after: AT_ONCE }).await?;
            }
            anyhow::Ok(())
        })
        .await;
    rolled?;
    let report = theatre.close().await?;
    assert_clean(&report);
    assert_eq!(report.findings.unknown, 0, "a drain left calls behind: {:?}", report.findings);
    Ok(())
}

/// What is accepted while Temporal is away runs when it is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_are_accepted_while_temporal_is_away() -> Result<()> {
    const AWAY: Duration = Duration::from_secs(60);
    let theatre = Theatre::open(&Cast { chats: 6, ..CAST }, 32).await?;
    let neighbour = &theatre.neighbours[0];
    let away = theatre.fault(Node::Server(Server::Temporal), Fault::Kill { back_after: AWAY });
    let people = async {
        let begun = Instant::now();
        let mut turns = Vec::new();
        while begun.elapsed() < AWAY - Duration::from_secs(5) {
            for seat in &neighbour.seats {
                let key = theatre.ledger.key("away");
                let rounds = vec![scripts::round(3, 0.0, vec![scripts::call(&key, 0.01)]), scripts::last(&key)];
                let asked = Instant::now();
                turns.push((seat, seat.send(&key, &scripts::message(&key, rounds)).await?));
                assert!(asked.elapsed() < Duration::from_secs(5), "accepting took {:?}", asked.elapsed());
            }
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
        anyhow::Ok(turns)
    };
    let (away, turns) = tokio::join!(away, people);
    away?;
    let deadline = Instant::now() + Duration::from_secs(120);
    for (seat, turn) in turns? {
        // Every third chat asks before it runs something.
        while seat.ended(turn.turn, Instant::now() + Duration::from_millis(200)).await.is_none() {
            assert!(Instant::now() < deadline, "{} did not end", turn.key);
            for approval in theatre.arena.observer.turn(turn.turn).await?.approvals_pending {
                seat.approve(&approval.to_string()).await?;
            }
        }
    }
    assert_clean(&theatre.close().await?);
    Ok(())
}
