//! A gateway that is asked to end hands its daemons over: the next stream is there before the last one ends.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use reliant_chaos::{AT_ONCE, Cast, Theatre, say, scripts, seat::Seat};
use reliant_harness::{Fault, Node, Supervised, eventually};
use reliant_types::pb::{self, chat_event::Kind};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A chat for the long call, and one for the short ones.
const CAST: Cast = Cast { apis: 1, workers: 1, gateways: 2, stages: 0, neighbours: 1, chats: 2 };

/// What the rows said of the daemon's gateway, look by look.
#[derive(Debug, Default)]
struct Looks {
    count: usize,
    without: usize,
    gateways: Vec<String>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draining_gateway_leaves_no_moment_without_one() -> Result<()> {
    let theatre = Theatre::open(&CAST, 52).await?;
    let neighbour = &theatre.neighbours[0];
    let [long, short] = &neighbour.seats[..] else { anyhow::bail!("two chats were asked for") };
    let key = theatre.ledger.key("long");
    let rounds = vec![scripts::round(3, 0.0, vec![scripts::call(&key, 3.0)]), scripts::last(&key)];
    let turn = long.send(&key, &scripts::message(&key, rounds)).await?;
    let gateway = holder(&theatre).await?;
    let stop = CancellationToken::new();
    let drain = async {
        eventually("the long call", PATIENCE, || async {
            Ok(scripts::Marks::read(&neighbour.host.root).has_begun(&key).then_some(()))
        })
        .await?;
        theatre.fault(Node::Role(gateway.clone()), Fault::Terminate { back_after: AT_ONCE }).await?;
        assert_eq!(long.ended(turn.turn, Instant::now() + PATIENCE).await, Some(pb::TurnStatus::Succeeded));
        anyhow::Ok(())
    };
    let drain = async {
        let drained = drain.await;
        stop.cancel();
        drained
    };
    let (drained, looks, calls) = tokio::join!(drain, look(&theatre, &stop), call_on(&theatre, short, &stop));
    drained?;
    let (looks, calls) = (looks?, calls?);
    say(&format!("{calls} short calls; {looks:?}"));
    assert_eq!(looks.without, 0, "the daemon was without a gateway: {looks:?}");
    assert_eq!((looks.gateways.len(), &looks.gateways[0]), (2, &gateway.address), "{looks:?}");
    let look = theatre.arena.observer.turn(turn.turn).await?;
    assert_eq!(look.calls[0].generation, 1, "the long call was sent again");
    let waited = [waits(&theatre, long).await?, waits(&theatre, short).await?];
    assert_eq!(waited, [0, 0], "calls waited for their daemon");
    let report = theatre.close().await?;
    assert!(report.verdict().is_empty(), "{:#?}", report.verdict());
    assert_eq!(report.findings.unknown, 0);
    Ok(())
}

async fn holder(theatre: &Theatre) -> Result<Arc<Supervised>> {
    let address = theatre.arena.observer.gateway_of(&theatre.neighbours[0].host.id).await?;
    let gateway = address.and_then(|address| theatre.arena.role_at(&address));
    gateway.context("the daemon has a gateway")
}

async fn look(theatre: &Theatre, stop: &CancellationToken) -> Result<Looks> {
    let mut looks = Looks::default();
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    while !stop.is_cancelled() {
        ticks.tick().await;
        looks.count += 1;
        match theatre.arena.observer.gateway_of(&theatre.neighbours[0].host.id).await? {
            Some(address) if looks.gateways.last() == Some(&address) => {}
            Some(address) => looks.gateways.push(address),
            None => looks.without += 1,
        }
    }
    Ok(looks)
}

/// One short call after another.
async fn call_on(theatre: &Theatre, seat: &Seat, stop: &CancellationToken) -> Result<usize> {
    let mut calls = 0;
    while !stop.is_cancelled() {
        let key = theatre.ledger.key("short");
        let rounds = vec![scripts::round(1, 0.0, vec![scripts::call(&key, 0.01)]), scripts::round(1, 0.0, Vec::new())];
        let turn = seat.send(&key, &scripts::message(&key, rounds)).await?;
        assert_eq!(seat.ended(turn.turn, Instant::now() + PATIENCE).await, Some(pb::TurnStatus::Succeeded));
        calls += 1;
    }
    Ok(calls)
}

/// How often a turn or a call of the chat came to wait for its daemon: each state is an event.
async fn waits(theatre: &Theatre, seat: &Seat) -> Result<usize> {
    let events = theatre.arena.observer.events(seat.chat).await?;
    anyhow::ensure!(!events.is_empty(), "the chat has no events");
    let waits = events.iter().filter(|event| match &event.kind {
        Some(Kind::TurnChanged(turn)) => turn.status() == pb::TurnStatus::WaitingDaemon,
        Some(Kind::ToolCallChanged(changed)) => {
            changed.tool_call.as_ref().is_some_and(|call| call.status() == pb::ToolCallStatus::WaitingDaemon)
        }
        _ => false,
    });
    Ok(waits.count())
}
