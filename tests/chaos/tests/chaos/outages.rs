//! Whole servers that go and come back while people work.

use std::time::Duration;

use anyhow::Result;
use reliant_chaos::{Cast, Report, Theatre, scripts};
use reliant_devstack::Server;
use reliant_harness::{Fault, Node};
use tokio::time::Instant;

pub const CAST: Cast = Cast { apis: 2, workers: 2, gateways: 2, stages: 0, neighbours: 1, chats: 4 };

fn assert_clean(report: &Report) {
    let verdict = report.verdict();
    assert!(verdict.is_empty(), "{}\n{}", report.table(), verdict.join("\n"));
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
