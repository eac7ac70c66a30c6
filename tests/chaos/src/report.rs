//! What a campaign came to: a table for people, flat JSON for programs.

use std::{collections::BTreeMap, fmt::Write as _, path::Path, sync::atomic::Ordering, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use crate::{
    matrix::{Cell, Kind, Process, Step, impossible},
    outages::Pair,
    phases::Phase,
    plan::{Done, Plan},
    replay::Histories,
    tally::{Hit, Tally},
};

/// Two outages at once, as the report's JSON has it.
const OVERLAPPING: &str = "overlapping_outages";

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
    pub histories: Histories,
    /// Chats whose prompt was shortened, and the turns in which it was.
    pub outgrown: usize,
    pub shortened_turns: usize,
    pub long_turns: usize,
    pairs: Vec<Pair>,
    phases: BTreeMap<Phase, usize>,
    stuck: Vec<String>,
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
            histories: Histories::default(),
            outgrown: 0,
            shortened_turns: 0,
            long_turns: 0,
            pairs: tally.pairs.lock().clone(),
            phases: tally.phases.lock().clone(),
            stuck: tally.stuck.lock().clone(),
            hits: tally.hits(),
            problems: tally.problems(),
            missed: tally.missed.lock().clone(),
            settled: tally.settled.lock().clone(),
            takeovers,
            takeover_kills: tally.takeover_kills.load(Ordering::Relaxed) as usize,
        }
    }

    pub fn faults(&self) -> usize {
        self.faults_by_kind().values().sum()
    }

    /// Those that counted, by what was done.
    fn faults_by_kind(&self) -> BTreeMap<&'static str, usize> {
        let mut kinds: BTreeMap<_, _> = Kind::ALL.iter().map(|kind| (kind.key(), 0)).collect();
        kinds.extend(Phase::STRESSED.iter().map(|phase| (phase.name(), 0)));
        kinds.insert(OVERLAPPING, self.pairs.len());
        for hit in self.hits.iter().filter(|hit| hit.counts) {
            *kinds.entry(hit.cell.kind.key()).or_default() += 1;
        }
        for (phase, count) in self.phases.iter().filter(|(phase, _)| **phase != Phase::Calm) {
            *kinds.entry(phase.name()).or_default() += count;
        }
        kinds
    }

    fn takeover_ms(&self, share: f64) -> u128 {
        quantile(&self.takeovers, share).as_millis()
    }

    /// Why this campaign is no proof, each with the seed; empty when it is one.
    pub fn verdict(&self) -> Vec<String> {
        let mut all = Vec::new();
        all.extend(self.stuck.iter().map(|text| format!("stuck: {text}")));
        all.extend(self.histories.differing.iter().map(|text| format!("a history differs: {text}")));
        all.extend(self.histories.not_replayed.iter().map(|text| format!("histories were not replayed: {text}")));
        all.extend(self.findings.lost.iter().map(|text| format!("lost: {text}")));
        all.extend(self.findings.duplicated.iter().map(|text| format!("duplicated: {text}")));
        all.extend(self.findings.unexplained.iter().map(|text| format!("unexplained: {text}")));
        all.extend(self.findings.broken.iter().map(|text| format!("broken: {text}")));
        all.extend(self.problems.iter().map(|text| format!("problem: {text}")));
        all.extend(self.failed_calls.iter().map(|text| format!("a call failed: {text}")));
        all.extend(self.collapses.iter().map(|text| format!("ended by itself: {text}")));
        all.extend(self.plan.unmet(&self.done()).iter().map(|text| format!("not as planned: {text}")));
        all.iter().map(|text| format!("seed {}: {text}", self.seed)).collect()
    }

    fn done(&self) -> Done<'_> {
        let Self { hits, takeover_kills, takeovers, pairs, phases, outgrown, long_turns, took, .. } = self;
        Done {
            hits,
            takeover_kills: *takeover_kills,
            takeovers,
            pairs,
            phases,
            outgrown: *outgrown,
            long_turns: *long_turns,
            took: *took,
        }
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
        let _ = writeln!(text, "\nbeside the matrix:");
        for (phase, count) in &self.phases {
            let _ = writeln!(text, "  {phase:<36} {count:>3}");
        }
        for pair in &self.pairs {
            let _ = writeln!(text, "  {pair}");
        }
        let _ = writeln!(
            text,
            "{} chats outgrew their model's window, in {} turns; the long chat did {} turns\n\
             {} stuck; {} histories replayed, {} differ",
            self.outgrown,
            self.shortened_turns,
            self.long_turns,
            self.stuck.len(),
            self.histories.replayed,
            self.histories.differing.len()
        );
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
        put("stuck_turns", json!(self.stuck.len()));
        put("histories", json!(self.histories.replayed));
        put("histories_that_differ", json!(self.histories.differing.len()));
        put("outgrown_chats", json!(self.outgrown));
        put("turns_with_shortened_prompt", json!(self.shortened_turns));
        put("long_chat_turns", json!(self.long_turns));
        put("calm_phases", json!(self.phases.get(&Phase::Calm).copied().unwrap_or_default()));
        put("faults_by_kind", json!(self.faults_by_kind()));
        let mut pairs: BTreeMap<String, usize> = BTreeMap::new();
        self.pairs.iter().for_each(|pair| *pairs.entry(pair.to_string()).or_default() += 1);
        put("overlapping_outages", json!(pairs));
        put("findings", json!(self.verdict()));
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

