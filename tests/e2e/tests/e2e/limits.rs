//! What is larger than somebody else takes: more tools than a model, more calls than a daemon.

use anyhow::Result;
use futures::future::try_join_all;
use reliant_client::{Client, ClientConfig, ClientUpdate, From};
use reliant_harness::{DaemonOptions, Rig, RigOptions, eventually};
use reliant_types::{limits, pb};
use serde_json::json;

use crate::scripts::{MODEL, PATIENCE, one_call, only_call, script, server_of_tools, session};

fn notices(messages: &[pb::Message]) -> Vec<String> {
    let notices = messages.iter().filter(|message| message.role() == pb::Role::Notice);
    notices.map(reliant_client::text_of).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_gets_as_many_tools_as_it_takes_and_the_chat_is_told_once() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let script = dir.path().join("many.py");
    // So many tools that no model of OpenAI's format takes those of two.
    std::fs::write(&script, server_of_tools(100, "t%03d"))?;
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let server = json!({ "command": "python3", "args": [script] });
    let servers = json!({ "mcpServers": { "many": server, "more": server } });
    let files = vec![(".mcp.json", servers.to_string())];
    let daemon = rig.daemon(&ada, "laptop", DaemonOptions { files, trust_mcp: true, ..Default::default() }).await?;
    eventually("the server's tools", PATIENCE, || async {
        let daemons = ada.client.list_daemons(pb::ListDaemonsRequest::default()).await?.daemons;
        Ok(daemons.iter().any(|d| d.id == daemon.id && d.tools.len() > 200).then_some(()))
    })
    .await?;
    // The simulator refuses 129 tools with OpenAI's own words.
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let report = chat.send_and_wait(&one_call("shell", json!({ "command": "echo ours" })), PATIENCE).await?;
    assert!(report.succeeded(), "{:?}", report.turn);
    assert_eq!(only_call(&report).status(), pb::ToolCallStatus::Succeeded);
    let said = notices(&report.messages);
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("at most 128") && said[0].contains("not offered"), "{said:?}");
    let report = chat.send_and_wait(&one_call("mcp__many__t000", json!({})), PATIENCE).await?;
    assert!(only_call(&report).result.contains("ran t000"), "{report:?}");
    assert_eq!(notices(&report.messages), Vec::<String>::new(), "it was said before");
    // Anthropic's format has no such limit.
    let mut chat = session(&ada, "sim-anthropic/default", pb::ChatMode::Auto).await?;
    let report = chat.send_and_wait(&one_call("mcp__more__t099", json!({})), PATIENCE).await?;
    assert!(only_call(&report).result.contains("ran t099"), "{report:?}");
    assert_eq!(notices(&report.messages), Vec::<String>::new());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_find_no_room_on_the_daemon_wait_and_all_run() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let options = DaemonOptions { config: "max_running = 1".into(), ..Default::default() };
    let daemon = rig.daemon(&ada, "laptop", options).await?;
    // The calls of one message run one behind the other; those of several chats want to run at one time.
    let chats = (0..4).map(|n| {
        let (ada, args) = (&ada, json!({ "command": format!("echo {n} >> order; sleep 0.4") }));
        async move {
            let mut chat = session(ada, MODEL, pb::ChatMode::Auto).await?;
            let sent = chat.send(&one_call("shell", args)).await?;
            let turn = sent.turn.unwrap().id;
            let mut told = None;
            // The person sees what is waited for.
            let ended = loop {
                let ClientUpdate::Event(event) = chat.next().await? else { continue };
                match event.kind {
                    Some(pb::chat_event::Kind::ToolCallChanged(changed)) => {
                        told = told.or(changed.tool_call.filter(|call| !call.waiting_for.is_empty()));
                    }
                    Some(pb::chat_event::Kind::TurnChanged(now)) if now.id == turn && now.ended_at.is_some() => {
                        break now;
                    }
                    _ => {}
                }
            };
            assert_eq!(ended.status(), pb::TurnStatus::Succeeded, "{ended:?}");
            assert!(chat.verification().is_clean(), "{:?}", chat.verification());
            let calls =
                ada.client.get_turn(pb::GetTurnRequest { turn_id: turn, ..Default::default() }).await?.tool_calls;
            assert_eq!(calls.len(), 1);
            assert_eq!(calls[0].status(), pb::ToolCallStatus::Succeeded, "{calls:?}");
            anyhow::Ok(told)
        }
    });
    let told = tokio::time::timeout(PATIENCE, try_join_all(chats)).await??;
    let told: Vec<_> = told.into_iter().flatten().collect();
    assert!(!told.is_empty(), "nobody was told what a call waits for");
    for call in told {
        assert_eq!(call.status(), pb::ToolCallStatus::Pending, "{call:?}");
        assert!(call.waiting_for.contains("no more can"), "{call:?}");
    }
    let mut order: Vec<String> =
        std::fs::read_to_string(daemon.root.join("order"))?.lines().map(str::to_owned).collect();
    order.sort();
    assert_eq!(order, ["0", "1", "2", "3"], "each ran once");
    Ok(())
}

