//! `make bench`: the figures this project stands by, measured on one machine in one run, with zero model think time.
//! Prints a table and writes flat JSON. Ratios hold on any machine; absolute times hold on this one. Names of parts, with
//! commas between them, measure these alone; `--strict` fails where a goal is missed. With `--slices` it measures short
//! slices of parts when it is asked to (slices.rs), for a comparison with another build.

mod arrivals;
mod closed_loop;
mod daemons;
mod floors;
mod growth;
mod long_chat;
mod overload;
mod progress;
mod report;
mod slices;
mod streams;
mod temporal_http;
mod tracing_cost;
mod turns;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use reliant_harness::{DaemonOptions, Person, Rig, RigOptions};

use report::Report;

/// The roles would read it, too.
const OTLP_VARIABLE: &str = "RELIANT_TELEMETRY__OTLP_ENDPOINT";
const PARTS: [&str; 10] =
    ["floors", "turns", "trips", "streams", "memory", "long", "growth", "arrivals", overload::PART, "tracing"];

#[tokio::main]
async fn main() -> Result<()> {
    reliant_harness::init();
    let started = Instant::now();
    let out =
        std::env::var_os("BENCH_OUT").map_or_else(|| PathBuf::from("loadtest/results/latest.json"), PathBuf::from);
    let Arguments { only, strict, slices } = arguments(std::env::args().skip(1))?;
    ensure!(
        std::env::var_os(OTLP_VARIABLE).is_none_or(|url| url.is_empty()),
        "the figures are those of roles that export nothing; unset {OTLP_VARIABLE}"
    );
    let wanted = |name: &str| only.as_deref().is_none_or(|only| only.split(',').any(|part| part == name));
    let options = RigOptions {
        apis: 2,
        // The daemons' configuration is what begins at [telemetry].
        config: format!(
            "[api.limits.rate]\ncalls_per_second = 0.0\n\n{}[telemetry]\nlog = \"warn\"\n",
            growth::config()
        ),
        ..Default::default()
    };
    let rig = Rig::start(options).await.context("the mesh did not start")?;
    let ada = rig.person("ada").await?;
    let daemon = DaemonOptions { config: "bench_tools = true\n".into(), ..Default::default() };
    let daemon = rig.daemon(&ada, "bench", daemon).await?;
    let amount = if slices { SLICE } else { WHOLE };
    let mut bench = Bench { rig, ada, daemon, amount };
    if slices {
        return slices::run(&mut bench).await;
    }
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
    if wanted("growth") {
        Box::pin(growth::run(&bench, &mut report)).await.context("growth")?;
    }
    if wanted("arrivals") {
        Box::pin(arrivals::run(&bench, &mut report)).await.context("arrivals")?;
    }
    if wanted(overload::PART) {
        Box::pin(overload::run(&mut bench, &mut report)).await.context("overload")?;
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
    slices: bool,
}

fn arguments(given: impl Iterator<Item = String>) -> Result<Arguments> {
    let (flags, parts): (Vec<_>, Vec<_>) = given.partition(|argument| argument.starts_with('-'));
    let is_flag = |flag: &String| ["--strict", "--slices"].contains(&flag.as_str());
    ensure!(flags.iter().all(is_flag), "the flags are --strict and --slices, not {}", flags.join(" "));
    let has = |name: &str| flags.iter().any(|flag| flag == name);
    let (strict, slices) = (has("--strict"), has("--slices"));
    ensure!(!slices || (!strict && parts.is_empty()), "--slices stands alone: the parts are asked for one by one");
    let only = (!parts.is_empty()).then(|| parts.join(","));
    let is_part = |name: &str| PARTS.contains(&name);
    ensure!(only.iter().flat_map(|only| only.split(',')).all(is_part), "the parts are {}", PARTS.join(", "));
    Ok(Arguments { only, strict, slices })
}

/// What is measured.
pub struct Bench {
    pub rig: Rig,
    pub ada: Person,
    pub daemon: reliant_harness::TestDaemon,
    pub amount: Amount,
}

/// How much of each part is measured.
#[derive(Debug, Clone, Copy)]
pub struct Amount {
    pub warm_up: usize,
    pub floor_runs: usize,
    /// Turns of each kind, one after another.
    pub one_by_one: usize,
    /// Of each kind of turn, 32 chats at once.
    pub rate_time: Duration,
    pub trips: usize,
    /// Of each stream of text.
    pub stream_seconds: usize,
}

const WHOLE: Amount = Amount {
    warm_up: 10,
    floor_runs: 60,
    one_by_one: 100,
    rate_time: Duration::from_secs(20),
    trips: 300,
    stream_seconds: 6,
};
/// A few seconds a part, so that two builds take turns before the machine changes.
const SLICE: Amount = Amount {
    warm_up: 3,
    floor_runs: 15,
    one_by_one: 25,
    rate_time: Duration::from_millis(2500),
    trips: 60,
    stream_seconds: 1,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_the_flag_come_in_any_order() {
        let parsed = |line: &str| arguments(line.split_whitespace().map(str::to_owned)).ok();
        let expected =
            |only: Option<&str>, strict| Some(Arguments { only: only.map(str::to_owned), strict, slices: false });
        assert_eq!(parsed(""), expected(None, false));
        assert_eq!(parsed("--strict"), expected(None, true));
        assert_eq!(parsed("--strict turns,trips"), expected(Some("turns,trips"), true));
        assert_eq!(parsed("turns --strict"), expected(Some("turns"), true));
        assert_eq!(parsed("--slices"), Some(Arguments { only: None, strict: false, slices: true }));
        for bad in ["--strickt", "turms", "--slices turns", "--slices --strict"] {
            assert_eq!(parsed(bad), None, "{bad}");
        }
    }
}
