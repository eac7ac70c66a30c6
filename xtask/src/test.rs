//! `cargo test` with a private Postgres and Temporal around it, and one closing line over all crates.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use reliant_devstack::{Placement, Stack, StackConfig, Tools};

use crate::cargo;

/// A database per test is made on this server. Its URL is what tests of the store look for.
const DATABASE_VARIABLE: &str = "RELIANT_TEST_DATABASE_URL";

/// Workflows of tests run on this server.
const TEMPORAL_VARIABLE: &str = "RELIANT_TEST_TEMPORAL";
/// Tests of the bus start, kill and restart servers of their own with this program.
const NATS_VARIABLE: &str = "RELIANT_TEST_NATS_SERVER";

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Totals {
    passed: u64,
    failed: u64,
    ignored: u64,
}

pub async fn run(root: &Path, args: &[String]) -> Result<()> {
    let begun = Instant::now();
    let mut totals = Totals::default();
    let passed = cargo_test(root, args, |line| {
        println!("{line}");
        totals.add(line);
    })
    .await;
    let Totals { passed: ok, failed, ignored } = totals;
    println!("\n{ok} passed, {failed} failed, {ignored} ignored in {} s", begun.elapsed().as_secs());
    passed
}

/// Runs tests of the workspace over private servers; each line of their output goes to `say`.
pub async fn cargo_test(root: &Path, args: &[String], mut say: impl FnMut(&str)) -> Result<()> {
    let dir = tempfile::tempdir().context("no directory for the private Postgres")?;
    let config = StackConfig { nats: Placement::Off, ..StackConfig::for_tests(dir.path()) };
    let nats_server = Tools::new(&config.tools_dir).nats()?;
    let stack = Stack::start(config).await?;
    let mut command = Command::new(cargo());
    command
        .args(["test", "--workspace", "--no-fail-fast"])
        .args(args)
        .current_dir(root)
        .env(DATABASE_VARIABLE, &stack.postgres_url)
        .env(TEMPORAL_VARIABLE, format!("http://{}", stack.temporal_address))
        .env(NATS_VARIABLE, nats_server)
        .stdout(Stdio::piped());
    // What a person has set for a mesh of theirs must not reach tests.
    for variable in ["DATABASE_URL", "NATS_URL", "TEMPORAL_ADDRESS", "ARGS", "MAKEFLAGS", "MAKELEVEL"] {
        command.env_remove(variable);
    }
    let mut child = command.spawn().context("cargo could not be started")?;
    let output = child.stdout.take().expect("it is piped");
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("cargo's output broke off")?;
        say(&String::from_utf8_lossy(&line));
    }
    let status = child.wait().context("cargo was lost")?;
    stack.stop().await;
    if !status.success() {
        bail!("cargo test ended with {status}");
    }
    Ok(())
}

impl Totals {
    /// "test result: ok. 8 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.02s"
    fn add(&mut self, line: &str) {
        let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". ")) else {
            return;
        };
        for part in counts.split(';') {
            let mut words = part.split_whitespace();
            let (Some(Ok(count)), Some(what)) = (words.next().map(str::parse::<u64>), words.next()) else { continue };
            match what {
                "passed" => self.passed += count,
                "failed" => self.failed += count,
                "ignored" => self.ignored += count,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_summed() {
        let mut totals = Totals::default();
        totals.add("running 3 tests");
        totals.add("test result: ok. 8 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.02s");
        totals
            .add("test result: FAILED. 7 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 60.23s");
        assert_eq!(totals, Totals { passed: 15, failed: 1, ignored: 1 });
    }
}
