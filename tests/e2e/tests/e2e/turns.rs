//! Turns: plain, with tools, queued, repeated, cancelled, approved, with both wire formats.

use std::time::Duration;

use anyhow::Result;
use reliant_client::{Approvals, ClientUpdate, From};
use reliant_harness::{DaemonOptions, Rig, RigOptions, eventually};
use reliant_types::{ChatId, TurnId, pb};
use serde_json::json;

use crate::scripts::{MODEL, PATIENCE, one_call, only_call, script, session};

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_turn_streams_and_ends_on_both_wire_formats() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    for model in ["sim/text?tokens=60&rate=400", "sim-anthropic/text?tokens=60&rate=400", "sim/think"] {
        let mut session = session(&ada, model, pb::ChatMode::Ask).await?;
        let report = session.send_and_wait("hello", PATIENCE).await?;
        assert!(report.succeeded(), "{model}: {:?}", report.turn);
        assert!(report.verification.is_clean(), "{model}: {:?}", report.verification);
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
    assert!(report.verification.is_clean(), "{:?}", report.verification);
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
    assert!(session.verification().is_clean());
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

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_ends_the_turn_and_the_process_at_once() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut session = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let command = "echo $$ > pid; sleep 300";
    let sent = session.send(&one_call("shell", json!({ "command": command, "timeout_seconds": 600 }))).await?;
    let turn: TurnId = sent.turn.unwrap().id.parse()?;
    let pid = eventually("the command's pid", PATIENCE, || async {
        Ok(std::fs::read_to_string(daemon.root.join("pid")).ok().filter(|text| text.ends_with('\n')))
    })
    .await?;
    let cancelled = session.cancel(turn).await?;
    assert_eq!(cancelled.status(), pb::TurnStatus::Cancelled);
    eventually("the end of the process", Duration::from_secs(5), || async {
        Ok((!std::path::Path::new(&format!("/proc/{}", pid.trim())).exists()).then_some(()))
    })
    .await?;
    // The chat goes on.
    let report = session.send_and_wait("hello again", PATIENCE).await?;
    assert!(report.succeeded(), "{:?}", report.turn);
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
        assert!(viewer.verification().is_clean(), "{:?}", viewer.verification());
        assert!(viewer.verification().bytes > 0);
    }
    Ok(())
}
