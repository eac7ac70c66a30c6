//! Reading what servers that call themselves compatible really send. Nothing here fails on a type it did not expect.

use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// A text; anything else is none.
pub fn text<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(match Value::deserialize(from)? {
        Value::String(text) => Some(text),
        _ => None,
    })
}

/// A text, or the text of the JSON object that stands in its place: some servers send a tool's arguments so.
pub fn json_text<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(match Value::deserialize(from)? {
        Value::String(text) => Some(text),
        object @ Value::Object(_) => Some(object.to_string()),
        _ => None,
    })
}

/// A count of tokens; fractions, negatives and other types are 0.
pub fn count<'de, D: Deserializer<'de>>(from: D) -> Result<i64, D::Error> {
    Ok(Value::deserialize(from)?.as_i64().unwrap_or(0).clamp(0, 1 << 40))
}
