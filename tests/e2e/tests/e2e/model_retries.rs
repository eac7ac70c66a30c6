//! A provider that cannot answer: the model is asked again until the turn's deadline, the person is told, and can cancel.

use std::time::Duration;

use anyhow::{Result, ensure};
use reliant_client::{ChatSession, ClientUpdate};
use reliant_harness::{Person, Rig, RigOptions};
use reliant_types::{TurnId, pb};
use tokio::time::Instant;

use crate::scripts::{PATIENCE, session};

/// Sends, and returns when the viewer was told that the model is asked again.
async fn waiting(person: &Person, model: &str) -> Result<(ChatSession, TurnId, pb::Turn, pb::ChatEvent)> {
    let mut chat = session(person, model, pb::ChatMode::Ask).await?;
    let turn: TurnId = chat.send(&format!("hello {model}")).await?.turn.unwrap().id.parse()?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        ensure!(Instant::now() < deadline, "nobody said that {model} is asked again");
        if let ClientUpdate::Event(event) = chat.next().await?
            && let Some(pb::chat_event::Kind::TurnChanged(changed)) = &event.kind
            && !changed.waiting_for.is_empty()
        {
            let changed = changed.clone();
            return Ok((chat, turn, changed, event));
        }
    }
}

fn seconds_until(event: &pb::ChatEvent, turn: &pb::Turn) -> i64 {
    turn.retry_at.as_ref().map_or(0, |at| at.seconds) - event.time.as_ref().map_or(0, |at| at.seconds)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_comes_back_answers_however_often_it_failed() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    // Past the workflow's own timers: the relay wakes.
    let (mut long, long_turn, told, event) = waiting(&ada, "sim/fault?kind=429&times=1&retry_after=16").await?;
    assert!((16..=18).contains(&seconds_until(&event, &told)), "{told:?} at {event:?}");

    let (mut often, turn, told, _) = waiting(&ada, "sim/fault?kind=529&times=20&retry_after=0.2").await?;
    assert_eq!(told.status(), pb::TurnStatus::Running);
    assert!(told.waiting_for.contains("status 529"), "{told:?}");
    let ended = often.wait_turn(turn, PATIENCE).await?;
    assert_eq!((ended.status(), ended.waiting_for.as_str()), (pb::TurnStatus::Succeeded, ""), "{ended:?}");
    assert!(often.verification().is_clean(), "{:?}", often.verification());

    // A wait is not in the way of a cancel.
    let (mut cancelled, turn, told, event) = waiting(&ada, "sim/fault?kind=503&times=1000&retry_after=600").await?;
    assert!(seconds_until(&event, &told) >= 600, "{told:?}");
    let asked = Instant::now();
    ada.client.cancel_turn(pb::CancelTurnRequest { turn_id: turn.to_string() }).await?;
    let ended = cancelled.wait_turn(turn, PATIENCE).await?;
    assert_eq!(ended.status(), pb::TurnStatus::Cancelled, "{ended:?}");
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());

    let ended = long.wait_turn(long_turn, PATIENCE).await?;
    assert_eq!(ended.status(), pb::TurnStatus::Succeeded, "{ended:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_stays_away_fails_the_turn_at_its_deadline() -> Result<()> {
    let config = "[api.limits]\nturn_deadline = \"4s\"\n".to_owned();
    let rig = Rig::start(RigOptions { config, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let mut chat = session(&ada, "sim/fault?kind=529&times=1000&retry_after=0.5", pb::ChatMode::Ask).await?;
    let report = chat.send_and_wait("are you there", PATIENCE).await?;
    assert_eq!(report.turn.status(), pb::TurnStatus::Failed, "{:?}", report.turn);
    assert_eq!(report.turn.error_code, "PROVIDER_UNAVAILABLE", "{:?}", report.turn);
    let said = &report.turn.error_message;
    assert!(said.contains("within the turn's time") && said.contains("status 529"), "{said}");
    assert!((3..20).contains(&report.total().as_secs()), "{:?}", report.total());
    // What will not be better later is not asked again.
    let mut chat = session(&ada, "sim/fault?kind=401&times=1000", pb::ChatMode::Ask).await?;
    let report = chat.send_and_wait("and with this key", PATIENCE).await?;
    assert_eq!(report.turn.error_code, "PROVIDER_REJECTED", "{:?}", report.turn);
    assert!(report.total() < Duration::from_secs(3), "{:?}", report.total());
    Ok(())
}
