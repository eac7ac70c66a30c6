//! The head and the tail of a text of any length, in bounded memory, with a line that says how much was left out.

use std::collections::VecDeque;

/// The longest line of "left out".
const NOTE_BYTES: usize = 128;

#[derive(Debug)]
pub struct HeadTail {
    head: Vec<u8>,
    tail: VecDeque<u8>,
    half: usize,
    total: u64,
}

impl HeadTail {
    /// What is rendered has at most `max` bytes.
    pub fn new(max: usize) -> Self {
        Self { head: Vec::new(), tail: VecDeque::new(), half: max.saturating_sub(NOTE_BYTES) / 2, total: 0 }
    }

    pub fn of(text: &[u8], max: usize) -> Vec<u8> {
        let mut whole = Self::new(max);
        whole.push(text);
        whole.render(max)
    }

    pub fn push(&mut self, piece: &[u8]) {
        self.total += piece.len() as u64;
        let take = piece.len().min(self.half - self.head.len());
        self.head.extend_from_slice(&piece[..take]);
        let mut rest = &piece[take..];
        if rest.len() > self.half {
            rest = &rest[rest.len() - self.half..];
        }
        let over = (self.tail.len() + rest.len()).saturating_sub(self.half);
        self.tail.drain(..over);
        self.tail.extend(rest);
    }

    pub fn total(&self) -> u64 {
        self.total
    }

    /// At most `max` bytes. Where the text is UTF-8, no character is split.
    pub fn render(&self, max: usize) -> Vec<u8> {
        let (front, back) = self.tail.as_slices();
        let tail = [front, back].concat();
        let half = self.half.min(max.saturating_sub(NOTE_BYTES) / 2);
        let whole = (self.head.len() + tail.len()) as u64 == self.total;
        if whole && self.total <= max as u64 {
            return [&self.head[..], &tail].concat();
        }
        // A head that was not filled holds everything; only a smaller `max` brings us here with it.
        let head = end_of_character(&self.head[..self.head.len().min(half)]);
        let rest = if tail.is_empty() { &self.head[..] } else { &tail[..] };
        let tail = start_of_character(&rest[rest.len().saturating_sub(half)..]);
        let left_out = self.total - (head.len() + tail.len()) as u64;
        let note = format!("\n[… {left_out} of {} bytes left out …]\n", self.total);
        [head, note.as_bytes(), tail].concat()
    }
}

/// Without a character that is cut at the end.
fn end_of_character(bytes: &[u8]) -> &[u8] {
    match std::str::from_utf8(bytes) {
        Err(e) if e.error_len().is_none() => &bytes[..e.valid_up_to()],
        _ => bytes,
    }
}

/// Without the rest of a character that was cut at the start.
fn start_of_character(bytes: &[u8]) -> &[u8] {
    let cut = bytes.iter().take(3).take_while(|b| **b & 0xc0 == 0x80).count();
    &bytes[cut..]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_short_text_is_whole_and_a_long_one_says_what_is_missing() {
        assert_eq!(HeadTail::of(b"hello", 1000), b"hello");
        let long = "é".repeat(10_000);
        let shown = String::from_utf8(HeadTail::of(long.as_bytes(), 1000)).unwrap();
        assert!(shown.len() <= 1000 && shown.starts_with('é') && shown.ends_with('é'), "{shown}");
        assert!(shown.contains("of 20000 bytes left out"), "{shown}");
    }

    proptest! {
        #[test]
        fn never_longer_than_asked_and_made_of_both_ends(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..700), 0..12),
            max in 300usize..1500,
            asked in 300usize..1500,
        ) {
            let mut text = HeadTail::new(max);
            for piece in &pieces {
                text.push(piece);
            }
            let whole = pieces.concat();
            prop_assert_eq!(text.total(), whole.len() as u64);
            let shown = text.render(asked);
            if whole.len() < max.min(asked) - NOTE_BYTES {
                prop_assert_eq!(shown, whole);
            } else {
                prop_assert!(shown.len() <= asked.max(max));
                prop_assert!(shown.len() <= asked || shown == whole);
            }
        }
    }
}
