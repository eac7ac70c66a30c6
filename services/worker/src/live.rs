//! The live text of messages that models are writing here: gathered into deltas, kept for refills.
//!
//! Invariants: offsets of a block are contiguous; a piece of text never splits a character; a block's text stays
//! readable here until five seconds after its commit; the memory of one message is bounded. Nothing here is durable: the
//! message is, once it is committed.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use reliant_types::{ChatId, MessageId, UserId, limits, pb, unix_us};

/// One delta's text; longer pieces are cut at a character.
const DELTA_MAX_BYTES: usize = 64 * 1024;
/// What one refill carries, so that it fits a NATS message; the reader asks again for the rest.
const REFILL_MAX_BYTES: usize = 512 * 1024;

/// All live messages of this worker, by message id.
#[derive(Default)]
pub struct Live {
    messages: Mutex<HashMap<String, LiveMessage>>,
}

struct LiveMessage {
    chat: ChatId,
    user: UserId,
    epoch: i64,
    blocks: Vec<Block>,
    bytes: usize,
    sent_at: Option<Instant>,
    /// Set once nothing more comes.
    forget_at: Option<Instant>,
}

struct Block {
    kind: pb::StreamKind,
    tool: String,
    text: String,
    published: usize,
}

/// Who a live message is for, and which attempt writes it.
#[derive(Debug, Clone)]
pub struct LiveKey {
    pub chat: ChatId,
    pub user: UserId,
    pub message: MessageId,
    pub epoch: i64,
}

/// What became of a piece.
#[derive(Debug, PartialEq, Eq)]
pub enum Push {
    /// Publish what has gathered.
    Now,
    /// Publish what has gathered after so long.
    After(Duration),
    /// The message is larger than a message may be.
    TooLarge,
}

impl Live {
    /// Opens the text of an attempt; an older attempt's text of the same message is void.
    pub fn open(&self, key: &LiveKey) {
        let message = LiveMessage {
            chat: key.chat,
            user: key.user,
            epoch: key.epoch,
            blocks: Vec::new(),
            bytes: 0,
            sent_at: None,
            forget_at: None,
        };
        self.messages.lock().insert(key.message.to_string(), message);
    }

    /// The next block, at position `position`.
    pub fn block(&self, key: &LiveKey, position: usize, kind: pb::StreamKind, tool: &str) {
        self.with(key, |message| {
            while message.blocks.len() <= position {
                message.blocks.push(Block { kind, tool: tool.to_owned(), text: String::new(), published: 0 });
            }
        });
    }

    pub fn push(&self, key: &LiveKey, position: usize, piece: &str) -> Push {
        self.with(key, |message| {
            message.bytes += piece.len();
            if message.bytes > limits::MODEL_TEXT_MAX_BYTES {
                return Push::TooLarge;
            }
            if let Some(block) = message.blocks.get_mut(position) {
                block.text.push_str(piece);
            }
            let waiting: usize = message.blocks.iter().map(|block| block.text.len() - block.published).sum();
            // What comes slower than the gathering time is never held back.
            match message.sent_at.map(|at| at.elapsed()) {
                Some(since) if since < limits::DELTA_GATHER && waiting < limits::DELTA_GATHER_MAX_BYTES => {
                    Push::After(limits::DELTA_GATHER - since)
                }
                _ => Push::Now,
            }
        })
        .unwrap_or(Push::Now)
    }

    /// What has gathered since the last call.
    pub fn take(&self, key: &LiveKey) -> Vec<pb::Delta> {
        self.with(key, |message| {
            let mut deltas = Vec::new();
            for position in 0..message.blocks.len() {
                let (from, to) = (message.blocks[position].published, message.blocks[position].text.len());
                message.deltas(&key.message.to_string(), position, from, to, usize::MAX, &mut deltas);
                message.blocks[position].published = to;
            }
            if !deltas.is_empty() {
                message.sent_at = Some(Instant::now());
            }
            deltas
        })
        .unwrap_or_default()
    }

