//! An answer before it is put on a wire: blocks in pieces, their pace, and the fault that strikes it.

use std::time::Duration;

use crate::fault::Fault;

/// A long text is not cut into more pieces than this; pieces grow instead.
const PIECES_MAX: usize = 4000;

#[derive(Debug, Clone, Default)]
pub struct Answer {
    pub blocks: Vec<Block>,
    pub pace: Pace,
    pub stop: Option<Stop>,
    pub fault: Option<Fault>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Block {
    Text(Vec<String>),
    Thinking(Vec<String>),
    /// `id` is given when the answer is complete.
    Tool {
        id: String,
        name: String,
        args: Vec<String>,
    },
}

/// When pieces leave: at `ttft`, and then `rate` a second by the clock, not by the piece before.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Pace {
    pub ttft: Duration,
    /// Pieces per second; 0: all at once.
    pub rate: f64,
    /// Each piece is late by up to so much, the same in every run.
    pub jitter: Duration,
    /// Each piece of text begins with `<unix microseconds>;`.
    pub stamp: bool,
}

impl Pace {
    /// The time of piece `n`, from the request.
    pub fn due(&self, n: usize) -> Duration {
        let paced = if self.rate > 0.0 { Duration::from_secs_f64(n as f64 / self.rate) } else { Duration::ZERO };
        // A small multiplicative hash spreads neighbours.
        let spread = ((n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f64 / (1u64 << 24) as f64;
        self.ttft + paced + self.jitter.mul_f64(spread)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    EndTurn,
    ToolUse,
    MaxTokens,
    Refusal,
}

impl Stop {
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "end_turn" => Self::EndTurn,
            "max_tokens" => Self::MaxTokens,
            "refusal" => Self::Refusal,
            _ => return None,
        })
    }
}

/// Tokens: a piece is one, and four bytes of the request are one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub input: usize,
    pub output: usize,
    pub thinking: usize,
}

impl Answer {
    pub fn stop(&self) -> Stop {
        let tools = self.blocks.iter().any(|block| matches!(block, Block::Tool { .. }));
        self.stop.unwrap_or(if tools { Stop::ToolUse } else { Stop::EndTurn })
    }

    pub fn usage(&self, request_bytes: usize) -> Usage {
        let thinking = |block: &&Block| matches!(block, Block::Thinking(_));
        let count = |block: &Block| block.pieces().len();
        Usage {
            input: request_bytes.div_ceil(4),
            output: self.blocks.iter().map(count).sum(),
            thinking: self.blocks.iter().filter(thinking).map(count).sum(),
        }
    }

    pub fn text(&mut self, text: &str) {
        self.blocks.push(Block::Text(pieces(text)));
    }

    pub fn thinking(&mut self, text: &str) {
        self.blocks.push(Block::Thinking(pieces(text)));
    }

    pub fn tool(&mut self, name: &str, args: &str) {
        let size = (args.len() / 64).max(24);
        let mut rest = args;
        let mut cut = Vec::new();
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rest.ceil_char_boundary(size.min(rest.len())));
            cut.push(piece.to_owned());
            rest = after;
        }
        self.blocks.push(Block::Tool { id: String::new(), name: name.to_owned(), args: cut });
    }

    /// Gives the calls their ids: the same for the same conversation, others for any other.
    pub fn name_calls(&mut self, conversation: u64) {
        let mut count = 0;
        for block in &mut self.blocks {
            if let Block::Tool { id, .. } = block {
                *id = format!("call_{conversation:016x}_{count}");
                count += 1;
            }
        }
    }
}

impl Block {
    pub fn pieces(&self) -> &[String] {
        match self {
            Block::Text(pieces) | Block::Thinking(pieces) => pieces,
            Block::Tool { args, .. } => args,
        }
    }
}

/// A text cut behind its spaces and line ends.
pub fn pieces(text: &str) -> Vec<String> {
    let least = text.len() / PIECES_MAX;
    let mut all = Vec::new();
    let mut piece = String::new();
    for word in text.split_inclusive([' ', '\n']) {
        piece.push_str(word);
        if piece.len() > least {
            all.push(std::mem::take(&mut piece));
        }
    }
    if !piece.is_empty() {
        all.push(piece);
    }
    all
}

const WORDS: &[&str] = &[
    "the ", "quick ", "brown ", "fox ", "jumps ", "over ", "a ", "lazy ", "dog, ", "and ", "then ", "it ", "rests ",
    "under ", "an ", "old ", "oak. ",
];

/// So many words; each padded to `bytes` if that is more.
pub fn words(count: usize, bytes: usize) -> Vec<String> {
    (0..count)
        .map(|n| {
            let word = WORDS[n % WORDS.len()];
            if word.len() >= bytes { word.to_owned() } else { format!("{word}{} ", "x".repeat(bytes - word.len() - 1)) }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_text() {
        for text in ["", "a", "a b\nc ", &"word ".repeat(50_000), &"x".repeat(100_000), "ß ü\n\n"] {
            let cut = pieces(text);
            assert_eq!(cut.concat(), text);
            assert!(cut.len() <= PIECES_MAX + 1);
        }
        let mut answer = Answer::default();
        answer.tool("t", "{\"text\":\"äöü\"}");
        assert_eq!(answer.blocks[0].pieces().concat(), "{\"text\":\"äöü\"}");
        assert_eq!(words(3, 10).concat().len(), 30);
    }

    #[test]
    fn the_pace_does_not_drift() {
        let pace =
            Pace { ttft: Duration::from_millis(100), rate: 50.0, jitter: Duration::from_millis(5), stamp: false };
        for n in 0..1000 {
            let late = pace.due(n) - Duration::from_millis(100 + 20 * n as u64);
            assert!(late <= Duration::from_millis(5), "{n}: {late:?}");
        }
        assert_eq!(Pace::default().due(7), Duration::ZERO);
    }
}
