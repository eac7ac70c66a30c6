//! The pairs of all rounds, and what they say.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, ensure};
use reliant_load::{Ratio, Verdict};
use serde_json::json;

use super::{Commit, bench::Figures};

/// What no commit has a part in: where these differ, the machine treated the two differently.
const CONTROLS: [&str; 3] = ["temporal_floor_ms_p50", "nats_round_trip_us_p50", "fdatasync_us_p50"];
/// Of the load generator's own doing, and the slowest few of a slice: shown and not judged.
const SHOWN_ONLY: [&str; 4] = ["_client", "_model_sim", "_p95", "_over_"];

/// What a comparison comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conclusion {
    NoneWorse,
    Worse,
    /// None is worse as far as can be seen, but too much cannot be seen.
    Unclear,
}

/// By figure, a pair for each round.
#[derive(Debug, Default)]
pub struct Table(BTreeMap<String, Vec<(f64, f64)>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Judged,
    Control,
    Shown,
}

fn kind(name: &str) -> Kind {
    if CONTROLS.contains(&name) {
        Kind::Control
    } else if SHOWN_ONLY.iter().any(|part| name.contains(part)) {
        Kind::Shown
    } else {
        Kind::Judged
    }
}

/// Rates; of all else, less is better.
fn more_is_better(name: &str) -> bool {
    name.contains("_per_s")
}

impl Table {
    pub fn add(&mut self, [a, b]: [Figures; 2]) {
        for (name, a) in a {
            if let Some(b) = b.get(&name) {
                self.0.entry(name).or_default().push((a, *b));
            }
        }
    }

    /// Prints each figure's ratio and the conclusion, and writes both. `others`: cores that other programs used meanwhile,
    /// where that is known.
    pub fn tell(&self, commits: &[Commit; 2], others: Option<f64>, out: &Path) -> Result<Conclusion> {
        ensure!(!self.0.is_empty(), "the two have no figure in common");
        println!(
            "\n  {:<36} {:>9} {:>9} {:>7}  {:>15}",
            "figure (medians of the rounds)", "A", "B", "B / A", "between"
        );
        let (mut worse, mut unclear, mut judged, mut uneven) = (Vec::new(), Vec::new(), 0, Vec::new());
        let mut figures = serde_json::Map::new();
        for (name, pairs) in &self.0 {
            let Some(ratio) = Ratio::of(pairs) else { continue };
            let verdict = ratio.verdict();
            let (a, b) = (median(pairs.iter().map(|pair| pair.0)), median(pairs.iter().map(|pair| pair.1)));
            let is_worse = verdict == if more_is_better(name) { Verdict::Lower } else { Verdict::Higher };
            let differs = matches!(verdict, Verdict::Higher | Verdict::Lower);
            let word = match (kind(name), verdict) {
                (Kind::Shown, _) => "not judged",
                (Kind::Control, _) if differs => "UNEVEN: neither has a part in it",
                (_, Verdict::Unclear) => "cannot tell",
                (_, Verdict::Same) => "",
                _ if is_worse => "WORSE",
                _ => "better",
            };
            match kind(name) {
                Kind::Shown => {}
                Kind::Control if differs => uneven.push(name.as_str()),
                Kind::Control => {}
                Kind::Judged => {
                    judged += 1;
                    if differs && is_worse {
                        worse.push(name.as_str());
                    } else if verdict == Verdict::Unclear {
                        unclear.push(name.as_str());
                    }
                }
            }
            let Ratio { middle, low, high, pairs } = ratio;
            println!("  {name:<36} {a:>9.2} {b:>9.2} {middle:>7.3}  {low:>7.3} {high:>7.3}  {word}");
            figures.insert(
                name.clone(),
                json!({ "a": a, "b": b, "ratio": middle, "low": low, "high": high, "pairs": pairs, "verdict": word }),
            );
        }
        println!();
        if let Some(others) = others {
            println!("  other programs used {others:.2} cores meanwhile");
        }
        let conclusion = if !worse.is_empty() {
            Conclusion::Worse
        } else if !uneven.is_empty() || judged == 0 || unclear.len() * 2 > judged {
            Conclusion::Unclear
        } else {
            Conclusion::NoneWorse
        };
        let sentence = match conclusion {
            Conclusion::Worse => format!("B is worse than A in {}", worse.join(", ")),
            Conclusion::NoneWorse if unclear.is_empty() => "no figure of B is worse than A's".to_owned(),
            Conclusion::NoneWorse => {
                format!("no figure of B is worse than A's, as far as can be told: not of {}", unclear.join(", "))
            }
            Conclusion::Unclear if !uneven.is_empty() => {
                format!("the machine treated the two differently ({}); run it again", uneven.join(", "))
            }
            Conclusion::Unclear => format!(
                "the machine was too unquiet to tell: {} of {judged} figures have too wide a spread. \
                 Run it again with fewer neighbours or more ROUNDS",
                unclear.len()
            ),
        };
        println!("  {sentence}");
        let [a, b] = commits.each_ref().map(|commit| commit.sha.as_str());
        let word = match conclusion {
            Conclusion::Worse => "worse",
            Conclusion::NoneWorse => "none worse",
            Conclusion::Unclear => "unclear",
        };
        let json = json!({
            "a": a, "b": b, "conclusion": word, "sentence": sentence, "other_programs_cores": others, "figures": figures,
        });
        if let Some(dir) = out.parent() {
            std::fs::create_dir_all(dir).with_context(|| format!("could not make {}", dir.display()))?;
        }
        std::fs::write(out, serde_json::to_vec_pretty(&json)?)
            .with_context(|| format!("could not write {}", out.display()))?;
        println!("  written to {}", out.display());
        Ok(conclusion)
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    reliant_load::Samples::plain(values).at(0.5)
}
