//! More than the servers can do at once: one user's load is that user's wait, and memory stays where it is.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _};
use reliant_devstack::{http_get, resident_kib};
use reliant_harness::{Person, Rig, RigOptions, eventually};
use reliant_types::{ChatId, Code, Failure, TurnId, pb};

use crate::scripts::{PATIENCE, session};

/// Few slots and a model that takes its time: a crowd of turns is a backlog.
const SLOTS: &str = "[flows.worker]\nactivity_slots = 3\n";
const SLOW: &str = "sim/text?tokens=4&rate=100&ttft_ms=350";
const CROWD: usize = 120;
/// Senders at one time.
const SENDERS: usize = 6;
/// A worker's growth while one user's crowd waits.
const GROWTH_MAX_KIB: u64 = 64 * 1024;

/// A server that is busy says when to try again; a chat too many does no harm.
async fn new_chat(person: &Person) -> Result<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let error = match person.chat(SLOW, pb::ChatMode::Ask).await {
            Ok(chat) => return Ok(chat.id),
            Err(error) => error,
        };
        let again = error.downcast_ref::<Failure>().filter(|failure| failure.code == Code::Unavailable);
        match again.and_then(|failure| failure.retry_after) {
            Some(delay) if Instant::now() < deadline => tokio::time::sleep(delay).await,
            _ => return Err(error),
        }
    }
}

/// One message in each of so many new chats.
async fn crowd(person: &Person, chats: usize) -> Result<Vec<(ChatId, TurnId)>> {
    let sends = futures::stream::iter(0..chats).map(|n| async move {
        let chat = new_chat(person).await?;
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
    let turns = crowd(&ada, CROWD).await?;
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
    let turns = crowd(&ada, 60).await?;
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
