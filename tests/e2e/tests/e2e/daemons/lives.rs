//! What a daemon's life brings: a lid that is closed for hours, a disk without room, dispatches out of order, children that
//! outlive it.

use std::time::Duration;

use anyhow::{Context as _, Result};
use reliant_bus::{Bus, BusConfig, ToolSubject};
use reliant_client::ChatSession;
use reliant_devstack::http_get;
use reliant_harness::{DaemonOptions, Observer, Person, Rig, RigOptions, TestDaemon, eventually};
use reliant_types::{DaemonId, ToolCallId, TurnId, limits, pb};
use serde_json::json;

use super::{call_that_is, calls, file, runs};
use crate::{
    overload::metric,
    scripts::{MODEL, PATIENCE, one_call, session},
};

struct Desk {
    rig: Rig,
    ada: Person,
    daemon: TestDaemon,
}

impl Desk {
    async fn open() -> Result<Self> {
        let rig = Rig::start(RigOptions::default()).await?;
        let ada = rig.person("ada").await?;
        let daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
        Ok(Self { rig, ada, daemon })
    }

    /// A new chat in which this command runs, or waits to.
    async fn runs(&self, command: &str) -> Result<(ChatSession, TurnId)> {
        let chat = session(&self.ada, MODEL, pb::ChatMode::Auto).await?;
        let sent = chat.send(&one_call("shell", json!({ "command": command }))).await?;
        Ok((chat, sent.turn.context("no turn")?.id.parse()?))
    }

    async fn turn_is(&self, turn: TurnId, status: pb::TurnStatus) -> Result<()> {
        eventually(&format!("a turn that is {status:?}"), PATIENCE, || async {
            let request = pb::GetTurnRequest { turn_id: turn.to_string(), ..Default::default() };
            let now = self.ada.client.get_turn(request).await?.turn.context("a turn")?.status();
            Ok((now == status).then_some(()))
        })
        .await
    }

    async fn metrics(&self) -> Result<String> {
        let admin = self.rig.mesh.workers[0].addresses().admin.context("a worker has an admin listener")?;
        Ok(http_get(admin, "/metrics").await?.1)
    }

    /// How often the relay woke chats that nothing else did.
    async fn looks(&self) -> Result<f64> {
        let metrics = self.metrics().await?;
        let value =
            metrics.lines().find_map(|line| line.strip_prefix("reliant_relay_rewakes_total{reason=\"stale\"} "));
        Ok(value.map_or(Ok(0.0), str::parse)?)
    }

    async fn nothing_unacknowledged(&self) -> Result<()> {
        eventually("an empty journal", PATIENCE, || async {
            let status = reliant_daemon::status(&self.daemon.state_dir)?.context("the daemon runs")?;
            Ok((status.connected && status.unacknowledged == 0).then_some(()))
        })
        .await
    }

    async fn ended_well(&self, chat: &mut ChatSession, turn: TurnId) -> Result<pb::ToolCall> {
        assert_eq!(chat.wait_turn(turn, PATIENCE).await?.status(), pb::TurnStatus::Succeeded);
        assert!(chat.verification().is_clean(), "{:?}", chat.verification());
        calls(&self.ada, turn).await?.pop().context("a call")
    }
}

