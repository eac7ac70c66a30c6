//! OpenAI's chat completions, as OpenAI and as compatible servers take it: the request. The answer is read in `stream`.

mod stream;

use serde::{Serialize, ser::SerializeSeq};
use serde_json::{Value, value::RawValue};

use super::{base64, object};
use crate::{ChatMessage, ChatRole, ModelRequest, Part};

pub use stream::Decoder;

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
