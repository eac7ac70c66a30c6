//! Keeps `.sqlx` equal to the queries: each checked query is described by a Postgres that has exactly our migrations.
//! With it committed, a clean clone builds without a database.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use reliant_devstack::{Placement, Stack, StackConfig};

use crate::cargo;

const CRATE: &str = "reliant-store";

pub async fn run(root: &Path, check: bool) -> Result<()> {
    let kept = root.join(".sqlx");
    let fresh = if uses_checked_queries(&root.join("shared/store"))? { describe(root).await? } else { BTreeMap::new() };
    let old = read_queries(&kept)?;
    if fresh == old {
        println!("{} checked queries match the schema", fresh.len());
        return Ok(());
    }
    let missing = fresh.iter().filter(|(name, text)| old.get(*name) != Some(text)).count();
    let stale = old.keys().filter(|name| !fresh.contains_key(*name)).count();
    if check {
        bail!(
            ".sqlx is not what the queries and migrations say ({missing} new or changed, {stale} stale); run `make sqlx` and commit it"
        );
    }
    fs::create_dir_all(&kept).with_context(|| format!("could not make {}", kept.display()))?;
    for name in old.keys().filter(|name| !fresh.contains_key(*name)) {
        fs::remove_file(kept.join(name)).with_context(|| format!("could not remove {name}"))?;
    }
    for (name, text) in &fresh {
        fs::write(kept.join(name), text).with_context(|| format!("could not write {name}"))?;
    }
    println!("wrote .sqlx: {} queries ({missing} new or changed, {stale} removed)", fresh.len());
    Ok(())
}

/// Compiles the store against a migrated database; the query macros write down what they learn.
async fn describe(root: &Path) -> Result<BTreeMap<String, String>> {
    let dir = tempfile::tempdir().context("no directory for the private Postgres")?;
    let config = StackConfig {
        nats: Placement::Off,
        temporal: Placement::Off,
        ..StackConfig::for_tests(dir.path().join("stack"))
    };
    let stack = Stack::start(config).await?;
    let mut migrations: Vec<PathBuf> = sql_files(&root.join("migrations"))?;
    migrations.sort();
    ensure!(!migrations.is_empty(), "migrations/ holds no .sql files");
    for migration in &migrations {
        let sql = fs::read_to_string(migration).with_context(|| format!("could not read {}", migration.display()))?;
        stack.sql("reliant", &sql).await.with_context(|| format!("{} failed", migration.display()))?;
    }
    let out = dir.path().join("queries");
    fs::create_dir(&out).context("no directory for the queries")?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    // The macros run when the crate is compiled; a flag of this run alone makes cargo compile it, and only it, anew.
    // Another target directory, because one package alone selects other features than the workspace.
    let run = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros());
    let status = Command::new(cargo())
        .args(["rustc", "--quiet", "--package", CRATE, "--lib", "--profile", "check", "--target-dir"])
        .arg(target.join("sqlx"))
        .args(["--", "--cfg", &format!("described_{run}")])
        .current_dir(root)
        .env("DATABASE_URL", &stack.postgres_url)
        .env("SQLX_OFFLINE", "false")
        .env("SQLX_OFFLINE_DIR", &out)
        .status()
        .context("cargo could not be started")?;
    stack.stop().await;
    ensure!(status.success(), "{CRATE} does not compile against the migrated schema (see above)");
    read_queries(&out)
}

fn uses_checked_queries(dir: &Path) -> Result<bool> {
    for entry in fs::read_dir(dir).with_context(|| format!("could not read {}", dir.display()))? {
        let path = entry?.path();
        let found = if path.is_dir() {
            uses_checked_queries(&path)?
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).with_context(|| format!("could not read {}", path.display()))?;
            ["query!", "query_as!", "query_scalar!", "query_file!", "query_file_as!"]
                .iter()
                .any(|name| text.contains(name))
        } else {
            false
        };
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}

fn sql_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("could not read {}", dir.display()))?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "sql")).collect())
}

fn read_queries(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut queries = BTreeMap::new();
    if !dir.exists() {
        return Ok(queries);
    }
    for entry in fs::read_dir(dir).with_context(|| format!("could not read {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("query-") && name.ends_with(".json") {
            let text = fs::read_to_string(&path).with_context(|| format!("could not read {}", path.display()))?;
            queries.insert(name, text);
        }
    }
    Ok(queries)
}
