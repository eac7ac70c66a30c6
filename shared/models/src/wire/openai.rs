//! OpenAI's chat completions, as OpenAI and as compatible servers speak it. Ids, indexes, usage and the final
//! `[DONE]` may be missing; a tool call's index is a name for the call, never a size.

use reliant_types::{limits, pb};
use serde::{Deserialize, Serialize, ser::SerializeSeq};
use serde_json::{Value, value::RawValue};

use super::{
    ErrorDetail, Events,
    assemble::{Assembler, Prose, ToolBlock},
    base64, finish, object,
};
use crate::{ChatMessage, ChatRole, ModelError, ModelRequest, Part, lenient};

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    messages: Messages<'a>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tools: Vec<Tool<'a>>,
    stream: bool,
    stream_options: StreamOptions,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_completion_tokens: Option<u32>,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

#[derive(Serialize)]
struct Tool<'a> {
    r#type: &'static str,
    function: ToolFunction<'a>,
}

#[derive(Serialize)]
struct ToolFunction<'a> {
    name: &'a str,
    description: &'a str,
    parameters: &'a Value,
}

struct Messages<'a> {
    system: &'a str,
    messages: &'a [ChatMessage],
}

#[derive(Serialize)]
#[serde(tag = "role", rename_all = "lowercase")]
enum Message<'a> {
    System {
        content: &'a str,
    },
    User {
        content: Content<'a>,
    },
    Assistant {
        content: Option<String>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        tool_calls: Vec<Call<'a>>,
    },
    Tool {
        tool_call_id: &'a str,
        content: String,
    },
}

#[derive(Serialize)]
#[serde(untagged)]
enum Content<'a> {
    Text(String),
    Parts(Vec<ContentPart<'a>>),
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ContentPart<'a> {
    Text { text: &'a str },
    ImageUrl { image_url: ImageUrl },
}

#[derive(Serialize)]
struct ImageUrl {
    url: String,
}

#[derive(Serialize)]
struct Call<'a> {
    id: &'a str,
    r#type: &'static str,
    function: CallFunction<'a>,
}

#[derive(Serialize)]
struct CallFunction<'a> {
    name: &'a str,
    #[serde(serialize_with = "as_text")]
    arguments: Box<RawValue>,
}

fn as_text<S: serde::Serializer>(raw: &RawValue, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(raw.get())
}

impl Serialize for Messages<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut seq = serializer.serialize_seq(None)?;
        if !self.system.is_empty() {
            seq.serialize_element(&Message::System { content: self.system })?;
        }
        for message in self.messages {
            match message.role {
                ChatRole::User => {
                    if let Some(content) = user_content(&message.parts) {
                        seq.serialize_element(&Message::User { content })?;
                    }
                }
                ChatRole::Assistant => {
                    let text = texts(&message.parts);
                    let tool_calls: Vec<Call<'_>> = message.parts.iter().filter_map(call).collect();
                    if !text.is_empty() || !tool_calls.is_empty() {
                        let content = (!text.is_empty()).then_some(text);
                        seq.serialize_element(&Message::Assistant { content, tool_calls })?;
                    }
                }
                ChatRole::Tool => {
                    for part in &message.parts {
                        if let Part::ToolResult { provider_id, content, is_error } = part {
                            // The format has no place for the flag.
                            let content = format!("{}{content}", if *is_error { "[tool error] " } else { "" });
                            seq.serialize_element(&Message::Tool { tool_call_id: provider_id, content })?;
                        }
                    }
                }
            }
        }
        seq.end()
    }
}

fn texts(parts: &[Part]) -> String {
    let mut all = String::new();
    for part in parts {
        if let Part::Text(text) = part {
            if !all.is_empty() && !text.is_empty() {
                all.push_str("\n\n");
            }
            all.push_str(text);
        }
    }
    all
}

fn user_content(parts: &[Part]) -> Option<Content<'_>> {
    if !parts.iter().any(|part| matches!(part, Part::Image { .. })) {
        let text = texts(parts);
        return (!text.is_empty()).then_some(Content::Text(text));
    }
    let parts = parts.iter().filter_map(|part| match part {
        Part::Text(text) if !text.is_empty() => Some(ContentPart::Text { text }),
        Part::Image { media_type, data } => Some(ContentPart::ImageUrl {
            image_url: ImageUrl { url: format!("data:{media_type};base64,{}", base64(data)) },
        }),
        _ => None,
    });
    Some(Content::Parts(parts.collect()))
}

fn call(part: &Part) -> Option<Call<'_>> {
    match part {
        Part::ToolUse { provider_id, name, input_json } => Some(Call {
            id: provider_id,
            r#type: "function",
            function: CallFunction { name, arguments: object(input_json) },
        }),
        _ => None,
    }
}

