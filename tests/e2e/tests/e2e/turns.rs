//! Turns: plain, with tools, queued, repeated, cancelled, approved, with both wire formats.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use reliant_client::{Approvals, ClientUpdate, From};
use reliant_devstack::http_get;
use reliant_harness::{DaemonOptions, Rig, RigOptions, eventually};
use reliant_types::{ChatId, TurnId, pb};
use serde_json::json;

use crate::{
    daemons::{file, runs},
    scripts::{MODEL, PATIENCE, one_call, only_call, script, session},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_turn_streams_and_ends_on_both_wire_formats() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    for model in ["sim/text?tokens=60&rate=400", "sim-anthropic/text?tokens=60&rate=400", "sim/think"] {
        let mut session = session(&ada, model, pb::ChatMode::Ask).await?;
        let report = session.send_and_wait("hello", PATIENCE).await?;
        assert!(report.succeeded(), "{model}: {:?}", report.turn);
        assert!(report.verification.is_complete(), "{model}: {:?}", report.verification);
        assert!(report.deltas > 1, "{model}: the text came in one piece");
        assert!(!report.answer().is_empty(), "{model}");
        let usage = report.turn.usage.unwrap_or_default();
        assert!(usage.output_tokens > 0, "{model}: {usage:?}");
        assert_eq!(report.turn.trace_id.len(), 32, "{model}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shell_turn_goes_through_every_role() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut session = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let text = one_call("shell", json!({ "command": "echo to-stdout; echo to-stderr >&2; echo hi > made.txt" }));
    let report = session.send_and_wait(&text, PATIENCE).await?;
    assert!(report.succeeded(), "{:?}", report.turn);
    let call = only_call(&report);
    assert_eq!(call.status(), pb::ToolCallStatus::Succeeded, "{call:?}");
    assert_eq!(call.exit_code, Some(0));
    assert!(call.result.contains("to-stdout") && call.result.contains("to-stderr"), "{}", call.result);
    assert_eq!(std::fs::read_to_string(daemon.root.join("made.txt"))?, "hi\n");
    // The person's message, the model's call, the results, the answer.
    let roles: Vec<_> = report.messages.iter().map(pb::Message::role).collect();
    assert_eq!(roles, [pb::Role::User, pb::Role::Assistant, pb::Role::Tool, pb::Role::Assistant]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_calls_and_several_rounds_stay_in_order() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let shell = |command: &str| json!({ "name": "shell", "args": { "command": command } });
    let rounds = json!([
        { "tools": [shell("sleep 0.3; echo slow"), shell("echo quick"), shell("echo last")] },
        { "text": "once more", "tools": [shell("echo second round")] },
        { "text": "finished" },
    ]);
    let mut session = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let report = session.send_and_wait(&script(rounds), PATIENCE).await?;
    assert!(report.succeeded(), "{:?}", report.turn);
    assert!(report.verification.is_complete(), "{:?}", report.verification);
    assert_eq!(report.tool_calls.len(), 4);
    assert_eq!(report.answer(), "finished");
    let first = report.messages.iter().find(|m| m.role() == pb::Role::Tool).unwrap();
    let results: Vec<String> = first
        .blocks
        .iter()
        .map(|block| match &block.block {
            Some(pb::content_block::Block::ToolResult(result)) => result.content.trim().to_owned(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(results[0].contains("slow") && results[1].contains("quick") && results[2].contains("last"), "{results:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_calls_of_a_message_take_effect_in_their_order() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let call = |name: &str, args: serde_json::Value| json!({ "name": name, "args": args });
    let lines: String = (0..8).map(|n| format!("line {n}\n")).collect();
    let mut calls = vec![call("write_file", json!({ "path": "eight.txt", "content": lines }))];
    calls.extend((0..8).map(|n| {
        call(
            "edit_file",
            json!({ "path": "eight.txt", "old_string": format!("line {n}\n"), "new_string": format!("edited {n}\n") }),
        )
    }));
    calls.push(call("read_file", json!({ "path": "eight.txt" })));
    calls.push(call("shell", json!({ "command": "sleep 0.2; grep -c edited eight.txt > count.txt" })));
    calls.push(call("shell", json!({ "command": "cat count.txt" })));
    let rounds = json!([{ "tools": calls }, { "text": "finished" }]);
    let mut session = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let report = session.send_and_wait(&script(rounds), PATIENCE).await?;
    assert!(report.succeeded(), "{:?}", report.turn);
    let of = |index: i32| &report.tool_calls.iter().find(|call| call.index == index).unwrap().result;
    let read = of(9);
    assert_eq!(read.matches("edited").count(), 8, "a call reads what those before it wrote: {read}");
    assert_eq!(of(11).trim(), "8", "a command finds what the one before it made");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_sent_while_a_turn_runs_queues_and_the_same_id_twice_is_one() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let mut session = session(&ada, "sim/text?tokens=50&rate=50", pb::ChatMode::Ask).await?;
    let first = session.send_as("m-1", "one").await?;
    let second = session.send_as("m-2", "two").await?;
    let again = session.send_as("m-1", "one").await?;
    assert!(!first.duplicate && !second.duplicate && again.duplicate);
    assert_eq!(first.turn.as_ref().unwrap().id, again.turn.as_ref().unwrap().id);
    assert_eq!(second.turn.as_ref().unwrap().status(), pb::TurnStatus::Queued);
    let ids: Vec<TurnId> =
        [&first, &second].iter().map(|sent| sent.turn.as_ref().unwrap().id.parse().unwrap()).collect();
    for id in &ids {
        assert_eq!(session.wait_turn(*id, PATIENCE).await?.status(), pb::TurnStatus::Succeeded);
    }
    let messages = ada
        .client
        .list_messages(pb::ListMessagesRequest { chat_id: session.chat().to_string(), ..Default::default() })
        .await?
        .messages;
    assert_eq!(messages.len(), 4, "two questions, two answers");
    assert!(session.verification().is_complete(), "{:?}", session.verification());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_waits_for_its_approval_and_a_denial_reaches_the_model() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let touch = |name: &str| one_call("shell", json!({ "command": format!("touch {name}") }));

    let mut denied = session(&ada, MODEL, pb::ChatMode::Ask).await?.approvals(Approvals::Deny);
    let report = denied.send_and_wait(&touch("denied.txt"), PATIENCE).await?;
    assert!(report.succeeded(), "{:?}", report.turn);
    let call = only_call(&report);
    assert_eq!((call.status(), call.error_code.as_str()), (pb::ToolCallStatus::Failed, "APPROVAL_DENIED"));
    assert!(!daemon.root.join("denied.txt").exists());

    let mut approved = session(&ada, MODEL, pb::ChatMode::Ask).await?.approvals(Approvals::ApproveForSession);
    let report = approved.send_and_wait(&touch("approved.txt"), PATIENCE).await?;
    assert_eq!(only_call(&report).status(), pb::ToolCallStatus::Succeeded);
    assert!(daemon.root.join("approved.txt").exists());
    // Approved for the session: nobody is asked again.
    approved.approvals = Approvals::Leave;
    let report = approved.send_and_wait(&touch("again.txt"), PATIENCE).await?;
    assert_eq!(only_call(&report).status(), pb::ToolCallStatus::Succeeded);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn plan_mode_offers_only_read_only_tools() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let files = vec![("notes.txt", "the content\n".to_owned())];
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions { files, ..Default::default() }).await?;
    let mut session = session(&ada, MODEL, pb::ChatMode::Plan).await?;
    let report = session.send_and_wait(&one_call("read_file", json!({ "path": "notes.txt" })), PATIENCE).await?;
    assert!(only_call(&report).result.contains("the content"));
    let report = session.send_and_wait(&one_call("shell", json!({ "command": "true" })), PATIENCE).await?;
    let call = only_call(&report);
    assert_eq!(call.status(), pb::ToolCallStatus::Failed, "{call:?}");
    assert!(["TOOL_NOT_ALLOWED", "TOOL_UNKNOWN"].contains(&call.error_code.as_str()), "{call:?}");
    Ok(())
}

/// From the asking until nothing of what was cancelled goes on, the whole line long.
const CANCEL_MAX: Duration = Duration::from_secs(1);
const CANCEL_POLL: Duration = Duration::from_millis(5);

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_ends_the_turn_and_the_process_group_at_once() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut session = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    // The second one and its child, which inherits that, have to be killed.
    for (name, trap) in [("obeys", ""), ("ignores", "trap '' TERM; ")] {
        let command = format!("{trap}echo $$ > {name}-pid; sleep 300 & echo $! > {name}-child; wait");
        let sent = session.send(&one_call("shell", json!({ "command": command, "timeout_seconds": 600 }))).await?;
        let turn: TurnId = sent.turn.unwrap().id.parse()?;
        let mut pids = Vec::new();
        for of in ["pid", "child"] {
            pids.push(file(&daemon.root.join(format!("{name}-{of}"))).await?);
        }
        assert!(pids.iter().all(|pid| runs(pid)), "{name}: nothing is there to be cancelled");
        let begun = Instant::now();
        let cancelled = session.cancel(turn).await?;
        let answered = begun.elapsed();
        assert_eq!(cancelled.status(), pb::TurnStatus::Cancelled);
        while pids.iter().any(|pid| runs(pid)) && begun.elapsed() < PATIENCE {
            tokio::time::sleep(CANCEL_POLL).await;
        }
        let ended = begun.elapsed();
        eprintln!("{name}: the cancel was answered after {answered:?}, both processes had ended after {ended:?}");
        assert!(ended < CANCEL_MAX, "{name}: the processes ran on for {ended:?}");
    }
    // The chat goes on.
    let report = session.send_and_wait("hello again", PATIENCE).await?;
    assert!(report.succeeded(), "{:?}", report.turn);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_ends_a_streaming_answer_at_once() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    // Half a minute of text, if nobody stopped it.
    let mut session = session(&ada, "sim/text?tokens=3000&rate=100", pb::ChatMode::Ask).await?;
    let sent = session.send("a long text").await?;
    let turn: TurnId = sent.turn.unwrap().id.parse()?;
    let mut pieces = 0;
    while pieces < 10 {
        pieces += usize::from(matches!(session.next().await?, ClientUpdate::Delta(_)));
    }
    let admin = rig.mesh.workers[0].addresses().admin.context("a worker has an admin listener")?;
    let begun = Instant::now();
    assert_eq!(session.cancel(turn).await?.status(), pb::TurnStatus::Cancelled);
    let answered = begun.elapsed();
    let provider = eventually("the end of the call to the provider", PATIENCE, || async {
        let (_, text) = http_get(admin, "/metrics").await?;
        let call = |line: &str| line.starts_with("gen_ai_client_operation_duration_seconds_count");
        let cancelled = text.lines().any(|line| call(line) && line.contains("outcome=\"cancelled\""));
        Ok(cancelled.then(|| begun.elapsed()))
    });
    // The viewer is given twice as long as a piece may still come.
    let viewer = async {
        let (mut last, mut pieces) = (Duration::ZERO, 0);
        while let Ok(update) = tokio::time::timeout_at((begun + 2 * CANCEL_MAX).into(), session.next()).await {
            if matches!(update?, ClientUpdate::Delta(_)) {
                (last, pieces) = (begun.elapsed(), pieces + 1);
            }
        }
        anyhow::Ok((last, pieces))
    };
    let (provider, viewer) = tokio::join!(provider, viewer);
    let (provider, (last, pieces)) = (provider?, viewer?);
    eprintln!(
        "answered after {answered:?}, the provider left after {provider:?}; {pieces} more pieces, until {last:?}"
    );
    assert!(last < CANCEL_MAX, "pieces came for {last:?} after the cancel");
    assert!(provider < CANCEL_MAX, "the model wrote on for {provider:?}");
    assert!(session.verification().is_clean(), "{:?}", session.verification());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_viewer_who_comes_late_or_again_sees_everything_once() -> Result<()> {
    let rig = Rig::start(RigOptions { apis: 2, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let mut writer = session(&ada, "sim/text?tokens=200&rate=100", pb::ChatMode::Ask).await?;
    let chat: ChatId = writer.chat();
    let sent = writer.send("a long text").await?;
    let turn: TurnId = sent.turn.unwrap().id.parse()?;
    // Wait until text flows, then join through the other replica from the start and by snapshot.
    loop {
        if matches!(writer.next().await?, ClientUpdate::Delta(_)) {
            break;
        }
    }
    let config = reliant_client::ClientConfig::new(rig.mesh.api_url(1), ada.token.clone());
    let other = reliant_client::Client::connect(config).await?;
    let mut from_start = other.open_from(chat, From::Start).await?;
    let mut by_snapshot = other.open_from(chat, From::Snapshot).await?;
    for viewer in [&mut writer, &mut from_start, &mut by_snapshot] {
        assert_eq!(viewer.wait_turn(turn, PATIENCE).await?.status(), pb::TurnStatus::Succeeded);
        assert!(viewer.verification().is_complete(), "{:?}", viewer.verification());
        assert!(viewer.verification().bytes > 0);
    }
    Ok(())
}
