//! Values and their places. Each value is tried alone against the config type, so that an error names its key and
//! its source, which a whole document's error cannot.

use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::{ConfigError, Source, nearest::nearest};

/// All values of a table with their paths. Arrays are values; tables are not, but an empty one is.
pub(super) fn leaves(table: &Table) -> Vec<(Vec<String>, Value)> {
    fn walk(table: &Table, path: &mut Vec<String>, leaves: &mut Vec<(Vec<String>, Value)>) {
        for (name, value) in table {
            path.push(name.clone());
            match value {
                Value::Table(inner) if !inner.is_empty() => walk(inner, path, leaves),
                value => leaves.push((path.clone(), value.clone())),
            }
            path.pop();
        }
    }
    let mut leaves_found = Vec::new();
    walk(table, &mut Vec::new(), &mut leaves_found);
    leaves_found
}

/// Puts `value` at `path`. A value in the way of a deeper one gives way.
pub(super) fn insert(table: &mut Table, path: &[String], value: Value) {
    let Some((name, rest)) = path.split_first() else { return };
    if rest.is_empty() {
        table.insert(name.clone(), value);
        return;
    }
    let inner = table.entry(name.clone()).or_insert_with(|| Value::Table(Table::new()));
    if !inner.is_table() {
        *inner = Value::Table(Table::new());
    }
    if let Value::Table(inner) = inner {
        insert(inner, rest, value);
    }
}

/// A value given as text takes the first shape that the key accepts: text, a TOML value, a list with commas.
pub(super) fn from_text<T: DeserializeOwned>(key: &[String], text: &str, from: &Source) -> Result<Value, ConfigError> {
    let as_toml = format!("value = {text}").parse::<Table>().ok().and_then(|mut table| table.remove("value"));
    let as_list = Value::Array(text.split(',').map(|item| Value::String(item.trim().to_owned())).collect());
    let mut shapes = vec![Value::String(text.to_owned())];
    shapes.extend(as_toml);
    shapes.push(as_list);
    let mut error = None;
    for (at, shape) in shapes.into_iter().enumerate() {
        match check::<T>(key, &shape, from) {
            Ok(()) => return Ok(shape),
            // An unknown key is unknown in every shape.
            Err(unknown @ ConfigError::UnknownKey { .. }) => return Err(unknown),
            // The error about the TOML value says most: 'expected a duration', not 'expected a list'.
            Err(other) => {
                if at < 2 {
                    error = Some(other);
                }
            }
        }
    }
    Err(error.unwrap_or_else(|| ConfigError::Incomplete("an empty value".to_owned())))
}

/// Whether the config type takes `value` at `key`. A required neighbour that is missing is no fault of this value;
/// the whole document is checked at the end.
pub(super) fn check<T: DeserializeOwned>(key: &[String], value: &Value, from: &Source) -> Result<(), ConfigError> {
    let mut table = Table::new();
    insert(&mut table, key, value.clone());
    let Err(error) = T::deserialize(Value::Table(table)) else { return Ok(()) };
    let message = sentence(&error);
    if message.starts_with("missing field") {
        return Ok(());
    }
    let Some((unknown, known)) = unknown_field(&message) else {
        return Err(ConfigError::Value { key: key.join("."), from: from.clone(), message: without_value(&message) });
    };
    // The unknown name may be any part of the path, or sit deep within an array's table.
    let place = key.iter().position(|part| part == unknown);
    let parent = place.map_or(key, |at| &key[..at]).join(".");
    let full = |name: &str| if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") };
    Err(ConfigError::UnknownKey {
        key: place.map_or_else(|| full(unknown), |_| key.join(".")),
        from: from.clone(),
        nearest: nearest(unknown, known.iter().copied()).map(full),
        known: known.into_iter().map(full).collect(),
    })
}

/// The first line of a TOML error: the rest shows a place in a document that nobody wrote.
pub(super) fn sentence(error: &toml::de::Error) -> String {
    error.message().lines().next().unwrap_or_default().to_owned()
}

/// serde repeats the value it did not like, which may be a secret.
fn without_value(message: &str) -> String {
    match message.split_once("expected ") {
        Some((_, expected)) => format!("expected {expected}"),
        None => message.to_owned(),
    }
}

/// serde's words for an unknown field: its name, and the names that are known.
fn unknown_field(message: &str) -> Option<(&str, Vec<&str>)> {
    let rest = message.strip_prefix("unknown field `")?;
    let (unknown, rest) = rest.split_once('`')?;
    let known = rest.split('`').skip(1).step_by(2).collect();
    Some((unknown, known))
}
