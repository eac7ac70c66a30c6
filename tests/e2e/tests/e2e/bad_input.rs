//! What people and providers get wrong: a clear error with a code, and nothing lost or leaked.

use std::time::Duration;

use anyhow::Result;
use reliant_client::{Client, ClientConfig};
use reliant_devstack::resident_kib;
use reliant_harness::{DaemonOptions, Rig, RigOptions, eventually};
use reliant_types::{ChatId, Code, Failure, pb};
use serde_json::json;

use crate::scripts::{MODEL, PATIENCE, one_call, only_call, session};

#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T, Failure>, code: Code) {
    let failure = answer.expect_err("it should have been refused");
    assert_eq!(failure.code, code, "{failure:?}");
    assert!(failure.message.split(' ').count() >= 4, "no sentence: {failure:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_other_peoples_things() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let (ada, eve) = (rig.person("ada").await?, rig.person("eve").await?);
    let list = pb::ListChatsRequest::default;
    let with = |token: &str| Client::lazy(ClientConfig::new(rig.mesh.api_url(0), token));
    refused(with("nonsense")?.list_chats(list()).await, Code::TokenInvalid);
    refused(with(&rig.expired_token("ada")?)?.list_chats(list()).await, Code::TokenExpired);
    let mut nobody = ClientConfig::new(rig.mesh.api_url(0), "");
    nobody.token = reliant_client::Token::None;
    refused(Client::lazy(nobody)?.list_chats(list()).await, Code::TokenMissing);

    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let chat = ada.chat(MODEL, pb::ChatMode::Ask).await?;
    let id = chat.id.clone();
    let send = pb::SendMessageRequest { chat_id: id.clone(), client_message_id: "x".into(), text: "hi".into() };
    let sent = ada.client.send_message(send.clone()).await?;
    let turn_id = sent.turn.unwrap().id;
    refused(eve.client.get_chat(pb::GetChatRequest { chat_id: id.clone() }).await, Code::NotFound);
    refused(eve.client.send_message(send).await, Code::NotFound);
    refused(
        eve.client.get_turn(pb::GetTurnRequest { turn_id: turn_id.clone(), ..Default::default() }).await,
        Code::NotFound,
    );
    refused(eve.client.cancel_turn(pb::CancelTurnRequest { turn_id }).await, Code::NotFound);
    refused(eve.client.open(id.parse()?).await.map(|_| ()), Code::NotFound);
    let select =
        pb::SelectDaemonRequest { chat_id: id.clone(), daemon_id: chat.daemon_id.clone(), root_id: String::new() };
    refused(eve.client.select_daemon(select).await, Code::NotFound);
    let mine = eve.chat(MODEL, pb::ChatMode::Ask).await?;
    assert_eq!(mine.daemon_id, "", "eve got ada's daemon");
    let steal = pb::SelectDaemonRequest { chat_id: mine.id, daemon_id: chat.daemon_id.clone(), root_id: String::new() };
    refused(eve.client.select_daemon(steal).await, Code::NotFound);
    refused(eve.client.revoke_daemon(pb::RevokeDaemonRequest { daemon_id: chat.daemon_id }).await, Code::NotFound);
    refused(ada.client.get_chat(pb::GetChatRequest { chat_id: "not-an-id".into() }).await, Code::InvalidArgument);

    // A daemon's token opens no front door; a revoked token none at all.
    let registered = pb::RegisterDaemonRequest { name: "other".into(), replace: false };
    let daemon_token = ada.client.register_daemon(registered).await?.token;
    refused(with(&daemon_token)?.list_chats(list()).await, Code::ScopeMissing);
    let create = pb::CreateTokenRequest { name: "ci".into(), scopes: vec!["api".into()], valid_days: 1 };
    let made = ada.client.create_token(create).await?;
    let program = with(&made.secret)?;
    program.list_chats(list()).await?;
    let token_id = made.token.unwrap().id;
    ada.client.revoke_token(pb::RevokeTokenRequest { token_id }).await?;
    eventually("the revoked token to be refused", Duration::from_secs(3), || async {
        Ok(program.list_chats(list()).await.is_err_and(|failure| failure.code == Code::TokenRevoked).then_some(()))
    })
    .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_do_not_fit() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    refused(ada.chat("nobody/has-this", pb::ChatMode::Ask).await.map_err(as_failure), Code::ModelUnknown);
    let chat = ada.chat(MODEL, pb::ChatMode::Ask).await?;
    let send = |client_message_id: &str, text: String| pb::SendMessageRequest {
        chat_id: chat.id.clone(),
        client_message_id: client_message_id.into(),
        text,
    };
    refused(ada.client.send_message(send("", "hi".into())).await, Code::InvalidArgument);
    refused(ada.client.send_message(send("a", String::new())).await, Code::InvalidArgument);
    refused(ada.client.send_message(send("a", "x".repeat(2 << 20))).await, Code::MessageTooLarge);
    // Ten megabytes are refused while they are read; the api does not keep them.
    let before = resident_kib(rig.mesh.apis[0].pid());
    for _ in 0..8 {
        refused(ada.client.send_message(send("a", "x".repeat(10 << 20))).await, Code::MessageTooLarge);
    }
    let grown = resident_kib(rig.mesh.apis[0].pid()).saturating_sub(before);
    assert!(grown < 40 * 1024, "the api grew by {grown} KiB");
    assert_eq!(ada.client.list_messages(list(&chat)).await?.messages.len(), 0, "nothing of it was stored");
    let archive = pb::ArchiveChatRequest { chat_id: chat.id.clone(), archived: true };
    ada.client.archive_chat(archive).await?;
    refused(ada.client.send_message(send("a", "hi".into())).await, Code::ChatArchived);
    let rename = pb::RenameChatRequest { chat_id: chat.id.clone(), title: "x".repeat(1000) };
    refused(ada.client.rename_chat(rename).await, Code::InvalidArgument);
    Ok(())
}

