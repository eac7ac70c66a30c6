//! Messages that tell the simulator what its model does.

use std::time::Duration;

use reliant_client::{ChatSession, TurnReport};
use reliant_harness::Person;
use reliant_types::{ChatId, pb};
use serde_json::{Value, json};

pub const PATIENCE: Duration = Duration::from_secs(60);
pub const MODEL: &str = "sim/default";

/// A message whose model rounds are these.
pub fn script(rounds: Value) -> String {
    format!("please do as scripted\nsim: {}", json!({ "rounds": rounds }))
}

/// One tool call, then a text.
pub fn one_call(tool: &str, args: Value) -> String {
    script(json!([{ "tools": [{ "name": tool, "args": args }] }, { "text": "done" }]))
}

pub async fn session(person: &Person, model: &str, mode: pb::ChatMode) -> anyhow::Result<ChatSession> {
    let chat: ChatId = person.chat(model, mode).await?.id.parse()?;
    Ok(person.client.open(chat).await?)
}

/// The only call of a turn, which must have kept the stream's promise.
pub fn only_call(report: &TurnReport) -> &pb::ToolCall {
    assert!(report.verification.is_clean(), "{:?}", report.verification);
    assert_eq!(report.tool_calls.len(), 1, "{report:#?}");
    &report.tool_calls[0]
}

/// An MCP server in Python that offers so many tools, named by a Python format of their number; each says that it ran.
pub fn server_of_tools(count: usize, name: &str) -> String {
    const SERVER: &str = r#"
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    method, number = message.get("method"), message.get("id")
    if method == "initialize":
        result = {"protocolVersion": message["params"]["protocolVersion"], "capabilities": {"tools": {}},
                  "serverInfo": {"name": "many", "version": "1"}}
    elif method == "tools/list":
        result = {"tools": [{"name": NAME % n, "description": "x", "inputSchema": {"type": "object"}} for n in range(COUNT)]}
    elif method == "tools/call":
        result = {"content": [{"type": "text", "text": "ran " + message["params"]["name"]}]}
    elif number is not None:
        result = {}
    else:
        continue
    print(json.dumps({"jsonrpc": "2.0", "id": number, "result": result}), flush=True)
"#;
    format!("COUNT, NAME = {count}, {name:?}\n{SERVER}")
}
