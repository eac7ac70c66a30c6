//! More than the servers can do at once: one user's load is that user's wait, and memory stays where it is.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _};
use reliant_devstack::{http_get, resident_kib};
use reliant_harness::{DaemonOptions, Person, Rig, RigOptions, eventually};
use reliant_types::{ChatId, TurnId, pb};
use serde_json::json;

use crate::scripts::{MODEL, PATIENCE, one_call, session};

/// Few slots and a model that takes its time: a crowd of turns is a backlog.
const SLOTS: &str = "[flows.worker]\nactivity_slots = 3\n";
const SLOW: &str = "sim/text?tokens=4&rate=100&ttft_ms=350";
const CROWD: usize = 120;
/// Senders at one time.
const SENDERS: usize = 6;
/// A process's growth while one user's crowd waits.
const GROWTH_MAX_KIB: u64 = 64 * 1024;

/// One message in each of so many new chats.
async fn crowd(person: &Person, model: &str, chats: usize) -> Result<Vec<(ChatId, TurnId)>> {
    let sends = futures::stream::iter(0..chats).map(|n| async move {
        let chat = person.chat(model, pb::ChatMode::Ask).await?.id;
        let request =
            pb::SendMessageRequest { chat_id: chat.clone(), client_message_id: format!("c{n}"), text: "go".into() };
        let turn = person.client.send_message(request).await?.turn.context("no turn")?;
        anyhow::Ok((chat.parse()?, turn.id.parse()?))
    });
    sends.buffer_unordered(SENDERS).try_collect().await
}

async fn status(person: &Person, turn: TurnId) -> Result<pb::TurnStatus> {
    let request = pb::GetTurnRequest { turn_id: turn.to_string(), ..Default::default() };
    Ok(person.client.get_turn(request).await?.turn.context("no turn")?.status())
}

async fn open_turns(person: &Person, turns: &[(ChatId, TurnId)]) -> Result<usize> {
    let statuses = futures::stream::iter(turns).map(|(_, turn)| status(person, *turn)).buffer_unordered(SENDERS);
    let ended = |status: &pb::TurnStatus| {
        matches!(status, pb::TurnStatus::Succeeded | pb::TurnStatus::Failed | pb::TurnStatus::Cancelled)
    };
    let statuses: Vec<_> = statuses.try_collect().await?;
    Ok(statuses.iter().filter(|status| !ended(status)).count())
}

