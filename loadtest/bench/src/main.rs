//! `make bench`: the figures this project stands by, measured on one machine in one run, with zero model think time.
//! Prints a table and writes flat JSON. Ratios hold on any machine; absolute times hold on this one. Names of parts, with
//! commas between them, measure these alone; `--strict` fails where a goal is missed.

mod daemons;
mod floors;
mod long_chat;
mod report;
mod streams;
mod tracing_cost;
mod turns;

use std::{path::PathBuf, time::Instant};

use anyhow::{Context as _, Result, ensure};
use reliant_harness::{DaemonOptions, Person, Rig, RigOptions};

use report::Report;

/// The roles would read it, too.
const OTLP_VARIABLE: &str = "RELIANT_TELEMETRY__OTLP_ENDPOINT";
const PARTS: [&str; 7] = ["floors", "turns", "trips", "streams", "memory", "long", "tracing"];

#[tokio::main]
async fn main() -> Result<()> {
    reliant_harness::init();
    let started = Instant::now();
    let out =
        std::env::var_os("BENCH_OUT").map_or_else(|| PathBuf::from("loadtest/results/latest.json"), PathBuf::from);
    let Arguments { only, strict } = arguments(std::env::args().skip(1))?;
    ensure!(
        std::env::var_os(OTLP_VARIABLE).is_none_or(|url| url.is_empty()),
        "the figures are those of roles that export nothing; unset {OTLP_VARIABLE}"
    );
    let wanted = |name: &str| only.as_deref().is_none_or(|only| only.split(',').any(|part| part == name));
    let options = RigOptions {
        apis: 2,
        config: "[api.limits.rate]\ncalls_per_second = 0.0\n\n[telemetry]\nlog = \"warn\"\n".into(),
        ..Default::default()
    };
    let rig = Rig::start(options).await.context("the mesh did not start")?;
    let ada = rig.person("ada").await?;
    let daemon = DaemonOptions { config: "bench_tools = true\n".into(), ..Default::default() };
    let daemon = rig.daemon(&ada, "bench", daemon).await?;
    let mut bench = Bench { rig, ada, daemon };
    let mut report = Report::new();
    report.say("OTLP export was off but for the cost of tracing; logs at level warn; zero model think time; everything on this machine");
    if wanted("floors") {
        floors::run(&bench, &mut report).await.context("floors")?;
    }
    if wanted("turns") {
        turns::run(&bench, &mut report).await.context("turns")?;
    }
    if wanted("trips") {
        daemons::round_trips(&mut bench, &mut report).await.context("tool round trips")?;
    }
    if wanted("streams") {
        streams::run(&bench, &mut report).await.context("streams")?;
    }
    if wanted("memory") {
        daemons::memory(&bench, &mut report).await.context("gateway memory")?;
    }
    if wanted("long") {
        long_chat::run(&bench, &mut report).await.context("long chat")?;
    }
    // Last: from here on this process's own spans are exported, too.
    if wanted("tracing") {
        tracing_cost::run(&mut report).await.context("cost of tracing")?;
    }
    let outcome = report.goals();
    report.say(&format!("took {:.0} s", started.elapsed().as_secs_f64()));
    report.write(&out)?;
    if strict { outcome.strictly(only.is_none()) } else { Ok(()) }
}

#[derive(Debug, PartialEq)]
struct Arguments {
    only: Option<String>,
    strict: bool,
}

fn arguments(given: impl Iterator<Item = String>) -> Result<Arguments> {
    let (flags, parts): (Vec<_>, Vec<_>) = given.partition(|argument| argument.starts_with('-'));
    ensure!(flags.iter().all(|flag| flag == "--strict"), "the only flag is --strict, not {}", flags.join(" "));
    let only = (!parts.is_empty()).then(|| parts.join(","));
    let is_part = |name: &str| PARTS.contains(&name);
    ensure!(only.iter().flat_map(|only| only.split(',')).all(is_part), "the parts are {}", PARTS.join(", "));
    Ok(Arguments { only, strict: !flags.is_empty() })
}

/// What is measured.
pub struct Bench {
    pub rig: Rig,
    pub ada: Person,
    pub daemon: reliant_harness::TestDaemon,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_the_flag_come_in_any_order() {
        let parsed = |line: &str| arguments(line.split_whitespace().map(str::to_owned)).ok();
        let expected = |only: Option<&str>, strict| Some(Arguments { only: only.map(str::to_owned), strict });
        assert_eq!(parsed(""), expected(None, false));
        assert_eq!(parsed("--strict"), expected(None, true));
        assert_eq!(parsed("--strict turns,trips"), expected(Some("turns,trips"), true));
        assert_eq!(parsed("turns --strict"), expected(Some("turns"), true));
        assert_eq!((parsed("--strickt"), parsed("turms")), (None, None));
    }
}
