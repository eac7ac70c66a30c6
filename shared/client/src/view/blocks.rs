//! Live texts: which attempt they belong to, how far they are, and whether pieces fit.

use std::collections::{BTreeMap, VecDeque};

use reliant_types::pb;

use super::{Verification, tail};

/// Targets whose end is remembered, so that a late piece is told from one that came too early.
const CLOSED_MAX: usize = 512;

/// A message's content block, or a call's stdout (0) or stderr (1).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockKey {
    pub target: String,
    pub block: i32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveBlock {
    pub epoch: i64,
    pub kind: pb::StreamKind,
    /// The tool whose arguments are being written.
    pub tool: String,
    /// What is known, over all streams.
    pub bytes: Vec<u8>,
    /// How far this stream has come.
    position: usize,
    /// Nothing of it came on this stream yet: it may begin anew from 0.
    fresh: bool,
    /// A piece is missing; the rest of this stream's pieces cannot be used.
    holed: bool,
}

impl LiveBlock {
    /// As text; output of tools need not be UTF-8.
    pub fn text(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.bytes)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// Pieces of this epoch are awaited.
    Open { epoch: i64 },
    /// A call that ended: output that is still on its way may come, or not.
    Ended { epoch: i64 },
    /// Its message was committed under this epoch.
    Committed { epoch: i64 },
    /// Its turn ended without it.
    Abandoned,
}

/// What came of a piece.
pub(super) enum Piece {
    New(pb::Delta),
    Nothing,
    Hole,
}

#[derive(Debug, Default)]
pub(super) struct Blocks {
    live: BTreeMap<BlockKey, LiveBlock>,
    targets: BTreeMap<String, Target>,
    closed: VecDeque<String>,
}

impl Blocks {
    pub(super) fn live(&self) -> &BTreeMap<BlockKey, LiveBlock> {
        &self.live
    }

    /// A new stream, or a snapshot: the server sends live texts from their beginning again.
    pub(super) fn restart(&mut self) {
        for block in self.live.values_mut() {
            block.fresh = true;
            block.holed = false;
        }
    }

    /// Drops what is not among `open`, as a snapshot says it.
    pub(super) fn keep_open(&mut self, open: &BTreeMap<String, i64>) {
        self.live.retain(|key, block| open.get(&key.target) == Some(&block.epoch));
        self.targets.retain(|target, _| open.contains_key(target));
        self.closed.clear();
    }

    /// An attempt or a call's run begins. Returns whether an older one had begun.
    pub(super) fn open(&mut self, target: &str, epoch: i64) -> bool {
        let before = self.targets.insert(target.to_owned(), Target::Open { epoch });
        let Some(Target::Open { epoch: before } | Target::Ended { epoch: before }) = before else { return false };
        if before == epoch {
            return false;
        }
        self.drop_live(target);
        true
    }

    pub(super) fn epoch(&self, target: &str) -> Option<i64> {
        match self.targets.get(target)? {
            Target::Open { epoch } | Target::Ended { epoch } => Some(*epoch),
            Target::Committed { .. } | Target::Abandoned => None,
        }
    }

    /// A call ended; what is known of its output stays to be read.
    pub(super) fn end(&mut self, target: &str, epoch: i64) -> usize {
        self.close(target, Target::Ended { epoch });
        let known = |block| self.live.get(&BlockKey { target: target.to_owned(), block });
        (0..=1).filter_map(known).filter(|live| live.epoch == epoch).map(|live| live.bytes.len()).sum()
    }

    /// The attempt of a turn that ended.
    pub(super) fn abandon(&mut self, target: &str) {
        self.drop_live(target);
        self.close(target, Target::Abandoned);
    }

