//! What is asked of a model, in our words. The wire formats are made from this in `wire`.

use serde_json::Value;

/// One call of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelRequest {
    /// "provider/name", as chats use it.
    pub model: String,
    pub system: String,
    /// Oldest first. Every tool call is answered by the tool message after it; see [`crate::mend_history`].
    pub messages: Vec<ChatMessage>,
    pub tools: Vec<ToolSpec>,
    /// Tokens the answer may have; 0: the model's own.
    pub max_output_tokens: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChatRole {
    User,
    Assistant,
    /// Results of the tool calls that the assistant message before asked for.
    Tool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ChatMessage {
    pub role: ChatRole,
    pub parts: Vec<Part>,
}

impl ChatMessage {
    pub fn user(text: impl Into<String>) -> Self {
        Self { role: ChatRole::User, parts: vec![Part::Text(text.into())] }
    }

    pub fn assistant(parts: Vec<Part>) -> Self {
        Self { role: ChatRole::Assistant, parts }
    }

    pub fn tool(parts: Vec<Part>) -> Self {
        Self { role: ChatRole::Tool, parts }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    Text(String),
    /// Sent back only to Anthropic, and only with its signature.
    Thinking {
        text: String,
        signature: String,
    },
    /// `input_json` is the text the model wrote; where it is not a JSON object it is sent back wrapped in one.
    ToolUse {
        provider_id: String,
        name: String,
        input_json: String,
    },
    ToolResult {
        provider_id: String,
        content: String,
        is_error: bool,
    },
    Image {
        media_type: String,
        data: Vec<u8>,
    },
}

/// A tool that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolSpec {
    pub name: String,
    pub description: String,
    /// A JSON schema of type "object".
    pub input_schema: Value,
}