    /// The message is committed: refills go on for a while.
    pub fn committed(&self, key: &LiveKey) {
        self.with(key, |message| message.forget_at = Some(Instant::now() + limits::PREFIX_HOLD));
    }

    /// The attempt was given up: its text is void.
    pub fn drop_attempt(&self, key: &LiveKey) {
        let mut messages = self.messages.lock();
        if messages.get(&key.message.to_string()).is_some_and(|message| message.epoch == key.epoch) {
            messages.remove(&key.message.to_string());
        }
    }

    /// The lengths of what is being written, by chat; forgets what was held long enough.
    pub fn tick(&self) -> Vec<(UserId, ChatId, Vec<pb::BlockLength>)> {
        let now = Instant::now();
        let mut messages = self.messages.lock();
        messages.retain(|_, message| message.forget_at.is_none_or(|at| at > now));
        messages
            .iter()
            .filter(|(_, message)| message.forget_at.is_none() && message.bytes > 0)
            .map(|(id, message)| (message.user, message.chat, message.lengths(id)))
            .collect()
    }

    /// Answers a viewer's replica. A request for another user's message finds nothing.
    pub fn refill(&self, request: &pb::PrefixRequest) -> pb::PrefixReply {
        let messages = self.messages.lock();
        let found = messages.get(&request.target_id).filter(|message| message.user.to_string() == request.user_id);
        let Some(message) = found else { return pb::PrefixReply::default() };
        let mut deltas = Vec::new();
        let mut left = REFILL_MAX_BYTES;
        for position in 0..message.blocks.len() {
            if request.block >= 0 && request.block as usize != position {
                continue;
            }
            let text = &message.blocks[position].text;
            let from = if request.block >= 0 { request.from_offset.max(0) as usize } else { 0 };
            let from = floor_char(text, from.min(text.len()));
            left -= message.deltas(&request.target_id, position, from, text.len(), left, &mut deltas);
        }
        pb::PrefixReply { found: true, deltas }
    }

    pub fn len(&self) -> usize {
        self.messages.lock().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn with<R>(&self, key: &LiveKey, act: impl FnOnce(&mut LiveMessage) -> R) -> Option<R> {
        let mut messages = self.messages.lock();
        messages.get_mut(&key.message.to_string()).filter(|message| message.epoch == key.epoch).map(act)
    }
}

impl LiveMessage {
    /// Adds the text of `from..to`, at most `max` bytes of it; says how much it added.
    fn deltas(&self, id: &str, position: usize, from: usize, to: usize, max: usize, out: &mut Vec<pb::Delta>) -> usize {
        let block = &self.blocks[position];
        let to = floor_char(&block.text, to.min(from.saturating_add(max)));
        let produced_unix_us = unix_us();
        let mut at = from;
        while at < to {
            let mut end = floor_char(&block.text, (at + DELTA_MAX_BYTES).min(to));
            if end <= at {
                end = to;
            }
            out.push(pb::Delta {
                chat_id: self.chat.to_string(),
                block: Some(block.reference(id, position)),
                epoch: self.epoch,
                offset: at as i64,
                piece: block.text.as_bytes()[at..end].to_vec().into(),
                produced_unix_us,
                tool: block.tool.clone(),
            });
            at = end;
        }
        to.saturating_sub(from)
    }

