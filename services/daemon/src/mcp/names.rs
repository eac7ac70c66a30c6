//! What MCP servers call their tools, made fit for models: names of a fixed alphabet and length, no two alike;
//! schemas that providers accept. A server that lies gets its tools cleaned or left out, and nobody else suffers.

use std::collections::HashMap;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::schema::is_schema;

const NAME_MAX_CHARS: usize = 64;
const HASH_CHARS: usize = 8;
const DESCRIPTION_MAX_CHARS: usize = 4096;
const SCHEMA_MAX_BYTES: usize = 32 * 1024;

fn sanitised(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '_' }).collect()
}

fn hashed(name: &str, server: &str, tool: &str) -> String {
    let mut hash = Sha256::new();
    hash.update((server.len() as u64).to_be_bytes());
    hash.update(server);
    hash.update(tool);
    let hash = hex::encode(hash.finalize());
    let head: String = name.chars().take(NAME_MAX_CHARS - HASH_CHARS - 1).collect();
    format!("{head}_{}", &hash[..HASH_CHARS])
}

/// A name for each (server, tool) of one root. It depends on the pair alone, unless two would be alike.
pub fn offered(pairs: &[(&str, &str)]) -> Vec<String> {
    let plain = |server: &str, tool: &str| {
        let name = format!("mcp__{}__{}", sanitised(server), sanitised(tool));
        if name.len() > NAME_MAX_CHARS { hashed(&name, server, tool) } else { name }
    };
    let mut count: HashMap<String, usize> = HashMap::new();
    for (server, tool) in pairs {
        *count.entry(plain(server, tool)).or_default() += 1;
    }
    pairs
        .iter()
        .map(|(server, tool)| {
            let name = plain(server, tool);
            if count[&name] > 1 { hashed(&name, server, tool) } else { name }
        })
        .collect()
}

pub fn description(text: &str) -> String {
    let clean = text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t'));
    clean.take(DESCRIPTION_MAX_CHARS).collect()
}

/// The schema as it is sent to providers. One that none would accept becomes "any object", so that the tool still
/// works and does not break the other tools' turn.
pub fn schema(given: &Map<String, Value>) -> String {
    let mut schema = given.clone();
    schema.remove("$schema");
    schema.entry("type").or_insert_with(|| json!("object"));
    let is_object = schema.get("type") == Some(&json!("object"));
    let properties_fit = schema.get("properties").is_none_or(Value::is_object);
    let text = Value::Object(schema);
    let valid = is_object && properties_fit && is_schema(&text);
    let text = text.to_string();
    if valid && text.len() <= SCHEMA_MAX_BYTES { text } else { json!({"type": "object"}).to_string() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn plain_names_stay_plain() {
        assert_eq!(offered(&[("time", "get_current_time")]), ["mcp__time__get_current_time"]);
        let alike = offered(&[("a b", "x"), ("a.b", "x"), ("c", "x")]);
        assert!(alike[0] != alike[1] && alike[0].starts_with("mcp__a_b__x_") && alike[2] == "mcp__c__x", "{alike:?}");
    }

    #[test]
    fn schemas_that_lie_are_replaced() {
        let check = |value: Value| schema(value.as_object().unwrap());
        let good = json!({"type": "object", "properties": {"a": {"type": "string"}}});
        assert_eq!(serde_json::from_str::<Value>(&check(good.clone())).unwrap(), good);
        let any = json!({"type": "object"}).to_string();
        assert_eq!(check(json!({})), any);
        for bad in [
            json!({"type": "string"}),
            json!({"type": "object", "properties": []}),
            json!({"type": "object", "properties": {"a": {"type": "strin"}}}),
            json!({"type": "object", "required": "a"}),
            json!({"type": "object", "description": "x".repeat(SCHEMA_MAX_BYTES)}),
        ] {
            assert_eq!(check(bad.clone()), any, "{bad}");
        }
        assert_eq!(description("a\u{1b}[31mb\0c\nd"), "a[31mbc\nd");
    }

    proptest! {
        #[test]
        fn names_fit_and_differ(pairs in prop::collection::hash_set((".{0,40}", ".{0,80}"), 0..20)) {
            let pairs: Vec<(&str, &str)> = pairs.iter().map(|(s, t)| (s.as_str(), t.as_str())).collect();
            let names = offered(&pairs);
            for name in &names {
                prop_assert!(name.len() <= 64 && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-'));
            }
            let distinct: std::collections::HashSet<_> = names.iter().collect();
            prop_assert_eq!(distinct.len(), names.len());
        }
    }
}
