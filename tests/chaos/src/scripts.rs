//! Messages that tell the simulator what its model does. Each call carries its turn's key, its round and its index, and
//! writes them to a file of the root when it begins and when it ends: the same call twice is two lines.

use std::{collections::BTreeMap, path::Path};

use serde_json::{Value, json};

pub const MARKS: &str = "calls.log";

/// One call: a line, some seconds, another line.
pub fn call(key: &str, seconds: f64) -> Value {
    let line = |word: &str| format!("echo \"{word} {key} {{round}} {{index}} $RELIANT_CALL_ID\" >> {MARKS}");
    let command = format!("{}; sleep {seconds}; {}; echo did {key}", line("begin"), line("end"));
    json!({ "name": "shell", "args": { "command": command } })
}

/// Tokens at a pace, then the calls.
pub fn round(tokens: usize, rate: f64, calls: Vec<Value>) -> Value {
    json!({ "tokens": tokens, "rate": rate, "tools": calls })
}

pub fn message(key: &str, rounds: Vec<Value>) -> String {
    format!("{key}: please do as scripted\nsim: {}", json!({ "rounds": rounds }))
}

/// The same with so many bytes of text before it.
pub fn long_message(key: &str, bytes: usize, rounds: Vec<Value>) -> String {
    const SENTENCE: &str =
        "This is what the file says, line by line, and it has to be read before anything is changed. ";
    let text = SENTENCE.repeat(bytes.div_ceil(SENTENCE.len()));
    format!("{text}\n{}", message(key, rounds))
}

/// The last round of every turn.
pub fn last(key: &str) -> Value {
    json!({ "text": format!("{key} is done. {}", "All of it, as it was asked for. ".repeat(4)), "rate": 60.0 })
}

/// What the marker files of a root say, by (key, round, index).
#[derive(Debug, Default, Clone)]
pub struct Marks {
    pub begun: BTreeMap<(String, i32, i32), Vec<String>>,
    pub ended: BTreeMap<(String, i32, i32), Vec<String>>,
    /// Lines that are none of ours.
    pub strange: Vec<String>,
}

impl Marks {
    pub fn read(root: &Path) -> Self {
        let text = std::fs::read_to_string(root.join(MARKS)).unwrap_or_default();
        let mut marks = Self::default();
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let parsed = match words[..] {
                [word @ ("begin" | "end"), key, round, index, call] => {
                    round.parse().ok().zip(index.parse().ok()).map(|(round, index)| (word, key, round, index, call))
                }
                _ => None,
            };
            match parsed {
                Some((word, key, round, index, call)) => {
                    let map = if word == "begin" { &mut marks.begun } else { &mut marks.ended };
                    map.entry((key.to_owned(), round, index)).or_default().push(call.to_owned());
                }
                None => marks.strange.push(line.to_owned()),
            }
        }
        marks
    }

    pub fn has_begun(&self, key: &str) -> bool {
        self.begun.keys().any(|(of, _, _)| of == key)
    }

    pub fn has_ended(&self, key: &str) -> bool {
        self.ended.keys().any(|(of, _, _)| of == key)
    }
}

/// The key in a call's input, as the model asked for it.
pub fn key_of(input: &str) -> Option<(String, i32, i32)> {
    let input: Value = serde_json::from_str(input).ok()?;
    let mut words = input["command"].as_str()?.split('"').nth(1)?.split_whitespace().skip(1);
    Some((words.next()?.to_owned(), words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_read_as_they_are_written() {
        let dir = std::env::temp_dir().join(format!("reliant-marks-{}", uuid::Uuid::now_v7()));
        std::fs::create_dir_all(&dir).expect("dir");
        std::fs::write(dir.join(MARKS), "begin a-1 0 1 x\nend a-1 0 1 x\nbegin a-1 0 1 y\nwhat\n").expect("write");
        let marks = Marks::read(&dir);
        assert_eq!(marks.begun[&("a-1".to_owned(), 0, 1)], ["x", "y"]);
        assert_eq!(marks.ended[&("a-1".to_owned(), 0, 1)], ["x"]);
        assert_eq!(marks.strange, ["what"]);
        std::fs::remove_dir_all(&dir).expect("remove");
    }

    #[test]
    fn a_call_carries_its_key() {
        let call = call("k-7", 0.1)["args"].to_string().replace("{round}", "2").replace("{index}", "3");
        assert_eq!(key_of(&call), Some(("k-7".to_owned(), 2, 3)));
    }
}
