//! MCP against real servers: `mcp-server-time` (Python, stdio), `@modelcontextprotocol/server-everything` (Node, stdio
//! and streamable HTTP); and servers that die, hang or lie.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use reliant_harness::{DaemonOptions, Person, Rig, RigOptions, TestDaemon, eventually};
use reliant_types::pb;
use serde_json::{Value, json};

use crate::scripts::{MODEL, PATIENCE, one_call, only_call, session};

/// What `make tools` installed, or a sentence.
fn tool(name: &str) -> Result<PathBuf> {
    let path = Some(reliant_harness::tools_dir().join(name)).filter(|path| path.exists());
    path.with_context(|| {
        format!("{name} is not in {}; `make test` installs it", reliant_harness::tools_dir().display())
    })
}

/// A root's files with one real server in it, `time`.
pub fn time_server() -> Result<Vec<(&'static str, String)>> {
    let server = json!({ "command": tool("venv/bin/mcp-server-time")?, "args": ["--local-timezone", "UTC"] });
    Ok(vec![(".mcp.json", json!({ "mcpServers": { "time": server } }).to_string())])
}

async fn with_servers(servers: Value) -> Result<(Rig, Person, TestDaemon)> {
    // A call that hangs must not hold up the test for two minutes.
    let env = vec![("RELIANT_WORKER__TOOL_TIMEOUT".to_owned(), "4s".to_owned())];
    let rig = Rig::start(RigOptions { env, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let files = vec![(".mcp.json", json!({ "mcpServers": servers }).to_string())];
    let daemon = rig.daemon(&ada, "laptop", DaemonOptions { files, trust_mcp: true, ..Default::default() }).await?;
    Ok((rig, ada, daemon))
}

pub async fn offered(ada: &Person, prefix: &str) -> Result<Vec<String>> {
    eventually(&format!("tools of {prefix}"), PATIENCE, || async {
        let daemons = ada.client.list_daemons(pb::ListDaemonsRequest { include_revoked: false }).await?.daemons;
        let names: Vec<String> = daemons
            .iter()
            .flat_map(|daemon| &daemon.tools)
            .filter(|tool| tool.name.starts_with(prefix))
            .map(|tool| {
                assert!(!tool.read_only, "an MCP server's hint is not believed: {}", tool.name);
                tool.name.clone()
            })
            .collect();
        Ok((!names.is_empty()).then_some(names))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn real_servers_answer_over_stdio_and_http() -> Result<()> {
    let time = tool("venv/bin/mcp-server-time")?;
    let everything = tool("npm/node_modules/@modelcontextprotocol/server-everything/dist/index.js")?;
    let port = reliant_devstack::free_port(0)?;
    let mut http = tokio::process::Command::new("node")
        .arg(&everything)
        .arg("streamableHttp")
        .env("PORT", port.to_string())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let (_rig, ada, _daemon) = with_servers(json!({
        "time": { "command": time, "args": ["--local-timezone", "UTC"] },
        "everything": { "command": "node", "args": [everything, "stdio"] },
        "web": { "type": "http", "url": format!("http://127.0.0.1:{port}/mcp") },
    }))
    .await?;
    let mut session = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    for (name, args, expected) in [
        ("mcp__time__get_current_time", json!({ "timezone": "UTC" }), "UTC"),
        ("mcp__everything__echo", json!({ "message": "over stdio" }), "over stdio"),
        ("mcp__web__echo", json!({ "message": "over http" }), "over http"),
    ] {
        offered(&ada, name).await?;
        let report = session.send_and_wait(&one_call(name, args), PATIENCE).await?;
        let call = only_call(&report);
        assert_eq!(call.status(), pb::ToolCallStatus::Succeeded, "{name}: {call:?}");
        assert!(call.result.contains(expected), "{name}: {}", call.result);
    }
    http.kill().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_start_only_when_they_are_trusted() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let marker = rig.dir().join("started");
    let server = json!({ "mcpServers": { "evil": { "command": "touch", "args": [marker] } } });
    let files = vec![(".mcp.json", server.to_string())];
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions { files, ..Default::default() }).await?;
    let mut session = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let report = session.send_and_wait(&one_call("mcp__evil__x", json!({})), PATIENCE).await?;
    assert_eq!(only_call(&report).status(), pb::ToolCallStatus::Failed);
    assert!(!marker.exists(), "an untrusted server was started");
    Ok(())
}

/// A server in Python that offers `die`, `hang`, `lie` and `fine`.
const BAD_SERVER: &str = r#"
import json, os, sys, time
for line in sys.stdin:
    try:
        message = json.loads(line)
    except ValueError:
        continue
    method, number = message.get("method"), message.get("id")
    if method == "initialize":
        result = {"protocolVersion": message["params"]["protocolVersion"], "capabilities": {"tools": {}},
                  "serverInfo": {"name": "bad", "version": "1"}}
    elif method == "tools/list":
        result = {"tools": [{"name": name, "description": name, "inputSchema": {"type": "object"},
                             "annotations": {"readOnlyHint": True}} for name in ("die", "hang", "lie", "fine")]
                            + [{"name": "no_schema", "description": "x" * 100000, "inputSchema": {"type": 12, "$ref": "nowhere"}},
                               {"name": "evil name\n", "inputSchema": {"type": "object", "properties": 7}}]}
    elif method == "tools/call":
        name = message["params"]["name"]
        if name == "die":
            os._exit(1)
        if name == "hang":
            time.sleep(600)
        if name == "lie":
            sys.stdout.write("this is not JSON-RPC\n")
            result = {"content": "not a list"}
        else:
            result = {"content": [{"type": "text", "text": "fine"}]}
    elif number is not None:
        result = {}
    else:
        continue
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", "id": number, "result": result}) + "\n")
    sys.stdout.flush()
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_or_lies_or_hangs_harms_only_its_call() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let script = dir.path().join("bad.py");
    std::fs::write(&script, BAD_SERVER)?;
    let (_rig, ada, _daemon) = with_servers(json!({ "bad": { "command": "python3", "args": [script] } })).await?;
    offered(&ada, "mcp__bad__fine").await?;
    let mut session = session(&ada, MODEL, pb::ChatMode::Auto).await?;

    let report = session.send_and_wait(&one_call("mcp__bad__die", json!({})), PATIENCE).await?;
    let call = only_call(&report).clone();
    assert_eq!(call.status(), pb::ToolCallStatus::OutcomeUnknown, "{call:?}");
    assert_eq!(call.unknown_cause(), pb::UnknownCause::ProcessDied);

    // It is started again.
    let report = session.send_and_wait(&one_call("mcp__bad__fine", json!({})), PATIENCE).await?;
    assert_eq!(only_call(&report).status(), pb::ToolCallStatus::Succeeded, "{:?}", report.tool_calls);

    let report = session.send_and_wait(&one_call("mcp__bad__lie", json!({})), PATIENCE).await?;
    let call = only_call(&report);
    assert!(call.is_error && report.succeeded(), "{call:?}");

    // Schemas that are none, and names that no model takes, harm nobody: the tool is called and judges for itself.
    let report = session.send_and_wait(&one_call("mcp__bad__no_schema", json!({ "any": 1 })), PATIENCE).await?;
    let call = only_call(&report);
    assert_eq!(call.status(), pb::ToolCallStatus::Succeeded, "{call:?}");
    let report = session.send_and_wait(&one_call("mcp__bad__evil_name_", json!({})), PATIENCE).await?;
    assert!(!only_call(&report).tool.contains('\n') && report.succeeded());

    // A hanging call ends at its time, and the server that is stuck is started again.
    let report = session.send_and_wait(&one_call("mcp__bad__hang", json!({})), PATIENCE).await?;
    let call = only_call(&report);
    assert_eq!((call.status(), call.is_error), (pb::ToolCallStatus::TimedOut, true), "{call:?}");
    assert!(call.result.split(' ').count() > 4, "{call:?}");
    // The next calls may still meet the stuck server, and are told so; then it has been started again.
    let mut met = Vec::new();
    while met.last() != Some(&pb::ToolCallStatus::Succeeded) {
        assert!(met.len() < 6, "it was not started again: {met:?}");
        let report = session.send_and_wait(&one_call("mcp__bad__fine", json!({})), PATIENCE).await?;
        assert!(report.succeeded(), "{:?}", report.turn);
        met.push(only_call(&report).status());
    }

    // Or it is cancelled by the person.
    let sent = session.send(&one_call("mcp__bad__hang", json!({}))).await?;
    let turn: reliant_types::TurnId = sent.turn.context("no turn")?.id.parse()?;
    eventually("the hanging call to run", PATIENCE, || async {
        let turn = ada.client.get_turn(pb::GetTurnRequest { turn_id: turn.to_string(), ..Default::default() }).await?;
        Ok(turn.tool_calls.iter().any(|call| call.status() == pb::ToolCallStatus::Running).then_some(()))
    })
    .await?;
    assert_eq!(session.cancel(turn).await?.status(), pb::TurnStatus::Cancelled);
    Ok(())
}
