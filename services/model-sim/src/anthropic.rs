//! Anthropic's messages: what a request must be, and how an answer is written.

use serde_json::{Value, json};

use crate::{
    answer::{Block, Stop, Usage},
    ask::{Ask, AskCall, Item, Refusal, Tool, check_tool_name, check_tools, hash, script_name, text},
    stream::Writer,
};

/// Anthropic's own limits.
const NAME_MAX: usize = 128;
const CACHE_MARKS_MAX: usize = 4;

pub fn parse(body: &[u8]) -> Result<Ask, Refusal> {
    let value: Value = serde_json::from_slice(body)
        .map_err(|error| Refusal::invalid(format!("The request body is not valid JSON: {error}")))?;
    let model = text(&value, "model", "request")?;
    let mut ask = Ask {
        model: script_name(model),
        stream: value.get("stream").and_then(Value::as_bool).unwrap_or(false),
        include_usage: true,
        bytes: body.len(),
        ..Ask::default()
    };
    if value.get("max_tokens").and_then(Value::as_u64).is_none_or(|limit| limit == 0) {
        return Err(Refusal::invalid("max_tokens: Field required"));
    }
    let mut marks = 0;
    match value.get("system") {
        None | Some(Value::String(_)) => {}
        Some(Value::Array(blocks)) => {
            for block in blocks {
                if block["type"] != "text" || text(block, "text", "system")?.is_empty() {
                    return Err(Refusal::invalid("system: text content blocks must be non-empty"));
                }
                marks += usize::from(block.get("cache_control").is_some());
            }
        }
        Some(_) => return Err(Refusal::invalid("system: Input should be a valid string or list")),
    }
    let messages = value["messages"].as_array().filter(|messages| !messages.is_empty());
    let messages = messages.ok_or_else(|| Refusal::invalid("messages: at least one message is required"))?;
    let mut open: Vec<String> = Vec::new();
    for (at, message) in messages.iter().enumerate() {
        let path = format!("messages.{at}");
        let role = text(message, "role", &path)?;
        if at == 0 && role != "user" {
            return Err(Refusal::invalid("messages: first message must use the \"user\" role"));
        }
        let whole;
        let blocks = match &message["content"] {
            Value::String(text) => {
                whole = [json!({ "type": "text", "text": text })];
                &whole[..]
            }
            Value::Array(blocks) if !blocks.is_empty() => blocks,
            _ => return Err(Refusal::invalid(format!("{path}.content: non-empty content is required"))),
        };
        marks += blocks.iter().filter(|block| block.get("cache_control").is_some()).count();
        match role {
            "user" => read_user(blocks, &path, &mut open, &mut ask.items)?,
            "assistant" if open.is_empty() => open = read_assistant(blocks, &path, &mut ask.items)?,
            "assistant" => return Err(unanswered(&path, &open)),
            role => return Err(Refusal::invalid(format!("{path}.role: unexpected role \"{role}\""))),
        }
    }
    if !open.is_empty() {
        return Err(unanswered(&format!("messages.{}", messages.len() - 1), &open));
    }
    if let Some(tools) = value.get("tools").and_then(Value::as_array) {
        for tool in tools {
            let name = text(tool, "name", "tools")?.to_owned();
            marks += usize::from(tool.get("cache_control").is_some());
            ask.tools.push(Tool { name, schema: tool["input_schema"].clone() });
        }
        check_tools(&ask.tools, NAME_MAX)?;
    }
    if marks > CACHE_MARKS_MAX {
        return Err(Refusal::invalid(format!(
            "A maximum of {CACHE_MARKS_MAX} blocks with cache_control may be provided. Found {marks}."
        )));
    }
    Ok(ask)
}

fn unanswered(path: &str, open: &[String]) -> Refusal {
    Refusal::invalid(format!(
        "{path}: `tool_use` ids were found without `tool_result` blocks immediately after: {}. Each `tool_use` block must \
         have a corresponding `tool_result` block in the next message.",
        open.join(", ")
    ))
}

