//! The findings of the security review, one line each: closed where its tests pass, open, or for later.

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use anyhow::{Context, Result, bail};

use crate::test::cargo_test;

const TABLE: &str = "tests/hostile.txt";

#[derive(Debug, PartialEq, Eq)]
enum State<'a> {
    /// By these tests; a name's last part is enough.
    Tested(Vec<&'a str>),
    Open(&'a str),
    Later(&'a str),
}

#[derive(Debug, PartialEq, Eq)]
struct Finding<'a> {
    id: &'a str,
    what: &'a str,
    state: State<'a>,
}

/// A line: `id | what | test name, name …`, or `open why`, or `later why`.
fn findings(table: &str) -> Result<Vec<Finding<'_>>> {
    let lines = table.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let parts: Vec<&str> = line.split('|').map(str::trim).collect();
            let [id, what, state] = parts[..] else { bail!("{TABLE}: not `id | what | state`: {line}") };
            let state = match state.split_once(' ') {
                Some(("test", names)) => State::Tested(names.split(',').map(str::trim).collect()),
                Some(("open", why)) => State::Open(why),
                Some(("later", why)) => State::Later(why),
                _ => bail!("{TABLE}: {id} is neither `test`, `open` nor `later`: {state}"),
            };
            Ok(Finding { id, what, state })
        })
        .collect()
}

/// True: none is open.
pub async fn run(root: &Path) -> Result<bool> {
    let table = std::fs::read_to_string(root.join(TABLE)).with_context(|| format!("{TABLE} cannot be read"))?;
    let findings = findings(&table)?;
    let names: BTreeSet<&str> = findings
        .iter()
        .filter_map(|finding| match &finding.state {
            State::Tested(names) => Some(names.iter().copied()),
            State::Open(_) | State::Later(_) => None,
        })
        .flatten()
        .collect();
    let mut args = vec!["--tests".to_owned(), "--".to_owned()];
    args.extend(names.iter().map(|name| (*name).to_owned()));
    let mut results = HashMap::new();
    // Which test failed says the line of its finding.
    let ran = cargo_test(root, &args, |line| {
        if let Some((name, passed)) = result(line) {
            let last = name.rsplit("::").next().unwrap_or(name).to_owned();
            *results.entry(last).or_insert(true) &= passed;
        }
    })
    .await;
    if results.is_empty() {
        ran?;
        bail!("none of the tests of {TABLE} was run");
    }
    let mut none_open = true;
    for Finding { id, what, state } in &findings {
        let (state, why) = match state {
            State::Later(why) => ("later", (*why).to_owned()),
            State::Open(why) => ("open", (*why).to_owned()),
            State::Tested(names) => {
                let bad: Vec<String> = names
                    .iter()
                    .filter_map(|name| match results.get(*name) {
                        Some(true) => None,
                        Some(false) => Some(format!("{name} failed")),
                        None => Some(format!("{name} was not run")),
                    })
                    .collect();
                if bad.is_empty() { ("closed", format!("{} tests", names.len())) } else { ("open", bad.join(", ")) }
            }
        };
        none_open &= state != "open";
        println!("{id:<5} {state:<6} {what} ({why})");
    }
    Ok(none_open)
}

/// "test daemons::lives::x ... ok"
fn result(line: &str) -> Option<(&str, bool)> {
    let (name, result) = line.strip_prefix("test ")?.split_once(" ... ")?;
    match result.split_whitespace().next()? {
        "ok" => Some((name, true)),
        "FAILED" => Some((name, false)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read_and_results_are_found() {
        let table = "# words\nC1 | a schema | test a::b, c\n\nM4 | rows | later it comes with retention\n";
        let found = findings(table).unwrap();
        assert_eq!(found[0].state, State::Tested(vec!["a::b", "c"]));
        assert_eq!(found[1], Finding { id: "M4", what: "rows", state: State::Later("it comes with retention") });
        assert!(findings("C1 | a schema").is_err() && findings("C1 | a | maybe").is_err());
        assert_eq!(result("test a::b ... ok"), Some(("a::b", true)));
        assert_eq!(result("test a ... FAILED"), Some(("a", false)));
        assert_eq!(result("test result: ok. 1 passed"), None);
    }

    #[test]
    fn the_table_of_this_project_can_be_read() {
        let table = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(TABLE)).unwrap();
        let ids: Vec<&str> = findings(&table).unwrap().iter().map(|finding| finding.id).collect();
        let once: BTreeSet<&&str> = ids.iter().collect();
        assert_eq!(once.len(), ids.len(), "each finding has one line");
    }
}