/// The lid is closed: the kernel runs nothing of the daemon or of its tools. The hours are moved into the rows.
#[tokio::test(flavor = "multi_thread")]
async fn a_laptop_sleeps_for_an_hour_and_then_for_too_long() -> Result<()> {
    const MINUTE: Duration = Duration::from_secs(60);
    const HOUR: Duration = Duration::from_secs(3600);
    let desk = Desk::open().await?;
    let observer = Observer::connect(&desk.rig.database_url).await?;
    let command = "echo begun >> begun; sleep 1; echo woke";
    let (mut first, begun) = desk.runs(command).await?;
    file(&desk.daemon.root.join("begun")).await?;
    desk.daemon.process.pause();
    desk.rig.connected(&desk.ada, &desk.daemon.id, false).await?;
    let (mut second, waits) = desk.runs("echo was never sent").await?;
    // The relay finds within a minute that the daemon is away; from then on the turns' clocks stand.
    observer.age(MINUTE).await?;
    for turn in [begun, waits] {
        desk.turn_is(turn, pb::TurnStatus::WaitingDaemon).await?;
    }
    let looks = desk.looks().await?;
    observer.age(HOUR).await?;
    eventually("a look at both chats", PATIENCE, || async { Ok((desk.looks().await? >= looks + 2.0).then_some(())) })
        .await?;
    for turn in [begun, waits] {
        desk.turn_is(turn, pb::TurnStatus::WaitingDaemon).await?;
    }
    assert_eq!(calls(&desk.ada, begun).await?[0].status(), pb::ToolCallStatus::Running, "it may still come");
    desk.daemon.process.resume();
    let call = desk.ended_well(&mut first, begun).await?;
    assert_eq!((call.status(), call.result.as_str()), (pb::ToolCallStatus::Succeeded, "woke\n"));
    assert_eq!(desk.ended_well(&mut second, waits).await?.status(), pb::ToolCallStatus::Succeeded);
    assert_eq!(std::fs::read_to_string(desk.daemon.root.join("begun"))?, "begun\n");
    desk.nothing_unacknowledged().await?;

    // Longer than a sent call waits: the turn goes on without it, and what comes afterwards changes nothing.
    std::fs::remove_file(desk.daemon.root.join("begun"))?;
    let (mut third, given_up) = desk.runs(command).await?;
    file(&desk.daemon.root.join("begun")).await?;
    desk.daemon.process.pause();
    desk.rig.connected(&desk.ada, &desk.daemon.id, false).await?;
    observer.age(MINUTE).await?;
    desk.turn_is(given_up, pb::TurnStatus::WaitingDaemon).await?;
    observer.age(limits::TOOL_TIMEOUT + limits::TOOL_AWAY_MAX).await?;
    let call = desk.ended_well(&mut third, given_up).await?;
    assert_eq!(call.status(), pb::ToolCallStatus::OutcomeUnknown, "{call:?}");
    assert_eq!(call.unknown_cause(), pb::UnknownCause::DaemonAway);
    let counted = "reliant_tool_outcome_unknown_total{cause=\"daemon_away\"} 1";
    assert!(desk.metrics().await?.contains(counted), "it is not counted");
    desk.daemon.process.resume();
    eventually("the late result, counted", PATIENCE, || async {
        Ok(desk.metrics().await?.contains("reliant_tool_results_total{outcome=\"late\"}").then_some(()))
    })
    .await?;
    assert_eq!(calls(&desk.ada, given_up).await?[0].result, call.result, "a late result was applied");
    desk.nothing_unacknowledged().await?;
    Ok(())
}

/// RLIMIT_FSIZE of 0: the kernel refuses each write, as on a disk without room.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_without_room_refuses_calls_with_a_sentence_and_loses_no_result() -> Result<()> {
    let mut desk = Desk::open().await?;
    let go = desk.daemon.root.join("go");
    let (mut first, running) = desk.runs("echo 1 >> first; until [ -e go ]; do sleep 0.05; done; echo first").await?;
    file(&desk.daemon.root.join("first")).await?;
    desk.daemon.process.refuse_writes(true)?;
    std::fs::write(&go, "")?;
    let (mut second, refused) = desk.runs("echo 2 >> second; echo second").await?;
    let told = eventually("a sentence on what is waited for", PATIENCE, || async {
        Ok(calls(&desk.ada, refused).await?.into_iter().find(|call| !call.waiting_for.is_empty()))
    })
    .await?;
    assert_eq!(told.status(), pb::ToolCallStatus::Pending, "{told:?}");
    assert!(
        told.waiting_for.contains("journal cannot be written") && told.waiting_for.contains("free some disk space")
    );
    assert_eq!(calls(&desk.ada, running).await?[0].status(), pb::ToolCallStatus::Running, "its end is not on disk yet");
    assert!(desk.daemon.process.is_alive(), "a full disk ended the daemon");
    desk.daemon.process.refuse_writes(false)?;
    let call = desk.ended_well(&mut first, running).await?;
    assert_eq!((call.status(), call.result.as_str()), (pb::ToolCallStatus::Succeeded, "first\n"));
    let call = desk.ended_well(&mut second, refused).await?;
    assert_eq!((call.status(), call.result.as_str()), (pb::ToolCallStatus::Succeeded, "second\n"));
    for (name, line) in [("first", "1\n"), ("second", "2\n")] {
        assert_eq!(std::fs::read_to_string(desk.daemon.root.join(name))?, line, "it ran once");
    }
    desk.nothing_unacknowledged().await
}

