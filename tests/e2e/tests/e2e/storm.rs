//! A gateway dies, and a thousand daemons come to the other one at once.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _};
use reliant_harness::{DaemonOptions, Rig, RigOptions, Swarm, eventually};
use reliant_types::{Code, pb};
use serde_json::json;

use crate::{
    overload::metric,
    scripts::{MODEL, PATIENCE, one_call, only_call, session},
};

const DAEMONS: usize = 1000;
/// They start on their own, not all at once.
const START: Duration = Duration::from_secs(8);
const CONNECT_PATIENCE: Duration = Duration::from_secs(120);
/// From the gateway's death until all are at the other one.
const BACK_MAX: Duration = Duration::from_secs(60);
/// Dials of one daemon in all, half of them to a gateway that is not there.
const DIALS_MAX: usize = 8;
/// A tool call in the middle of it.
const CALL_MAX: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_daemons_come_back_after_their_gateway_died() -> Result<()> {
    // A narrow door, so that the storm stands before it even on a fast machine.
    let options = RigOptions { gateways: 2, config: "[gateway]\nadmissions = 1\n".into(), ..RigOptions::default() };
    let mut rig = Rig::start(options).await?;
    let (ada, crowd) = (rig.person("ada").await?, rig.person("crowd").await?);
    // It was there before, at the gateway that survives.
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions { gateway: 1, ..Default::default() }).await?;
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;

    let store = rig.store.clone();
    let tokens: Vec<_> = futures::stream::iter(0..DAEMONS)
        .map(|n| {
            let store = store.clone();
            async move { store.register_daemon(crowd.user, &format!("d{n}"), false).await }
        })
        .buffer_unordered(4)
        .try_collect()
        .await?;
    let swarm = Swarm::start(tokens, vec![rig.mesh.gateway_url(0), rig.mesh.gateway_url(1)], START);
    eventually("all daemons to be connected", CONNECT_PATIENCE, || async {
        Ok((swarm.connected() == DAEMONS).then_some(()))
    })
    .await?;
    let at_first = swarm.on_gateway(0);
    assert!(at_first > DAEMONS / 4, "only {at_first} daemons are at the gateway that is to die");
    let dials_before = swarm.dials();
    let refused_before = swarm.refusals();

    rig.mesh.gateways[0].kill();
    let died = Instant::now();
    let storm = async {
        eventually("all daemons to be at the other gateway", BACK_MAX, || async {
            Ok((swarm.on_gateway(1) == DAEMONS).then_some(()))
        })
        .await?;
        anyhow::Ok(died.elapsed())
    };
    let call = async {
        let begun = Instant::now();
        let report = chat.send_and_wait(&one_call("shell", json!({ "command": "echo still here" })), PATIENCE).await?;
        assert!(report.succeeded(), "{:?}", report.turn);
        assert!(only_call(&report).result.contains("still here"), "{report:?}");
        anyhow::Ok(begun.elapsed())
    };
    let (back, call) = tokio::try_join!(storm, call)?;
    let dials = swarm.dials() - dials_before;
    let refusals = swarm.refusals();
    eprintln!(
        "{at_first} of {DAEMONS} daemons were at the gateway that died; all were back after {back:?} and {dials} dials; \
         a call meanwhile took {call:?}; refused before {refused_before:?}, in all {refusals:?}"
    );
    assert!(call < CALL_MAX, "a call of a daemon that was there took {call:?}");
    assert!(dials < at_first * DIALS_MAX, "{dials} dials for {at_first} daemons");
    let full = Code::QueueFull.to_string();
    let (count, delayed) = refusals.get(&full).copied().unwrap_or_default();
    assert!(count > 0, "nobody stood before the door: {refusals:?}");
    assert_eq!(count, delayed, "who is refused is told when to come back");

    // Each has one live stream, and it is the gateway's view as well.
    assert_eq!((swarm.connected(), swarm.streams()), (DAEMONS, DAEMONS));
    let admin = rig.mesh.gateways[1].addresses().admin.context("a gateway has an admin listener")?;
    eventually("the gateway to hold each daemon once", Duration::from_secs(10), || async {
        let held = metric(admin, "reliant_daemons_connected").await?;
        Ok((held == (DAEMONS + 1) as f64).then_some(()))
    })
    .await?;
    let list = crowd.client.list_daemons(pb::ListDaemonsRequest { include_revoked: false }).await?.daemons;
    assert_eq!(list.iter().filter(|daemon| daemon.connected).count(), DAEMONS);
    Ok(())
}
