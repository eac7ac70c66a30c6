//! `.mcp.json` in its usual format. A file that is wrong costs its own servers, never the daemon.

use std::{collections::BTreeMap, io::Read, path::Path};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{
    content::Digests,
    shown::{summary, visible},
};
use crate::confine::{Confine, ConfineError};

pub const FILE: &str = ".mcp.json";
const FILE_MAX_BYTES: u64 = 1024 * 1024;
const SERVERS_MAX: usize = 32;

/// How a server is reached, variables filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spec {
    Stdio { command: String, args: Vec<String>, env: BTreeMap<String, String> },
    Http { url: String, headers: BTreeMap<String, String> },
}

/// One entry of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    /// Names this entry's exact content, in this root: what a person trusts.
    pub key: String,
    /// For people: all of the entry, variables not filled in.
    pub summary: String,
    pub spec: Result<Spec, String>,
}

/// The entries of a root's file; none where there is no file.
pub fn read(confine: &Confine, digests: &Digests) -> Result<Vec<Entry>, String> {
    let file = match confine.open_file(Path::new(FILE)) {
        Ok(file) => file,
        Err(ConfineError::NotFound { .. }) => return Ok(Vec::new()),
        Err(e) => return Err(e.to_string()),
    };
    let mut text = Vec::new();
    file.take(FILE_MAX_BYTES + 1).read_to_end(&mut text).map_err(|e| e.to_string())?;
    if text.len() as u64 > FILE_MAX_BYTES {
        return Err(format!("{FILE} is larger than {FILE_MAX_BYTES} bytes"));
    }
    let files = |entry: &Value| digests.named_by(confine, entry);
    parse(&text, confine.path(), &|name| std::env::var(name).ok(), &files)
}

/// The digests of the files in the root that an entry names.
type Files<'a> = dyn Fn(&Value) -> Vec<(String, String)> + 'a;

fn parse(text: &[u8], root: &Path, vars: &dyn Fn(&str) -> Option<String>, files: &Files) -> Result<Vec<Entry>, String> {
    let file: Value = serde_json::from_slice(text).map_err(|e| format!("{FILE} is not JSON: {e}"))?;
    let servers = match file.get("mcpServers") {
        Some(Value::Object(servers)) => servers,
        Some(_) => return Err(format!("\"mcpServers\" of {FILE} is not an object")),
        None => return Err(format!("{FILE} has no \"mcpServers\"")),
    };
    if servers.len() > SERVERS_MAX {
        return Err(format!("{FILE} names {} servers; at most {SERVERS_MAX} are started", servers.len()));
    }
    Ok(servers
        .iter()
        .filter(|(_, entry)| entry.get("disabled").and_then(Value::as_bool) != Some(true))
        .map(|(name, entry)| Entry {
            name: visible(name).chars().take(64).collect(),
            key: key(name, entry, root, &files(entry)),
            summary: summary(entry),
            spec: spec(entry, vars),
        })
        .collect())
}

/// SHA-256 over the root's path, the server's name, its entry with sorted keys, and the files that it names.
fn key(name: &str, entry: &Value, root: &Path, files: &[(String, String)]) -> String {
    let mut hash = Sha256::new();
    let entry = canonical(entry);
    let fixed = [root.as_os_str().as_encoded_bytes(), name.as_bytes(), entry.as_bytes()];
    let files = files.iter().flat_map(|(name, digest)| [name.as_bytes(), digest.as_bytes()]);
    for part in fixed.into_iter().chain(files) {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hex::encode(hash.finalize())
}

fn canonical(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<_, _> = map.iter().collect();
            let parts: Vec<_> =
                sorted.into_iter().map(|(k, v)| format!("{}:{}", Value::String(k.clone()), canonical(v))).collect();
            format!("{{{}}}", parts.join(","))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(canonical).collect::<Vec<_>>().join(",")),
        other => other.to_string(),
    }
}

