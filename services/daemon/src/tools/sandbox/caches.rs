//! Caches of confined commands: a directory per root, beneath the state directory. What a command puts into a cache is
//! executed by later builds, so the person's own caches are read at most.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::paths;

/// The variables that move a tool's cache, and the place beneath the root's cache directory. pip, uv, go's build
/// cache, pre-commit, yarn and others follow `XDG_CACHE_HOME`.
const VARIABLES: &[(&str, &str)] = &[
    ("XDG_CACHE_HOME", "xdg"),
    ("CARGO_HOME", "cargo"),
    ("npm_config_cache", "npm"),
    ("npm_config_store_dir", "pnpm"),
    ("YARN_CACHE_FOLDER", "yarn"),
    ("BUN_INSTALL_CACHE_DIR", "bun"),
    ("PIP_CACHE_DIR", "pip"),
    ("UV_CACHE_DIR", "uv"),
    ("GOCACHE", "go-build"),
    ("GOMODCACHE", "go-mod"),
    ("GRADLE_USER_HOME", "gradle"),
    ("NUGET_PACKAGES", "nuget"),
    ("DENO_DIR", "deno"),
];
const MAVEN: &str = "maven";

/// The cache directory of a root, made and filled when it is not there.
pub fn open(caches: &Path, root: &Path) -> io::Result<PathBuf> {
    let id = hex::encode(Sha256::digest(root.as_os_str().as_encoded_bytes()));
    let dir = caches.join(&id[..16]);
    if dir.is_dir() {
        return Ok(dir);
    }
    // Filled under a name that no command may write, so that no link of a command leads this astray.
    fs::create_dir_all(caches)?;
    let draft = tempfile::Builder::new().prefix("new-").tempdir_in(caches)?;
    for (_, place) in VARIABLES {
        fs::create_dir(draft.path().join(place))?;
    }
    fs::create_dir(draft.path().join(MAVEN))?;
    if let Some(home) = paths::cargo_home() {
        fill_cargo_home(&home, &draft.path().join("cargo"));
    }
    match fs::rename(draft.path(), &dir) {
        // Another command of this root was first.
        Err(_) if dir.is_dir() => Ok(dir),
        Err(error) => Err(error),
        Ok(()) => Ok(dir),
    }
}

pub fn variables(dir: &Path) -> impl Iterator<Item = (OsString, OsString)> + '_ {
    let mut maven = OsString::from("-Dmaven.repo.local=");
    maven.push(dir.join(MAVEN));
    VARIABLES
        .iter()
        .map(|(name, place)| (OsString::from(name), dir.join(place).into_os_string()))
        .chain([("MAVEN_ARGS".into(), maven)])
}

/// What the person has downloaded is linked entry by entry: builds find it without the network and cannot change it, and
/// what is new lands beside the links. A link that cannot be made costs a download.
fn fill_cargo_home(home: &Path, own: &Path) {
    fill(&home.join("bin"), &own.join("bin"));
    for name in ["env", "config", "config.toml"] {
        link(&home.join(name), &own.join(name));
    }
    for level in ["registry/index", "registry/cache", "registry/src"] {
        for registry in names(&home.join(level)) {
            fill(&home.join(level).join(&registry), &own.join(level).join(&registry));
        }
    }
    for level in ["git/db", "git/checkouts"] {
        fill(&home.join(level), &own.join(level));
    }
}

fn fill(from: &Path, to: &Path) {
    if from.is_dir() && fs::create_dir_all(to).is_ok() {
        for name in names(from) {
            link(&from.join(&name), &to.join(&name));
        }
    }
}

fn link(from: &Path, to: &Path) {
    if from.exists() {
        let _ = symlink(from, to);
    }
}

fn names(dir: &Path) -> Vec<OsString> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.file_name())).collect()
}
