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
