//! Dependencies that a crate declares and no line of it names: each costs everybody's build.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Named only by code that a macro or a build script writes.
const WRITTEN: &[(&str, &str)] =
    &[("reliant-rpc", "tonic-prost"), ("reliant-flows", "temporalio-workflow"), ("reliant-flows", "futures")];

/// Every such dependency of the members: their direct dependencies by name, and the directory of each. `read` gives a
/// file's text.
pub fn found(
    members: &BTreeMap<String, (PathBuf, Vec<String>)>,
    files: &[PathBuf],
    read: impl Fn(&Path) -> String,
) -> Vec<String> {
    let mut found = Vec::new();
    for (name, (dir, dependencies)) in members {
        let is_source = |path: &&PathBuf| path.starts_with(dir) && path.extension().is_some_and(|ext| ext == "rs");
        let sources: Vec<String> = files.iter().filter(is_source).map(|path| read(path)).collect();
        for dependency in dependencies {
            let written = WRITTEN.contains(&(name.as_str(), dependency.as_str()));
            let word = dependency.replace('-', "_");
            if !written && !sources.iter().any(|source| names(source, &word)) {
                found.push(format!("{name} depends on {dependency}, and no line of it names that; remove it"));
            }
        }
    }
    found
}

/// Whether `word` stands in the text by itself, not as a part of a longer one.
fn names(text: &str, word: &str) -> bool {
    let part = |char: char| char.is_alphanumeric() || char == '_';
    text.match_indices(word).any(|(at, _)| !text[..at].ends_with(part) && !text[at + word.len()..].starts_with(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dependency_that_no_line_names_is_found() {
        let deps = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let members = BTreeMap::from([
            ("one".to_owned(), (PathBuf::from("shared/one"), deps(&["tower-http", "http", "bytes"]))),
            ("reliant-rpc".to_owned(), (PathBuf::from("shared/rpc"), deps(&["tonic-prost"]))),
        ]);
        let files = ["shared/one/src/lib.rs", "shared/one/Cargo.toml", "shared/other/src/lib.rs"].map(PathBuf::from);
        let read = |path: &Path| match path.to_str() {
            Some("shared/one/src/lib.rs") => "use tower_http::cors;\nbytes_of(x)".to_owned(),
            Some("shared/one/Cargo.toml") => "http = 1".to_owned(),
            _ => "use http::Uri; use bytes::Bytes;".to_owned(),
        };
        let expected =
            ["http", "bytes"].map(|name| format!("one depends on {name}, and no line of it names that; remove it"));
        assert_eq!(found(&members, &files, read), expected);
    }
}