    fn lengths(&self, id: &str) -> Vec<pb::BlockLength> {
        let length = |(position, block): (usize, &Block)| pb::BlockLength {
            chat_id: self.chat.to_string(),
            block: Some(block.reference(id, position)),
            epoch: self.epoch,
            length: block.text.len() as i64,
        };
        self.blocks.iter().enumerate().map(length).collect()
    }
}

impl Block {
    fn reference(&self, id: &str, position: usize) -> pb::BlockRef {
        pb::BlockRef { target_id: id.to_owned(), block: position as i32, kind: self.kind as i32 }
    }
}

/// The last character boundary at or before `at`.
fn floor_char(text: &str, mut at: usize) -> usize {
    at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> LiveKey {
        LiveKey { chat: ChatId::new(), user: UserId::new(), message: MessageId::new(), epoch: 3 }
    }

    fn text_of(deltas: &[pb::Delta]) -> String {
        let mut all = Vec::new();
        for delta in deltas {
            assert_eq!(delta.offset as usize, all.len(), "contiguous");
            assert!(std::str::from_utf8(&delta.piece).is_ok(), "no split character");
            all.extend_from_slice(&delta.piece);
        }
        String::from_utf8(all).unwrap()
    }

    #[test]
    fn the_first_piece_goes_at_once_and_quick_ones_gather() {
        let (live, key) = (Live::default(), key());
        live.open(&key);
        live.block(&key, 0, pb::StreamKind::Text, "");
        assert_eq!(live.push(&key, 0, "a"), Push::Now);
        assert_eq!(live.take(&key).len(), 1);
        assert!(matches!(live.push(&key, 0, "b"), Push::After(wait) if wait <= limits::DELTA_GATHER));
        assert_eq!(live.push(&key, 0, &"c".repeat(limits::DELTA_GATHER_MAX_BYTES)), Push::Now);
        let deltas = live.take(&key);
        assert_eq!((deltas.len(), deltas[0].offset), (1, 1));
        assert!(live.take(&key).is_empty());
    }

    #[test]
    fn long_text_is_cut_at_characters_and_refilled_in_parts() {
        let (live, key) = (Live::default(), key());
        live.open(&key);
        live.block(&key, 0, pb::StreamKind::Text, "");
        let text = "ä€😀x".repeat(90_000);
        live.push(&key, 0, &text);
        assert_eq!(text_of(&live.take(&key)), text);

        let mut read = String::new();
        loop {
            let request = pb::PrefixRequest {
                target_id: key.message.to_string(),
                block: 0,
                from_offset: read.len() as i64,
                user_id: key.user.to_string(),
            };
            let reply = live.refill(&request);
            assert!(reply.found);
            if reply.deltas.is_empty() {
                break;
            }
            for delta in reply.deltas {
                assert_eq!(delta.offset as usize, read.len());
                read.push_str(std::str::from_utf8(&delta.piece).unwrap());
            }
        }
        assert_eq!(read, text);
    }

    #[test]
    fn a_refill_in_the_middle_of_a_character_begins_before_it() {
        let (live, key) = (Live::default(), key());
        live.open(&key);
        live.block(&key, 0, pb::StreamKind::Thinking, "");
        live.push(&key, 0, "aä");
        let mut request = pb::PrefixRequest {
            target_id: key.message.to_string(),
            block: -1,
            from_offset: 0,
            user_id: key.user.to_string(),
        };
        assert_eq!(text_of(&live.refill(&request).deltas), "aä");
        (request.block, request.from_offset) = (0, 2);
        assert_eq!(live.refill(&request).deltas[0].offset, 1);
        request.user_id = UserId::new().to_string();
        assert!(!live.refill(&request).found);
    }

    #[test]
    fn an_older_epoch_writes_nothing_and_drops_nothing() {
        let (live, old) = (Live::default(), key());
        live.open(&old);
        let new = LiveKey { epoch: old.epoch + 1, ..old.clone() };
        live.open(&new);
        live.block(&new, 0, pb::StreamKind::Text, "");
        live.push(&new, 0, "new");
        live.push(&old, 0, "old");
        live.drop_attempt(&old);
        let deltas = live.take(&new);
        assert_eq!((text_of(&deltas).as_str(), deltas[0].epoch), ("new", new.epoch));
    }

    #[test]
    fn a_message_without_end_is_refused() {
        let (live, key) = (Live::default(), key());
        live.open(&key);
        live.block(&key, 0, pb::StreamKind::Text, "");
        let piece = "x".repeat(limits::MODEL_TEXT_MAX_BYTES / 2 + 1);
        assert_eq!(live.push(&key, 0, &piece), Push::Now);
        assert_eq!(live.push(&key, 0, &piece), Push::TooLarge);
    }
}
