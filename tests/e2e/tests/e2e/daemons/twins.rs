//! Two daemons with one identity: the newer one serves, the older one stops, says why, and stays stopped.

use std::time::Duration;

use anyhow::{Context as _, Result};
use reliant_harness::{Observer, Rig, RigOptions, eventually};
use reliant_types::{TurnId, pb};
use serde_json::json;

use super::{Start, ended, file};
use crate::scripts::{MODEL, PATIENCE, one_call, only_call, session};

/// In which an eviction loop would show.
const WATCHED: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread")]
async fn the_older_of_two_stops_and_the_newer_one_serves() -> Result<()> {
    let rig = Rig::start(RigOptions { gateways: 2, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let (older, id) = Start::of(&rig, &ada, "laptop").await?;
    let old = older.spawn()?;
    rig.connected(&ada, &id, true).await?;
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let running = chat.send(&one_call("shell", json!({ "command": "echo begun > begun; sleep 120" }))).await?;
    let turn: TurnId = running.turn.context("no turn")?.id.parse()?;
    file(&older.root.join("begun")).await?;

    // The same token on another machine, by another gateway.
    let mut newer = Start::new(&older.binary, &rig.dir().join("other-machine"))?;
    (newer.gateway, newer.token) = (rig.mesh.gateway_url(1), older.token.clone());
    let mut new = newer.spawn()?;
    let gone = ended(old).await?;
    assert_eq!(gone.code, Some(1), "{}", gone.stderr);
    assert!(gone.sentence().contains("a newer process of this daemon took over"), "{}", gone.stderr);

    // What ran on the older one was ended there, or its journal is not known any more: its turn goes on either way.
    assert_eq!(chat.wait_turn(turn, PATIENCE).await?.status(), pb::TurnStatus::Succeeded);
    let observer = Observer::connect(&rig.database_url).await?;
    let lease = async || observer.lease(&id).await?.context("a lease");
    eventually("the newer one's lease", PATIENCE, || async { Ok((lease().await?.instance == 2).then_some(())) })
        .await?;
    let before = lease().await?;
    let report =
        chat.send_and_wait(&one_call("shell", json!({ "command": "echo newer > served; echo ok" })), PATIENCE).await?;
    assert_eq!(only_call(&report).status(), pb::ToolCallStatus::Succeeded, "{:?}", report.tool_calls);
    assert!(newer.root.join("served").exists() && !older.root.join("served").exists());
    tokio::time::sleep(WATCHED).await;
    let after = lease().await?;
    assert_eq!((after.instance, after.epoch), (before.instance, before.epoch), "they evict each other");
    assert!(new.try_wait()?.is_none(), "the newer one goes on");

    // Started again, the older machine is the newer process, and takes the daemon over once.
    let again = older.spawn()?;
    let gone = ended(new).await?;
    assert!(gone.code == Some(1) && gone.sentence().contains("took over"), "{}", gone.stderr);
    let report = chat.send_and_wait(&one_call("shell", json!({ "command": "echo ok" })), PATIENCE).await?;
    assert_eq!(only_call(&report).status(), pb::ToolCallStatus::Succeeded, "{:?}", report.tool_calls);
    drop(again);
    Ok(())
}