fn read_user(blocks: &[Value], path: &str, open: &mut Vec<String>, items: &mut Vec<Item>) -> Result<(), Refusal> {
    let mut texts = false;
    for block in blocks {
        match block["type"].as_str() {
            Some("text") => {
                let text = text(block, "text", path)?;
                if text.is_empty() {
                    return Err(Refusal::invalid("messages: text content blocks must be non-empty"));
                }
                texts = true;
                if !open.is_empty() {
                    return Err(unanswered(path, open));
                }
                items.push(Item::User(text.to_owned()));
            }
            Some("image") if block["source"]["type"].is_string() => {}
            Some("tool_result") => {
                let id = text(block, "tool_use_id", path)?.to_owned();
                let Some(at) = open.iter().position(|known| *known == id).filter(|_| !texts) else {
                    return Err(Refusal::invalid(format!(
                        "{path}: unexpected `tool_use_id` found in `tool_result` blocks: {id}"
                    )));
                };
                open.remove(at);
                let content = match &block["content"] {
                    Value::String(text) => text.clone(),
                    Value::Null => String::new(),
                    Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
                    _ => {
                        return Err(Refusal::invalid(format!("{path}: a tool_result's content is a string or a list")));
                    }
                };
                let is_error = block["is_error"].as_bool().unwrap_or(false);
                items.push(Item::Result { id, content, is_error });
            }
            kind => return Err(Refusal::invalid(format!("{path}.content: unexpected block type {kind:?}"))),
        }
    }
    if open.is_empty() { Ok(()) } else { Err(unanswered(path, open)) }
}

fn read_assistant(blocks: &[Value], path: &str, items: &mut Vec<Item>) -> Result<Vec<String>, Refusal> {
    let mut said = String::new();
    let mut calls: Vec<AskCall> = Vec::new();
    for block in blocks {
        match block["type"].as_str() {
            Some("text") => {
                let text = text(block, "text", path)?;
                if text.trim().is_empty() {
                    return Err(Refusal::invalid("messages: text content blocks must contain non-whitespace text"));
                }
                said.push_str(text);
            }
            Some("thinking") => {
                let thinking = text(block, "thinking", path)?;
                if text(block, "signature", path)? != signature(&[thinking]) {
                    return Err(Refusal::invalid(format!("{path}: Invalid `signature` in `thinking` block")));
                }
            }
            Some("tool_use") => {
                let id = text(block, "id", path)?.to_owned();
                let name = text(block, "name", path)?.to_owned();
                check_tool_name(&name, NAME_MAX)?;
                check_tool_name(&id, NAME_MAX)?;
                if !block["input"].is_object() {
                    return Err(Refusal::invalid(format!(
                        "{path}: tool_use.input: Input should be a valid dictionary"
                    )));
                }
                if calls.iter().any(|known| known.id == id) {
                    return Err(Refusal::invalid(format!("{path}: `tool_use` ids must be unique")));
                }
                calls.push(AskCall { id, name });
            }
            kind => return Err(Refusal::invalid(format!("{path}.content: unexpected block type {kind:?}"))),
        }
    }
    let open = calls.iter().map(|call| call.id.clone()).collect();
    items.push(Item::Assistant { text: said, calls });
    Ok(open)
}

/// Proves that a thinking block is ours and whole.
pub fn signature(pieces: &[impl AsRef<str>]) -> String {
    let text: String = pieces.iter().map(AsRef::as_ref).collect();
    format!("sim-{:016x}", hash(&text))
}

pub fn error(kind: &str, message: &str) -> Value {
    json!({ "type": "error", "error": { "type": kind, "message": message } })
}

fn stop_reason(stop: Stop) -> &'static str {
    match stop {
        Stop::EndTurn => "end_turn",
        Stop::ToolUse => "tool_use",
        Stop::MaxTokens => "max_tokens",
        Stop::Refusal => "refusal",
    }
}

fn usage_json(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.input, "output_tokens": usage.output,
        "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0,
    })
}

