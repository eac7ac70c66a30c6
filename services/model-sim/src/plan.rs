//! Plans: a line `sim: {"rounds":[…]}` in the person's last message says what the model does in each round.
//!
//! ```json
//! {"rounds":[{"tools":[{"name":"shell","args":{"command":"echo {round}.{index}"}}]},
//!            {"fault":"cut","times":1,"text":"done","rate":50}]}
//! ```
//! A round may have `thinking`, `text`, `tokens` (so many made-up words), `tools` (`repeat` asks for one more than once),
//! `ttft_ms`, `rate`, `jitter_ms`, `stamp`, `stop`, and a `fault` with `times`, `after`, `at`, `retry_after`. After the last
//! round the model says that it is done. `{round}` and `{index}` in texts and arguments are replaced.

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use crate::{
    answer::{Answer, Block, Stop, words},
    ask::{Ask, Refusal},
    fault::{Fault, FaultKind, Faults},
};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    rounds: Vec<Round>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Round {
    thinking: Option<String>,
    text: Option<String>,
    tokens: Option<usize>,
    tools: Vec<Call>,
    ttft_ms: Option<f64>,
    rate: Option<f64>,
    jitter_ms: Option<f64>,
    stamp: Option<bool>,
    stop: Option<String>,
    fault: Option<String>,
    times: Option<u64>,
    after: Option<usize>,
    at: Option<usize>,
    retry_after: Option<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Call {
    name: String,
    #[serde(default)]
    args: Value,
    #[serde(default)]
    repeat: Option<usize>,
    /// In place of `args`: any text, to see what becomes of a model that writes no JSON.
    #[serde(default)]
    raw_args: Option<String>,
}

/// The plan in a message, if it has one.
pub fn of_prompt(prompt: &str) -> Result<Option<Plan>, Refusal> {
    let Some(line) = prompt.lines().rev().find_map(|line| line.trim_start().strip_prefix("sim:")) else {
        return Ok(None);
    };
    let plan = serde_json::from_str(line.trim());
    plan.map(Some).map_err(|error| Refusal::invalid(format!("the line 'sim:' of the message is no plan: {error}")))
}

/// Replaces the placeholders in every text within.
pub fn fill(value: &Value, round: usize, index: usize) -> Value {
    match value {
        Value::String(text) => Value::String(fill_text(text, round, index)),
        Value::Array(all) => all.iter().map(|value| fill(value, round, index)).collect(),
        Value::Object(all) => {
            Value::Object(all.iter().map(|(key, value)| (key.clone(), fill(value, round, index))).collect())
        }
        other => other.clone(),
    }
}

fn fill_text(text: &str, round: usize, index: usize) -> String {
    text.replace("{round}", &round.to_string()).replace("{index}", &index.to_string())
}

fn millis(value: f64) -> Duration {
    Duration::from_secs_f64(if value.is_finite() { value.clamp(0.0, 3_600_000.0) / 1000.0 } else { 0.0 })
}

impl Plan {
    /// What the model does now.
    pub fn answer(&self, ask: &Ask, faults: &Faults, answer: &mut Answer) -> Result<(), Refusal> {
        let at = ask.round();
        let Some(round) = self.rounds.get(at) else {
            answer.text(&format!("Done after {at} rounds."));
            return Ok(());
        };
        let pace = &mut answer.pace;
        pace.ttft = round.ttft_ms.map_or(pace.ttft, millis);
        pace.jitter = round.jitter_ms.map_or(pace.jitter, millis);
        pace.rate = round.rate.filter(|rate| rate.is_finite()).map_or(pace.rate, |rate| rate.clamp(0.0, 100_000.0));
        pace.stamp = round.stamp.unwrap_or(pace.stamp);
        if let Some(stop) = &round.stop {
            let stop = Stop::parse(stop).ok_or_else(|| Refusal::invalid(format!("plan: there is no stop '{stop}'")))?;
            answer.stop = Some(stop);
        }
        if let Some(kind) = &round.fault {
            let fault = Fault {
                kind: FaultKind::parse(kind)?,
                after: round.after.unwrap_or(3),
                at: round.at,
                retry_after: round.retry_after.filter(|delay| delay.is_finite()).unwrap_or(1.0),
                times: round.times.unwrap_or(u64::MAX),
            };
            if faults.strikes(&fault, &(ask.first_prompt(), ask.prompt(), at)) {
                answer.fault = Some(fault);
            }
        }
        if let Some(thinking) = &round.thinking {
            answer.thinking(&fill_text(thinking, at, 0));
        }
        if let Some(text) = &round.text {
            answer.text(&fill_text(text, at, 0));
        }
        if let Some(tokens) = round.tokens {
            answer.blocks.push(Block::Text(words(tokens.min(1_000_000), 0)));
        }
        let mut index = 0;
        for call in &round.tools {
            for _ in 0..call.repeat.unwrap_or(1).min(1000) {
                let args = match &call.raw_args {
                    Some(raw) => fill_text(raw, at, index),
                    None if call.args.is_null() => "{}".to_owned(),
                    None => fill(&call.args, at, index).to_string(),
                };
                answer.tool(&call.name, &args);
                index += 1;
            }
        }
        if answer.blocks.is_empty() {
            answer.text("(nothing)");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ask::Item;

    #[test]
    fn a_plan_is_found_and_read() {
        assert!(of_prompt("hello\nsimilar: x").unwrap().is_none());
        assert!(of_prompt("sim: {\"rounds\":[{\"txt\":1}]}").is_err());
        let prompt = "do it\n  sim: {\"rounds\":[{\"text\":\"r{round}\",\"tools\":[{\"name\":\"t\",\"repeat\":2,\
                      \"args\":{\"a\":[\"{index}\",7]}}]}]}\nthanks";
        let plan = of_prompt(prompt).unwrap().unwrap();
        let ask = Ask { items: vec![Item::User(prompt.into())], ..Ask::default() };
        let mut answer = Answer::default();
        plan.answer(&ask, &Faults::default(), &mut answer).unwrap();
        let all: Vec<String> = answer.blocks.iter().map(|block| block.pieces().concat()).collect();
        assert_eq!(all, ["r0", r#"{"a":["0",7]}"#, r#"{"a":["1",7]}"#]);
    }
}
