//! What happens in a campaign, gathered while it runs.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use reliant_harness::Fault;
use uuid::Uuid;

use crate::{matrix::Cell, outages::Pair, phases::Phase};

/// A turn that takes longer to recover is named, so that its logs can be read.
const SLOW: Duration = Duration::from_secs(15);

/// A fault that was done.
#[derive(Debug, Clone)]
pub struct Hit {
    pub cell: Cell,
    pub node: String,
    /// It hit its step: rows said so right before it, and right after where they could be asked.
    pub counts: bool,
    /// Unix milliseconds, before it was done.
    pub since_ms: i64,
    pub fault: Fault,
}

/// Gathers while the campaign runs.
#[derive(Debug, Default)]
pub struct Tally {
    pub(crate) seed: u64,
    pub(crate) pairs: Mutex<Vec<Pair>>,
    pub(crate) phases: Mutex<BTreeMap<Phase, usize>>,
    pub(crate) stuck: Mutex<Vec<String>>,
    hits: Mutex<Vec<Hit>>,
    pub(crate) problems: Mutex<Vec<String>>,
    pub(crate) missed: Mutex<Vec<(Cell, String)>>,
    pub(crate) settled: Mutex<Vec<(Cell, Duration)>>,
    pub(crate) takeovers: Mutex<Vec<Duration>>,
    pub(crate) takeover_kills: AtomicU64,
    others: Mutex<Vec<(String, Fault, i64)>>,
    unknown: Mutex<BTreeMap<Uuid, &'static str>>,
    told: AtomicU64,
}

impl Tally {
    pub fn new(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    pub fn wall_ms(&self) -> i64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
    }

    pub fn hit(&self, hit: Hit) {
        let count = self.told.fetch_add(1, Ordering::Relaxed) + 1;
        say(&format!("{count:>4} {} at {}{}", hit.cell, hit.node, if hit.counts { "" } else { " (missed its step)" }));
        self.hits.lock().push(hit);
    }

    /// A fault that is part of no matrix.
    pub fn done(&self, node: &str, fault: &Fault) {
        say(&format!("  {fault:?} at {node}"));
        self.others.lock().push((node.to_owned(), fault.clone(), self.wall_ms()));
    }

    /// This call must end as unknown, by this cause.
    pub fn expect_unknown(&self, call: Uuid, cause: &'static str) {
        self.unknown.lock().insert(call, cause);
    }

    pub fn expected_unknown(&self) -> BTreeMap<Uuid, &'static str> {
        self.unknown.lock().clone()
    }

    /// When this process was ended by us, in Unix milliseconds.
    pub fn ends_of(&self, node: &str) -> Vec<i64> {
        self.times_of(node, |fault| {
            matches!(fault, Fault::Kill { .. } | Fault::Terminate { .. } | Fault::LoseJournal { .. })
        })
    }

    /// When we took this daemon's journal away.
    pub fn losses_of(&self, node: &str) -> Vec<i64> {
        self.times_of(node, |fault| matches!(fault, Fault::LoseJournal { .. }))
    }

    /// When the kernel began to refuse this daemon's writes.
    pub fn full_disks_of(&self, node: &str) -> Vec<i64> {
        self.times_of(node, |fault| matches!(fault, Fault::FullDisk(_)))
    }

    fn times_of(&self, node: &str, ends: impl Fn(&Fault) -> bool) -> Vec<i64> {
        let hits = self.hits.lock();
        let hits = hits.iter().filter(|hit| hit.node == node && ends(&hit.fault)).map(|hit| hit.since_ms);
        let others = self.others.lock();
        let others = others.iter().filter(|(of, fault, _)| of == node && ends(fault)).map(|(_, _, at)| *at);
        hits.chain(others).collect()
    }

    /// Two outages overlapped, and both were healed.
    pub fn overlapped(&self, pair: Pair) {
        self.pairs.lock().push(pair);
    }

    /// A phase was had to its end.
    pub fn phase(&self, phase: Phase) {
        *self.phases.lock().entry(phase).or_default() += 1;
    }

    /// A chat stands still for which work was requested.
    pub fn stuck(&self, found: String) {
        say(&format!("  !! seed {}: stuck: {found}", self.seed));
        self.stuck.lock().push(found);
    }

    pub fn stuck_chats(&self) -> usize {
        self.stuck.lock().len()
    }

    pub fn problem(&self, problem: String) {
        say(&format!("  !! seed {}: {problem}", self.seed));
        self.problems.lock().push(problem);
    }

    pub fn missed(&self, cell: Cell, why: String) {
        say(&format!("   - {cell} was not had: {why}"));
        self.missed.lock().push((cell, why));
    }

    pub fn settled(&self, cell: Cell, after: Duration) {
        if after >= SLOW {
            say(&format!("     {cell}: its turn ended {:.1} s after the fault", after.as_secs_f64()));
        }
        self.settled.lock().push((cell, after));
    }

    /// A streaming worker was killed for its takeover, and hit; each of its streams is a takeover.
    pub fn takeover_kill(&self) {
        self.takeover_kills.fetch_add(1, Ordering::Relaxed);
    }

    pub fn takeover(&self, after: Duration) {
        self.takeovers.lock().push(after);
    }

    pub fn hits(&self) -> Vec<Hit> {
        self.hits.lock().clone()
    }

    pub fn problems(&self) -> Vec<String> {
        self.problems.lock().clone()
    }
}

/// A line for whoever watches the campaign.
#[expect(clippy::print_stdout, reason = "it is a program for people")]
pub fn say(line: &str) {
    println!("{line}");
}
