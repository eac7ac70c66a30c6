//! Rules of the repository that no compiler knows.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{cargo, imports, log_fields, unused};

/// A path in a document that begins with one of these must exist.
const DOCUMENTED: &[&str] = &[
    ".ci/",
    "compose/",
    "docs/",
    "loadtest/",
    "migrations/",
    "observability/",
    "proto/",
    "services/",
    "shared/",
    "tests/",
    "xtask/",
];
/// Made by a build or a run, so a document may name them while they are absent.
const MADE: &[&str] = &["services/web/dist", "services/web/gen", "loadtest/results", "tests/chaos/results"];
/// Left behind by somebody who meant to come back. Taken apart, so that this file passes.
const LEFTOVERS: &[&str] =
    &[concat!("FIX", "ME"), concat!("XX", "X:"), concat!("<<<<", "<<< "), concat!(">>>>", ">>> ")];

pub fn run(root: &Path) -> Result<()> {
    let members = members(root)?;
    let files = tracked(root)?;
    let dependencies = members.iter().map(|(name, (_, dependencies))| (name.clone(), dependencies.clone())).collect();
    let mut found = imports::breaches(&dependencies);
    found.extend(unused::found(&members, &files, |path| read(root, path).unwrap_or_default()));
    let is_document = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == "md");
    for path in files.iter().filter(is_document) {
        let text = read(root, path)?;
        let paths = named_paths(&text);
        found.extend(
            paths
                .into_iter()
                .filter(|named| !exists(root, path, named))
                .map(|named| format!("{} names {named}, which does not exist", path.display())),
        );
    }
    for path in &files {
        let Ok(text) = read(root, path) else { continue };
        found.extend(
            LEFTOVERS
                .iter()
                .filter(|word| text.contains(**word))
                .map(|word| format!("{} holds '{word}'", path.display())),
        );
        if path.ends_with("package-lock.json") && text.contains("\"resolved\"") {
            found.push(format!(
                "{} names a registry's host; write it with omit-lockfile-registry-resolved",
                path.display()
            ));
        }
    }
    for path in files.iter().filter(|path| is_product(path)) {
        let text = read(root, path)?;
        found.extend(bare_errors(&text).map(|line| {
            format!("{}:{line} logs an error without its causes; write error = %chain(&error)", path.display())
        }));
        found.extend(log_fields::bare_entities(&text).into_iter().map(|(line, name)| {
            format!(
                "{}:{line} logs the field '{name}'; write {name}.id, or what shared/telemetry/src/names.rs has",
                path.display()
            )
        }));
    }
    if found.is_empty() {
        println!(
            "checked: import directions, unused dependencies, paths in documents, lock files, leftovers, logged errors and ids in {} files",
            files.len()
        );
        return Ok(());
    }
    bail!("{} rules are broken:\n  {}", found.len(), found.join("\n  "))
}

/// The crates of this workspace: directory below the root, and direct dependencies of any kind.
fn members(root: &Path) -> Result<BTreeMap<String, (PathBuf, Vec<String>)>> {
    let output = Command::new(cargo())
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root)
        .output()
        .context("cargo could not be started")?;
    ensure!(output.status.success(), "cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).context("cargo metadata is no JSON")?;
    let list = |value: &serde_json::Value| value.as_array().cloned().unwrap_or_default();
    let name = |value: &serde_json::Value| value["name"].as_str().map(str::to_owned).context("a package has no name");
    let mut members = BTreeMap::new();
    for package in list(&metadata["packages"]) {
        let mut dependencies = list(&package["dependencies"]).iter().map(name).collect::<Result<Vec<_>>>()?;
        dependencies.sort();
        dependencies.dedup();
        let manifest = package["manifest_path"].as_str().context("a package has no manifest")?;
        let dir = Path::new(manifest).parent().and_then(|dir| dir.strip_prefix(root).ok());
        let dir = dir.with_context(|| format!("{manifest} is not below {}", root.display()))?;
        members.insert(name(&package)?, (dir.to_owned(), dependencies));
    }
    ensure!(!members.is_empty(), "cargo metadata names no package");
    Ok(members)
}

