//! The files that a server's command line names: those in the root are part of what is trusted, because commands of the
//! agent can write them.

use std::{
    collections::HashMap,
    fs::File,
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use parking_lot::Mutex;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{confine::Confine, tools::sandbox::surroundings};

/// Of one file; what lies behind counts by its length and its time of change.
const HASHED_MAX_BYTES: u64 = 256 * 1024 * 1024;
const KNOWN_MAX: usize = 1024;

/// Device, inode, length and time of change: a file is read again when one differs.
type Version = (u64, u64, u64, i64, i64);

/// What was hashed already; the files are looked at every few seconds.
#[derive(Debug, Default)]
pub struct Digests(Mutex<HashMap<Version, String>>);

impl Digests {
    /// SHA-256 of each regular file in the root that the words name, by the word, in order.
    pub fn named_by(&self, confine: &Confine, entry: &Value) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for word in words(entry) {
            // `--script=server.py` names a file as well.
            for part in std::iter::once(word).chain(word.split_once('=').map(|(_, value)| value)) {
                if let Some(digest) = inside(confine, part).and_then(|file| self.digest(file)) {
                    found.push((part.to_owned(), digest));
                }
            }
        }
        found
    }

    fn digest(&self, file: File) -> Option<String> {
        let meta = file.metadata().ok()?;
        let version = (meta.dev(), meta.ino(), meta.len(), meta.ctime(), meta.ctime_nsec());
        if let Some(digest) = self.0.lock().get(&version) {
            return Some(digest.clone());
        }
        let mut hash = Sha256::new();
        let mut file = file.take(HASHED_MAX_BYTES);
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match file.read(&mut buffer).ok()? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
        if meta.len() > HASHED_MAX_BYTES {
            hash.update(format!("{version:?}"));
        }
        let digest = hex::encode(hash.finalize());
        let mut known = self.0.lock();
        if known.len() >= KNOWN_MAX {
            known.clear();
        }
        known.insert(version, digest.clone());
        Some(digest)
    }
}

fn words(entry: &Value) -> impl Iterator<Item = &str> {
    let args = entry.get("args").and_then(Value::as_array).into_iter().flatten();
    entry.get("command").into_iter().chain(args).filter_map(Value::as_str)
}

fn inside(confine: &Confine, word: &str) -> Option<File> {
    let path = Path::new(word);
    let path = if path.is_absolute() { path.strip_prefix(confine.path()).ok()? } else { path };
    if path.as_os_str().is_empty() { None } else { confine.open_file(path).ok() }
}

/// What a server may read besides the usual: the directories of files, and the directories, that its command line names
/// by absolute paths. None of them holds the home directory.
pub fn readable(program: &str, args: &[String]) -> Vec<PathBuf> {
    let home = std::env::home_dir().unwrap_or_default();
    let words = std::iter::once(program).chain(args.iter().map(String::as_str));
    let paths = words.map(Path::new).filter(|path| path.is_absolute());
    let dirs = paths.filter_map(|path| if path.is_file() { path.parent() } else { path.is_dir().then_some(path) });
    dirs.map(surroundings).filter(|dir| !home.starts_with(dir)).collect()
}
