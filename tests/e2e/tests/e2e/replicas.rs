//! Several of each role: whoever takes a step, viewers see everything once and in order, and nothing that waits is lost.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicUsize, Ordering},
};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _};
use reliant_client::{ChatSession, Client, ClientConfig, ClientUpdate, From};
use reliant_devstack::Tools;
use reliant_harness::{DaemonOptions, Person, Rig, RigOptions, eventually, tools_dir, within};
use reliant_types::{ChatId, TurnId, pb};
use serde_json::json;

use crate::scripts::{MODEL, PATIENCE, one_call, script, session};

/// The same person at another replica.
async fn at(rig: &Rig, person: &Person, api: usize) -> Result<Client> {
    Ok(Client::connect(ClientConfig::new(rig.mesh.api_url(api), person.token.clone())).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_viewer_at_one_replica_sees_what_is_sent_at_the_other() -> Result<()> {
    let rig = Rig::start(RigOptions { apis: 2, workers: 2, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let other = at(&rig, &ada, 1).await?;
    let mut senders = Vec::new();
    let mut viewers = Vec::new();
    for _ in 0..4 {
        let sender = session(&ada, MODEL, pb::ChatMode::Auto).await?;
        viewers.push(other.open_from(sender.chat(), From::Start).await?);
        senders.push(sender);
    }
    let rounds = json!([
        { "text": "first {round}", "rate": 300,
          "tools": [{ "name": "shell", "repeat": 2, "args": { "command": "for i in 1 2 3; do echo {index} $i; sleep 0.05; done" } }] },
        { "tokens": 60, "rate": 300 },
    ]);
    let mut turns: HashMap<ChatId, Vec<String>> = HashMap::new();
    for round in 0..3 {
        for sender in &senders {
            let sent = sender.send(&format!("{round} {}", script(rounds.clone()))).await?;
            turns.entry(sender.chat()).or_default().push(sent.turn.context("no turn")?.id);
        }
    }
    let watched = viewers.into_iter().chain(senders).map(|session| {
        let turns = turns[&session.chat()].clone();
        async move { within("the end of all turns", PATIENCE, watch(session, turns)).await? }
    });
    let mut viewers = futures::future::try_join_all(watched).await?;
    for viewer in &viewers {
        let seen = viewer.verification();
        assert!(seen.is_complete() && seen.bytes > 0, "{seen:?}");
    }
    let senders = viewers.split_off(viewers.len() / 2);
    // Both see the same.
    for (viewer, sender) in viewers.iter().zip(&senders) {
        let texts = |session: &ChatSession| -> Vec<(i32, String)> {
            session
                .view()
                .messages
                .values()
                .map(|message| (message.ordinal, reliant_client::text_of(message)))
                .collect()
        };
        assert_eq!(texts(viewer), texts(sender));
    }
    Ok(())
}

/// Reads on until these turns have ended.
async fn watch(mut session: ChatSession, turns: Vec<String>) -> Result<ChatSession> {
    let ended = |session: &ChatSession, turn: &String| {
        session.view().turns.get(turn).is_some_and(|turn| turn.status() == pb::TurnStatus::Succeeded)
    };
    while !turns.iter().all(|turn| ended(&session, turn)) {
        session.next().await?;
    }
    Ok(session)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_viewer_goes_on_at_the_other_replica_where_it_was() -> Result<()> {
    let rig = Rig::start(RigOptions { apis: 2, workers: 2, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let mut writer = session(&ada, "sim/text?tokens=300&rate=100", pb::ChatMode::Ask).await?;
    let chat: ChatId = writer.chat();
    let sent = writer.send("a long text").await?;
    let turn: TurnId = sent.turn.context("no turn")?.id.parse()?;
    let (first, second) = (at(&rig, &ada, 0).await?, at(&rig, &ada, 1).await?);
    let mut seen: HashMap<i64, u32> = HashMap::new();
    let mut note = |update: &ClientUpdate| {
        if let ClientUpdate::Event(event) = update {
            *seen.entry(event.seq).or_default() += 1;
        }
    };
    let mut viewer = first.open_from(chat, From::Start).await?;
    let mut text = 0;
    while text < 200 {
        let update = viewer.next().await?;
        note(&update);
        if let ClientUpdate::Delta(delta) = update {
            text += delta.piece.len();
        }
    }
    let before = viewer.view().last_seq;
    assert!(viewer.verification().is_clean(), "{:?}", viewer.verification());
    // In the middle of the text, with its cursor and what it has of the text.
    viewer.subscription().go_on_at(second);
    loop {
        match viewer.next().await? {
            ClientUpdate::Reconnected => break,
            update => note(&update),
        }
    }
    let ended = loop {
        let update = viewer.next().await?;
        note(&update);
        if let Some(turn) = viewer.view().turns.get(&turn.to_string()).filter(|turn| turn.ended_at.is_some()) {
            break turn.clone();
        }
    };
    assert_eq!(ended.status(), pb::TurnStatus::Succeeded, "{ended:?}");
    let verification = viewer.verification();
    assert!(verification.is_complete() && verification.reconnects == 1, "{verification:?}");
    assert_eq!(writer.wait_turn(turn, PATIENCE).await?, ended);
    let last = viewer.view().last_seq;
    assert!(last > before, "what came after the cursor came at the other replica");
    // The first ones came while the stream was opened.
    let first = seen.keys().min().copied().unwrap_or_default();
    let expected: HashMap<i64, u32> = (first..=last.unwrap_or_default()).map(|seq| (seq, 1)).collect();
    assert_eq!(seen, expected, "every event once");
    assert!(Some(first) <= before, "events on both sides of the move");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tools_output_is_whole_for_who_watches_it_and_for_who_comes_in_the_middle() -> Result<()> {
    let rig = Rig::start(RigOptions { apis: 2, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let chat: ChatId = session(&ada, MODEL, pb::ChatMode::Auto).await?.chat();
    let (first, second) = (at(&rig, &ada, 0).await?, at(&rig, &ada, 1).await?);
    let mut watching = first.open_from(chat, From::Start).await?;
    let command = "for i in $(seq 60); do echo line $i; sleep 0.05; done";
    let expected: String = (1..=60).map(|n| format!("line {n}\n")).collect();
    let sent = watching.send(&one_call("shell", json!({ "command": command }))).await?;
    let turn: TurnId = sent.turn.context("no turn")?.id.parse()?;
    let begun = async {
        while output(&watching).is_none_or(|bytes| bytes.len() < expected.len() / 3) {
            watching.next().await?;
        }
        anyhow::Ok(())
    };
    within("a third of the output", PATIENCE, begun).await??;
    // The other replica had nobody who followed this chat: it has to ask for what was printed before.
    let mut late = second.open_from(chat, From::Snapshot).await?;
    let calls = late.view().tool_calls_of(&turn.to_string());
    assert!(calls.iter().any(|call| call.status() == pb::ToolCallStatus::Running), "it came too late: {calls:?}");
    for (who, viewer) in [("who watched", &mut watching), ("who came in the middle", &mut late)] {
        assert_eq!(viewer.wait_turn(turn, PATIENCE).await?.status(), pb::TurnStatus::Succeeded, "{who}");
        let seen = String::from_utf8_lossy(output(viewer).unwrap_or_default()).into_owned();
        assert_eq!(seen, expected, "{who}: {:?}", viewer.verification());
        assert!(viewer.verification().is_complete(), "{who}: {:?}", viewer.verification());
    }
    Ok(())
}

/// What is known of the one call's stdout.
fn output(session: &ChatSession) -> Option<&[u8]> {
    let call = session.view().tool_calls.keys().next()?;
    session.view().live_block(call, 0).map(|live| live.bytes.as_slice())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approval_waits_while_api_and_worker_are_restarted() -> Result<()> {
    let mut rig = Rig::start(RigOptions { apis: 2, workers: 2, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut chat = session(&ada, MODEL, pb::ChatMode::Ask).await?;
    let sent = chat.send(&one_call("shell", json!({ "command": "echo ran >> runs" }))).await?;
    let turn: TurnId = sent.turn.context("no turn")?.id.parse()?;
    let asked = eventually("the approval", PATIENCE, || async {
        let request = pb::ListApprovalsRequest { chat_id: chat.chat().to_string(), ..Default::default() };
        Ok(ada.client.list_approvals(request).await?.approvals.pop())
    })
    .await?;
    for process in rig.mesh.apis.iter_mut().chain(&mut rig.mesh.workers) {
        process.kill();
    }
    for process in rig.mesh.apis.iter_mut().chain(&mut rig.mesh.workers) {
        process.restart(PATIENCE).await?;
    }
    assert!(!daemon.root.join("runs").exists(), "nobody allowed it yet");
    // Decided at the other replica than the one it was asked at.
    let other = at(&rig, &ada, 1).await?;
    let listed = other.list_approvals(pb::ListApprovalsRequest::default()).await?.approvals;
    assert_eq!(listed.iter().map(|approval| &approval.id).collect::<Vec<_>>(), [&asked.id], "it still waits");
    let decision = pb::DecideApprovalRequest {
        approval_id: asked.id.clone(),
        approve: true,
        scope: pb::ApprovalScope::Once as i32,
    };
    other.decide_approval(decision).await?;
    let ended = chat.wait_turn(turn, PATIENCE).await?;
    assert_eq!(ended.status(), pb::TurnStatus::Succeeded, "{ended:?}");
    assert!(chat.verification().is_clean(), "{:?}", chat.verification());
    assert_eq!(std::fs::read_to_string(daemon.root.join("runs"))?, "ran\n", "once");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_that_never_idles_goes_on_in_new_runs_and_loses_nothing() -> Result<()> {
    let env = vec![("RELIANT_FLOWS__RUN_TURNS".to_owned(), "3".to_owned())];
    let rig = Rig::start(RigOptions { workers: 2, env, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    // All at once: there is always a next turn.
    let mut turns = Vec::new();
    for n in 0..10 {
        let sent = chat.send(&one_call("shell", json!({ "command": format!("echo turn {n}") }))).await?;
        turns.push(sent.turn.context("no turn")?.id.parse::<TurnId>()?);
    }
    for turn in &turns {
        let ended = chat.wait_turn(*turn, PATIENCE).await?;
        assert_eq!(ended.status(), pb::TurnStatus::Succeeded, "{ended:?}");
    }
    assert!(chat.verification().is_complete(), "{:?}", chat.verification());
    let runs = eventually("the list of runs", PATIENCE, || async {
        let runs = runs_of(&rig, chat.chat()).await?;
        Ok(runs.iter().any(|status| status.contains("CONTINUED_AS_NEW")).then_some(runs))
    })
    .await?;
    let continued = runs.iter().filter(|status| status.contains("CONTINUED_AS_NEW")).count();
    assert!(continued >= 3, "10 turns, at most 3 in a run: {runs:?}");
    Ok(())
}

/// The states of all runs of a chat's workflow, as Temporal's own command says them.
async fn runs_of(rig: &Rig, chat: ChatId) -> Result<Vec<String>> {
    let address = rig.temporal_address.trim_start_matches("http://");
    let output = tokio::process::Command::new(Tools::new(tools_dir()).temporal()?)
        .args(["workflow", "list", "--address", address, "--output", "json", "--query"])
        .arg(format!("WorkflowId = 'chat:{chat}'"))
        .kill_on_drop(true)
        .output()
        .await?;
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let runs: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let runs = runs.as_array().context("a list of runs")?;
    Ok(runs.iter().map(|run| run["status"].to_string()).collect())
}

const CHATS: usize = 150;
const ASKERS: usize = 8;

/// Whoever is not answered asks again, and what was committed before an api died is not made twice.
#[tokio::test(flavor = "multi_thread")]
async fn requests_for_chats_outlive_the_api_and_make_one_each() -> Result<()> {
    let mut rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let made = AtomicUsize::new(0);
    let ask = futures::stream::iter(0..CHATS).map(|_| async {
        ada.chat(MODEL, pb::ChatMode::Ask).await?;
        made.fetch_add(1, Ordering::Relaxed);
        anyhow::Ok(())
    });
    let ask = ask.buffer_unordered(ASKERS).try_collect::<Vec<()>>();
    let harm = async {
        let reached = async |count: usize| {
            eventually(&format!("{count} chats"), PATIENCE, || async {
                Ok((made.load(Ordering::Relaxed) >= count).then_some(()))
            })
            .await
        };
        for part in [1, 2, 3] {
            reached(part * CHATS / 4).await?;
            rig.mesh.apis[0].kill();
            rig.mesh.apis[0].restart(PATIENCE).await?;
        }
        anyhow::Ok(())
    };
    let (asked, harmed) = tokio::join!(ask, harm);
    asked?;
    harmed?;
    let page = pb::ListChatsRequest { page_size: 200, ..Default::default() };
    assert_eq!(ada.client.list_chats(page).await?.chats.len(), CHATS);
    Ok(())
}
