//! Arguments that fit a tool's JSON schema: its required properties, with plain values. Enough for tools that nobody
//! here knows; a tool may still refuse them.

use serde_json::{Map, Value, json};

const DEPTH_MAX: usize = 8;

/// An object with what the schema requires.
pub fn arguments(schema: &Value) -> Value {
    match example(schema, schema, "", 0) {
        object @ Value::Object(_) => object,
        _ => json!({}),
    }
}

fn example(root: &Value, schema: &Value, name: &str, depth: usize) -> Value {
    if depth > DEPTH_MAX {
        return Value::Null;
    }
    if let Some(target) = schema.get("$ref").and_then(Value::as_str).and_then(|path| path.strip_prefix('#')) {
        return root.pointer(target).map_or(Value::Null, |target| example(root, target, name, depth + 1));
    }
    for fixed in ["const", "default"] {
        if let Some(value) = schema.get(fixed).filter(|value| !value.is_null()) {
            return value.clone();
        }
    }
    for list in ["enum", "examples"] {
        if let Some(value) = schema.get(list).and_then(|list| list.get(0)) {
            return value.clone();
        }
    }
    for choice in ["anyOf", "oneOf", "allOf"] {
        if let Some(first) = schema.get(choice).and_then(|list| list.get(0)) {
            return example(root, first, name, depth + 1);
        }
    }
    let kind = match &schema["type"] {
        Value::String(kind) => kind.as_str(),
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).find(|kind| *kind != "null").unwrap_or("null"),
        _ if schema.get("properties").is_some() => "object",
        _ => "string",
    };
    match kind {
        "object" => {
            let mut object = Map::new();
            let required = schema.get("required").and_then(Value::as_array).into_iter().flatten();
            for name in required.filter_map(Value::as_str) {
                object.insert(name.to_owned(), example(root, &schema["properties"][name], name, depth + 1));
            }
            Value::Object(object)
        }
        "array" => {
            let count = schema.get("minItems").and_then(Value::as_u64).unwrap_or(0).min(8);
            (0..count).map(|_| example(root, &schema["items"], name, depth + 1)).collect()
        }
        "integer" => json!(schema.get("minimum").and_then(Value::as_i64).unwrap_or(1)),
        "number" => json!(schema.get("minimum").and_then(Value::as_f64).unwrap_or(1.0)),
        "boolean" => json!(false),
        "null" => Value::Null,
        _ => text(schema, name),
    }
}

fn text(schema: &Value, name: &str) -> Value {
    let name = name.to_ascii_lowercase();
    let format = schema.get("format").and_then(Value::as_str).unwrap_or_default();
    let text = match (format, name.as_str()) {
        ("date-time", _) => "2026-01-01T12:00:00Z",
        ("date", _) => "2026-01-01",
        ("uri" | "url", _) => "https://example.com/",
        ("email", _) => "someone@example.com",
        (_, name) if name.contains("timezone") || name == "tz" => "UTC",
        (_, name) if name.contains("time") => "12:00",
        (_, name) if name.contains("url") || name.contains("uri") => "https://example.com/",
        (_, name) if name.contains("path") || name.contains("dir") => ".",
        (_, name) if name.contains("message") || name.contains("text") => "hello from the simulator",
        _ => "hello",
    };
    let least = schema.get("minLength").and_then(Value::as_u64).unwrap_or(0).min(1000) as usize;
    Value::String(format!("{text}{}", "o".repeat(least.saturating_sub(text.len()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn required_properties_are_made() {
        let schema = json!({
            "type": "object",
            "properties": {
                "timezone": { "type": "string" }, "time": { "type": "string" }, "count": { "type": "integer", "minimum": 3 },
                "kind": { "enum": ["a", "b"] }, "inner": { "$ref": "#/$defs/inner" }, "skipped": { "type": "string" },
                "list": { "type": "array", "minItems": 2, "items": { "type": "boolean" } },
                "maybe": { "anyOf": [{ "type": "number" }, { "type": "null" }] },
            },
            "required": ["timezone", "time", "count", "kind", "inner", "list", "maybe"],
            "$defs": { "inner": { "type": "object", "properties": { "message": { "type": "string" } }, "required": ["message"] } },
        });
        let expected = json!({
            "timezone": "UTC", "time": "12:00", "count": 3, "kind": "a", "inner": { "message": "hello from the simulator" },
            "list": [false, false], "maybe": 1.0,
        });
        assert_eq!(arguments(&schema), expected);
        assert_eq!(arguments(&json!({ "$ref": "#" })), json!({}));
        assert_eq!(arguments(&Value::Null), json!({}));
    }
}
