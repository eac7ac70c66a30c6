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
mod report;
mod scripts;
mod seat;
mod step;
mod takeover;

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use reliant_harness::{Arena, ArenaOptions};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use report::{Report, say};

use crate::{
    chance::Chance,
    crowd::Neighbour,
    lane::Work,
    matrix::{Cell, Kind, Process, Step},
    report::Tally,
    seat::Ledger,
    step::Stage,
    takeover::Audience,
};

/// What a campaign is made of.
#[derive(Debug, Clone)]
pub struct Campaign {
    pub seed: u64,
    /// Cells of the matrix.
    pub cells: usize,
    /// Faults that are sought at one time.
    pub lanes: usize,
    /// People of the crowd, each with a daemon, and chats of each.
    pub neighbours: usize,
    pub chats: usize,
    /// Kills of a streaming worker whose takeover is measured.
    pub takeovers: usize,
    /// No new fault is begun after this.
    pub limit: Duration,
    pub arena: ArenaOptions,
    /// Only cells whose name holds this.
    pub only: Option<String>,
    /// Logs and data stay where they are.
    pub keep: bool,
}

/// People are not to be limited, and logs tell what went wrong.
const CONFIG: &str = "[api.limits.rate]\ncalls_per_second = 0.0\n\n[telemetry]\nlog = \"info\"\n";

impl Campaign {
    /// All of it: at least 300 faults, in under half an hour.
    pub fn full(seed: u64) -> Self {
        Self {
            seed,
            cells: 210,
            lanes: 3,
            neighbours: 3,
            chats: 4,
            takeovers: 100,
            limit: Duration::from_secs(25 * 60),
            arena: ArenaOptions { config: CONFIG.to_owned(), ..ArenaOptions::default() },
            only: None,
            keep: false,
        }
    }

    /// A glimpse of it, for every test run.
    pub fn short(seed: u64) -> Self {
        Self {
            cells: 12,
            lanes: 2,
            neighbours: 1,
            chats: 3,
            takeovers: 3,
            limit: Duration::from_secs(75),
            arena: ArenaOptions { workers: 2, config: CONFIG.to_owned(), ..ArenaOptions::default() },
            ..Self::full(seed)
        }
    }

    fn plan(&self) -> Vec<Cell> {
        let mut cells = match &self.only {
            Some(only) => {
                let all = Process::ALL.iter().flat_map(|process| {
                    let kinds = Kind::ALL.iter();
                    kinds.flat_map(|kind| {
                        Step::ALL.iter().map(|step| Cell { process: *process, kind: *kind, step: *step })
                    })
                });
                let mut fits: Vec<Cell> = all.filter(|cell| cell.to_string().contains(only.as_str())).collect();
                Chance::new(self.seed, 2).shuffle(&mut fits);
                fits.iter().cycle().take(self.cells.min(fits.len() * 100)).copied().collect()
            }
            None => matrix::plan(self.seed, self.cells),
        };
        cells.retain(|cell| matrix::impossible(cell).is_none());
        cells
    }

    pub async fn run(&self) -> Result<Report> {
        let begun = Instant::now();
        say(&format!("seed {}; again with: make chaos ARGS=\"--seed {}\"", self.seed, self.seed));
        let arena = Arena::start(self.arena.clone()).await.context("the mesh did not start")?;
        say(&format!("logs are in {}", arena.logs().display()));
        let (ledger, tally) = (Arc::new(Ledger::default()), Arc::new(Tally::default()));
        let mut stages = Vec::new();
        for number in 0..self.lanes {
            stages.push(Stage::new(&arena, &format!("lane{number}"), &ledger).await?);
        }
        let mut neighbours = Vec::new();
        for number in 0..self.neighbours {
            neighbours.push(Neighbour::new(&arena, &format!("crowd{number}"), self.chats, &ledger).await?);
        }
        let audience = Audience::new(&arena, "audience", &ledger).await?;
        let cells = self.plan();
        let planned = cells.len() + self.takeovers;
        say(&format!("{planned} faults are planned; up after {:.0} s", begun.elapsed().as_secs_f64()));

        let deadline = Instant::now() + self.limit;
        let (work, stop) = (Work::new(cells, deadline), CancellationToken::new());
        let faults = async {
            // Takeovers first: there one fault at a time is done, so that it alone is measured.
            audience.kill(self.takeovers, deadline, self.seed, &tally).await;
            let lanes = stages.iter().map(|stage| lane::run(stage, &work, self.seed, &tally));
            futures::future::join_all(lanes).await;
            stop.cancel();
        };
        let lives = (0..)
            .zip(&neighbours)
            .map(|(number, neighbour)| neighbour.live(&arena, self.seed.wrapping_add(number), &ledger, &tally, &stop));
        tokio::join!(faults, futures::future::join_all(lives));
        if work.left() > 0 {
            tally.problem(format!("time was over with {} cells left", work.left()));
        }

        let mut hosts = Vec::new();
        let mut seats = Vec::new();
        let mut keep = Vec::new();
        for Stage { visitor, host, auto, ask, .. } in stages {
            hosts.push(host);
            seats.extend([auto, ask]);
            keep.push(visitor);
        }
        for Neighbour { visitor, host, seats: own, .. } in neighbours {
            hosts.push(host);
            seats.extend(own);
            keep.push(visitor);
        }
        let (own, visitor) = audience.into_parts();
        seats.extend(own);
        keep.push(visitor);
        let subject = checker::Subject { arena: &arena, ledger: &ledger, hosts: &hosts, hits: tally.hits() };
        let findings = checker::check(&subject, seats).await.context("the checker could not read everything")?;
        let mut report = Report::new(self.seed, begun.elapsed(), planned, &tally, findings);
        report.collapses = arena.collapses().iter().map(|one| format!("{}: {}", one.name, one.log_tail)).collect();
        report.failed_calls = ledger.failed_calls.lock().clone();
        drop((keep, hosts));
        if self.keep || !report.verdict().is_empty() {
            arena.keep_files();
        }
        Ok(report)
    }
}
