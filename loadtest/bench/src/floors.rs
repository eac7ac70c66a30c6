//! What no design of ours can be faster than, on this machine and in this run.

use std::{
    fs::{File, OpenOptions},
    io::{Seek as _, Write as _},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Result;
use reliant_flows::FlowsConfig;

use reliant_load::{Samples, samples::MS};

use crate::{Bench, report::Report};

const SYNC_BYTES: usize = 200;

pub async fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let config = FlowsConfig {
        address: bench.rig.temporal_address.clone(),
        task_queue: bench.rig.task_queue.clone(),
        ..FlowsConfig::default()
    };
    let floor = Samples::of(reliant_flows::floor::run_floor(&config, bench.amount.floor_runs).await?, MS);
    report.set("temporal_floor_ms_p50", floor.at(0.5));
    Ok(())
}

/// A file that takes one synced write after another.
pub struct SyncProbe(File);

impl SyncProbe {
    pub fn new(dir: &Path, writes: usize) -> Result<Self> {
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).open(dir.join("sync-probe"))?;
        // As a journal does: within space that is there already.
        file.write_all(&vec![0; SYNC_BYTES * writes])?;
        file.sync_all()?;
        file.rewind()?;
        Ok(Self(file))
    }

    pub fn write(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        self.0.write_all(&[7; SYNC_BYTES])?;
        self.0.sync_data()?;
        Ok(begun.elapsed())
    }
}
