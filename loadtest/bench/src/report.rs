//! Figures with their goals.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::overload;

/// The figures of meshes that export their spans; all others are of meshes that do not.
const EXPORTED: [&str; 4] = [
    "cpu_ms_per_tool_turn_traced_10",
    "cpu_ms_per_tool_turn_traced_100",
    "tracing_cost_percent_10",
    "tracing_cost_percent_100",
];

pub struct Report {
    values: BTreeMap<String, f64>,
    notes: Vec<String>,
    /// Whether each figure is printed as it comes.
    printed: bool,
    /// Parts that this machine cannot measure; their goals are not missed.
    left_out: Vec<&'static str>,
}

/// What became of the goals.
#[derive(Debug, Default, PartialEq)]
pub struct Outcome {
    missed: Vec<String>,
    unmeasured: Vec<String>,
}

impl Outcome {
    /// Fails where a goal was missed; where `all` was to be measured, also where a goal's figure is not there.
    pub fn strictly(&self, all: bool) -> Result<()> {
        ensure!(self.missed.is_empty(), "goals were missed: {}", self.missed.join("; "));
        ensure!(!all || self.unmeasured.is_empty(), "goals were not measured: {}", self.unmeasured.join("; "));
        Ok(())
    }
}

#[expect(clippy::print_stdout, reason = "the table is the output")]
impl Report {
    pub fn new() -> Self {
        Self { values: BTreeMap::new(), notes: Vec::new(), printed: true, left_out: Vec::new() }
    }

    /// For a slice, whose figures somebody else reads.
    pub fn silent() -> Self {
        Self { printed: false, ..Self::new() }
    }

    pub fn values(&self) -> &BTreeMap<String, f64> {
        &self.values
    }

    pub fn say(&mut self, note: &str) {
        println!("  {note}");
        self.notes.push(note.to_owned());
    }

    pub fn leave_out(&mut self, part: &'static str, why: &str) {
        self.say(&format!("the part {part} is left out: {why}"));
        self.left_out.push(part);
    }

    pub fn set(&mut self, key: &str, value: f64) {
        if self.printed {
            println!("  {key:<34} {value:>10.2}");
        }
        self.values.insert(key.to_owned(), (value * 1000.0).round() / 1000.0);
    }

    fn get(&self, key: &str) -> Option<f64> {
        self.values.get(key).copied().filter(|value| value.is_finite())
    }

    /// Each goal, and whether it was met.
    pub fn goals(&mut self) -> Outcome {
        let (tool, floor) = (self.get("tool_turn_ms_p50"), self.get("temporal_floor_ms_p50"));
        let ratio = tool.zip(floor).map(|(tool, floor)| tool / floor);
        let trip = self.get("tool_round_trip_us_p50");
        let net = trip.zip(self.get("fdatasync_us_p50")).map(|(trip, sync)| trip - 2.0 * sync);
        let over_nats = net.zip(self.get("nats_round_trip_us_p50")).map(|(net, nats)| net / nats);
        if let Some(ratio) = ratio {
            self.set("tool_turn_over_floor", ratio);
        }
        if let Some(over_nats) = over_nats {
            self.set("tool_round_trip_less_syncs_over_nats", over_nats);
        }
        println!();
        let below = |what: &str, value: Option<f64>, goal: f64| (what.to_owned(), value, goal, true);
        let above = |what: &str, value: Option<f64>, goal: f64| (what.to_owned(), value, goal, false);
        let mut goals = vec![
            below("one-tool turn p50, ms", tool, 60.0),
            below("one-tool turn p50 over the floor", ratio, 1.6),
            below("first token p50, ms", self.get("first_token_ms_p50"), 30.0),
            above("plain turns/s at 32 chats", self.get("turns_per_s_32"), 40.0),
            above("one-tool turns/s at 32 chats", self.get("tool_turns_per_s_32"), 25.0),
            below("tool round trip less two syncs, over raw NATS", over_nats, 5.0),
            below("tool round trip, us", trip, 3000.0),
            below("a piece of text to the client p50, ms", self.get("chunk_ms_p50"), 3.0),
            below("a piece at 200/s p50, ms", self.get("chunk_200_ms_p50"), 3.0),
            below("a turn of a chat of 2,000 over one of a new chat", self.get("turn_at_2000_over_new"), 1.5),
            below("warnings of Temporal about a history's size", self.get("temporal_history_warnings"), 1.0),
            below("CPU for tracing every turn, %", self.get("tracing_cost_percent_100"), 10.0),
            below("CPU for tracing one turn in ten, %", self.get("tracing_cost_percent_10"), 5.0),
            below("gateway memory per daemon, KiB", self.get("gateway_kib_per_daemon"), 64.0),
            above("turns/s while four times as many arrive, of the most", self.get("arrivals_4x_throughput"), 0.8),
            above("the same: the least served user over the median one", self.get("arrivals_4x_fairness"), 0.8),
            below("the same: accepted turns that never ended", self.get("arrivals_4x_unended"), 1.0),
            below("CPU of a chat's turn 500 over its turn 5", self.get("turn_500_over_5"), 1.15),
            below("bytes of event rows over bytes of content", self.get("stored_over_content"), 3.0),
        ];
        if !self.left_out.contains(&overload::PART) {
            goals.extend([
                above("turns/s with half of the cores, of all", self.get("overload_half"), 0.4),
                above("turns/s with a quarter of the cores, of all", self.get("overload_quarter"), 0.16),
                above("turns/s with an eighth of the cores, of all", self.get("overload_eighth"), 0.06),
                above("half: turns/s after the worker's death, of before", self.get("overload_half_after_kill"), 0.8),
                above("quarter: the same", self.get("overload_quarter_after_kill"), 0.8),
                above("eighth: the same", self.get("overload_eighth_after_kill"), 0.8),
                below("turns' p95 after an overload, of before", self.get("overload_recovery_p95"), 1.5),
                below("longest wait of a chat over the median one", self.get("overload_worst_gap"), 10.0),
            ]);
        }
        let mut outcome = Outcome::default();
        for (what, value, goal, less) in goals {
            let Some(value) = value else {
                outcome.unmeasured.push(what);
                continue;
            };
            let met = if less { value < goal } else { value >= goal };
            let sign = if less { "<" } else { "≥" };
            println!("  {} {what}: {value:.2} (goal {sign} {goal})", if met { "met   " } else { "MISSED" });
            if !met {
                outcome.missed.push(format!("{what}: {value:.2} (goal {sign} {goal})"));
            }
        }
        outcome
    }