/// The request's body. `own` is OpenAI itself, which has another name for the token limit than everybody else.
pub fn body(request: &ModelRequest, name: &str, max_tokens: u32, own: bool) -> Vec<u8> {
    let limit = (max_tokens > 0).then_some(max_tokens);
    let body = Body {
        model: name,
        messages: Messages { system: &request.system, messages: &request.messages },
        tools: request
            .tools
            .iter()
            .map(|tool| Tool {
                r#type: "function",
                function: ToolFunction {
                    name: &tool.name,
                    description: &tool.description,
                    parameters: &tool.input_schema,
                },
            })
            .collect(),
        stream: true,
        stream_options: StreamOptions { include_usage: true },
        max_tokens: limit.filter(|_| !own),
        max_completion_tokens: limit.filter(|_| own),
    };
    serde_json::to_vec(&body).expect("texts and numbers serialize")
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(default)]
    x_groq: Option<Groq>,
    #[serde(default)]
    error: Option<ErrorDetail>,
}

#[derive(Deserialize)]
struct Groq {
    #[serde(default)]
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    index: i64,
    #[serde(default)]
    delta: Option<Delta>,
    #[serde(default, deserialize_with = "lenient::text")]
    finish_reason: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Delta {
    #[serde(deserialize_with = "lenient::text")]
    content: Option<String>,
    /// DeepSeek, vLLM.
    #[serde(deserialize_with = "lenient::text")]
    reasoning_content: Option<String>,
    /// OpenRouter, Groq, Ollama.
    #[serde(deserialize_with = "lenient::text")]
    reasoning: Option<String>,
    /// The model's refusal, said in place of content.
    #[serde(deserialize_with = "lenient::text")]
    refusal: Option<String>,
    tool_calls: Option<Vec<CallDelta>>,
}

#[derive(Deserialize)]
struct CallDelta {
    #[serde(default)]
    index: Option<Value>,
    #[serde(default, deserialize_with = "lenient::text")]
    id: Option<String>,
    #[serde(default)]
    function: Option<FunctionDelta>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct FunctionDelta {
    #[serde(deserialize_with = "lenient::text")]
    name: Option<String>,
    #[serde(deserialize_with = "lenient::json_text")]
    arguments: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Usage {
    #[serde(deserialize_with = "lenient::count")]
    prompt_tokens: i64,
    #[serde(deserialize_with = "lenient::count")]
    completion_tokens: i64,
    prompt_tokens_details: Option<PromptDetails>,
    completion_tokens_details: Option<CompletionDetails>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct PromptDetails {
    #[serde(deserialize_with = "lenient::count")]
    cached_tokens: i64,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct CompletionDetails {
    #[serde(deserialize_with = "lenient::count")]
    reasoning_tokens: i64,
}

impl From<Usage> for pb::Usage {
    fn from(usage: Usage) -> Self {
        pb::Usage {
            input_tokens: usage.prompt_tokens,
            output_tokens: usage.completion_tokens,
            cache_read_tokens: usage.prompt_tokens_details.unwrap_or_default().cached_tokens,
            cache_write_tokens: 0,
            reasoning_tokens: usage.completion_tokens_details.unwrap_or_default().reasoning_tokens,
            cost_microusd: 0,
        }
    }
}

/// A call that grows. Until its name is known it has no block.
struct Slot {
    index: Option<u64>,
    id: String,
    block: Option<ToolBlock>,
    early_input: String,
}

/// See [`super::Decoder`].
pub struct Decoder {
    key: String,
    blocks: Assembler,
    /// At most [`limits::MESSAGE_TOOL_CALLS_MAX`], in the order of their first piece.
    slots: Vec<Slot>,
    usage: Option<pb::Usage>,
    stop: Option<pb::StopReason>,
    done: bool,
}

impl Decoder {
    pub fn new(key: &str) -> Self {
        Self {
            key: key.to_owned(),
            blocks: Assembler::default(),
            slots: Vec::new(),
            usage: None,
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
        if data.trim() == "[DONE]" {
            if self.stop.is_none() && self.blocks.is_empty() {
                return Err(ModelError::garbage("the stream ended without a message"));
            }
            self.stop("", out)?;
            self.complete(out);
            return Ok(());
        }
        let chunk: Chunk = serde_json::from_str(data).map_err(|error| {
            ModelError::garbage(format!("a chunk of the stream is not as expected ({:?})", error.classify()))
        })?;
        if let Some(error) = chunk.error {
            return Err(error.in_stream(&self.key));
        }
        if let Some(usage) = chunk.usage.or(chunk.x_groq.and_then(|groq| groq.usage)) {
            self.usage = Some(usage.into());
        }
        for choice in chunk.choices {
            // We ask for one choice; another one is not ours.
            if choice.index != 0 || self.stop.is_some() {
                continue;
            }
            if let Some(delta) = choice.delta {
                self.delta(delta, out)?;
            }
            if let Some(reason) = choice.finish_reason {
                self.stop(&reason, out)?;
            }
        }
        Ok(())
    }

    fn delta(&mut self, delta: Delta, out: &mut Events) -> Result<(), ModelError> {
        if let Some(piece) = delta.reasoning_content.or(delta.reasoning) {
            self.blocks.prose(Prose::Thinking, piece, out)?;
        }
        if let Some(piece) = delta.content {
            self.blocks.prose(Prose::Text, piece, out)?;
        }
        if let Some(piece) = delta.refusal {
            self.blocks.prose(Prose::Text, piece, out)?;
        }
        for call in delta.tool_calls.unwrap_or_default() {
            self.call(call, out)?;
        }
        Ok(())
    }

    fn call(&mut self, call: CallDelta, out: &mut Events) -> Result<(), ModelError> {
        let index = match call.index {
            None | Some(Value::Null) => None,
            Some(index) => match index.as_u64() {
                Some(index) if index < limits::MESSAGE_TOOL_CALLS_MAX as u64 => Some(index),
                _ => return Err(ModelError::garbage("a tool call's index is no small number")),
            },
        };
        let id = call.id.unwrap_or_default();
        let FunctionDelta { name, arguments } = call.function.unwrap_or_default();
        let name = name.unwrap_or_default();
        let at = match self.find(index, &id, &name) {
            Some(at) => at,
            None => {
                if self.slots.len() >= limits::MESSAGE_TOOL_CALLS_MAX {
                    let what = format!("more than {} tool calls", limits::MESSAGE_TOOL_CALLS_MAX);
                    return Err(ModelError::TooLarge { what });
                }
                self.slots.push(Slot { index, id: String::new(), block: None, early_input: String::new() });
                self.slots.len() - 1
            }
        };
        let slot = &mut self.slots[at];
        if slot.id.is_empty() {
            slot.id = id;
        }
        let mut piece = arguments.unwrap_or_default();
        if slot.block.is_none() && !name.is_empty() {
            if slot.id.is_empty() {
                slot.id = format!("call_{:016x}", rand::random::<u64>());
            }
            slot.block = Some(self.blocks.tool(slot.id.clone(), name, out)?);
            piece.insert_str(0, &std::mem::take(&mut slot.early_input));
        }
        match &mut slot.block {
            Some(block) => self.blocks.tool_input(block, piece, out),
            None => {
                slot.early_input.push_str(&piece);
                if slot.early_input.len() > limits::TOOL_INPUT_MAX_BYTES {
                    return Err(ModelError::garbage("a tool call's input came without its name"));
                }
                Ok(())
            }
        }
    }

    /// The call a piece belongs to. Some servers give every call the index 0, or none: a new id together with a name
    /// begins a new call.
    fn find(&self, index: Option<u64>, id: &str, name: &str) -> Option<usize> {
        let at = match index {
            Some(_) => self.slots.iter().rposition(|slot| slot.index == index)?,
            None => {
                if let Some(at) = self.slots.iter().rposition(|slot| !id.is_empty() && slot.id == id) {
                    return Some(at);
                }
                self.slots.len().checked_sub(1)?
            }
        };
        let slot = &self.slots[at];
        let named_again = !name.is_empty() && slot.block.is_some();
        let other_id = !id.is_empty() && slot.id != id;
        let begins = named_again && (other_id || (index.is_none() && id.is_empty()));
        (!begins).then_some(at)
    }

    fn stop(&mut self, reason: &str, out: &mut Events) -> Result<(), ModelError> {
        if self.stop.is_some() {
            return Ok(());
        }
        self.blocks.close(out);
        for slot in &self.slots {
            match &slot.block {
                Some(block) => self.blocks.tool_end(block, out),
                None => return Err(ModelError::garbage("a tool call has no name")),
            }
        }
        self.stop = Some(match reason {
            "length" => pb::StopReason::MaxTokens,
            "content_filter" => pb::StopReason::ContentFilter,
            "error" => return Err(ModelError::Overloaded { status: 500, retry_after: None }),
            // Some servers say "stop" also where tools are called.
            _ if self.blocks.has_tools() => pb::StopReason::ToolUse,
            _ => pb::StopReason::EndTurn,
        });
        Ok(())
    }

    fn complete(&mut self, out: &mut Events) {
        self.done = true;
        finish(self.usage.take(), self.stop.unwrap_or(pb::StopReason::EndTurn), out);
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