/// What git keeps or would keep.
fn tracked(root: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"])
        .current_dir(root)
        .output()
        .context("git was not found; install it")?;
    ensure!(output.status.success(), "git ls-files failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    let text = String::from_utf8(output.stdout).context("a file's name is not UTF-8")?;
    let paths = text.split('\0').filter(|path| !path.is_empty()).map(PathBuf::from);
    Ok(paths.filter(|path| root.join(path).is_file()).collect())
}

fn read(root: &Path, path: &Path) -> Result<String> {
    fs::read_to_string(root.join(path)).with_context(|| format!("could not read {}", path.display()))
}

/// Words that look like paths of this repository.
fn named_paths(text: &str) -> Vec<String> {
    let part_of_path = |c: char| c.is_ascii_alphanumeric() || "/._-*".contains(c);
    let mut named: Vec<String> = text
        .split(|c: char| !part_of_path(c))
        .map(|word| word.trim_start_matches("./").trim_end_matches(['.', '/', '-']))
        .filter(|word| DOCUMENTED.iter().any(|start| word.starts_with(start)) && !word.contains('*'))
        .map(str::to_owned)
        .collect();
    named.sort();
    named.dedup();
    named
}

/// Rust that runs in production.
fn is_product(path: &Path) -> bool {
    let is_rust = path.extension().is_some_and(|extension| extension == "rs");
    is_rust && (path.starts_with("shared") || path.starts_with("services"))
}

/// Lines on which a field of a log is an error by itself: `%error`, `?error`, or one as `dyn Error`.
fn bare_errors(text: &str) -> impl Iterator<Item = usize> {
    const NAMES: &[&str] = &["error", "err", "failure", "cause"];
    let names_itself = |line: &str, sigil: char| {
        line.match_indices(sigil).any(|(at, _)| {
            let before = line[..at].chars().next_back();
            let after = &line[at + 1..];
            let name = &after[..after.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(after.len())];
            let field = &after[name.len()..];
            // A field of it, or a call, is something else.
            NAMES.contains(&name) && !field.starts_with(['.', '(']) && matches!(before, Some(' ' | '(' | ',') | None)
        })
    };
    let is_bare = move |line: &str| {
        let cast = line.contains("tracing::") && line.contains("as &dyn");
        names_itself(line, '%') || names_itself(line, '?') || cast
    };
    text.lines()
        .enumerate()
        .filter(move |(_, line)| is_bare(line))
        .map(|(at, _)| at + 1)
        .collect::<Vec<_>>()
        .into_iter()
}

/// From the root, or beside the document that names it.
fn exists(root: &Path, document: &Path, named: &str) -> bool {
    let beside = document.parent().map(|dir| root.join(dir).join(named));
    MADE.iter().any(|made| named.starts_with(made))
        || root.join(named).exists()
        || beside.is_some_and(|path| path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_found_in_prose() {
        let text =
            "See `shared/types/src/limits.rs`, docs/adr/, (tests/e2e) and services/*; not a/b or https://x/docs/y.";
        assert_eq!(named_paths(text), ["docs/adr", "shared/types/src/limits.rs", "tests/e2e"]);
    }

    #[test]
    fn an_error_that_is_logged_without_its_causes_is_found() {
        let found = |line: &str| bare_errors(line).count() > 0;
        for bad in [
            r#"tracing::warn!(%error, "x");"#,
            r#"    %error,"#,
            r#"tracing::error!(error = ?error, "x");"#,
            r#"tracing::warn!(error = &error as &dyn std::error::Error, "x");"#,
        ] {
            assert!(found(bad), "{bad}");
        }
        for good in [
            r#"tracing::warn!(error = %chain(&error), "x");"#,
            r#"tracing::info!(code = %failure.code, "x");"#,
            "let rest = left % error_count;",
            "Err(error)?",
        ] {
            assert!(!found(good), "{good}");
        }
    }

    #[test]
    fn a_document_may_name_what_is_beside_it_or_made() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("a/docs")).unwrap();
        fs::write(root.path().join("a/docs/x.md"), "").unwrap();
        assert!(exists(root.path(), Path::new("a/README.md"), "docs/x.md"));
        assert!(exists(root.path(), Path::new("README.md"), "loadtest/results/latest.json"));
        assert!(!exists(root.path(), Path::new("README.md"), "docs/x.md"));
    }
}