    /// Whether spans left the roles while the figures were taken.
    fn otlp(&self) -> String {
        let exported: Vec<_> = EXPORTED.into_iter().filter(|key| self.values.contains_key(*key)).collect();
        if exported.is_empty() { "off".to_owned() } else { format!("off, but for {}", exported.join(", ")) }
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let mut flat: serde_json::Map<String, serde_json::Value> =
            self.values.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        flat.insert("otlp".into(), json!(self.otlp()));
        std::fs::write(path, serde_json::to_vec_pretty(&flat)?)
            .with_context(|| format!("could not write {}", path.display()))?;
        println!("  written to {}", path.display());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_that_is_missed_or_not_measured_fails_a_strict_run() {
        let mut report = Report::new();
        report.set("first_token_ms_p50", 29.0);
        let met = report.goals();
        assert!(met.missed.is_empty() && met.unmeasured.len() > 5, "{met:?}");
        assert!(met.strictly(false).is_ok());
        assert!(met.strictly(true).is_err_and(|error| error.to_string().contains("plain turns/s")));

        report.set("first_token_ms_p50", 31.0);
        report.set("turns_per_s_32", f64::NAN);
        let missed = report.goals();
        assert_eq!(missed.missed, ["first token p50, ms: 31.00 (goal < 30)"]);
        assert!(missed.strictly(false).is_err_and(|error| error.to_string().contains("first token")));
        assert!(
            missed.unmeasured.iter().any(|goal| goal.starts_with("plain turns/s")),
            "what is no number is no figure"
        );
    }

    #[test]
    fn goals_of_a_part_that_is_left_out_are_not_asked_for() {
        let asked_for = |report: &mut Report| {
            report.goals().unmeasured.iter().any(|goal| goal.starts_with("turns/s with half of the cores"))
        };
        let mut report = Report::new();
        assert!(asked_for(&mut report));
        report.leave_out(overload::PART, "there is no cgroup");
        assert!(!asked_for(&mut report));
    }

    #[test]
    fn the_json_says_which_figures_were_taken_with_export() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/out.json");
        let mut report = Report::new();
        let mut written = |key: &str| {
            report.set(key, 1.0);
            report.write(&path).unwrap();
            let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            json["otlp"].as_str().unwrap().to_owned()
        };
        assert_eq!(written("first_token_ms_p50"), "off");
        assert_eq!(written("tracing_cost_percent_100"), "off, but for tracing_cost_percent_100");
    }
}