fn spec(entry: &Value, vars: &dyn Fn(&str) -> Option<String>) -> Result<Spec, String> {
    let text = |key: &str| match entry.get(key) {
        Some(Value::String(text)) => expand(text, vars).map(Some),
        None => Ok(None),
        Some(_) => Err(format!("\"{key}\" is not a string")),
    };
    let map = |key: &str| match entry.get(key) {
        Some(Value::Object(map)) => map
            .iter()
            .map(|(k, v)| match v {
                Value::String(v) => Ok((k.clone(), expand(v, vars)?)),
                _ => Err(format!("\"{k}\" of \"{key}\" is not a string")),
            })
            .collect(),
        None => Ok(BTreeMap::new()),
        Some(_) => Err(format!("\"{key}\" is not an object")),
    };
    let kind = entry.get("type").and_then(Value::as_str);
    match (kind, text("command")?, text("url")?) {
        (None | Some("stdio"), Some(command), _) if !command.is_empty() => {
            let args = match entry.get("args") {
                Some(Value::Array(args)) => args
                    .iter()
                    .map(|a| {
                        a.as_str()
                            .ok_or("\"args\" holds something that is not a string".to_owned())
                            .and_then(|a| expand(a, vars))
                    })
                    .collect::<Result<_, _>>()?,
                None => Vec::new(),
                Some(_) => return Err("\"args\" is not a list".into()),
            };
            Ok(Spec::Stdio { command, args, env: map("env")? })
        }
        (None | Some("http" | "streamable-http" | "streamableHttp"), None, Some(url)) => {
            if url.starts_with("http://") || url.starts_with("https://") {
                Ok(Spec::Http { url, headers: map("headers")? })
            } else {
                Err("\"url\" is not an http address".into())
            }
        }
        (Some("sse"), ..) => Err("the old \"sse\" transport is not supported; use \"http\"".into()),
        (Some(other), ..) if !matches!(other, "stdio" | "http" | "streamable-http" | "streamableHttp") => {
            Err(format!("type \"{other}\" is not known; use \"stdio\" or \"http\""))
        }
        _ => Err("it has neither \"command\" nor \"url\"".into()),
    }
}

/// `${VAR}` and `${VAR:-default}`. Our own variables are not given away.
fn expand(text: &str, vars: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        out.push_str(&rest[..at]);
        let Some(end) = rest[at..].find('}') else { return Err(format!("'{text}' has a ${{ without its }}")) };
        let inside = &rest[at + 2..at + end];
        let (name, default) = match inside.split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (inside, None),
        };
        let value = (!name.starts_with("RELIANT_")).then(|| vars(name)).flatten();
        match (value, default) {
            (Some(value), _) => out.push_str(&value),
            (None, Some(default)) => out.push_str(default),
            (None, None) => return Err(format!("the variable {name} is not set")),
        }
        rest = &rest[at + end + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(entry: &str) -> Result<Spec, String> {
        let vars = |name: &str| (name == "HOME" || name == "RELIANT_TOKEN").then(|| "/home/me".to_owned());
        let text = format!(r#"{{"mcpServers": {{"s": {entry}}}}}"#);
        parse(text.as_bytes(), Path::new("/r"), &vars, &|_| Vec::new()).unwrap().remove(0).spec
    }

    #[test]
    fn the_usual_forms_are_read() {
        let Ok(Spec::Stdio { command, args, env }) =
            check(r#"{"command": "npx", "args": ["-y", "${HOME}/x", "${NO:-d}"], "env": {"A": "${HOME}"}}"#)
        else {
            panic!()
        };
        assert_eq!(
            (command.as_str(), args.join(" "), env["A"].as_str()),
            ("npx", "-y /home/me/x d".into(), "/home/me")
        );
        assert!(matches!(
            check(r#"{"type": "http", "url": "http://x/mcp", "headers": {"a": "b"}}"#),
            Ok(Spec::Http { .. })
        ));
        for bad in [
            r#"{}"#,
            r#"{"type": "sse", "url": "http://x"}"#,
            r#"{"command": "${NO}"}"#,
            r#"{"command": "${RELIANT_TOKEN}"}"#,
            r#"{"command": "x", "args": [1]}"#,
            r#"{"type": "http", "url": "file:///x"}"#,
            r#"{"command": "${x"}"#,
            r#"7"#,
            r#"{"type": "telnet", "command": "x"}"#,
        ] {
            assert!(check(bad).is_err(), "{bad}");
        }
        assert!(parse(b"[", Path::new("/"), &|_| None, &|_| Vec::new()).is_err());
        assert!(parse(b"{}", Path::new("/"), &|_| None, &|_| Vec::new()).is_err());
    }

    #[test]
    fn a_key_names_content_name_and_root() {
        let key = |text: &str, root: &str| {
            parse(text.as_bytes(), Path::new(root), &|_| None, &|_| Vec::new()).unwrap().remove(0).key
        };
        let one = key(r#"{"mcpServers": {"s": {"command": "a", "args": ["b"]}}}"#, "/r");
        assert_eq!(one, key(r#"{"mcpServers": {"s": {"args": ["b"], "command": "a"}}}"#, "/r"));
        for other in [
            key(r#"{"mcpServers": {"s": {"command": "a", "args": ["c"]}}}"#, "/r"),
            key(r#"{"mcpServers": {"t": {"command": "a", "args": ["b"]}}}"#, "/r"),
            key(r#"{"mcpServers": {"s": {"command": "a", "args": ["b"]}}}"#, "/q"),
            key(r#"{"mcpServers": {"s": {"command": "a", "args": ["b"], "env": {"X": "1"}}}}"#, "/r"),
        ] {
            assert_ne!(one, other);
        }
    }
}
