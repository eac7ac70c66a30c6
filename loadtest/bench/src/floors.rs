//! What no design of ours can be faster than, on this machine and in this run.

use std::{
    fs::OpenOptions,
    io::{Seek as _, Write as _},
    time::{Duration, Instant},
};

use anyhow::Result;
use reliant_flows::FlowsConfig;

use crate::{
    Bench,
    report::{MS, Report, Samples, US},
};

const FLOOR_RUNS: usize = 60;
const SYNCS: usize = 300;
const ROUND_TRIPS: usize = 2000;
const SYNC_BYTES: usize = 200;

pub async fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let config = FlowsConfig {
        address: bench.rig.temporal_address.clone(),
        task_queue: bench.rig.task_queue.clone(),
        ..FlowsConfig::default()
    };
    let floor = Samples::of(reliant_flows::floor::run_floor(&config, FLOOR_RUNS).await?, MS);
    report.set("temporal_floor_ms_p50", floor.at(0.5));
    let nats = reliant_bus::probe::round_trips(&bench.rig.nats.nats_url, ROUND_TRIPS).await?;
    report.set("nats_round_trip_us_p50", Samples::of(nats, US).at(0.5));
    report.set("fdatasync_us_p50", Samples::of(syncs(&bench.rig)?, US).at(0.5));
    Ok(())
}

fn syncs(rig: &reliant_harness::Rig) -> Result<Vec<Duration>> {
    let path = rig.dir().join("sync-probe");
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).open(path)?;
    // As a journal does: within space that is there already.
    file.write_all(&vec![0; SYNC_BYTES * SYNCS])?;
    file.sync_all()?;
    file.rewind()?;
    let mut times = Vec::with_capacity(SYNCS);
    for _ in 0..SYNCS {
        let begun = Instant::now();
        file.write_all(&[7; SYNC_BYTES])?;
        file.sync_data()?;
        times.push(begun.elapsed());
    }
    Ok(times)
}
