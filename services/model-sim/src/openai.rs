//! OpenAI's chat completions: what a request must be, and how an answer is written.

use serde_json::{Value, json};

use crate::{
    answer::{Block, Stop, Usage},
    ask::{Ask, AskCall, Item, Refusal, Tool, check_tool_name, check_tools, script_name, text},
    stream::Writer,
};

/// OpenAI's own limits: of a tool's name, of the tools of a request, and of the calls of one message.
const NAME_MAX: usize = 64;
const TOOLS_MAX: usize = 128;
/// The format has no flag for a failed tool; Reliant's client marks it so.
const ERROR_MARK: &str = "[tool error] ";

pub fn parse(body: &[u8]) -> Result<Ask, Refusal> {
    let value: Value = serde_json::from_slice(body)
        .map_err(|error| Refusal::invalid(format!("We could not parse the JSON body of your request: {error}")))?;
    let model = text(&value, "model", "request")?;
    let mut ask = Ask {
        model: script_name(model),
        stream: value.get("stream").and_then(Value::as_bool).unwrap_or(false),
        include_usage: value["stream_options"]["include_usage"].as_bool().unwrap_or(false),
        bytes: body.len(),
        ..Ask::default()
    };
    for field in ["max_tokens", "max_completion_tokens"] {
        if value.get(field).is_some_and(|limit| limit.as_u64().is_none_or(|limit| limit == 0)) {
            return Err(Refusal::invalid(format!("Invalid '{field}': a positive integer is required")));
        }
    }
    let messages = value["messages"].as_array().filter(|messages| !messages.is_empty());
    for (at, message) in
        messages.ok_or_else(|| Refusal::invalid("messages: a non-empty array is required"))?.iter().enumerate()
    {
        read(message, &format!("messages[{at}]"), &mut ask.items)?;
    }
    check_pairs(&ask.items)?;
    if let Some(tools) = value.get("tools") {
        let tools = tools.as_array().filter(|tools| !tools.is_empty());
        let tools = tools.ok_or_else(|| Refusal::invalid("tools: a non-empty array is required"))?;
        check_length("tools", tools.len())?;
        for tool in tools {
            if tool["type"] != "function" {
                return Err(Refusal::invalid("tools: 'type' must be 'function'"));
            }
            let function = &tool["function"];
            let name = text(function, "name", "tools.function")?.to_owned();
            ask.tools.push(Tool { name, schema: function["parameters"].clone() });
        }
        check_tools(&ask.tools, NAME_MAX)?;
    }
    Ok(ask)
}

fn read(message: &Value, path: &str, items: &mut Vec<Item>) -> Result<(), Refusal> {
    let content = || content(&message["content"], path);
    match text(message, "role", path)? {
        "system" | "developer" => drop(content()?),
        "user" => items.push(Item::User(content()?)),
        "assistant" => {
            let calls = match message.get("tool_calls") {
                None | Some(Value::Null) => Vec::new(),
                Some(calls) => {
                    let calls = calls
                        .as_array()
                        .filter(|calls| !calls.is_empty())
                        .ok_or_else(|| Refusal::invalid(format!("Invalid '{path}.tool_calls': empty array")))?;
                    check_length(&format!("{path}.tool_calls"), calls.len())?;
                    calls.iter().map(|call| read_call(call, path)).collect::<Result<_, _>>()?
                }
            };
            let text = if message["content"].is_null() { String::new() } else { content()? };
            if text.is_empty() && calls.is_empty() {
                return Err(Refusal::invalid(format!("{path}: an assistant message needs content or tool_calls")));
            }
            items.push(Item::Assistant { text, calls });
        }
        "tool" => {
            let id = text(message, "tool_call_id", path)?.to_owned();
            let content = content()?;
            let is_error = content.starts_with(ERROR_MARK);
            let content = content.strip_prefix(ERROR_MARK).map(str::to_owned).unwrap_or(content);
            items.push(Item::Result { id, content, is_error });
        }
        role => return Err(Refusal::invalid(format!("Invalid value: '{role}' at {path}.role"))),
    }
    Ok(())
}