fn list(chat: &pb::Chat) -> pb::ListMessagesRequest {
    pb::ListMessagesRequest { chat_id: chat.id.clone(), ..Default::default() }
}

fn as_failure(error: anyhow::Error) -> Failure {
    error.downcast::<Failure>().expect("the client's error")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_fails_is_tried_again_or_named() -> Result<()> {
    let config = "[models]\nstall = \"2s\"\n[models.retry]\ninitial = \"50ms\"\nmax = \"200ms\"\n".to_owned();
    let rig = Rig::start(RigOptions { config, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    session(&ada, "sim/echo", pb::ChatMode::Ask).await?.send_and_wait("warm", PATIENCE).await?;
    let before = resident_kib(rig.mesh.workers[0].pid());
    for provider in ["sim", "sim-anthropic"] {
        for fault in [
            "429&retry_after=2",
            "500",
            "529",
            "cut",
            "stall",
            "stall_head",
            "malformed",
            "invalid_utf8",
            "html",
            "error_event",
            "empty",
        ] {
            let mut session =
                session(&ada, &format!("{provider}/fault?kind={fault}&times=1"), pb::ChatMode::Ask).await?;
            let report = session.send_and_wait(&format!("try {provider} {fault}"), PATIENCE).await?;
            assert!(report.succeeded(), "{provider} {fault}: {:?}", report.turn);
            assert!(report.verification.is_clean(), "{provider} {fault}: {:?}", report.verification);
            if fault.starts_with("429") {
                assert!(report.total() >= Duration::from_secs(2), "it asked to be left alone: {:?}", report.total());
            }
        }
        // What would grow without end is cut off at a limit, and named where it comes again and again.
        for fault in ["huge_index", "endless_line", "html"] {
            let mut session =
                session(&ada, &format!("{provider}/fault?kind={fault}&times=1000&after=0"), pb::ChatMode::Ask).await?;
            let report = session.send_and_wait(&format!("always {provider} {fault}"), PATIENCE).await?;
            assert_eq!(report.turn.status(), pb::TurnStatus::Failed, "{provider} {fault}: {:?}", report.turn);
            let code = report.turn.error_code.as_str();
            assert!(
                ["PROVIDER_GARBAGE", "PROVIDER_UNAVAILABLE"].contains(&code),
                "{provider} {fault}: {:?}",
                report.turn
            );
            assert!(report.turn.error_message.split(' ').count() > 6, "no sentence: {:?}", report.turn);
            // The chat goes on.
            assert!(report.verification.is_clean(), "{provider} {fault}: {:?}", report.verification);
        }
    }
    let grown = resident_kib(rig.mesh.workers[0].pid()).saturating_sub(before);
    assert!(grown < 64 * 1024, "the worker grew by {grown} KiB");
    let mut session = session(&ada, "sim/fault?kind=400&times=1000", pb::ChatMode::Ask).await?;
    let report = session.send_and_wait("always refused", PATIENCE).await?;
    assert_eq!(report.turn.status(), pb::TurnStatus::Failed, "{:?}", report.turn);
    assert_eq!(report.turn.error_code, "PROVIDER_REJECTED", "{:?}", report.turn);
    assert!(report.turn.error_message.len() > 20);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_daemon_and_a_daemon_that_is_away() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let mut alone = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let report = alone.send_and_wait(&one_call("shell", json!({ "command": "true" })), PATIENCE).await?;
    let call = only_call(&report);
    assert!(call.is_error && ["DAEMON_NONE", "TOOL_UNKNOWN"].contains(&call.error_code.as_str()), "{call:?}");

    let mut daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let session = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    daemon.process.kill();
    rig.connected(&ada, &daemon.id, false).await?;
    let chat: ChatId = session.chat();
    let sent = session.send(&one_call("shell", json!({ "command": "echo back" }))).await?;
    let turn_id = sent.turn.unwrap().id;
    eventually("the turn to wait for the daemon", PATIENCE, || async {
        let turn = ada
            .client
            .get_turn(pb::GetTurnRequest { turn_id: turn_id.clone(), ..Default::default() })
            .await?
            .turn
            .unwrap();
        Ok((turn.status() == pb::TurnStatus::WaitingDaemon).then_some(()))
    })
    .await?;
    daemon.process.restart(PATIENCE).await?;
    let turn = ada.client.wait_turn(chat, turn_id.parse()?, PATIENCE).await?;
    assert_eq!(turn.status(), pb::TurnStatus::Succeeded, "{turn:?}");
    Ok(())
}
