//! A configuration as it may be shown: secrets are gone, also from URLs.

use reliant_types::url::without_passwords;
use serde::Serialize;
use toml::Value;

/// The effective configuration as TOML. [`crate::Secret`]s print as `***`, and so does a password within a URL.
pub fn redacted<T: Serialize>(config: &T) -> String {
    let mut value = match Value::try_from(config) {
        Ok(value) => value,
        // Only types that TOML cannot hold get here (a map with keys that are no strings); ours have none.
        Err(error) => return format!("# this configuration cannot be shown: {error}\n"),
    };
    hide(&mut value);
    toml::to_string_pretty(&value).unwrap_or_else(|error| format!("# this configuration cannot be shown: {error}\n"))
}

fn hide(value: &mut Value) {
    match value {
        Value::String(text) => *text = without_passwords(text),
        Value::Array(values) => values.iter_mut().for_each(hide),
        Value::Table(table) => table.iter_mut().for_each(|(_, value)| hide(value)),
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) | Value::Datetime(_) => {}
    }
}
