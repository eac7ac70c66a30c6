//! The wire formats. A decoder turns the data of events into [`ModelEvent`]s; it knows nothing of HTTP.

pub mod anthropic;
mod assemble;
pub mod openai;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use reliant_types::pb;
use serde_json::value::RawValue;

use crate::{ModelError, ModelEvent, config::ProviderKind};

/// Where a decoder puts what it read.
pub type Events = VecDeque<ModelEvent>;

/// The state of one stream.
pub enum Decoder {
    OpenAi(openai::Decoder),
    Anthropic(anthropic::Decoder),
}

impl Decoder {
    pub fn new(kind: ProviderKind, key: &str) -> Self {
        match kind {
            ProviderKind::OpenAi => Self::OpenAi(openai::Decoder::new(key)),
            ProviderKind::Anthropic => Self::Anthropic(anthropic::Decoder::new(key)),
        }
    }

    /// One event's data.
    pub fn event(&mut self, data: &str, out: &mut Events) -> Result<(), ModelError> {
        match self {
            Self::OpenAi(decoder) => decoder.event(data, out),
            Self::Anthropic(decoder) => decoder.event(data, out),
        }
    }

    /// The provider's own end came: nothing after it matters.
    pub fn is_done(&self) -> bool {
        match self {
            Self::OpenAi(decoder) => decoder.is_done(),
            Self::Anthropic(decoder) => decoder.is_done(),
        }
    }

    /// The connection ended. Good only where the stop reason is known.
    pub fn end(&mut self, out: &mut Events) -> Result<(), ModelError> {
        match self {
            Self::OpenAi(decoder) => decoder.end(out),
            Self::Anthropic(decoder) => decoder.end(out),
        }
    }
}

/// The last two events.
fn finish(usage: Option<pb::Usage>, stop: pb::StopReason, out: &mut Events) {
    if let Some(usage) = usage {
        out.push_back(ModelEvent::Usage(usage));
    }
    out.push_back(ModelEvent::Stop(stop));
}

/// A tool's input as a JSON object: the text itself, or, where it is none, the text within one.
fn object(input_json: &str) -> Box<RawValue> {
    let text = input_json.trim();
    if text.starts_with('{')
        && let Ok(raw) = RawValue::from_string(text.to_owned())
    {
        return raw;
    }
    let wrapped = if text.is_empty() { serde_json::json!({}) } else { serde_json::json!({ "invalid_json": text }) };
    RawValue::from_string(wrapped.to_string()).expect("a value's text is JSON")
}

fn base64(data: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(data)
}

/// What a provider says in the body of an error, or in an error event.
#[derive(serde::Deserialize)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

#[derive(serde::Deserialize, Default)]
#[serde(default)]
pub struct ErrorDetail {
    #[serde(deserialize_with = "crate::lenient::text")]
    pub message: Option<String>,
    #[serde(rename = "type", deserialize_with = "crate::lenient::text")]
    pub kind: Option<String>,
    /// A text with OpenAI, a number with some compatible servers.
    pub code: serde_json::Value,
}

impl ErrorDetail {
    /// An error that came where the status was already 200.
    pub fn in_stream(self, key: &str) -> ModelError {
        let kind = self.kind.as_deref().unwrap_or_default();
        let code = self.code.as_str().unwrap_or_default();
        let number = self.code.as_u64().and_then(|code| u16::try_from(code).ok());
        let status = match (kind, code, number) {
            ("rate_limit_error" | "rate_limit_exceeded", ..) | (_, "rate_limit_exceeded", _) | (.., Some(429)) => {
                return ModelError::RateLimited { retry_after: None };
            }
            ("overloaded_error", ..) => 529,
            ("api_error" | "server_error" | "timeout_error", ..) => 500,
            ("invalid_request_error", ..) => 400,
            ("authentication_error", ..) => 401,
            ("permission_error", ..) => 403,
            ("not_found_error", ..) => 404,
            ("request_too_large", ..) => 413,
            (.., Some(status)) => status,
            _ => 500,
        };
        if (400..500).contains(&status) && status != 408 {
            let message = crate::error::scrub(self.message.as_deref().unwrap_or("no reason given"), key);
            return ModelError::Rejected { status, message };
        }
        ModelError::Overloaded { status, retry_after: None }
    }
}
