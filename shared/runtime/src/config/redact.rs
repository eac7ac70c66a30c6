//! A configuration as it may be shown: secrets are gone, also from URLs.

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
        Value::String(text) => {
            if let Some(hidden) = without_password(text) {
                *text = hidden;
            }
        }
        Value::Array(values) => values.iter_mut().for_each(hide),
        Value::Table(table) => table.iter_mut().for_each(|(_, value)| hide(value)),
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) | Value::Datetime(_) => {}
    }
}

/// `scheme://user:password@host` with its password hidden.
fn without_password(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once("://")?;
    // A password may hold a raw '/' or '@'; hiding more than it is better than less.
    let (user_info, host) = rest.rsplit_once('@')?;
    let (user, _) = user_info.split_once(':')?;
    Some(format!("{scheme}://{user}:***@{host}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_in_urls_are_hidden() {
        let check = |text, expected: Option<&str>| assert_eq!(without_password(text).as_deref(), expected, "{text}");
        check("postgres://ada:secret@db:5432/x", Some("postgres://ada:***@db:5432/x"));
        check("postgres://ada:se@c/ret@db/x", Some("postgres://ada:***@db/x"));
        check("postgres://ada@db/x", None);
        check("postgres:///x?host=/run", None);
        check("plain text: with@colon", None);
    }
}
