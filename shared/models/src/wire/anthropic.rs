//! Anthropic's messages. Thinking is kept with its signature and sent back with it; redacted thinking is skipped.

use reliant_types::{limits, pb};
use serde::{Deserialize, Serialize};
use serde_json::{Value, value::RawValue};

use super::{
    ErrorDetail, Events,
    assemble::{Assembler, Prose, ToolBlock},
    base64, finish, object,
};
use crate::{ChatMessage, ChatRole, ModelError, ModelRequest, Part, lenient};

pub const VERSION: &str = "2023-06-01";
/// The format demands a limit; every model that speaks it can answer so much.
const MAX_TOKENS_DEFAULT: u32 = 8192;

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    max_tokens: u32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    system: Vec<Block<'a>>,
    messages: Vec<Message<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tools: Vec<Tool<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    thinking: Option<ThinkingConfig>,
    stream: bool,
}

#[derive(Serialize)]
struct ThinkingConfig {
    r#type: &'static str,
    budget_tokens: u32,
}

#[derive(Serialize)]
struct Tool<'a> {
    name: &'a str,
    description: &'a str,
    input_schema: &'a Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_control: Option<Cache>,
}

#[derive(Serialize, Clone, Copy)]
struct Cache {
    r#type: &'static str,
}

const EPHEMERAL: Cache = Cache { r#type: "ephemeral" };

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: Vec<Block<'a>>,
}

#[derive(Serialize)]
struct Block<'a> {
    #[serde(flatten)]
    kind: BlockBody<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_control: Option<Cache>,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum BlockBody<'a> {
    Text {
        text: &'a str,
    },
    Thinking {
        thinking: &'a str,
        signature: &'a str,
    },
    ToolUse {
        id: &'a str,
        name: &'a str,
        input: Box<RawValue>,
    },
    ToolResult {
        tool_use_id: &'a str,
        content: &'a str,
        #[serde(skip_serializing_if = "is_false")]
        is_error: bool,
    },
    Image {
        source: Source<'a>,
    },
}

#[derive(Serialize)]
struct Source<'a> {
    r#type: &'static str,
    media_type: &'a str,
    data: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_false(flag: &bool) -> bool {
    !*flag
}

fn block(part: &Part) -> Option<Block<'_>> {
    let kind = match part {
        // The API refuses empty texts.
        Part::Text(text) if text.trim().is_empty() => return None,
        Part::Text(text) => BlockBody::Text { text },
        Part::Thinking { signature, .. } if signature.is_empty() => return None,
        Part::Thinking { text, signature } => BlockBody::Thinking { thinking: text, signature },
        Part::ToolUse { provider_id, name, input_json } => {
            BlockBody::ToolUse { id: provider_id, name, input: object(input_json) }
        }
        Part::ToolResult { provider_id, content, is_error } => {
            BlockBody::ToolResult { tool_use_id: provider_id, content, is_error: *is_error }
        }
        Part::Image { media_type, data } => {
            BlockBody::Image { source: Source { r#type: "base64", media_type, data: base64(data) } }
        }
    };
    Some(Block { kind, cache_control: None })
}

/// Neighbours of one side become one message, tool results first, as the API wants it.
fn messages(history: &[ChatMessage]) -> Vec<Message<'_>> {
    let mut messages: Vec<Message<'_>> = Vec::new();
    for message in history {
        let role = if message.role == ChatRole::Assistant { "assistant" } else { "user" };
        let content: Vec<Block<'_>> = message.parts.iter().filter_map(block).collect();
        if content.is_empty() {
            continue;
        }
        match messages.last_mut().filter(|last| last.role == role) {
            Some(last) => last.content.extend(content),
            None => messages.push(Message { role, content }),
        }
    }
    messages
}

/// Thinking can be switched on only where the tool round under way began with thinking: the API refuses it else.
fn may_think(history: &[ChatMessage]) -> bool {
    let round = history.iter().rev().take_while(|message| message.role != ChatRole::User);
    round.filter(|message| message.role == ChatRole::Assistant).all(|message| {
        let signed = |part: &Part| matches!(part, Part::Thinking { signature, .. } if !signature.is_empty());
        message.parts.iter().any(signed)
    })
}

