//! A served simulator and Reliant's own client before it.
#![allow(dead_code, reason = "each test file uses its part")]

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use reliant_model_sim::{SimConfig, Stats, build};
use reliant_models::{
    BlockKind, ChatMessage, ModelError, ModelEvent, ModelRequest, Models, ModelsConfig, Part, RetryPolicy, ToolSpec,
};
use reliant_types::pb;
use tokio::{sync::oneshot, task::JoinHandle, time::Instant};

pub const FORMATS: [&str; 2] = ["sim", "sim-anthropic"];

pub struct Sim {
    pub base_url: String,
    pub models: Models,
    pub stats: Arc<Stats>,
    pub stop: Option<oneshot::Sender<()>>,
    pub task: JoinHandle<()>,
}

impl Sim {
    pub async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut ModelsConfig)) -> Self {
        let built = build(SimConfig { listen: ([127, 0, 0, 1], 0).into() }).await.unwrap();
        let base_url = built.base_url();
        let stats = built.stats();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(async move { built.run(async { drop(stopped.await) }).await.unwrap() });
        let mut config = ModelsConfig {
            stall: Duration::from_millis(1500),
            retry: RetryPolicy { initial: Duration::from_millis(5), max: Duration::from_millis(20) },
            ..ModelsConfig::default()
        }
        .with_sim(&base_url);
        change(&mut config);
        let models = Models::new(config).unwrap();
        Self { base_url, models, stats, stop: Some(stop), task }
    }

    /// One attempt, to its end.
    pub async fn ask(&self, model: &str, prompt: &str) -> Result<Answer, ModelError> {
        read(self.models.stream(request(model, prompt)).await?).await
    }

    /// With retries before the first event.
    pub async fn ask_patiently(&self, model: &str, prompt: &str) -> Result<Answer, ModelError> {
        self.ask_for(Duration::from_secs(10), model, prompt).await
    }

    /// With retries before the first event, for so long.
    pub async fn ask_for(&self, patience: Duration, model: &str, prompt: &str) -> Result<Answer, ModelError> {
        let deadline = Instant::now() + patience;
        read(self.models.stream_with_retry(request(model, prompt), deadline).await?).await
    }
}

pub fn request(model: &str, prompt: &str) -> ModelRequest {
    ModelRequest {
        model: model.into(),
        system: "You are a test.".into(),
        messages: vec![ChatMessage::user(prompt)],
        tools: vec![
            tool("shell", serde_json::json!({ "command": { "type": "string" } })),
            tool("mcp__time__get_current_time", serde_json::json!({ "timezone": { "type": "string" } })),
        ],
        max_output_tokens: 0,
    }
}

pub fn tool(name: &str, properties: serde_json::Value) -> ToolSpec {
    let required: Vec<&String> = properties.as_object().unwrap().keys().collect();
    let input_schema = serde_json::json!({ "type": "object", "properties": properties, "required": required });
    ToolSpec { name: name.into(), description: format!("The tool {name}."), input_schema }
}

/// A whole answer, put together as the events say.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Answer {
    pub parts: Vec<Part>,
    pub usage: Option<pb::Usage>,
    pub stop: Option<pb::StopReason>,
}

impl Answer {
    pub fn text(&self) -> String {
        let texts = self.parts.iter().filter_map(|part| match part {
            Part::Text(text) => Some(text.as_str()),
            _ => None,
        });
        texts.collect()
    }

    /// (name, input) of each call.
    pub fn calls(&self) -> Vec<(&str, &str)> {
        let calls = self.parts.iter().filter_map(|part| match part {
            Part::ToolUse { name, input_json, .. } => Some((name.as_str(), input_json.as_str())),
            _ => None,
        });
        calls.collect()
    }
}

/// Reads a stream and holds it to what [`ModelEvent`] promises.
pub async fn read(
    mut stream: impl futures::Stream<Item = Result<ModelEvent, ModelError>> + Unpin,
) -> Result<Answer, ModelError> {
    let mut answer = Answer::default();
    let mut open: Vec<u32> = Vec::new();
    while let Some(event) = stream.next().await {
        assert_eq!(answer.stop, None, "an event after Stop");
        let event = event?;
        let grows = match &event {
            ModelEvent::BlockStart { index, kind } => {
                assert_eq!(*index as usize, answer.parts.len());
                open.push(*index);
                answer.parts.push(match kind {
                    BlockKind::Text => Part::Text(String::new()),
                    BlockKind::Thinking => Part::Thinking { text: String::new(), signature: String::new() },
                    BlockKind::ToolUse { provider_id, name } => Part::ToolUse {
                        provider_id: provider_id.clone(),
                        name: name.clone(),
                        input_json: String::new(),
                    },
                });
                continue;
            }
            ModelEvent::BlockEnd { index } => {
                let at = open.iter().position(|known| known == index).expect("an open block ends");
                open.remove(at);
                continue;
            }
            ModelEvent::Usage(usage) => {
                answer.usage = Some(*usage);
                continue;
            }
            ModelEvent::Stop(stop) => {
                assert!(open.is_empty(), "open blocks at Stop: {open:?}");
                answer.stop = Some(*stop);
                continue;
            }
            ModelEvent::Text { index, .. }
            | ModelEvent::Thinking { index, .. }
            | ModelEvent::Signature { index, .. }
            | ModelEvent::ToolInput { index, .. } => *index,
        };
        assert!(open.contains(&grows), "block {grows} is not open");
        match (&mut answer.parts[grows as usize], event) {
            (Part::Text(text), ModelEvent::Text { piece, .. })
            | (Part::Thinking { text, .. }, ModelEvent::Thinking { piece, .. })
            | (Part::Thinking { signature: text, .. }, ModelEvent::Signature { piece, .. })
            | (Part::ToolUse { input_json: text, .. }, ModelEvent::ToolInput { piece, .. }) => {
                assert!(!piece.is_empty());
                text.push_str(&piece);
            }
            (part, event) => panic!("{event:?} for {part:?}"),
        }
    }
    assert!(answer.stop.is_some(), "a stream without Stop and without error");
    Ok(answer)
}

/// Answers every call with `ok`, and says how often: the next request of a conversation.
pub fn go_on(request: &mut ModelRequest, answer: &Answer) {
    let results = answer.parts.iter().filter_map(|part| match part {
        Part::ToolUse { provider_id, name, .. } => Some(Part::ToolResult {
            provider_id: provider_id.clone(),
            content: format!("{name} says ok"),
            is_error: false,
        }),
        _ => None,
    });
    let results = results.collect();
    request.messages.push(ChatMessage::assistant(answer.parts.clone()));
    request.messages.push(ChatMessage::tool(results));
}
