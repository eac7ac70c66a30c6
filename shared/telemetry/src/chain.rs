//! An error and its causes in one line: the one way in which an error is logged. What a text says already is not said
//! twice, whether its author put the cause into it or not.

use std::{error::Error, fmt};

/// Causes below one error; what is deeper is a loop or noise.
const DEPTH_MAX: usize = 16;
const TEXT_MAX_BYTES: usize = 2048;

/// Made by [`chain`].
pub struct Chain<'a>(&'a (dyn Error + 'static));

/// For a log's `error` field: `tracing::warn!(error = %chain(&error), "a sentence")`.
pub fn chain<'a>(error: &'a (dyn Error + 'static)) -> Chain<'a> {
    Chain(error)
}

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.0.to_string();
        let mut source = self.0.source();
        for _ in 0..DEPTH_MAX {
            let Some(cause) = source else { break };
            let said = cause.to_string();
            if !text.contains(&said) {
                text.push_str(": ");
                text.push_str(&said);
            }
            source = cause.source();
        }
        text.truncate(text.floor_char_boundary(TEXT_MAX_BYTES));
        f.write_str(&text.replace(['\n', '\r'], " "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<Box<Layer>>,
    }

    fn layers(texts: &[&'static str]) -> Layer {
        let mut layers = texts.iter().rev();
        let mut error = Layer { text: layers.next().expect("one at least"), source: None };
        for text in layers {
            error = Layer { text, source: Some(Box::new(error)) };
        }
        error
    }

    #[test]
    fn each_cause_is_said_once_and_in_one_line() {
        let check = |texts: &[&'static str], line: &str| assert_eq!(chain(&layers(texts)).to_string(), line);
        check(&["alone"], "alone");
        check(&["the store is away", "io", "refused\n(111)"], "the store is away: io: refused (111)");
        // The outer text holds its cause already, as many libraries do.
        check(&["talking to it: refused", "refused"], "talking to it: refused");
        check(&["same", "same", "same"], "same");
        check(&["a", "", "b"], "a: b");
    }

    #[test]
    fn a_long_chain_is_cut() {
        let long: &'static str = Box::leak("ä".repeat(TEXT_MAX_BYTES).into_boxed_str());
        assert!(chain(&layers(&["x", long])).to_string().len() <= TEXT_MAX_BYTES);
    }
}