/// The sum of a metric's samples whose line begins so.
pub(crate) async fn metric(address: std::net::SocketAddr, line: &str) -> Result<f64> {
    let (_, text) = http_get(address, "/metrics").await?;
    let of = |text: &str| text.rsplit_once(' ').and_then(|(_, value)| value.parse::<f64>().ok());
    Ok(text.lines().filter(|text| text.starts_with(line)).filter_map(of).sum())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_users_crowd_does_not_delay_anothers_first_turn() -> Result<()> {
    let rig = Rig::start(RigOptions { workers: 2, config: SLOTS.into(), ..RigOptions::default() }).await?;
    let (ada, eve) = (rig.person("ada").await?, rig.person("eve").await?);
    let mut warm = session(&eve, SLOW, pb::ChatMode::Ask).await?;
    assert!(warm.send_and_wait("hello", PATIENCE).await?.succeeded());
    let before: Vec<u64> = rig.mesh.workers.iter().map(|worker| resident_kib(worker.pid())).collect();

    let begun = Instant::now();
    let turns = crowd(&ada, SLOW, CROWD).await?;
    let backlog = open_turns(&ada, &turns).await?;
    assert!(backlog > CROWD / 2, "only {backlog} of {CROWD} turns wait: nothing is crowded");
    let admin = rig.mesh.workers[0].addresses().admin.context("a worker has an admin listener")?;
    let gauged = eventually("the gauge of held turns", Duration::from_secs(5), || async {
        let held = metric(admin, "reliant_turns_held").await?;
        Ok((held > CROWD as f64 / 3.0).then_some(held))
    })
    .await?;

    // Eve comes to a full house: her first turns, one after another.
    let mut waits = Vec::new();
    for n in 0..3 {
        let mut chat = session(&eve, SLOW, pb::ChatMode::Ask).await?;
        let report = chat.send_and_wait(&format!("first {n}"), PATIENCE).await?;
        assert!(report.succeeded(), "{:?}", report.turn);
        waits.push(report.ended_at - report.sent_at);
    }
    let left = open_turns(&ada, &turns).await?;
    // A turn takes 0.4 s; ada's others would take much longer than eve waited.
    assert!(left > CROWD / 4, "ada's crowd was gone before eve came: {left}");
    assert!(waits.iter().all(|wait| *wait < Duration::from_secs(5)), "eve waited {waits:?} behind {backlog} turns");

    eventually("the end of all of ada's turns", Duration::from_secs(120), || async {
        Ok((open_turns(&ada, &turns).await? == 0).then_some(()))
    })
    .await?;
    for (_, turn) in &turns {
        assert_eq!(status(&ada, *turn).await?, pb::TurnStatus::Succeeded);
    }
    let took = begun.elapsed();
    let grown =
        rig.mesh.workers.iter().zip(&before).map(|(worker, before)| resident_kib(worker.pid()).saturating_sub(*before));
    let grown: Vec<u64> = grown.collect();
    eprintln!(
        "eve waited {waits:?} behind {left} to {backlog} turns ({gauged} held); {CROWD} took {took:?}; workers grew by {grown:?} KiB"
    );
    assert!(grown.iter().all(|grown| *grown < GROWTH_MAX_KIB), "workers grew by {grown:?} KiB");
    let mut held = 0.0;
    for worker in &rig.mesh.workers {
        let admin = worker.addresses().admin.context("a worker has an admin listener")?;
        held += metric(admin, "reliant_turn_phase_seconds_count{phase=\"held\"}").await?;
    }
    assert!(held > CROWD as f64 / 2.0, "{held} rounds say that they were held");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn held_turns_outlive_the_workers_that_would_place_them() -> Result<()> {
    let mut rig = Rig::start(RigOptions { workers: 2, config: SLOTS.into(), ..RigOptions::default() }).await?;
    let ada = rig.person("ada").await?;
    let turns = crowd(&ada, SLOW, 60).await?;
    // One is cancelled while it is held, and one's chat is archived.
    let mut queued = Vec::new();
    for (chat, turn) in &turns {
        if status(&ada, *turn).await? == pb::TurnStatus::Queued {
            queued.push((*chat, *turn));
        }
    }
    let [.., (archived, _), (_, cancelled)] = queued[..] else { panic!("nothing waits: {}", queued.len()) };
    ada.client.cancel_turn(pb::CancelTurnRequest { turn_id: cancelled.to_string() }).await?;
    assert_eq!(status(&ada, cancelled).await?, pb::TurnStatus::Cancelled);
    ada.client.archive_chat(pb::ArchiveChatRequest { chat_id: archived.to_string(), archived: true }).await?;
    for n in 0..2 {
        let worker = &mut rig.mesh.workers[n];
        worker.kill();
        worker.restart(PATIENCE).await?;
    }
    eventually("the end of all turns", Duration::from_secs(90), || async {
        Ok((open_turns(&ada, &turns).await? == 0).then_some(()))
    })
    .await?;
    for (_, turn) in &turns {
        let wanted = if *turn == cancelled { pb::TurnStatus::Cancelled } else { pb::TurnStatus::Succeeded };
        assert_eq!(status(&ada, *turn).await?, wanted);
    }
    Ok(())
}

/// Of one user, and open at one time. With a model that is this slow, hardly any of them ends meanwhile.
const THOUSAND: usize = 1000;
const SLOWER: &str = "sim/text?tokens=4&rate=100&ttft_ms=3000";
/// Some are at work, and some end before the last one is sent.
const SENT_ABOVE: usize = 100;
const FIRST_MAX: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_held_turns_do_not_delay_anothers_first_turn_and_are_cancelled_like_any() -> Result<()> {
    let rig = Rig::start(RigOptions { workers: 2, config: SLOTS.into(), ..RigOptions::default() }).await?;
    let (ada, eve) = (rig.person("ada").await?, rig.person("eve").await?);
    let mut warm = session(&eve, SLOW, pb::ChatMode::Ask).await?;
    assert!(warm.send_and_wait("hello", PATIENCE).await?.succeeded());

    let roles = || rig.mesh.apis.iter().chain(&rig.mesh.workers).chain(&rig.mesh.gateways);
    let resident: Vec<u64> = roles().map(|role| resident_kib(role.pid())).collect();
    let begun = Instant::now();
    let turns = crowd(&ada, SLOWER, THOUSAND + SENT_ABOVE).await?;
    let sent = begun.elapsed();
    let admin = rig.mesh.workers[0].addresses().admin.context("a worker has an admin listener")?;
    let held = || metric(admin, "reliant_turns_held");
    let before = eventually("a thousand held turns", Duration::from_secs(5), || async {
        Ok(Some(held().await?).filter(|held| *held >= THOUSAND as f64))
    })
    .await?;
    let mut waits = Vec::new();
    for n in 0..3 {
        let mut chat = session(&eve, SLOW, pb::ChatMode::Ask).await?;
        let report = chat.send_and_wait(&format!("first {n}"), PATIENCE).await?;
        assert!(report.succeeded(), "{:?}", report.turn);
        waits.push(report.ended_at - report.sent_at);
    }
    let after = held().await?;
    eprintln!("eve waited {waits:?} behind {before} to {after} held turns, sent in {sent:?}");
    assert!(after > THOUSAND as f64 * 0.9, "ada's crowd was gone before eve came: {after}");
    assert!(waits.iter().all(|wait| *wait < FIRST_MAX), "eve waited {waits:?} behind {before} held turns");

    let begun = Instant::now();
    let cancels = futures::stream::iter(&turns).map(|(_, turn)| async {
        let request = pb::CancelTurnRequest { turn_id: turn.to_string() };
        let turn = ada.client.cancel_turn(request).await?.turn.context("no turn")?;
        anyhow::Ok(turn.status())
    });
    let ends: Vec<_> = cancels.buffer_unordered(SENDERS).try_collect().await?;
    let cancelled = ends.iter().filter(|status| **status == pb::TurnStatus::Cancelled).count();
    let succeeded = ends.iter().filter(|status| **status == pb::TurnStatus::Succeeded).count();
    eprintln!("{cancelled} were cancelled in {:?}, {succeeded} had ended", begun.elapsed());
    assert_eq!(cancelled + succeeded, turns.len(), "what was accepted ends in no third way");
    eventually("nobody who is held", PATIENCE, || async { Ok((held().await? == 0.0).then_some(())) }).await?;
    let mut chat = session(&ada, SLOW, pb::ChatMode::Ask).await?;
    // Temporal hears of each of the thousand before it hears of this one.
    assert!(chat.send_and_wait("after all of that", 3 * PATIENCE).await?.succeeded());
    for (role, before) in roles().zip(&resident) {
        let grown = resident_kib(role.pid()).saturating_sub(*before);
        eprintln!("{} grew by {grown} KiB", role.name());
        assert!(grown < GROWTH_MAX_KIB, "{} grew by {grown} KiB", role.name());
    }
    Ok(())
}

const WAVES: usize = 3;
const WAVE: usize = 80;
/// Of what a process had after the first wave.
const WAVE_GROWTH_MAX: f64 = 0.10;
/// Pages that an allocator keeps or not, by chance.
const WAVE_GROWTH_MAX_KIB: u64 = 4 * 1024;

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_flat_over_waves_of_turns() -> Result<()> {
    let rig = Rig::start(RigOptions { workers: 2, ..RigOptions::default() }).await?;
    let ada = rig.person("ada").await?;
    let _laptop = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let roles: Vec<_> = rig.mesh.apis.iter().chain(&rig.mesh.workers).chain(&rig.mesh.gateways).collect();
    let mut seen = Vec::new();
    for wave in 0..WAVES {
        let begun = Instant::now();
        let turns = futures::stream::iter(0..WAVE).map(|_| async {
            let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
            let report = chat.send_and_wait(&one_call("shell", json!({ "command": "seq 500" })), PATIENCE).await?;
            anyhow::ensure!(report.succeeded(), "{:?}", report.turn);
            Ok(())
        });
        let _: Vec<()> = turns.buffer_unordered(SENDERS).try_collect().await?;
        let resident: Vec<u64> = roles.iter().map(|role| resident_kib(role.pid())).collect();
        eprintln!("wave {wave}: {WAVE} turns in {:?}, then {resident:?} KiB", begun.elapsed());
        seen.push(resident);
    }
    for (n, role) in roles.iter().enumerate() {
        let (first, last) = (seen[0][n], seen[WAVES - 1][n]);
        let most = first + (first as f64 * WAVE_GROWTH_MAX) as u64 + WAVE_GROWTH_MAX_KIB;
        assert!(first > 0 && last <= most, "{} grew from {first} to {last} KiB", role.name());
    }
    Ok(())
}
