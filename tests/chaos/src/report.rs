//! What was done and what came of it: a table for people, flat JSON for programs.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use parking_lot::Mutex;
use reliant_harness::Fault;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::{
    matrix::{Cell, Kind, Process, Step, impossible},
    plan::{Done, Plan},
};

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
    hits: Mutex<Vec<Hit>>,
    problems: Mutex<Vec<String>>,
    missed: Mutex<Vec<(Cell, String)>>,
    settled: Mutex<Vec<(Cell, Duration)>>,
    takeovers: Mutex<Vec<Duration>>,
    takeover_kills: AtomicU64,
    others: Mutex<Vec<(String, Fault, i64)>>,
    unknown: Mutex<BTreeMap<Uuid, &'static str>>,
    told: AtomicU64,
}

impl Tally {
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

    pub fn problem(&self, problem: String) {
        say(&format!("  !! {problem}"));
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

/// All that an outcome may be unknown by.
pub const CAUSES: &[&str] = &["process_died", "journal_lost", "daemon_away"];

/// What the checker found.
#[derive(Debug, Default, Clone)]
pub struct Findings {
    pub turns: usize,
    pub tool_calls: usize,
    pub lost: Vec<String>,
    pub duplicated: Vec<String>,
    pub unknown: usize,
    /// Of them, by cause.
    pub causes: BTreeMap<String, usize>,
    pub unexplained: Vec<String>,
    /// Broken promises of any other kind.
    pub broken: Vec<String>,
    pub reconnects: u64,
    pub epoch_changes: u64,
}

#[derive(Debug)]
pub struct Report {
    pub seed: u64,
    pub took: Duration,
    pub plan: Plan,
    pub findings: Findings,
    pub collapses: Vec<String>,
    pub failed_calls: Vec<String>,
    hits: Vec<Hit>,
    problems: Vec<String>,
    missed: Vec<(Cell, String)>,
    settled: Vec<(Cell, Duration)>,
    takeovers: Vec<Duration>,
    takeover_kills: usize,
}

impl Report {
    pub fn new(seed: u64, took: Duration, plan: Plan, tally: &Tally, findings: Findings) -> Self {
        let mut takeovers = tally.takeovers.lock().clone();
        takeovers.sort();
        Self {
            seed,
            took,
            plan,
            findings,
            collapses: Vec::new(),
            failed_calls: Vec::new(),
            hits: tally.hits(),
            problems: tally.problems(),
            missed: tally.missed.lock().clone(),
            settled: tally.settled.lock().clone(),
            takeovers,
            takeover_kills: tally.takeover_kills.load(Ordering::Relaxed) as usize,
        }
    }

    pub fn faults(&self) -> usize {
        self.hits.iter().filter(|hit| hit.counts).count()
    }

    fn takeover_ms(&self, share: f64) -> u128 {
        quantile(&self.takeovers, share).as_millis()
    }

    /// Why this campaign is no proof; empty when it is one.
    pub fn verdict(&self) -> Vec<String> {
        let mut all = Vec::new();
        all.extend(self.findings.lost.iter().map(|text| format!("lost: {text}")));
        all.extend(self.findings.duplicated.iter().map(|text| format!("duplicated: {text}")));
        all.extend(self.findings.unexplained.iter().map(|text| format!("unexplained: {text}")));
        all.extend(self.findings.broken.iter().map(|text| format!("broken: {text}")));
        all.extend(self.problems.iter().map(|text| format!("problem: {text}")));
        all.extend(self.failed_calls.iter().map(|text| format!("a call failed: {text}")));
        all.extend(self.collapses.iter().map(|text| format!("ended by itself: {text}")));
        all.extend(self.plan.unmet(&self.done()).iter().map(|text| format!("not as planned: {text}")));
        all
    }

    fn done(&self) -> Done<'_> {
        let Self { hits, takeover_kills, takeovers, took, .. } = self;
        Done { hits, takeover_kills: *takeover_kills, takeovers, took: *took }
    }

    pub fn table(&self) -> String {
        let mut text = String::new();
        let counted = |process: Process, test: &dyn Fn(&Cell) -> bool| {
            self.hits.iter().filter(|hit| hit.counts && hit.cell.process == process && test(&hit.cell)).count()
        };
        let _ = writeln!(text, "\nseed {}, {:.0} s", self.seed, self.took.as_secs_f64());
        let _ = write!(text, "{:<10}", "");
        for kind in Kind::ALL {
            let _ = write!(text, "{kind:>13}");
        }
        text.push('\n');
        for process in Process::ALL {
            let _ = write!(text, "{process:<10}");
            for kind in Kind::ALL {
                let count = match impossible(*process, *kind) {
                    Some(_) => "-".to_owned(),
                    None => counted(*process, &|cell| cell.kind == *kind).to_string(),
                };
                let _ = write!(text, "{count:>13}");
            }
            text.push('\n');
        }
        text.push_str("\n-: never done, because\n");
        for ((process, kind), why) in pairs().filter_map(|pair| Some((pair, impossible(pair.0, pair.1)?))) {
            let _ = writeln!(text, "  {process} × {kind}: {why}");
        }
        let _ = write!(text, "\n{:<10}", "");
        for step in Step::ALL {
            let _ = write!(text, "{step:>18}");
        }
        text.push('\n');
        for process in Process::ALL {
            let _ = write!(text, "{process:<10}");
            for step in Step::ALL {
                let _ = write!(text, "{:>18}", counted(*process, &|cell| cell.step == *step));
            }
            text.push('\n');
        }
        let mut by_pair: BTreeMap<(Process, Kind), Vec<Duration>> = BTreeMap::new();
        for (cell, after) in &self.settled {
            by_pair.entry((cell.process, cell.kind)).or_default().push(*after);
        }
        let _ = writeln!(text, "\nfrom the fault to the turn's end, slowest pairs (median, max):");
        let mut pairs: Vec<_> = by_pair.into_iter().collect();
        pairs.iter_mut().for_each(|(_, all)| all.sort());
        pairs.sort_by_key(|(_, all)| std::cmp::Reverse(all.last().copied()));
        for ((process, kind), all) in pairs.iter().take(12) {
            let (median, max) = (quantile(all, 0.5), quantile(all, 1.0));
            let _ = writeln!(
                text,
                "  {process:<9} {kind:<12} {:>7.1} s {:>7.1} s",
                median.as_secs_f64(),
                max.as_secs_f64()
            );
        }
        for (cell, why) in &self.missed {
            let _ = writeln!(text, "not had: {cell}: {why}");
        }
        let found = &self.findings;
        let _ = writeln!(
            text,
            "\n{} faults ({} planned), {} turns, {} tool calls: {} lost, {} duplicated, {} unknown {:?} ({} unexplained)\n\
             takeover over {} streams of {} kills: p50 {} ms, p99 {} ms, max {} ms; viewers reconnected {} times",
            self.faults(),
            self.plan.faults(),
            found.turns,
            found.tool_calls,
            found.lost.len(),
            found.duplicated.len(),
            found.unknown,
            found.causes,
            found.unexplained.len(),
            self.takeovers.len(),
            self.takeover_kills,
            self.takeover_ms(0.5),
            self.takeover_ms(0.99),
            self.takeover_ms(1.0),
            found.reconnects,
        );
        text
    }

    pub fn json(&self) -> Value {
        let mut flat = Map::new();
        let mut put = |key: &str, value: Value| drop(flat.insert(key.to_owned(), value));
        put("seed", json!(self.seed));
        put("seconds", json!(self.took.as_secs()));
        put("faults", json!(self.faults()));
        put("turns", json!(self.findings.turns));
        put("tool_calls", json!(self.findings.tool_calls));
        put("lost", json!(self.findings.lost.len()));
        put("duplicated", json!(self.findings.duplicated.len()));
        put("unknown", json!(self.findings.unknown));
        for cause in CAUSES {
            put(&format!("unknown_{cause}"), json!(self.findings.causes.get(*cause).copied().unwrap_or_default()));
        }
        put("unexplained", json!(self.findings.unexplained.len()));
        put("broken", json!(self.findings.broken.len()));
        put("problems", json!(self.problems.len()));
        put("takeover_count", json!(self.takeovers.len()));
        put("takeover_kills", json!(self.takeover_kills));
        put("takeover_ms_p50", json!(self.takeover_ms(0.5)));
        put("takeover_ms_p99", json!(self.takeover_ms(0.99)));
        put("takeover_ms_max", json!(self.takeover_ms(1.0)));
        Value::Object(flat)
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).with_context(|| format!("could not make {}", dir.display()))?;
        }
        let text = serde_json::to_string_pretty(&self.json())?;
        std::fs::write(path, text + "\n").with_context(|| format!("could not write {}", path.display()))
    }
}