fn check_length(what: &str, length: usize) -> Result<(), Refusal> {
    if length <= TOOLS_MAX {
        return Ok(());
    }
    Err(Refusal::invalid(format!(
        "Invalid '{what}': array too long. Expected an array with maximum length {TOOLS_MAX}, but got an array with length \
         {length} instead."
    )))
}

fn content(value: &Value, path: &str) -> Result<String, Refusal> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) if !parts.is_empty() => {
            let mut all = String::new();
            for part in parts {
                match part["type"].as_str() {
                    Some("text") => all = text(part, "text", path)?.to_owned(),
                    Some("image_url") if part["image_url"]["url"].is_string() => {}
                    _ => return Err(Refusal::invalid(format!("{path}.content: a part of an unknown type"))),
                }
            }
            Ok(all)
        }
        _ => {
            Err(Refusal::invalid(format!("Invalid type for '{path}.content': expected a string or an array of parts")))
        }
    }
}

fn read_call(call: &Value, path: &str) -> Result<AskCall, Refusal> {
    let id = text(call, "id", path)?.to_owned();
    if call["type"] != "function" || id.is_empty() || id.len() > 64 {
        return Err(Refusal::invalid(format!(
            "{path}.tool_calls: an id of 1 to 64 characters and type 'function' are required"
        )));
    }
    let name = text(&call["function"], "name", path)?.to_owned();
    check_tool_name(&name, NAME_MAX)?;
    let arguments = text(&call["function"], "arguments", path)?;
    // OpenAI does not look, but servers that render templates fail on it.
    if !serde_json::from_str::<Value>(arguments).is_ok_and(|arguments| arguments.is_object()) {
        return Err(Refusal::invalid(format!("{path}.tool_calls: the arguments of '{name}' are not a JSON object")));
    }
    Ok(AskCall { id, name })
}

/// Every call is answered once, right behind its message.
fn check_pairs(items: &[Item]) -> Result<(), Refusal> {
    let mut open: Vec<&str> = Vec::new();
    let unanswered = |open: &[&str]| {
        Refusal::invalid(format!(
            "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'. \
             The following tool_call_ids did not have response messages: {}",
            open.join(", ")
        ))
    };
    for item in items {
        match item {
            Item::Result { id, .. } => match open.iter().position(|known| known == id) {
                Some(at) => drop(open.remove(at)),
                None => {
                    let message =
                        "messages with role 'tool' must be a response to a preceding message with 'tool_calls'";
                    return Err(Refusal::invalid(format!("{message}; '{id}' is none")));
                }
            },
            Item::User(_) | Item::Assistant { .. } if !open.is_empty() => return Err(unanswered(&open)),
            Item::Assistant { calls, .. } => open = calls.iter().map(|call| call.id.as_str()).collect(),
            Item::User(_) => {}
        }
        open.sort_unstable();
        if open.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Refusal::invalid("an assistant message has two tool_calls with one id"));
        }
    }
    if open.is_empty() { Ok(()) } else { Err(unanswered(&open)) }
}

pub fn error(kind: &str, message: &str) -> Value {
    let code = if kind == "not_found_error" { json!("model_not_found") } else { Value::Null };
    json!({ "error": { "message": message, "type": kind, "param": null, "code": code } })
}

fn usage_json(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.input,
        "completion_tokens": usage.output,
        "total_tokens": usage.input + usage.output,
        "prompt_tokens_details": { "cached_tokens": 0 },
        "completion_tokens_details": { "reasoning_tokens": usage.thinking },
    })
}

fn finish_reason(stop: Stop) -> &'static str {
    match stop {
        Stop::EndTurn => "stop",
        Stop::ToolUse => "tool_calls",
        Stop::MaxTokens => "length",
        Stop::Refusal => "content_filter",
    }
}

