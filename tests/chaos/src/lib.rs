//! Chaos: a whole mesh with many chats in flight, in which processes are killed, asked to end, paused, cut off, silenced
//! and slowed, each at a named step of a turn, alone and two at a time, while neighbours take CPU, memory and the disk; a
//! check that no chat stands still meanwhile; and a checker that reads what came of it.
//!
//! A fault counts only if rows said, right before it and right after, that a chat was at its step. The seed decides what
//! is done; what the machine does in between it cannot.

mod chance;
mod checker;
mod conditions;
mod crowd;
mod growth;
mod lane;
mod liveness;
mod matrix;
mod outages;
mod phases;
mod plan;
mod replay;
mod report;
pub mod scripts;
pub mod seat;
mod step;
pub mod stressor;
mod takeover;
mod tally;
mod theatre;

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use tokio::time::Instant;

pub use chance::clock_seed;
pub use report::Report;
pub use step::{Stage, describe};
pub use tally::say;
pub use theatre::{AT_ONCE, Cast, Theatre};

use crate::{
    chance::Chance,
    growth::Growth,
    lane::Work,
    matrix::{Cell, Kind, Process, Step},
    plan::Plan,
    theatre::Settings,
};

/// Of a full campaign, from its first process' start to its report.
pub const FULL: Duration = Duration::from_secs(40 * 60);
/// Of a short one.
pub const SHORT: Duration = Duration::from_secs(3 * 60);
/// A campaign needs this much to start, to let its last turns end, and to check.
pub const CAMPAIGN_MIN: Duration = Duration::from_secs(2 * 60);
/// Of a campaign's time, for what follows its last fault.
const CLOSING_DIVISOR: u32 = 5;
const CLOSING_MIN: Duration = Duration::from_secs(40);
const CLOSING_MAX: Duration = Duration::from_secs(5 * 60);
/// Chats that outgrow their window, in a campaign of any length.
const SMALL_WINDOWS: usize = 2;

/// What a campaign is made of.
#[derive(Debug, Clone)]
pub struct Campaign {
    pub seed: u64,
    /// Cells of the matrix.
    pub cells: usize,
    /// Kills of a streaming worker whose takeover is measured.
    pub takeovers: usize,
    /// Outages that overlap.
    pub pairs: usize,
    /// Phases in which a noisy neighbour takes CPU, memory or the disk.
    pub stress_phases: usize,
    /// Of each of them.
    pub phase: Duration,
    /// Turns of one long chat.
    pub long_turns: usize,
    /// Faults are done for this long at most, and in any case only as long as time is left to check.
    pub limit: Duration,
    /// From the first process' start to the report; what is not done by then is a finding.
    pub total: Duration,
    /// With fewer faults of the matrix than that it proves nothing.
    pub least: usize,
    /// All that is planned is to be had; else `least` of it.
    pub whole: bool,
    /// As many aimed faults at one time as there are stages.
    pub cast: Cast,
    /// Only cells whose name holds this.
    pub only: Option<String>,
    /// Where what explains a finding is saved; else beside the logs.
    pub evidence: Option<PathBuf>,
    /// Logs and data stay where they are.
    pub keep: bool,
}

/// Until when the parts of a campaign may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Deadlines {
    /// No new fault.
    faults: Instant,
    /// All turns have ended.
    turns: Instant,
    end: Instant,
}

impl Deadlines {
    fn new(begun: Instant, now: Instant, limit: Duration, total: Duration) -> Self {
        let end = begun + total;
        let closing = (total / CLOSING_DIVISOR).clamp(CLOSING_MIN, CLOSING_MAX);
        Self { faults: (now + limit).min(end - closing), turns: end - closing / 2, end }
    }
}

impl Campaign {
    /// All of it: at least 300 faults of the matrix, in 40 minutes.
    pub fn full(seed: u64) -> Self {
        Self {
            seed,
            cells: 220,
            takeovers: 100,
            pairs: 36,
            stress_phases: 7,
            phase: Duration::from_secs(120),
            long_turns: 200,
            limit: FULL,
            total: FULL,
            least: 300,
            whole: true,
            cast: Cast { apis: 2, workers: 3, gateways: 2, stages: 5, neighbours: 3, chats: 4 },
            only: None,
            evidence: None,
            keep: false,
        }
    }

