//! A daemon and its gateway that lose each other without a word. Nothing is closed and nothing arrives: each end finds
//! that out by itself.

use std::time::Duration;

use anyhow::{Context as _, Result};
use reliant_chaos::{Cast, Theatre, say, scripts};
use reliant_harness::{Network, Peer, eventually};
use reliant_types::pb;
use tokio::time::{Instant, sleep};

/// What is promised of a half-open stream.
const FOUND: Duration = Duration::from_secs(10);
/// Longer, so that a broken promise is told with its time.
const PATIENCE: Duration = Duration::from_secs(60);
/// The cut meets another moment between two pings each time.
const ROUNDS: u32 = 3;
const CAST: Cast = Cast { apis: 1, workers: 1, gateways: 2, stages: 1, neighbours: 0, chats: 0 };

/// From the cut: a stream to another gateway, and the end of the stream at the one that was lost.
struct Found {
    daemon: Duration,
    gateway: Duration,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_open_stream_is_found_at_both_ends_in_ten_seconds() -> Result<()> {
    let theatre = Theatre::open(&CAST, 51).await?;
    for round in 0..ROUNDS {
        let found = lose_each_other(&theatre, round).await?;
        say(&format!("round {round}: the daemon after {:?}, its gateway after {:?}", found.daemon, found.gateway));
        assert!(found.daemon < FOUND, "round {round}: the daemon took {:?}", found.daemon);
        assert!(found.gateway < FOUND, "round {round}: the gateway took {:?}", found.gateway);
    }
    let report = theatre.close().await?;
    assert!(report.verdict().is_empty(), "{:#?}", report.verdict());
    assert_eq!(report.findings.unknown, 0);
    Ok(())
}

async fn lose_each_other(theatre: &Theatre, round: u32) -> Result<Found> {
    let (arena, stage) = (&theatre.arena, &theatre.stages[0]);
    let key = theatre.ledger.key("half-open");
    // It runs while they lose each other, and ends when they have found each other again.
    let rounds = vec![scripts::round(3, 0.0, vec![scripts::call(&key, 12.0)]), scripts::last(&key)];
    let turn = stage.auto.send(&key, &scripts::message(&key, rounds)).await?;
    eventually("a running call", PATIENCE, || async {
        let begun = scripts::Marks::read(&stage.host.root).has_begun(&key);
        Ok((begun && arena.observer.turn(turn.turn).await?.calls[0].status == "running").then_some(()))
    })
    .await?;
    sleep(Duration::from_secs(1) * round).await;
    let address = arena.observer.gateway_of(&stage.host.id).await?.context("the daemon has a gateway")?;
    let gateway = arena.role_at(&address).context("a gateway of the mesh")?;
    let links = arena.links_of(&Peer::Role(stage.host.role.name.clone()));
    let link = links.iter().find(|link| link.to == Peer::Role(gateway.name.clone())).context("a way to it")?;
    let silence = link.lay(Network::Silent);
    let cut = Instant::now();
    let elsewhere = eventually("a stream to another gateway", PATIENCE, || async {
        let now = arena.observer.gateway_of(&stage.host.id).await?;
        Ok(now.is_some_and(|now| now != address).then(|| cut.elapsed()))
    });
    let dropped = eventually("the end of the lost stream", PATIENCE, || async {
        Ok((gateway.metric("reliant_daemons_connected").await? == 0.0).then(|| cut.elapsed()))
    });
    let (elsewhere, dropped) = tokio::join!(elsewhere, dropped);
    let found = Found { daemon: elsewhere?, gateway: dropped? };
    drop(silence);
    let ended = stage.auto.ended(turn.turn, Instant::now() + PATIENCE).await;
    assert_eq!(ended, Some(pb::TurnStatus::Succeeded));
    let marks = scripts::Marks::read(&stage.host.root);
    let once = |marks: &std::collections::BTreeMap<_, Vec<String>>| marks[&(key.clone(), 0, 0)].len() == 1;
    assert!(once(&marks.begun) && once(&marks.ended), "{marks:?}");
    Ok(found)
}