/// The whole answer at once.
pub fn whole(ask: &Ask, id: u64, blocks: &[Block], stop: Stop, usage: Usage) -> Value {
    let joined = |wanted: fn(&Block) -> Option<&Vec<String>>| {
        let text: String = blocks.iter().filter_map(wanted).flatten().map(String::as_str).collect();
        if text.is_empty() { Value::Null } else { Value::String(text) }
    };
    let calls: Vec<Value> = blocks
        .iter()
        .filter_map(|block| match block {
            Block::Tool { id, name, args } => {
                let arguments = args.concat();
                Some(json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } }))
            }
            _ => None,
        })
        .collect();
    let mut message = json!({
        "role": "assistant",
        "content": joined(|block| match block { Block::Text(pieces) => Some(pieces), _ => None }),
        "reasoning_content": joined(|block| match block { Block::Thinking(pieces) => Some(pieces), _ => None }),
    });
    if !calls.is_empty() {
        message["tool_calls"] = Value::Array(calls);
    }
    json!({
        "id": format!("chatcmpl-{id:016x}"), "object": "chat.completion", "created": 0, "model": ask.model,
        "choices": [{ "index": 0, "message": message, "finish_reason": finish_reason(stop) }],
        "usage": usage_json(usage),
    })
}

/// Writes the chunks of a stream.
pub struct OpenAiWriter {
    head: String,
    include_usage: bool,
    tools: usize,
}

impl OpenAiWriter {
    pub fn new(ask: &Ask, id: u64) -> Self {
        let model = Value::String(ask.model.clone());
        let head = format!(
            "data: {{\"id\":\"chatcmpl-{id:016x}\",\"object\":\"chat.completion.chunk\",\"created\":0,\"model\":{model},"
        );
        Self { head, include_usage: ask.include_usage, tools: 0 }
    }

    fn chunk(&self, out: &mut String, delta: &str, finish: &str) {
        out.push_str(&self.head);
        out.push_str("\"choices\":[{\"index\":0,\"delta\":");
        out.push_str(delta);
        out.push_str(",\"finish_reason\":");
        out.push_str(finish);
        out.push_str("}]}\n\n");
    }
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a text serializes")
}

impl Writer for OpenAiWriter {
    fn start(&mut self, _usage: Usage, out: &mut String) {
        self.chunk(out, "{\"role\":\"assistant\",\"content\":\"\"}", "null");
    }

    fn open(&mut self, block: &Block, out: &mut String) {
        if let Block::Tool { id, name, .. } = block {
            let call = format!(
                "{{\"tool_calls\":[{{\"index\":{},\"id\":{},\"type\":\"function\",\"function\":{{\"name\":{},\"arguments\":\"\"}}}}]}}",
                self.tools,
                quoted(id),
                quoted(name)
            );
            self.chunk(out, &call, "null");
            self.tools += 1;
        }
    }

    fn piece(&mut self, block: &Block, piece: &str, out: &mut String) {
        let piece = quoted(piece);
        let delta = match block {
            Block::Text(_) => format!("{{\"content\":{piece}}}"),
            Block::Thinking(_) => format!("{{\"reasoning_content\":{piece}}}"),
            Block::Tool { .. } => {
                let index = self.tools.saturating_sub(1);
                format!("{{\"tool_calls\":[{{\"index\":{index},\"function\":{{\"arguments\":{piece}}}}}]}}")
            }
        };
        self.chunk(out, &delta, "null");
    }

    fn close(&mut self, _block: &Block, _out: &mut String) {}

    fn finish(&mut self, stop: Stop, usage: Usage, out: &mut String) {
        self.chunk(out, "{}", &quoted(finish_reason(stop)));
        if self.include_usage {
            out.push_str(&self.head);
            out.push_str(&format!("\"choices\":[],\"usage\":{}}}\n\n", usage_json(usage)));
        }
        out.push_str("data: [DONE]\n\n");
    }

    fn error(&mut self, out: &mut String) {
        let error = error("server_error", "The server had an error while processing your request");
        out.push_str(&format!("data: {error}\n\n"));
    }

    fn huge_index(&mut self, out: &mut String) {
        let call = "{\"tool_calls\":[{\"index\":4294967295,\"id\":\"x\",\"function\":{\"name\":\"shell\",\"arguments\":\"{}\"}}]}";
        self.chunk(out, call, "null");
    }
}
