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
}
