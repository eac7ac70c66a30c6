//! Which MCP servers a person allowed. Trust is for an entry's exact content in one root: a changed entry asks again.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::config::{self, Entry};
use crate::{confine::Confine, error::DaemonError, state_dir::replace_file};

const TRUST_FILE: &str = "trust.json";
const VERSION: u32 = 1;

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    trusted: BTreeMap<String, Trusted>,
}

/// For people who read the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Trusted {
    root: PathBuf,
    server: String,
    at: String,
}

/// A server that waits for a person's word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingServer {
    pub name: String,
    /// The command line or address that would be used.
    pub summary: String,
}

#[derive(Debug, Default)]
pub struct TrustStore(File);

impl TrustStore {
    pub fn load(state_dir: &Path) -> Result<Self, DaemonError> {
        let path = state_dir.join(TRUST_FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(e) => return Err(DaemonError::Trust(format!("{}: {e}", path.display()))),
        };
        let file: File = serde_json::from_slice(&text)
            .map_err(|e| DaemonError::Trust(format!("{}: {e}; delete it to trust anew", path.display())))?;
        if file.version > VERSION {
            return Err(DaemonError::Trust(format!("{} was written by a newer reliant", path.display())));
        }
        Ok(Self(file))
    }

    pub fn has(&self, entry: &Entry) -> bool {
        self.0.trusted.contains_key(&entry.key)
    }
}

fn entries(root: &Path) -> Result<(Confine, Vec<Entry>), DaemonError> {
    let refuse = |reason: String| DaemonError::Root { path: root.to_owned(), reason };
    let confine = Confine::new(root).map_err(|e| refuse(e.to_string()))?;
    let entries = config::read(&confine).map_err(refuse)?;
    Ok((confine, entries))
}

/// The servers of a root's `.mcp.json` that nobody trusted yet.
pub fn pending_trust(state_dir: &Path, root: &Path) -> Result<Vec<PendingServer>, DaemonError> {
    let store = TrustStore::load(state_dir)?;
    let (_, entries) = entries(root)?;
    let pending = entries.into_iter().filter(|e| !store.has(e));
    Ok(pending.map(|e| PendingServer { name: e.name, summary: e.summary }).collect())
}

/// Trusts one server of a root's `.mcp.json`, or all of them. A running daemon takes it up within seconds. Answers
/// the names that were not trusted before.
pub fn trust(state_dir: &Path, root: &Path, server: Option<&str>) -> Result<Vec<String>, DaemonError> {
    let refuse = |e: std::io::Error| DaemonError::Trust(e.to_string());
    let mut store = TrustStore::load(state_dir)?;
    let (confine, entries) = entries(root)?;
    if let Some(name) = server
        && !entries.iter().any(|e| e.name == name)
    {
        return Err(DaemonError::Trust(format!(
            "{} names no server '{name}'",
            confine.path().join(config::FILE).display()
        )));
    }
    let mut added = Vec::new();
    for entry in entries.iter().filter(|e| server.is_none_or(|name| e.name == name)) {
        if store.has(entry) {
            continue;
        }
        let trusted = Trusted {
            root: confine.path().to_owned(),
            server: entry.name.clone(),
            at: chrono::Utc::now().to_rfc3339(),
        };
        store.0.trusted.insert(entry.key.clone(), trusted);
        added.push(entry.name.clone());
    }
    if !added.is_empty() {
        store.0.version = VERSION;
        std::fs::create_dir_all(state_dir).map_err(refuse)?;
        let json = serde_json::to_vec_pretty(&store.0).map_err(|e| DaemonError::Trust(e.to_string()))?;
        replace_file(&state_dir.join(TRUST_FILE), &json).map_err(refuse)?;
    }
    Ok(added)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trust_is_for_exact_content() {
        let dir = tempfile::tempdir().unwrap();
        let (root, state) = (dir.path().join("root"), dir.path().join("state"));
        std::fs::create_dir(&root).unwrap();
        let write = |a: &str, b: &str| {
            let text = format!(r#"{{"mcpServers": {{"a": {{"command": "{a}"}}, "b": {{"command": "{b}"}}}}}}"#);
            std::fs::write(root.join(".mcp.json"), text).unwrap();
        };
        let pending = || pending_trust(&state, &root).unwrap().into_iter().map(|p| p.name).collect::<Vec<_>>();
        assert!(pending().is_empty());
        write("x", "y");
        assert_eq!(pending(), ["a", "b"]);
        assert_eq!(trust(&state, &root, Some("a")).unwrap(), ["a"]);
        assert_eq!(pending(), ["b"]);
        assert!(trust(&state, &root, Some("c")).is_err());
        assert_eq!(trust(&state, &root, None).unwrap(), ["b"]);
        assert!(trust(&state, &root, None).unwrap().is_empty());
        write("x", "rm -rf /");
        assert_eq!(pending(), ["b"]);
        std::fs::write(state.join("trust.json"), "{").unwrap();
        assert!(pending_trust(&state, &root).is_err());
    }
}
