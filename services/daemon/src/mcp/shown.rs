//! What a person is shown of an entry before they trust it: all of it, on one line, with nothing hidden.

use std::collections::BTreeMap;

use reliant_types::visible::is_hidden;
use serde_json::Value;

const SHOWN_MAX_CHARS: usize = 8 * 1024;
/// Parts of names whose values are left out: the line goes to terminals and logs.
const SECRET_NAMES: &[&str] = &["KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL", "AUTH", "COOKIE"];

/// The command line or address, then `env` and `headers`, variables not filled in.
pub fn summary(entry: &Value) -> String {
    let mut parts = Vec::new();
    match (entry.get("command"), entry.get("url")) {
        (Some(Value::String(command)), _) => {
            let args = entry.get("args").and_then(Value::as_array);
            let args = args.into_iter().flatten().filter_map(Value::as_str);
            parts.extend(std::iter::once(command.as_str()).chain(args).map(word));
        }
        (_, Some(Value::String(url))) => parts.push(word(url)),
        _ => parts.push("(neither command nor url)".into()),
    }
    for (field, label) in [("env", "with"), ("headers", "with headers")] {
        let values: BTreeMap<_, _> = entry.get(field).and_then(Value::as_object).into_iter().flatten().collect();
        if !values.is_empty() {
            parts.push(label.into());
            parts.extend(values.into_iter().map(|(name, value)| assignment(name, value)));
        }
    }
    let text = visible(&parts.join(" "));
    match text.char_indices().nth(SHOWN_MAX_CHARS) {
        Some((end, _)) => format!("{} … and {} bytes more: look into the file", &text[..end], text.len() - end),
        None => text,
    }
}

/// A value that only names a variable is no secret.
fn assignment(name: &str, value: &Value) -> String {
    let value = value.as_str().unwrap_or_default();
    let upper = name.to_uppercase();
    let named = value.starts_with("${") && value.ends_with('}') && !value.contains(":-");
    let secret = !named && SECRET_NAMES.iter().any(|part| upper.contains(part));
    if secret { format!("{}=(not shown)", word(name)) } else { format!("{}={}", word(name), word(value)) }
}

/// Quoted where it would read as several words.
fn word(text: &str) -> String {
    let plain = !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || "'\"\\".contains(c));
    if plain { text.to_owned() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

/// On one line, and with each character that a screen hides written as an escape.
pub fn visible(text: &str) -> String {
    let hidden = |c: char| c.is_control() || is_hidden(c);
    text.chars().map(|c| if hidden(c) { c.escape_unicode().to_string() } else { c.to_string() }).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(entry: Value, expected: &str) {
        assert_eq!(summary(&entry), expected);
    }

    #[test]
    fn nothing_of_an_entry_is_hidden_but_secrets() {
        check(json!({"command": "true", "env": {"LD_PRELOAD": "./evil.so"}}), "true with LD_PRELOAD=./evil.so");
        check(
            json!({"command": "x", "args": ["a b", "it's"], "env": {"API_KEY": "sk-1", "A_TOKEN": "${A_TOKEN}"}}),
            "x 'a b' 'it'\\''s' with API_KEY=(not shown) A_TOKEN=${A_TOKEN}",
        );
        check(
            json!({"url": "http://x", "headers": {"Authorization": "Bearer 1", "x-team": "a"}}),
            "http://x with headers Authorization=(not shown) x-team=a",
        );
        check(json!({"command": "a\u{202e}b\u{200b}\n"}), "'a\\u{202e}b\\u{200b}\\u{a}'");
        check(json!({}), "(neither command nor url)");
        let long = "x".repeat(400) + " rm";
        assert!(summary(&json!({"command": "sh", "args": ["-c", long]})).ends_with(" rm'"));
    }
}