    /// A glimpse of it, for every test run.
    pub fn short(seed: u64) -> Self {
        Self {
            cells: 12,
            takeovers: 3,
            pairs: 1,
            stress_phases: 1,
            phase: Duration::from_secs(20),
            long_turns: 30,
            limit: Duration::from_secs(110),
            total: SHORT,
            least: 6,
            whole: false,
            cast: Cast { apis: 2, workers: 2, gateways: 2, stages: 2, neighbours: 1, chats: 3 },
            ..Self::full(seed)
        }
    }

    fn plan(&self) -> Plan {
        Plan {
            cells: self.cells(),
            takeovers: self.takeovers,
            pairs: outages::plan(self.seed, self.pairs),
            phases: phases::plan(self.seed, self.stress_phases, self.phase),
            outgrown: SMALL_WINDOWS,
            long_turns: self.long_turns,
            whole: self.whole,
            longest: Some(self.total),
        }
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
        let begun = Instant::now();
        let plan = self.plan();
        let planned = plan.faults();
        say(&format!("seed {}: {planned} faults; again with: make chaos ARGS=\"--seed {}\"", self.seed, self.seed));
        let settings = Settings {
            growth: Growth { small_windows: SMALL_WINDOWS, long_turns: self.long_turns },
            durable: true,
            evidence: self.evidence.clone(),
            config: String::new(),
        };
        let opening = Theatre::open_campaign(&self.cast, self.seed, settings);
        let opened = tokio::time::timeout_at(begun + self.total, opening).await;
        let theatre = opened.with_context(|| format!("seed {}: the mesh was not up in time", self.seed))??;
        let deadlines = Deadlines::new(begun, Instant::now(), self.limit, self.total);
        let Theatre { arena, stages, audience, tally, conditions, .. } = &theatre;
        let work = Work::new(plan.cells.clone(), deadlines.faults);
        let span = deadlines.faults.saturating_duration_since(Instant::now());
        let faults = async {
            // Takeovers first: there one fault at a time is done, so that it alone is measured. They leave half of the time.
            audience.kill(self.takeovers, deadlines.faults - span / 2, self.seed, tally).await;
            let lanes = stages.iter().map(|stage| lane::run(stage, &work, conditions, self.seed, tally));
            let phases = phases::run(arena, conditions, &plan.phases, deadlines.faults, tally);
            let pairs = outages::run(arena, conditions, &plan.pairs, self.seed, deadlines.faults, tally);
            tokio::join!(futures::future::join_all(lanes), phases, pairs);
        };
        let crowded = theatre.while_crowded_for(span, faults);
        if tokio::time::timeout_at(deadlines.turns, crowded).await.is_err() {
            tally.problem("turns or faults had not ended in time".to_owned());
        }
        if work.left() > 0 {
            say(&format!("time was over with {} cells left", work.left()));
        }
        let done = tally.hits().iter().filter(|hit| hit.counts).count();
        let least = self.least.min(plan.cells.len() + plan.takeovers);
        if done < least {
            tally.problem(format!("{done} faults are too few for a proof; {least} are"));
        }
        theatre.close_by(plan, self.keep, Some(deadlines.end)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn a_campaign_ends_when_its_time_is_over() {
        let begun = Instant::now();
        let deadlines = |limit, total| Deadlines::new(begun, begun + MINUTE / 6, limit, total);
        let full = deadlines(FULL, FULL);
        let expected =
            Deadlines { faults: begun + 35 * MINUTE, turns: begun + FULL - 150 * MINUTE / 60, end: begun + FULL };
        assert_eq!(full, expected);
        let short = deadlines(MINUTE, SHORT);
        assert_eq!((short.faults, short.end), (begun + MINUTE / 6 + MINUTE, begun + SHORT));
        for minutes in 2..60 {
            let Deadlines { faults, turns, end } = deadlines(FULL, minutes * MINUTE);
            assert!(begun < faults && faults < turns && turns < end && end == begun + minutes * MINUTE);
        }
        assert!(SHORT <= 3 * MINUTE && Campaign::short(1).total == SHORT);
    }

    #[test]
    fn the_seed_decides_all_of_the_plan() {
        let plan = |seed| {
            let Plan { cells, pairs, phases, .. } = Campaign::full(seed).plan();
            (cells, pairs, phases)
        };
        assert_eq!(plan(5), plan(5));
        let (one, other) = (plan(5), plan(6));
        assert!(one.0 != other.0 && one.1 != other.1);
        let short = Campaign::short(5).plan();
        assert_eq!((short.pairs.len(), short.phases.len(), short.outgrown), (1, 2, SMALL_WINDOWS));
    }
}