/// The whole answer at once.
pub fn whole(ask: &Ask, id: u64, blocks: &[Block], stop: Stop, usage: Usage) -> Value {
    let content: Vec<Value> = blocks
        .iter()
        .map(|block| match block {
            Block::Text(pieces) => json!({ "type": "text", "text": pieces.concat() }),
            Block::Thinking(pieces) => {
                json!({ "type": "thinking", "thinking": pieces.concat(), "signature": signature(pieces) })
            }
            Block::Tool { id, name, args } => {
                let input: Value = serde_json::from_str(&args.concat()).unwrap_or_else(|_| json!({}));
                json!({ "type": "tool_use", "id": id, "name": name, "input": input })
            }
        })
        .collect();
    json!({
        "id": format!("msg_{id:016x}"), "type": "message", "role": "assistant", "model": ask.model, "content": content,
        "stop_reason": stop_reason(stop), "stop_sequence": null, "usage": usage_json(usage),
    })
}

/// Writes the events of a stream.
pub struct AnthropicWriter {
    id: String,
    model: String,
    next: usize,
}

impl AnthropicWriter {
    pub fn new(ask: &Ask, id: u64) -> Self {
        Self { id: format!("msg_{id:016x}"), model: ask.model.clone(), next: 0 }
    }

    fn current(&self) -> usize {
        self.next.saturating_sub(1)
    }
}

fn event(out: &mut String, value: &Value) {
    let name = value["type"].as_str().unwrap_or_default();
    out.push_str(&format!("event: {name}\ndata: {value}\n\n"));
}

impl Writer for AnthropicWriter {
    fn start(&mut self, usage: Usage, out: &mut String) {
        let message = json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": [],
            "stop_reason": null, "stop_sequence": null, "usage": usage_json(Usage { output: 1, ..usage }),
        });
        event(out, &json!({ "type": "message_start", "message": message }));
        event(out, &json!({ "type": "ping" }));
    }

    fn open(&mut self, block: &Block, out: &mut String) {
        let content = match block {
            Block::Text(_) => json!({ "type": "text", "text": "" }),
            Block::Thinking(_) => json!({ "type": "thinking", "thinking": "", "signature": "" }),
            Block::Tool { id, name, .. } => json!({ "type": "tool_use", "id": id, "name": name, "input": {} }),
        };
        event(out, &json!({ "type": "content_block_start", "index": self.next, "content_block": content }));
        self.next += 1;
    }

    fn piece(&mut self, block: &Block, piece: &str, out: &mut String) {
        let delta = match block {
            Block::Text(_) => json!({ "type": "text_delta", "text": piece }),
            Block::Thinking(_) => json!({ "type": "thinking_delta", "thinking": piece }),
            Block::Tool { .. } => json!({ "type": "input_json_delta", "partial_json": piece }),
        };
        event(out, &json!({ "type": "content_block_delta", "index": self.current(), "delta": delta }));
    }

    fn close(&mut self, block: &Block, out: &mut String) {
        if let Block::Thinking(pieces) = block {
            let delta = json!({ "type": "signature_delta", "signature": signature(pieces) });
            event(out, &json!({ "type": "content_block_delta", "index": self.current(), "delta": delta }));
        }
        event(out, &json!({ "type": "content_block_stop", "index": self.current() }));
    }

    fn finish(&mut self, stop: Stop, usage: Usage, out: &mut String) {
        let delta = json!({ "stop_reason": stop_reason(stop), "stop_sequence": null });
        let usage = json!({ "output_tokens": usage.output });
        event(out, &json!({ "type": "message_delta", "delta": delta, "usage": usage }));
        event(out, &json!({ "type": "message_stop" }));
    }

    fn error(&mut self, out: &mut String) {
        event(out, &error("overloaded_error", "Overloaded"));
    }

    fn huge_index(&mut self, out: &mut String) {
        let content = json!({ "type": "tool_use", "id": "x", "name": "shell", "input": {} });
        event(out, &json!({ "type": "content_block_start", "index": 4_294_967_295_u64, "content_block": content }));
    }
}
