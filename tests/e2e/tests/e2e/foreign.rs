//! Clients that share no code with reliant: Python's grpcio, and a real browser.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use crate::{
    observability::{checked, succeeded, traced, way, well_formed},
    scripts::{MODEL, PATIENCE, one_call, session},
};
use anyhow::{Context as _, Result, ensure};
use reliant_harness::{DaemonOptions, Rig, RigOptions, eventually, tools_dir};
use reliant_observe::tree;
use reliant_types::pb;
use serde_json::json;
use tokio::{io::AsyncWriteExt as _, process::Command};

const LOGIN_CODE_TTL: std::time::Duration = std::time::Duration::from_secs(600);
/// Until the page has come so far as to ask for the call.
const BROWSER_PATIENCE: std::time::Duration = std::time::Duration::from_secs(120);

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("tests/e2e is two levels down")
}

#[tokio::test(flavor = "multi_thread")]
async fn python_grpcio_learns_all_by_reflection() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let python = Some(tools_dir().join("venv/bin/python")).filter(|path| path.exists());
    let python = python.context("no Python environment in the tools directory; `make test` makes it")?;
    let address = rig.mesh.api_url(0).trim_start_matches("http://").to_owned();
    let mut child = Command::new(python)
        .arg(repository().join("tests/foreign/grpc_client.py"))
        .args([&address, "-"])
        .stdin(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut input = child.stdin.take().context("the child has a standard input")?;
    input.write_all(format!("{}\n", ada.token).as_bytes()).await?;
    drop(input);
    ensure!(child.wait().await?.success(), "the foreign client found something wrong");
    Ok(())
}

/// Runs a flow through a real browser. With `TEST_PICTURES`, its pictures are kept in that directory.
async fn in_browser(rig: &Rig, flow: &str, arguments: &[&str]) -> Result<()> {
    let pictures = std::env::var_os("TEST_PICTURES").map_or_else(|| rig.dir().join("screenshots"), PathBuf::from);
    let status = Command::new("node")
        .arg(repository().join("tests/browser").join(flow))
        .args(arguments)
        .arg(pictures)
        .kill_on_drop(true)
        .status()
        .await
        .context("node could not be started")?;
    ensure!(status.success(), "the browser test {flow} failed");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_signs_in_chats_and_sees_a_tool_run() -> Result<()> {
    // Slow enough that a person, and the test, sees the text grow.
    let config = "[models]\ndefault = \"sim/default?rate=60\"\n".to_owned();
    let (rig, sink) = traced(RigOptions { config, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let mut daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let code = rig.store.create_login_code(ada.user, LOGIN_CODE_TTL).await?;
    let url = format!("{}/#code={code}", rig.mesh.api_url(0));
    let interrupted = one_call("shell", json!({ "command": "echo begun > begun; sleep 300" }));
    let begun = daemon.root.join("begun");
    let death = async {
        eventually("the call during which the daemon dies", BROWSER_PATIENCE, || async {
            Ok(begun.exists().then_some(()))
        })
        .await?;
        daemon.process.kill();
        Ok(daemon.process.restart(PATIENCE).await?)
    };
    let arguments = [url.as_str(), interrupted.as_str()];
    tokio::try_join!(in_browser(&rig, "smoke.mjs", &arguments), death)?;

    // Each message's trace begins at the click.
    let chats = ada.client.list_chats(pb::ListChatsRequest::default()).await?.chats;
    let turns = sink.store().list(&chats.first().context("the page made a chat")?.id, true, 10);
    ensure!(turns.len() == 4, "four messages were sent: {turns:?}");
    for turn in turns {
        let spans = well_formed(sink, "from the browser", &turn.trace_id).await?;
        let web = |name, kind| (name, kind, "web");
        let send = "reliant.v1.MessageService/SendMessage";
        way(&spans, &[web("client.send_message", "internal"), web(send, "client"), (send, "server", "api")]);
        way(&spans, &[web(send, "client"), ("turn.accept", "internal", "api")]);
        let painted = way(&spans, &[web("client.send_message", "internal"), web("client.first_text", "internal")]);
        let first = spans.iter().find(|span| span.name.starts_with("chat ")).context("a model was asked")?;
        ensure!(painted.end_ns > first.start_ns, "text was painted before the model was asked\n{}", tree::text(&spans));
        let roots = spans.iter().filter(|span| span.parent_id.is_empty()).count();
        ensure!(roots == 1 && tree::orphans(&spans).is_empty(), "not one whole trace\n{}", tree::text(&spans));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_finds_a_turn_on_the_trace_page_and_sees_where_its_time_went() -> Result<()> {
    let (rig, sink) = traced(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    // Long enough that a tool's time is a part that can be seen.
    let report = chat.send_and_wait(&one_call("shell", json!({ "command": "sleep 0.3" })), PATIENCE).await?;
    succeeded("on the page", &report);
    checked(sink, "on the page", &report.turn).await?;
    in_browser(&rig, "observe.mjs", &[sink.url(), &report.turn.trace_id, &chat.chat().to_string()]).await
}
