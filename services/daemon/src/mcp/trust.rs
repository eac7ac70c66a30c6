//! Which MCP servers a person allowed. Trust is for an entry's exact content in one root, and for the files of the root
//! that it names: a change of either asks again.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    config::{self, Entry},
    content::Digests,
};
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
    /// The whole entry: the command line or address, the environment, the headers.
    pub summary: String,
    /// Names what was shown; [`trust`] takes no other content for it.
    pub key: String,
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

    /// Whether a server of this name was trusted in this root with another content.
    pub fn had(&self, root: &Path, entry: &Entry) -> bool {
        self.0.trusted.values().any(|trusted| trusted.root == root && trusted.server == entry.name)
    }
}

fn entries(root: &Path) -> Result<(Confine, Vec<Entry>), DaemonError> {
    let refuse = |reason: String| DaemonError::Root { path: root.to_owned(), reason };
    let confine = Confine::new(root).map_err(|e| refuse(e.to_string()))?;
    let entries = config::read(&confine, &Digests::default()).map_err(refuse)?;
    Ok((confine, entries))
}

/// The servers of a root's `.mcp.json` that nobody trusted yet.
pub fn pending_trust(state_dir: &Path, root: &Path) -> Result<Vec<PendingServer>, DaemonError> {
    let store = TrustStore::load(state_dir)?;
    let (_, entries) = entries(root)?;
    let pending = entries.into_iter().filter(|e| !store.has(e));
    Ok(pending.map(|e| PendingServer { name: e.name, summary: e.summary, key: e.key }).collect())
}

/// Trusts what [`pending_trust`] answered and a person has seen. A running daemon takes it up within seconds. `Err`
/// where the file has changed since, and then nothing is trusted.
pub fn trust(state_dir: &Path, root: &Path, shown: &[PendingServer]) -> Result<(), DaemonError> {
    let refuse = |e: std::io::Error| DaemonError::Trust(e.to_string());
    let mut store = TrustStore::load(state_dir)?;
    let (confine, entries) = entries(root)?;
    for server in shown {
        if !entries.iter().any(|entry| entry.key == server.key) {
            return Err(DaemonError::Trust(format!(
                "the server '{}' of {}, or a file that it names, has changed since it was shown; look at it again",
                server.name,
                confine.path().join(config::FILE).display()
            )));
        }
    }
    for server in shown {
        let trusted = Trusted {
            root: confine.path().to_owned(),
            server: server.name.clone(),
            at: chrono::Utc::now().to_rfc3339(),
        };
        store.0.trusted.insert(server.key.clone(), trusted);
    }
    if shown.is_empty() {
        return Ok(());
    }
    store.0.version = VERSION;
    std::fs::create_dir_all(state_dir).map_err(refuse)?;
    let json = serde_json::to_vec_pretty(&store.0).map_err(|e| DaemonError::Trust(e.to_string()))?;
    replace_file(&state_dir.join(TRUST_FILE), &json).map_err(refuse)
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
        let pending = || pending_trust(&state, &root).unwrap();
        let names = || pending().into_iter().map(|p| p.name).collect::<Vec<_>>();
        assert!(names().is_empty());
        write("x", "y");
        assert_eq!(names(), ["a", "b"]);
        trust(&state, &root, &pending()[..1]).unwrap();
        assert_eq!(names(), ["b"]);
        // What is in the file by now is not what was shown.
        let shown = pending();
        write("x", "z");
        assert!(trust(&state, &root, &shown).unwrap_err().to_string().contains("has changed"));
        assert_eq!(names(), ["b"]);
        trust(&state, &root, &pending()).unwrap();
        assert!(names().is_empty());
        write("x", "rm -rf /");
        assert_eq!(names(), ["b"]);
        std::fs::write(state.join("trust.json"), "{").unwrap();
        assert!(pending_trust(&state, &root).is_err());
    }

    #[test]
    fn trust_covers_the_files_of_the_root_that_an_entry_names() {
        let dir = tempfile::tempdir().unwrap();
        let (root, state) = (dir.path().join("root"), dir.path().join("state"));
        std::fs::create_dir_all(root.join("src")).unwrap();
        let file = root.join("src/server.py");
        let absolute = file.canonicalize().unwrap_or_else(|_| root.canonicalize().unwrap().join("src/server.py"));
        for args in [r#""src/server.py""#.into(), r#""--script=src/server.py""#.into(), format!("{absolute:?}")] {
            let text = format!(r#"{{"mcpServers": {{"a": {{"command": "python3", "args": [{args}]}}}}}}"#);
            std::fs::write(root.join(".mcp.json"), text).unwrap();
            std::fs::write(&file, "one").unwrap();
            trust(&state, &root, &pending_trust(&state, &root).unwrap()).unwrap();
            assert!(pending_trust(&state, &root).unwrap().is_empty());
            std::fs::write(&file, "two").unwrap();
            assert_eq!(pending_trust(&state, &root).unwrap().len(), 1, "{args}");
            std::fs::write(&file, "one").unwrap();
            assert!(pending_trust(&state, &root).unwrap().is_empty(), "{args}");
        }
    }
}
