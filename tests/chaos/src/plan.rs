//! What a campaign means to show, and whether it did.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    matrix::Cell,
    outages::Pair,
    phases::{Phase, Planned},
    report::quantile,
    tally::Hit,
};

/// What is promised of a takeover, for 99 in 100.
const TAKEOVER_P99: Duration = Duration::from_secs(5);
/// The p99 of fewer is just their slowest, of which nothing is promised.
const P99_LEAST: usize = 100;

/// Empty for a play that is no campaign: it asserts for itself.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    pub cells: Vec<Cell>,
    /// Kills of a streaming worker.
    pub takeovers: usize,
    /// Outages that overlap.
    pub pairs: Vec<Pair>,
    /// What a neighbour takes, and when servers are spared.
    pub phases: Vec<Planned>,
    /// Chats that are to outgrow their model's window.
    pub outgrown: usize,
    /// Turns of the long chat.
    pub long_turns: usize,
    /// Each kill and each pair of the cells is to be had; a glimpse shows what its minute has room for.
    pub whole: bool,
    /// From the first process' start to the last check.
    pub longest: Option<Duration>,
}

/// What came of it.
pub struct Done<'a> {
    pub hits: &'a [Hit],
    pub takeover_kills: usize,
    /// From the shortest to the longest.
    pub takeovers: &'a [Duration],
    pub pairs: &'a [Pair],
    pub phases: &'a BTreeMap<Phase, usize>,
    pub outgrown: usize,
    pub long_turns: usize,
    pub took: Duration,
}

impl Plan {
    pub fn faults(&self) -> usize {
        self.cells.len() + self.takeovers + self.pairs.len() + self.stressed_phases().count()
    }

    fn stressed_phases(&self) -> impl Iterator<Item = Phase> {
        self.phases.iter().map(|planned| planned.phase).filter(|phase| *phase != Phase::Calm)
    }

    /// What it asks for and has not got.
    pub fn unmet(&self, done: &Done<'_>) -> Vec<String> {
        let mut all = Vec::new();
        if self.whole {
            all.extend(self.pairs_without_fault(done.hits));
            if done.takeover_kills < self.takeovers {
                all.push(format!("{} takeover kills counted of {} planned", done.takeover_kills, self.takeovers));
            }
            all.extend(self.pairs.iter().filter(|pair| !done.pairs.contains(pair)).map(|pair| format!("no {pair}")));
            let phases: BTreeSet<Phase> =
                self.stressed_phases().filter(|phase| !done.phases.contains_key(phase)).collect();
            all.extend(phases.iter().map(|phase| format!("no {phase} counted")));
            if done.long_turns < self.long_turns {
                all.push(format!("the long chat did {} of {} turns", done.long_turns, self.long_turns));
            }
        }
        // Which is quick: a campaign of any length must have it.
        if done.outgrown < self.outgrown {
            all.push(format!("{} of {} chats outgrew their window", done.outgrown, self.outgrown));
        }
        let p99 = quantile(done.takeovers, 0.99);
        if done.takeovers.len() >= P99_LEAST && p99 >= TAKEOVER_P99 {
            all.push(format!("the p99 of takeovers is {} ms", p99.as_millis()));
        }
        if let Some(longest) = self.longest.filter(|longest| done.took > *longest) {
            all.push(format!("it took {:.0} s of {:.0} s", done.took.as_secs_f64(), longest.as_secs_f64()));
        }
        all
    }

    fn pairs_without_fault(&self, hits: &[Hit]) -> Vec<String> {
        let had: BTreeSet<String> = hits.iter().filter(|hit| hit.counts).flat_map(|hit| pairs_of(&hit.cell)).collect();
        let planned: BTreeSet<String> = self.cells.iter().flat_map(pairs_of).collect();
        planned.difference(&had).map(|pair| format!("no counted fault hit {pair}")).collect()
    }
}

fn pairs_of(cell: &Cell) -> [String; 2] {
    [format!("{} × {}", cell.process, cell.kind), format!("{} × {}", cell.process, cell.step)]
}
