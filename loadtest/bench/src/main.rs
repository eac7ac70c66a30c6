//! `make bench`: the figures this project stands by, measured on one machine in one run, with zero model think time.
//! Prints a table and writes flat JSON. Ratios hold on any machine; absolute times hold on this one.

mod daemons;
mod floors;
mod long_chat;
mod report;
mod streams;
mod tracing_cost;
mod turns;

use std::{path::PathBuf, time::Instant};

use anyhow::{Context as _, Result};
use reliant_harness::{DaemonOptions, Person, Rig, RigOptions};

use report::Report;

#[tokio::main]
async fn main() -> Result<()> {
    reliant_harness::init();
    let started = Instant::now();
    let out =
        std::env::var_os("BENCH_OUT").map_or_else(|| PathBuf::from("loadtest/results/latest.json"), PathBuf::from);
    let only = std::env::args().nth(1);
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
    report.goals();
    report.say(&format!("took {:.0} s", started.elapsed().as_secs_f64()));
    report.write(&out)?;
    Ok(())
}

/// What is measured.
pub struct Bench {
    pub rig: Rig,
    pub ada: Person,
    pub daemon: reliant_harness::TestDaemon,
}