/// The request's body.
pub fn body(request: &ModelRequest, name: &str, max_tokens: u32, thinking_tokens: u32, cache: bool) -> Vec<u8> {
    let max_tokens = if max_tokens == 0 { MAX_TOKENS_DEFAULT } else { max_tokens };
    let cache = cache.then_some(EPHEMERAL);
    let mut tools: Vec<Tool<'_>> = request
        .tools
        .iter()
        .map(|tool| Tool {
            name: &tool.name,
            description: &tool.description,
            input_schema: &tool.input_schema,
            cache_control: None,
        })
        .collect();
    if let Some(last) = tools.last_mut() {
        last.cache_control = cache;
    }
    let mut messages = messages(&request.messages);
    // The next round begins with all of this one.
    if let Some(last) = messages.last_mut().and_then(|message| message.content.last_mut())
        && !matches!(last.kind, BlockBody::Thinking { .. })
    {
        last.cache_control = cache;
    }
    let system = if request.system.is_empty() {
        Vec::new()
    } else {
        vec![Block { kind: BlockBody::Text { text: &request.system }, cache_control: cache }]
    };
    // 1,024 is the least the API takes, and the answer needs room beside it.
    let budget_tokens = thinking_tokens.min(max_tokens.saturating_sub(1024));
    let thinking = (budget_tokens >= 1024 && may_think(&request.messages))
        .then_some(ThinkingConfig { r#type: "enabled", budget_tokens });
    let body = Body { model: name, max_tokens, system, messages, tools, thinking, stream: true };
    serde_json::to_vec(&body).expect("texts and numbers serialize")
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Event {
    MessageStart {
        message: Start,
    },
    ContentBlockStart {
        index: u64,
        content_block: StartedBlock,
    },
    ContentBlockDelta {
        index: u64,
        delta: Delta,
    },
    ContentBlockStop {
        index: u64,
    },
    MessageDelta {
        delta: MessageDelta,
        #[serde(default)]
        usage: Option<Usage>,
    },
    MessageStop,
    Error {
        error: ErrorDetail,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct Start {
    #[serde(default)]
    usage: Option<Usage>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum StartedBlock {
    Text {
        #[serde(default, deserialize_with = "lenient::text")]
        text: Option<String>,
    },
    Thinking {
        #[serde(default, deserialize_with = "lenient::text")]
        thinking: Option<String>,
    },
    ToolUse {
        id: String,
        name: String,
        #[serde(default)]
        input: Value,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Delta {
    #[serde(rename = "text_delta")]
    Text { text: String },
    #[serde(rename = "thinking_delta")]
    Thinking { thinking: String },
    #[serde(rename = "signature_delta")]
    Signature { signature: String },
    #[serde(rename = "input_json_delta")]
    Input { partial_json: String },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct MessageDelta {
    #[serde(default, deserialize_with = "lenient::text")]
    stop_reason: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Usage {
    #[serde(deserialize_with = "lenient::count")]
    input_tokens: i64,
    #[serde(deserialize_with = "lenient::count")]
    output_tokens: i64,
    #[serde(deserialize_with = "lenient::count")]
    cache_read_input_tokens: i64,
    #[serde(deserialize_with = "lenient::count")]
    cache_creation_input_tokens: i64,
}

/// A block that is open, by the provider's number.
enum Open {
    Prose(u64, Prose),
    Tool(u64, ToolBlock),
    /// Of a kind we do not keep.
    Skipped(u64),
}

/// See [`super::Decoder`].
pub struct Decoder {
    key: String,
    blocks: Assembler,
    /// The API has one block open at a time.
    open: Option<Open>,
    usage: Usage,
    counted: bool,
    stop: Option<pb::StopReason>,
    done: bool,
}

impl Decoder {
    pub fn new(key: &str) -> Self {
        Self {
            key: key.to_owned(),
            blocks: Assembler::default(),
            open: None,
            usage: Usage::default(),
            counted: false,
            stop: None,
            done: false,
        }
    }

    pub fn is_done(&self) -> bool {
        self.done
    }

    pub fn event(&mut self, data: &str, out: &mut Events) -> Result<(), ModelError> {
        if self.done {
            return Ok(());
        }
        let event: Event = serde_json::from_str(data).map_err(|error| {
            ModelError::garbage(format!("an event of the stream is not as expected ({:?})", error.classify()))
        })?;
        match event {
            Event::MessageStart { message } => self.count(message.usage),
            Event::ContentBlockStart { index, content_block } => self.start(index, content_block, out)?,
            Event::ContentBlockDelta { index, delta } => self.delta(index, delta, out)?,
            Event::ContentBlockStop { index } => {
                if self.open.as_ref().is_some_and(|open| open.number() == index) {
                    self.close(out);
                }
            }
            Event::MessageDelta { delta, usage } => {
                self.count(usage);
                if let Some(reason) = delta.stop_reason {
                    self.close(out);
                    self.stop = Some(match reason.as_str() {
                        "max_tokens" | "model_context_window_exceeded" => pb::StopReason::MaxTokens,
                        "refusal" => pb::StopReason::ContentFilter,
                        _ if self.blocks.has_tools() => pb::StopReason::ToolUse,
                        _ => pb::StopReason::EndTurn,
                    });
                }
            }
            Event::MessageStop => {
                self.close(out);
                if self.stop.is_none() && self.blocks.is_empty() {
                    return Err(ModelError::garbage("the stream ended without a message"));
                }
                self.complete(out);
            }
            Event::Error { error } => return Err(error.in_stream(&self.key)),
            Event::Other => {}
        }
        Ok(())
    }

    fn start(&mut self, number: u64, started: StartedBlock, out: &mut Events) -> Result<(), ModelError> {
        if number > 4 * limits::MESSAGE_TOOL_CALLS_MAX as u64 {
            return Err(ModelError::garbage("a content block's index is no small number"));
        }
        self.close(out);
        self.open = Some(match started {
            StartedBlock::Text { text } => {
                self.blocks.open(Prose::Text, out)?;
                self.blocks.prose(Prose::Text, text.unwrap_or_default(), out)?;
                Open::Prose(number, Prose::Text)
            }
            StartedBlock::Thinking { thinking } => {
                self.blocks.open(Prose::Thinking, out)?;
                self.blocks.prose(Prose::Thinking, thinking.unwrap_or_default(), out)?;
                Open::Prose(number, Prose::Thinking)
            }
            StartedBlock::ToolUse { id, name, input } => {
                if name.is_empty() {
                    return Err(ModelError::garbage("a tool call has no name"));
                }
                let id = if id.is_empty() { format!("toolu_{:016x}", rand::random::<u64>()) } else { id };
                let mut tool = self.blocks.tool(id, name, out)?;
                // Usually empty here and streamed after; some servers send it whole.
                if input.as_object().is_some_and(|input| !input.is_empty()) {
                    self.blocks.tool_input(&mut tool, input.to_string(), out)?;
                }
                Open::Tool(number, tool)
            }
            StartedBlock::Other => Open::Skipped(number),
        });
        Ok(())
    }

    fn delta(&mut self, number: u64, delta: Delta, out: &mut Events) -> Result<(), ModelError> {
        match (&mut self.open, delta) {
            (Some(open), _) if open.number() != number => Err(ModelError::garbage("a piece belongs to no open block")),
            (Some(Open::Prose(_, Prose::Text)), Delta::Text { text }) => self.blocks.prose(Prose::Text, text, out),
            (Some(Open::Prose(_, Prose::Thinking)), Delta::Thinking { thinking }) => {
                self.blocks.prose(Prose::Thinking, thinking, out)
            }
            (Some(Open::Prose(_, Prose::Thinking)), Delta::Signature { signature }) => {
                self.blocks.signature(signature, out)
            }
            (Some(Open::Tool(_, tool)), Delta::Input { partial_json }) => {
                self.blocks.tool_input(tool, partial_json, out)
            }
            (Some(Open::Skipped(_)), _) | (_, Delta::Other) => Ok(()),
            _ => Err(ModelError::garbage("a piece does not fit its block")),
        }
    }

    fn close(&mut self, out: &mut Events) {
        match self.open.take() {
            Some(Open::Tool(_, tool)) => self.blocks.tool_end(&tool, out),
            Some(Open::Prose(..)) => self.blocks.close(out),
            Some(Open::Skipped(_)) | None => {}
        }
    }

    /// Counts are of the whole message so far; zero means "not said here".
    fn count(&mut self, usage: Option<Usage>) {
        let Some(usage) = usage else { return };
        self.counted = true;
        let take = |known: &mut i64, new: i64| *known = (*known).max(new);
        take(&mut self.usage.input_tokens, usage.input_tokens);
        take(&mut self.usage.output_tokens, usage.output_tokens);
        take(&mut self.usage.cache_read_input_tokens, usage.cache_read_input_tokens);
        take(&mut self.usage.cache_creation_input_tokens, usage.cache_creation_input_tokens);
    }

    fn complete(&mut self, out: &mut Events) {
        self.done = true;
        let Usage { input_tokens, output_tokens, cache_read_input_tokens, cache_creation_input_tokens } = self.usage;
        let usage = self.counted.then_some(pb::Usage {
            // Anthropic counts the cached part apart.
            input_tokens: input_tokens + cache_read_input_tokens + cache_creation_input_tokens,
            output_tokens,
            cache_read_tokens: cache_read_input_tokens,
            cache_write_tokens: cache_creation_input_tokens,
            reasoning_tokens: 0,
            cost_microusd: 0,
        });
        let default = if self.blocks.has_tools() { pb::StopReason::ToolUse } else { pb::StopReason::EndTurn };
        finish(usage, self.stop.unwrap_or(default), out);
    }

    pub fn end(&mut self, out: &mut Events) -> Result<(), ModelError> {
        if self.done {
            return Ok(());
        }
        if self.stop.is_none() {
            return Err(ModelError::CutStream);
        }
        self.complete(out);
        Ok(())
    }
}

impl Open {
    fn number(&self) -> u64 {
        match self {
            Open::Prose(number, _) | Open::Tool(number, _) | Open::Skipped(number) => *number,
        }
    }
}
