//! Scripts by model name, `name?parameter=value&…`, percent-encoded:
//!
//! | script | parameters (default) |
//! |---|---|
//! | `default` | none of its own; see `flows` |
//! | `text` | `tokens` (200), `piece_bytes` (0: words) |
//! | `think` | `tokens` (40), `thinking` (20) |
//! | `tool` | `tool` (shell), `args` (a JSON object) |
//! | `parallel` | `n` (4), `tool`, `args` |
//! | `rounds` | `n` (3), `tool`, `args` |
//! | `fault` | `kind`, `times` (always), `after` (3 pieces), `at` (bytes, for cut), `retry_after` (1 s), `tokens` (20) |
//! | `echo` | says the person's last message |
//!
//! All take `ttft_ms`, `rate` (pieces a second; 0: at once), `jitter_ms`, `stamp=1`, `stop` (end_turn, max_tokens,
//! refusal) and `window` (tokens; a longer request is refused). Faults are counted by the person's first message.
//! In `args`, `{round}` and `{index}` stand for the round and the call's place in it.

use std::{collections::BTreeMap, time::Duration};

use percent_encoding::percent_decode_str;
use serde_json::Value;

use crate::{
    answer::{Answer, Block, Pace, Stop, words},
    ask::{Ask, Refusal},
    fault::{Fault, FaultKind, Faults},
    flows,
    plan::{self, fill},
};

pub const SCRIPTS: &[&str] = &["default", "text", "think", "tool", "parallel", "rounds", "fault", "echo"];
const TOKENS_MAX: usize = 1_000_000;
/// More than providers allow and than clients should take: that is to be tried.
const CALLS_MAX: usize = 1000;

/// The parameters of a name; what nobody asked for at the end is refused.
struct Params(BTreeMap<String, String>);

impl Params {
    fn parse(query: &str) -> Result<Self, Refusal> {
        let decode = |text: &str| {
            let text = text.replace('+', "%20");
            let text = percent_decode_str(&text).decode_utf8();
            text.map(|text| text.into_owned()).map_err(|_| Refusal::invalid("model: a parameter is not UTF-8"))
        };
        let mut params = BTreeMap::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, "1"));
            params.insert(decode(name)?, decode(value)?);
        }
        Ok(Self(params))
    }

    fn text(&mut self, name: &str) -> Option<String> {
        self.0.remove(name)
    }

    fn number<T: std::str::FromStr + PartialOrd + Copy>(
        &mut self,
        name: &str,
        default: T,
        max: T,
    ) -> Result<T, Refusal> {
        let Some(text) = self.0.remove(name) else { return Ok(default) };
        let number = text.parse().ok().filter(|number| *number <= max);
        number.ok_or_else(|| Refusal::invalid(format!("model: '{name}={text}' is not a number within its limits")))
    }

    fn done(self) -> Result<(), Refusal> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => Err(Refusal::invalid(format!("model: the script has no parameter '{name}'"))),
        }
    }
}

/// Milliseconds, up to an hour.
fn millis(params: &mut Params, name: &str) -> Result<Duration, Refusal> {
    Ok(Duration::from_secs_f64(params.number(name, 0.0_f64, 3_600_000.0)?.max(0.0) / 1000.0))
}

/// The answer to a request, or why there is none.
pub fn answer(ask: &Ask, faults: &Faults) -> Result<Answer, Refusal> {
    let (name, query) = ask.model.split_once('?').unwrap_or((&ask.model, ""));
    let mut params = Params::parse(query)?;
    let pace = Pace {
        ttft: millis(&mut params, "ttft_ms")?,
        rate: params.number("rate", 0.0, 100_000.0)?,
        jitter: millis(&mut params, "jitter_ms")?,
        stamp: params.text("stamp").is_some_and(|text| text != "0"),
    };
    let stop = match params.text("stop") {
        Some(text) => {
            Some(Stop::parse(&text).ok_or_else(|| Refusal::invalid(format!("model: there is no stop '{text}'")))?)
        }
        None => None,
    };
    let window: usize = params.number("window", usize::MAX, usize::MAX)?;
    if ask.bytes.div_ceil(4) > window {
        return Err(Refusal::invalid(format!(
            "This model's maximum context length is {window} tokens. However, your messages resulted in {} tokens.",
            ask.bytes.div_ceil(4)
        )));
    }
    let mut answer = Answer { pace, stop, ..Answer::default() };
    let fault = if name == "fault" { Some(fault(&mut params)?) } else { None };
    if let Some(fault) = fault.filter(|fault| faults.strikes(fault, &(&ask.model, ask.first_prompt()))) {
        answer.fault = Some(fault);
    }
    match plan::of_prompt(ask.prompt())? {
        Some(plan) if name != "echo" => {
            // The parameters of a name are still checked, but the plan speaks.
            speak(name, &mut params, ask, &mut Answer::default())?;
            plan.answer(ask, faults, &mut answer)?;
        }
        _ => speak(name, &mut params, ask, &mut answer)?,
    }
    params.done()?;
    answer.name_calls(ask.hash());
    Ok(answer)
}