#[cfg(test)]
mod tests {
    use reliant_harness::Fault;

    use super::*;
    use crate::{outages, phases};

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
            plan: Plan {
                cells,
                takeovers: 100,
                pairs: outages::plan(1, 2),
                phases: phases::plan(1, 5, MINUTE),
                outgrown: 2,
                long_turns: 200,
                whole: true,
                longest: Some(30 * MINUTE),
            },
            findings: Findings::default(),
            collapses: Vec::new(),
            failed_calls: Vec::new(),
            histories: Histories { replayed: 40, ..Histories::default() },
            outgrown: 2,
            shortened_turns: 30,
            long_turns: 200,
            pairs: outages::plan(1, 2),
            phases: Phase::STRESSED.into_iter().chain([Phase::Calm]).map(|phase| (phase, 1)).collect(),
            stuck: Vec::new(),
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
        let expected: Vec<String> = expected.iter().map(|text| format!("seed 1: {text}")).collect();
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
            (report.pairs, report.phases, report.long_turns) = (Vec::new(), BTreeMap::new(), 3);
        };
        check(glimpse, &[]);
        check(|report| report.outgrown = 1, &["not as planned: 1 of 2 chats outgrew their window"]);
    }

    #[test]
    fn a_pair_a_neighbour_and_a_long_chat_that_were_not_had_are_found() {
        let pair = outages::plan(1, 2)[1];
        let missing = format!("not as planned: no {pair}");
        let one_less = |report: &mut Report| report.pairs.truncate(1);
        check(one_less, &[&missing]);
        let without = |phase| move |report: &mut Report| report.phases.retain(|one, _| *one != phase);
        check(without(Phase::Memory), &["not as planned: no memory_pressure counted"]);
        // A calm finds what is wrong; it is nothing that the mesh must bear.
        check(without(Phase::Calm), &[]);
        check(|report| report.long_turns = 199, &["not as planned: the long chat did 199 of 200 turns"]);
    }

    #[test]
    fn what_was_done_is_counted_by_kind() {
        let mut report = whole();
        report.hits[1].counts = false;
        let json = report.json();
        let kinds = &json["faults_by_kind"];
        let count = |kind: &str| kinds[kind].as_u64();
        assert_eq!([count("kill"), count("pause_6_s"), count("cut")], [Some(1), Some(0), Some(1)]);
        assert_eq!([count("slow_disk"), count("neighbour_all_cores"), count("calm")], [Some(1), Some(1), None]);
        assert_eq!(count("overlapping_outages"), Some(2));
        let sum: u64 = kinds.as_object().expect("kinds").values().filter_map(Value::as_u64).sum();
        assert_eq!(json["faults"].as_u64(), Some(sum));
        assert_eq!([&json["stuck_turns"], &json["histories"], &json["histories_that_differ"]], [0, 40, 0]);
    }

    #[test]
    fn each_broken_promise_is_a_finding() {
        let one = || vec!["x".to_owned()];
        check(|report| report.stuck = one(), &["stuck: x"]);
        check(|report| report.histories.differing = one(), &["a history differs: x"]);
        let unread = |report: &mut Report| report.histories.not_replayed = Some("x".to_owned());
        check(unread, &["histories were not replayed: x"]);
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