/// Clients take no more than gRPC's own default, as ours does: what is larger is an error here.
#[tokio::test(flavor = "multi_thread")]
async fn chats_of_the_largest_messages_are_read_by_a_client_without_settings() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let size = limits::MODEL_TEXT_MAX_BYTES / 1000 - 10;
    let mut chat = session(&ada, &format!("sim/text?tokens={size}&piece_bytes=1000"), pb::ChatMode::Ask).await?;
    for n in 0..5 {
        let report = chat.send_and_wait(&format!("long answer {n}"), PATIENCE).await?;
        assert!(report.succeeded(), "{:?}", report.turn);
        assert!(report.answer().len() > limits::MODEL_TEXT_MAX_BYTES - 50_000, "{}", report.answer().len());
    }
    assert!(chat.verification().is_clean(), "{:?}", chat.verification());
    let id = chat.chat();
    let (mut before_ordinal, mut seen) = (0, 0);
    loop {
        let request = pb::ListMessagesRequest { chat_id: id.to_string(), page_size: 500, before_ordinal };
        let page = ada.client.list_messages(request).await?;
        // Notices say that the model reads less of so long a chat.
        seen += page.messages.iter().filter(|message| message.role() != pb::Role::Notice).count();
        before_ordinal = page.messages[0].ordinal;
        if !page.has_more {
            break;
        }
    }
    assert_eq!(seen, 10);
    let viewer = Client::connect(ClientConfig::new(rig.mesh.api_url(0), ada.token.clone())).await?;
    for from in [From::Snapshot, From::Start] {
        let session = viewer.open_from(id, from).await?;
        assert!(session.verification().is_clean(), "{from:?}: {:?}", session.verification());
        let newest = session.view().messages.values().next_back().expect("a message");
        assert!(reliant_client::text_of(newest).len() > 1_000_000, "{from:?}");
    }
    // One byte too many ends the turn with a sentence, and nothing of it is stored.
    let size = limits::MODEL_TEXT_MAX_BYTES / 1000 + 1;
    let mut chat = session(&ada, &format!("sim/text?tokens={size}&piece_bytes=1000"), pb::ChatMode::Ask).await?;
    let report = chat.send_and_wait("too long", PATIENCE).await?;
    assert_eq!((report.turn.status(), report.turn.error_code.as_str()), (pb::TurnStatus::Failed, "PROVIDER_GARBAGE"));
    assert!(report.turn.error_message.contains("too large"), "{:?}", report.turn);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_of_the_most_calls_with_the_largest_results_fits() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let call = json!({ "name": "shell", "repeat": limits::MESSAGE_TOOL_CALLS_MAX,
                       "args": { "command": "head -c 60000 /dev/zero | tr '\\0' x" } });
    let report = chat.send_and_wait(&script(json!([{ "tools": [call] }, { "text": "done" }])), PATIENCE).await?;
    assert!(report.succeeded(), "{:?}", report.turn);
    assert!(report.verification.is_clean(), "{:?}", report.verification);
    let (mut calls, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = pb::GetTurnRequest { turn_id: report.turn.id.clone(), page_size: 500, page_token };
        let page = ada.client.get_turn(request).await?;
        calls.extend(page.tool_calls);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(calls.len(), limits::MESSAGE_TOOL_CALLS_MAX);
    assert!(calls.iter().all(|call| call.status() == pb::ToolCallStatus::Succeeded && call.result.len() > 40_000));
    let results = report.messages.iter().find(|message| message.role() == pb::Role::Tool).expect("the results");
    assert_eq!(results.blocks.len(), limits::MESSAGE_TOOL_CALLS_MAX);
    // A viewer who comes now reads all of it.
    let late = ada.client.open_from(chat.chat(), From::Start).await?;
    assert!(late.verification().is_clean(), "{:?}", late.verification());
    Ok(())
}