    /// A message is complete: its live texts must be what was committed, or a beginning of it.
    pub(super) fn commit(&mut self, message: &pb::Message, seen: &mut Verification) {
        use pb::content_block::Block;
        let was_open = matches!(self.targets.get(&message.id), Some(Target::Open { .. }));
        for block in &message.blocks {
            let committed = match &block.block {
                Some(Block::Text(text)) => text.text.as_bytes(),
                Some(Block::Thinking(thinking)) => thinking.text.as_bytes(),
                _ => continue,
            };
            let key = BlockKey { target: message.id.clone(), block: block.position };
            let live = self.live.get(&key).map_or(&[][..], |live| &live.bytes);
            if !committed.starts_with(live) {
                seen.text_mismatches += 1;
            } else if was_open && live.len() < committed.len() {
                seen.short_texts += 1;
            }
        }
        let epoch = self.epoch(&message.id).unwrap_or_default();
        self.drop_live(&message.id);
        self.close(&message.id, Target::Committed { epoch });
    }

    fn close(&mut self, target: &str, state: Target) {
        self.targets.insert(target.to_owned(), state);
        self.closed.push_back(target.to_owned());
        while self.closed.len() > CLOSED_MAX {
            let Some(oldest) = self.closed.pop_front() else { break };
            if !self.closed.contains(&oldest) && !matches!(self.targets.get(&oldest), Some(Target::Open { .. })) {
                self.targets.remove(&oldest);
                self.drop_live(&oldest);
            }
        }
    }

    fn drop_live(&mut self, target: &str) {
        self.live.retain(|key, _| key.target != target);
    }

    pub(super) fn delta(&mut self, mut delta: pb::Delta, seen: &mut Verification) -> Piece {
        let Some(block) = delta.block.clone() else { return Piece::Nothing };
        let (epoch, ended) = match self.targets.get(&block.target_id) {
            Some(Target::Open { epoch }) => (*epoch, false),
            Some(Target::Ended { epoch }) => (*epoch, true),
            Some(Target::Committed { epoch }) if delta.epoch >= *epoch => {
                seen.reorderings += 1;
                return Piece::Nothing;
            }
            Some(Target::Committed { .. } | Target::Abandoned) => {
                seen.stale += 1;
                return Piece::Nothing;
            }
            // Before its opening event.
            None => {
                seen.reorderings += 1;
                return Piece::Nothing;
            }
        };
        if delta.epoch != epoch {
            let older = delta.epoch < epoch;
            seen.stale += u64::from(older);
            seen.reorderings += u64::from(!older);
            return Piece::Nothing;
        }
        let kind = block.kind();
        let live =
            self.live.entry(BlockKey { target: block.target_id, block: block.block }).or_insert_with(|| LiveBlock {
                epoch,
                kind,
                tool: delta.tool.clone(),
                bytes: Vec::new(),
                position: 0,
                fresh: true,
                holed: false,
            });
        if live.holed {
            return Piece::Nothing;
        }
        let Ok(offset) = usize::try_from(delta.offset) else {
            seen.reorderings += 1;
            return Piece::Nothing;
        };
        if live.fresh {
            live.position = if offset == 0 { 0 } else { live.bytes.len() };
        }
        if offset > live.position {
            // Output of a call that ended is refilled by nobody; its result has what matters.
            if ended {
                seen.stale += 1;
                return Piece::Nothing;
            }
            seen.holes += 1;
            live.holed = true;
            return Piece::Hole;
        }
        live.fresh = false;
        seen.duplicates += u64::from(offset < live.position);
        let end = offset + delta.piece.len();
        let known = live.bytes.len().min(end);
        if live.bytes[offset..known] != delta.piece[..known - offset] || !is_whole(kind, &delta.piece) {
            seen.text_mismatches += 1;
        }
        live.position = live.position.max(end);
        if end <= live.bytes.len() {
            return Piece::Nothing;
        }
        delta.piece = tail(&delta.piece, known - offset);
        delta.offset = known as i64;
        live.bytes.extend_from_slice(&delta.piece);
        seen.bytes += delta.piece.len() as u64;
        Piece::New(delta)
    }
}

/// A piece of text never splits a character; output of tools is any bytes.
fn is_whole(kind: pb::StreamKind, piece: &[u8]) -> bool {
    matches!(kind, pb::StreamKind::Stdout | pb::StreamKind::Stderr) || std::str::from_utf8(piece).is_ok()
}