fn fault(params: &mut Params) -> Result<Fault, Refusal> {
    let kind = params.text("kind").ok_or_else(|| Refusal::invalid("model: the script 'fault' needs a 'kind'"))?;
    Ok(Fault {
        kind: FaultKind::parse(&kind)?,
        after: params.number("after", 3, usize::MAX)?,
        at: params.text("at").and_then(|at| at.parse().ok()),
        retry_after: params.number("retry_after", 1.0, 86_400.0)?,
        times: params.number("times", u64::MAX, u64::MAX)?,
    })
}

fn speak(name: &str, params: &mut Params, ask: &Ask, answer: &mut Answer) -> Result<(), Refusal> {
    match name {
        "default" => flows::answer(ask, answer),
        "text" => {
            let tokens = params.number("tokens", 200, TOKENS_MAX)?;
            let bytes = params.number("piece_bytes", 0, 1 << 20)?;
            answer.blocks.push(Block::Text(words(tokens, bytes)));
        }
        "think" => {
            let tokens = params.number("tokens", 40, TOKENS_MAX)?;
            answer.blocks.push(Block::Thinking(words(params.number("thinking", 20, TOKENS_MAX)?, 0)));
            answer.blocks.push(Block::Text(words(tokens, 0)));
        }
        "tool" => calls(params, ask, answer, 1, 1)?,
        "parallel" => {
            let n = params.number("n", 4, CALLS_MAX)?;
            calls(params, ask, answer, 1, n)?;
        }
        "rounds" => {
            let n = params.number("n", 3, CALLS_MAX)?;
            calls(params, ask, answer, n, 1)?;
        }
        "fault" => {
            let tokens = params.number("tokens", 20, TOKENS_MAX)?;
            answer.blocks.push(Block::Text(words(tokens, 0)));
        }
        "echo" => answer.text(ask.prompt()),
        other => {
            let message = format!("The model '{other}' does not exist. Scripts are {}.", SCRIPTS.join(", "));
            return Err(Refusal::not_found(message));
        }
    }
    Ok(())
}

/// `rounds` rounds of `n` calls each, then a text about their results.
fn calls(params: &mut Params, ask: &Ask, answer: &mut Answer, rounds: usize, n: usize) -> Result<(), Refusal> {
    let tool = params.text("tool").unwrap_or_else(|| "shell".into());
    let args = params.text("args").unwrap_or_else(|| r#"{"command":"echo call {index} of round {round}"}"#.into());
    let args: Value =
        serde_json::from_str(&args).map_err(|error| Refusal::invalid(format!("model: 'args' is not JSON: {error}")))?;
    let round = ask.round();
    if round >= rounds {
        answer.text(&flows::summary(ask));
        return Ok(());
    }
    for index in 0..n {
        answer.tool(&tool, &fill(&args, round, index).to_string());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ask::{AskCall, Item};

    fn ask(model: &str, items: Vec<Item>) -> Ask {
        Ask { model: model.into(), items, ..Ask::default() }
    }

    fn user(text: &str) -> Vec<Item> {
        vec![Item::User(text.into())]
    }

    fn answered(model: &str, items: Vec<Item>) -> Result<Answer, Refusal> {
        answer(&ask(model, items), &Faults::default())
    }

    #[test]
    fn names_have_parameters() {
        let answer = answered("text?tokens=3&rate=50&ttft_ms=20&stamp=1", user("x")).unwrap();
        assert_eq!(answer.blocks[0].pieces().len(), 3);
        assert_eq!(
            answer.pace,
            Pace { ttft: Duration::from_millis(20), rate: 50.0, jitter: Duration::ZERO, stamp: true }
        );
        let answer = answered("tool?tool=glob&args=%7B%22pattern%22%3A%22*.rs%22%7D", user("x")).unwrap();
        assert!(matches!(&answer.blocks[0], Block::Tool { name, .. } if name == "glob"));
        assert_eq!(answer.blocks[0].pieces().concat(), r#"{"pattern":"*.rs"}"#);
        for bad in
            ["text?tokens=x", "text?tokns=3", "nope", "fault", "fault?kind=fire", "tool?args=%7B", "text?rate=-1x"]
        {
            assert!(answered(bad, user("x")).is_err(), "{bad}");
        }
        assert_eq!(answered("nope", user("x")).unwrap_err().status, 404);
    }

    #[test]
    fn rounds_follow_the_history() {
        let mut items = user("go");
        for round in 0..3 {
            let answer = answered("rounds?n=3", items.clone()).unwrap();
            let [Block::Tool { id, args, .. }] = &answer.blocks[..] else { panic!("{answer:?}") };
            assert!(args.concat().contains(&format!("call 0 of round {round}")), "{args:?}");
            items.push(Item::Assistant {
                text: String::new(),
                calls: vec![AskCall { id: id.clone(), name: "shell".into() }],
            });
            items.push(Item::Result { id: id.clone(), content: "ok".into(), is_error: false });
        }
        assert!(matches!(answered("rounds?n=3", items.clone()).unwrap().blocks[..], [Block::Text(_)]));
        items.push(Item::User("again".into()));
        assert!(matches!(answered("rounds?n=3", items).unwrap().blocks[..], [Block::Tool { .. }]));
    }

    #[test]
    fn faults_heal_after_their_times() {
        let faults = Faults::default();
        let model = "fault?kind=500&times=2";
        let struck = |text: &str| answer(&ask(model, user(text)), &faults).unwrap().fault.is_some();
        assert_eq!([struck("a"), struck("a"), struck("a"), struck("b")], [true, true, false, true]);
    }
}