fn pairs() -> impl Iterator<Item = (Process, Kind)> {
    Process::ALL.iter().flat_map(|process| Kind::ALL.iter().map(|kind| (*process, *kind)))
}

pub(crate) fn quantile(sorted: &[Duration], share: f64) -> Duration {
    let place = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(place.saturating_sub(1).min(sorted.len().saturating_sub(1))).copied().unwrap_or_default()
}

/// A line for whoever watches the campaign.
#[expect(clippy::print_stdout, reason = "it is a program for people")]
pub fn say(line: &str) {
    println!("{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn hit(process: Process, kind: Kind, step: Step) -> Hit {
        let fault = Fault::Pause(MINUTE);
        Hit { cell: Cell { process, kind, step }, node: process.to_string(), counts: true, since_ms: 0, fault }
    }

    /// All that was planned, done.
    fn whole() -> Report {
        let hits = vec![
            hit(Process::Worker, Kind::Kill, Step::Streaming),
            hit(Process::Worker, Kind::Pause, Step::Persisting),
            hit(Process::Nats, Kind::Cut, Step::Queued),
        ];
        let cells = hits.iter().map(|hit| hit.cell).collect();
        Report {
            seed: 1,
            took: 29 * MINUTE,
            plan: Plan { cells, takeovers: 100, whole: true, longest: Some(30 * MINUTE) },
            findings: Findings::default(),
            collapses: Vec::new(),
            failed_calls: Vec::new(),
            hits,
            problems: Vec::new(),
            missed: Vec::new(),
            settled: Vec::new(),
            takeovers: vec![Duration::from_secs(1); 150],
            takeover_kills: 100,
        }
    }

    /// The report after `change` has these findings and no others.
    fn check(change: impl FnOnce(&mut Report), expected: &[&str]) {
        let mut report = whole();
        change(&mut report);
        assert_eq!(report.verdict(), expected);
    }

    #[test]
    fn what_was_planned_and_done_is_a_proof() {
        check(|_| {}, &[]);
        // Two of a hundred and fifty are no p99.
        check(|report| report.takeovers[149] = Duration::from_secs(50), &[]);
        check(|report| report.hits.push(hit(Process::Api, Kind::Slow, Step::Result)), &[]);
    }

    #[test]
    fn slow_takeovers_are_found() {
        let slow = |report: &mut Report| report.takeovers[147..].fill(Duration::from_secs(5));
        check(slow, &["not as planned: the p99 of takeovers is 5000 ms"]);
        check(|report| report.takeovers = vec![Duration::from_secs(9); 99], &[]);
    }

    #[test]
    fn missing_kills_are_found_however_many_streams_they_had() {
        check(|report| report.takeover_kills = 99, &["not as planned: 99 takeover kills counted of 100 planned"]);
    }

    #[test]
    fn a_pair_without_a_counted_fault_is_found() {
        let lost =
            ["not as planned: no counted fault hit NATS × cut", "not as planned: no counted fault hit NATS × queued"];
        check(|report| drop(report.hits.pop()), &lost);
        check(|report| report.hits[2].counts = false, &lost);
        let other = |report: &mut Report| report.hits[2].cell.step = Step::Result;
        check(other, &["not as planned: no counted fault hit NATS × queued"]);
        // The pairs of another process say nothing of this one's.
        let other = |report: &mut Report| report.hits[1].cell.kind = Kind::Kill;
        check(other, &["not as planned: no counted fault hit worker × pause 6 s"]);
    }

    #[test]
    fn a_campaign_that_takes_too_long_is_found() {
        check(|report| report.took = 31 * MINUTE, &["not as planned: it took 1860 s of 1800 s"]);
        let unlimited = |report: &mut Report| (report.took, report.plan.longest) = (31 * MINUTE, None);
        check(unlimited, &[]);
    }

    #[test]
    fn a_glimpse_is_judged_by_what_it_saw() {
        let glimpse = |report: &mut Report| {
            report.plan.whole = false;
            (report.takeover_kills, report.hits) = (0, Vec::new());
        };
        check(glimpse, &[]);
    }

    #[test]
    fn each_broken_promise_is_a_finding() {
        let one = || vec!["x".to_owned()];
        check(|report| report.findings.lost = one(), &["lost: x"]);
        check(|report| report.findings.duplicated = one(), &["duplicated: x"]);
        check(|report| report.findings.unexplained = one(), &["unexplained: x"]);
        check(|report| report.findings.broken = one(), &["broken: x"]);
        check(|report| report.problems = one(), &["problem: x"]);
        check(|report| report.failed_calls = one(), &["a call failed: x"]);
        check(|report| report.collapses = one(), &["ended by itself: x"]);
    }

    #[test]
    fn quantiles_are_of_the_ranks() {
        let all: Vec<Duration> = (1..=100).map(Duration::from_millis).collect();
        assert_eq!(quantile(&all, 0.5), Duration::from_millis(50));
        assert_eq!(quantile(&all, 0.99), Duration::from_millis(99));
        assert_eq!(quantile(&all, 1.0), Duration::from_millis(100));
        assert_eq!(quantile(&[], 0.5), Duration::ZERO);
    }
}