/// The test sends what workers send: a network may deliver it late, twice, or behind the cancel.
#[tokio::test(flavor = "multi_thread")]
async fn a_dispatch_late_or_twice_or_after_its_cancel_starts_nothing() -> Result<()> {
    let desk = Desk::open().await?;
    let bus = Bus::connect(&BusConfig { url: desk.rig.nats.nats_url.clone(), ..BusConfig::default() }).await?;
    let listed = desk.rig.connected(&desk.ada, &desk.daemon.id, true).await?;
    let incarnation = reliant_daemon::status(&desk.daemon.state_dir)?.context("the daemon runs")?.incarnation;
    let subject = ToolSubject { daemon: desk.daemon.id.parse::<DaemonId>()? };
    let ask = async |request| {
        let request = pb::ToolRequest { request: Some(request) };
        bus.request(&subject, &request, limits::NATS_REQUEST_TIMEOUT).await?.reply.context("an answer")
    };
    let dispatch = async |call: ToolCallId, generation, command: &str| {
        let dispatch = pb::Dispatch {
            call_id: call.to_string(),
            generation,
            chat_id: reliant_types::ChatId::new().to_string(),
            user_id: desk.ada.user.to_string(),
            incarnation: incarnation.clone(),
            root_id: listed.roots[0].id.clone(),
            tool: "shell".into(),
            input_json: json!({ "command": command }).to_string(),
            timeout_ms: 20_000,
            turn_id: TurnId::new().to_string(),
            ..Default::default()
        };
        match ask(pb::tool_request::Request::Dispatch(dispatch)).await? {
            pb::tool_reply::Reply::Dispatch(reply) => anyhow::Ok(reply.outcome()),
            other => anyhow::bail!("{other:?}"),
        }
    };
    let cancel = async |call: ToolCallId, generation| {
        let cancel = pb::CancelCall { call_id: call.to_string(), generation };
        match ask(pb::tool_request::Request::Cancel(cancel)).await? {
            pb::tool_reply::Reply::Cancel(reply) => anyhow::Ok(reply.known),
            other => anyhow::bail!("{other:?}"),
        }
    };
    use pb::DispatchOutcome::{Attached, Finished, Started, Tombstone};
    let (twice, never, stopped) = (ToolCallId::new(), ToolCallId::new(), ToolCallId::new());
    let once = "echo run >> runs; sleep 0.5";
    assert_eq!(dispatch(twice, 2, once).await?, Started);
    assert_eq!(dispatch(twice, 2, once).await?, Attached, "twice");
    assert_eq!(dispatch(twice, 1, once).await?, Tombstone, "late: a newer one has overtaken it");
    // The workers know of no such call, and throw its result away; a newer dispatch gets it all the same.
    desk.nothing_unacknowledged().await?;
    eventually("the call's end", PATIENCE, || async {
        Ok((dispatch(twice, 3, once).await? == Finished).then_some(()))
    })
    .await?;
    assert_eq!(dispatch(twice, 2, once).await?, Tombstone);
    assert!(!cancel(never, 2).await?, "it was never seen");
    for generation in [1, 2] {
        assert_eq!(dispatch(never, generation, "echo never >> runs").await?, Tombstone, "after its cancel");
    }
    assert_eq!(dispatch(stopped, 1, "sleep 1; echo stopped >> runs").await?, Started);
    assert!(cancel(stopped, 1).await?);
    assert_ne!(dispatch(stopped, 1, "echo stopped >> runs").await?, Started);
    eventually("the end of the cancelled one", PATIENCE, || async {
        Ok((dispatch(stopped, 1, "echo stopped >> runs").await? == Finished).then_some(()))
    })
    .await?;
    assert_eq!(std::fs::read_to_string(desk.daemon.root.join("runs"))?, "run\n");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn children_that_outlive_the_daemon_die_with_the_next_one() -> Result<()> {
    let mut desk = Desk::open().await?;
    let journal = desk.daemon.state_dir.join("journal.redb");
    for (name, loses_journal, cause) in
        [("killed", false, pb::UnknownCause::ProcessDied), ("lost", true, pb::UnknownCause::JournalLost)]
    {
        // One in the shell's group, one in a session of its own.
        let command = format!("setsid sh -c 'echo $$ > {name}-far; sleep 300' & echo $$ > {name}-near; sleep 300");
        let (mut chat, turn) = desk.runs(&command).await?;
        let mut pids = Vec::new();
        for place in ["far", "near"] {
            pids.push(file(&desk.daemon.root.join(format!("{name}-{place}"))).await?);
        }
        call_that_is(&desk.ada, turn, pb::ToolCallStatus::Running).await?;
        desk.daemon.process.kill();
        assert!(pids.iter().all(|pid| runs(pid)), "they were to outlive it");
        if loses_journal {
            std::fs::remove_file(&journal)?;
        }
        desk.daemon.process.restart(PATIENCE).await?;
        let call = desk.ended_well(&mut chat, turn).await?;
        assert_eq!((call.status(), call.unknown_cause()), (pb::ToolCallStatus::OutcomeUnknown, cause), "{call:?}");
        let gateway = desk.rig.mesh.gateways[0].addresses().admin.context("a gateway has an admin listener")?;
        let replaced = metric(gateway, "reliant_daemon_journals_replaced_total").await?;
        assert_eq!(replaced, if loses_journal { 1.0 } else { 0.0 }, "{name}");
        eventually("the end of what was left over", PATIENCE, || async {
            Ok((!pids.iter().any(|pid| runs(pid))).then_some(()))
        })
        .await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_tells_of_itself_on_an_admin_listener() -> Result<()> {
    let mut desk = Desk::open().await?;
    let admin = async |desk: &Desk| {
        let state_dir = desk.daemon.state_dir.clone();
        eventually("the admin listener's address", PATIENCE, || async {
            Ok(reliant_daemon::status(&state_dir)?.and_then(|status| status.admin))
        })
        .await
    };
    let at = admin(&desk).await?;
    assert_eq!(http_get(at, "/health").await?.0, 200);
    assert_eq!(http_get(at, "/ready").await?.0, 200);
    let commits = metric(at, "reliant_journal_commit_seconds_count").await?;
    let (mut chat, turn) = desk.runs("echo ran").await?;
    desk.ended_well(&mut chat, turn).await?;
    let more = metric(at, "reliant_journal_commit_seconds_count").await? - commits;
    assert!(more >= 2.0, "begun and finished are synced one by one, and {more} commits were counted");

    // Its gateway is away: it runs, and says what it has not.
    desk.rig.mesh.gateways[0].kill();
    let missing = eventually("a daemon that is not ready", PATIENCE, || async {
        let (status, text) = http_get(at, "/ready").await?;
        Ok((status == 503).then_some(text))
    })
    .await?;
    let report: serde_json::Value = serde_json::from_str(&missing)?;
    assert_eq!(report["missing"], json!(["gateway"]), "{missing}");
    assert_eq!(http_get(at, "/health").await?.0, 200);
    desk.rig.mesh.gateways[0].restart(PATIENCE).await?;
    eventually("a daemon that is ready again", PATIENCE, || async {
        Ok((http_get(at, "/ready").await?.0 == 200).then_some(()))
    })
    .await?;
    assert!(metric(at, "reliant_daemon_reconnects_total").await? >= 1.0);
    Ok(())
}
