//! Chaos: a whole mesh with many chats in flight, in which processes are killed, asked to end, paused, cut off, silenced
//! and slowed, each at a named step of a turn; and a checker that reads what came of it.
//!
//! A fault counts only if rows said, right before it and right after, that a chat was at its step. The seed decides what
//! is done; what the machine does in between it cannot.

mod chance;
mod checker;
mod crowd;
mod lane;
mod matrix;
mod plan;
mod report;
pub mod scripts;
pub mod seat;
mod step;
mod takeover;
mod theatre;

use std::time::Duration;

use anyhow::Result;
use tokio::time::Instant;

pub use report::{Report, say};
pub use step::{Stage, describe};
pub use theatre::{AT_ONCE, Cast, Theatre};

use crate::{
    chance::Chance,
    lane::Work,
    matrix::{Cell, Kind, Process, Step},
    plan::Plan,
};

/// Of a full campaign.
const LONGEST: Duration = Duration::from_secs(30 * 60);

/// What a campaign is made of.
#[derive(Debug, Clone)]
pub struct Campaign {
    pub seed: u64,
    /// Cells of the matrix.
    pub cells: usize,
    /// Kills of a streaming worker whose takeover is measured.
    pub takeovers: usize,
    /// No new fault is begun after this.
    pub limit: Duration,
    /// With fewer faults than that it proves nothing.
    pub least: usize,
    /// All that is planned is to be had; else `least` of it.
    pub whole: bool,
    /// From the first process' start to the last check.
    pub longest: Option<Duration>,
    /// As many aimed faults at one time as there are stages.
    pub cast: Cast,
    /// Only cells whose name holds this.
    pub only: Option<String>,
    /// Logs and data stay where they are.
    pub keep: bool,
}

impl Campaign {
    /// All of it: at least 300 faults, in under half an hour.
    pub fn full(seed: u64) -> Self {
        Self {
            seed,
            cells: 220,
            takeovers: 100,
            limit: Duration::from_secs(25 * 60),
            least: 300,
            whole: true,
            longest: Some(LONGEST),
            cast: Cast { apis: 2, workers: 3, gateways: 2, stages: 5, neighbours: 3, chats: 4 },
            only: None,
            keep: false,
        }
    }

    /// A glimpse of it, for every test run.
    pub fn short(seed: u64) -> Self {
        Self {
            cells: 12,
            takeovers: 3,
            limit: Duration::from_secs(60),
            least: 6,
            whole: false,
            longest: None,
            cast: Cast { apis: 2, workers: 2, gateways: 2, stages: 2, neighbours: 1, chats: 3 },
            ..Self::full(seed)
        }
    }

    fn plan(&self) -> Plan {
        Plan { cells: self.cells(), takeovers: self.takeovers, whole: self.whole, longest: self.longest }
    }

    fn cells(&self) -> Vec<Cell> {
        let Some(only) = &self.only else { return matrix::plan(self.seed, self.cells) };
        let mut fits = Vec::new();
        for process in Process::ALL {
            for kind in Kind::ALL {
                if matrix::impossible(*process, *kind).is_some() {
                    continue;
                }
                fits.extend(Step::ALL.iter().map(|step| Cell { process: *process, kind: *kind, step: *step }));
            }
        }
        fits.retain(|cell| cell.to_string().contains(only.as_str()));
        Chance::new(self.seed, 2).shuffle(&mut fits);
        fits.iter().cycle().take(if fits.is_empty() { 0 } else { self.cells }).copied().collect()
    }

    pub async fn run(&self) -> Result<Report> {
        let plan = self.plan();
        let planned = plan.faults();
        say(&format!("seed {}: {planned} faults; again with: make chaos ARGS=\"--seed {}\"", self.seed, self.seed));
        let theatre = Theatre::open(&self.cast, self.seed).await?;
        let Theatre { stages, audience, tally, .. } = &theatre;
        let deadline = Instant::now() + self.limit;
        let work = Work::new(plan.cells.clone(), deadline);
        let faults = async {
            // Takeovers first: there one fault at a time is done, so that it alone is measured.
            audience.kill(self.takeovers, deadline, self.seed, tally).await;
            let lanes = stages.iter().map(|stage| lane::run(stage, &work, self.seed, tally));
            futures::future::join_all(lanes).await;
        };
        theatre.while_crowded(faults).await;
        if work.left() > 0 {
            say(&format!("time was over with {} cells left", work.left()));
        }
        let done = tally.hits().iter().filter(|hit| hit.counts).count();
        if done < self.least.min(planned) {
            tally.problem(format!("{done} faults are too few for a proof; {} are", self.least.min(planned)));
        }
        theatre.close_by(plan, self.keep).await
    }
}
