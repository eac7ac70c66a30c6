//! The directories a daemon offers. The wire knows them by id; their paths come from the configuration alone.

use std::{collections::HashSet, io::Read, path::Path, sync::Arc};

use reliant_types::pb;
use sha2::{Digest, Sha256};

use crate::{config::RootConfig, confine::Confine, error::DaemonError};

/// Of a root's `AGENTS.md`, in a declaration.
const AGENTS_MD_MAX_BYTES: u64 = 32 * 1024;

#[derive(Debug)]
pub struct Root {
    /// The same as long as the directory's path is.
    pub id: String,
    pub name: String,
    pub confine: Confine,
}

impl Root {
    pub fn path(&self) -> &Path {
        self.confine.path()
    }

    pub fn declaration(&self) -> pb::Root {
        pb::Root {
            id: self.id.clone(),
            name: self.name.clone(),
            path: self.path().display().to_string(),
            agents_md: self.agents_md(),
        }
    }

    fn agents_md(&self) -> String {
        let mut bytes = Vec::new();
        let Ok(file) = self.confine.open_file(Path::new("AGENTS.md")) else { return String::new() };
        match file.take(AGENTS_MD_MAX_BYTES).read_to_end(&mut bytes) {
            Ok(_) => {
                let text = String::from_utf8_lossy(&bytes);
                text.trim_end_matches('\u{fffd}').to_owned()
            }
            Err(_) => String::new(),
        }
    }
}

#[derive(Debug, Clone)]
pub struct Roots(Vec<Arc<Root>>);

impl Roots {
    /// Opens roots; unless `allow_home` is set, one that holds the home directory or the daemon's state is refused.
    pub fn open_guarded(configs: &[RootConfig], state_dir: &Path, allow_home: bool) -> Result<Self, DaemonError> {
        let roots = Self::open(configs)?;
        if allow_home {
            return Ok(roots);
        }
        let home = std::env::home_dir().and_then(|home| home.canonicalize().ok());
        for root in roots.iter() {
            let path = root.path();
            let what = if path.parent().is_none() {
                "it is the whole system"
            } else if home.as_ref().is_some_and(|home| home.starts_with(path)) {
                "it holds your home directory with its keys and tokens"
            } else if state_dir.starts_with(path) {
                "it holds the daemon's state, which says what is trusted"
            } else if path.starts_with(state_dir) {
                "it is part of the daemon's state"
            } else {
                continue;
            };
            let reason =
                format!("{what}; give a project's directory, or set daemon.allow_home (--allow-home) if you want this");
            return Err(DaemonError::Root { path: path.to_owned(), reason });
        }
        Ok(roots)
    }

    pub fn open(configs: &[RootConfig]) -> Result<Self, DaemonError> {
        let mut roots: Vec<Arc<Root>> = Vec::new();
        let mut names = HashSet::new();
        for config in configs {
            let refuse = |reason: String| DaemonError::Root { path: config.path.clone(), reason };
            let confine = Confine::new(&config.path).map_err(|e| refuse(e.to_string()))?;
            if roots.iter().any(|r| r.path() == confine.path()) {
                continue;
            }
            let mut name = config.name.trim().to_owned();
            if name.is_empty() {
                name = confine.path().file_name().map_or("root".into(), |n| n.to_string_lossy().into_owned());
            }
            if name.chars().count() > 100 || name.chars().any(char::is_control) {
                return Err(refuse("its name must be at most 100 printable characters".into()));
            }
            let plain = name.clone();
            let mut count = 1;
            while !names.insert(name.clone()) {
                count += 1;
                name = format!("{plain} ({count})");
            }
            let id =
                format!("root-{}", &hex::encode(Sha256::digest(confine.path().as_os_str().as_encoded_bytes()))[..12]);
            roots.push(Arc::new(Root { id, name, confine }));
        }
        Ok(Self(roots))
    }

    /// The root of an id; an empty id is the first.
    pub fn get(&self, id: &str) -> Option<Arc<Root>> {
        if id.is_empty() { self.0.first().cloned() } else { self.0.iter().find(|r| r.id == id).cloned() }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Root>> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_have_stable_ids_and_distinct_names() {
        let dir = tempfile::tempdir().unwrap();
        let mut configs = Vec::new();
        for sub in ["a/x", "b/x", "a/x"] {
            let path = dir.path().join(sub);
            std::fs::create_dir_all(&path).unwrap();
            configs.push(RootConfig { name: String::new(), path });
        }
        std::fs::write(dir.path().join("a/x/AGENTS.md"), "Be brief.").unwrap();
        let roots = Roots::open(&configs).unwrap();
        let again = Roots::open(&configs).unwrap();
        let seen: Vec<_> = roots.iter().map(|r| (r.name.clone(), r.id.clone())).collect();
        assert_eq!(seen, again.iter().map(|r| (r.name.clone(), r.id.clone())).collect::<Vec<_>>());
        assert_eq!(seen.iter().map(|s| s.0.as_str()).collect::<Vec<_>>(), ["x", "x (2)"]);
        assert_eq!(roots.get("").unwrap().declaration().agents_md, "Be brief.");
        assert!(roots.get("../x").is_none());
        assert!(Roots::open(&[RootConfig { name: String::new(), path: dir.path().join("none") }]).is_err());
    }

    #[test]
    fn a_root_that_holds_the_home_directory_or_the_state_needs_a_word() {
        let dir = tempfile::tempdir().unwrap();
        let dir_path = dir.path().canonicalize().unwrap();
        let state = dir_path.join("a/state");
        std::fs::create_dir_all(state.join("running")).unwrap();
        std::fs::create_dir(dir_path.join("b")).unwrap();
        let open = |path: &Path, allow: bool| {
            Roots::open_guarded(&[RootConfig { name: String::new(), path: path.to_owned() }], &state, allow)
        };
        assert!(open(&dir_path.join("b"), false).is_ok());
        let home = std::env::home_dir().unwrap();
        for bad in ["/".as_ref(), home.as_path(), &dir_path.join("a"), &state, &state.join("running")] {
            let error = open(bad, false).unwrap_err().to_string();
            assert!(error.contains("--allow-home"), "{error}");
            assert!(open(bad, true).is_ok(), "{}", bad.display());
        }
    }
}
