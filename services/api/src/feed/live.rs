//! The live texts of one chat: what producers wrote so far and no commit has replaced yet.
//!
//! Per (target, block, epoch) what comes out is contiguous from offset 0, without hole or repetition. Pieces wait for the
//! event that opens their target, pieces of an older epoch are dropped, overlap is trimmed. Pure: where something is
//! missing, [`LiveTexts::holes`] says what to ask of whom.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use prost::Message as _;
use reliant_telemetry::sampled;
use reliant_types::{limits, pb};
use uuid::Uuid;

use super::budget::Budget;

/// Live output of a tool that is kept and shown. Beyond it the viewer waits for the result.
const TOOL_OUTPUT_MAX_BYTES: i64 = 4 * 1024 * 1024;
/// Live texts of one chat at one time; the oldest gives way.
const TARGETS_MAX: usize = 512;
const BLOCKS_MAX: usize = 256;
/// Pieces that wait for a hole before them to be filled: per block, and their bytes per target. What is dropped beyond that is
/// asked of the producer again once the hole is filled.
const PENDING_MAX: usize = 512;
const PENDING_MAX_BYTES: usize = 2 * 1024 * 1024;
/// What a waiting piece costs beside its bytes.
const PIECE_OVERHEAD_BYTES: usize = 256;
/// A tool's name, as blocks keep it.
const TOOL_NAME_MAX_BYTES: usize = 128;
/// Pieces that wait for the event that opens their target, per chat.
const EARLY_MAX: usize = 1024;
const EARLY_MAX_BYTES: usize = 1024 * 1024;
/// Ended targets that are remembered, so that their late pieces are not taken for early ones.
const CLOSED_MAX: usize = 512;
/// Text is kept in pieces of about this size, shared with the viewers that join late.
const CHUNK_BYTES: usize = 64 * 1024;

/// How much of each live text somebody has: (target, block) to (epoch, length).
pub type Marks = HashMap<(Uuid, i32), (i64, i64)>;

/// A stretch of live text that is missing here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hole {
    pub target: Uuid,
    /// -1: all blocks.
    pub block: i32,
    pub from: i64,
    pub epoch: i64,
    pub producer: Uuid,
}

#[derive(Debug)]
struct Block {
    kind: i32,
    tool: String,
    chunks: Vec<Bytes>,
    tail: BytesMut,
    len: i64,
    /// The producer is known to have so much.
    known: i64,
    /// Charged to the budget by [`cost`], and counted in the target's `pending_bytes`.
    pending: BTreeMap<i64, pb::Delta>,
    /// A bound was met: nothing more is kept or shown before the commit.
    full: bool,
}

#[derive(Debug)]
struct Target {
    epoch: i64,
    producer: Option<Uuid>,
    /// The turn whose model writes this; `None` for a tool's output.
    turn: Option<Uuid>,
    blocks: BTreeMap<i32, Block>,
    pending_bytes: usize,
    /// Pieces may have passed before anybody here listened.
    ask_all: bool,
    opened: u64,
    budget: Arc<Budget>,
}

impl Target {
    fn max_bytes(&self) -> i64 {
        if self.turn.is_some() { limits::MODEL_TEXT_MAX_BYTES as i64 } else { TOOL_OUTPUT_MAX_BYTES }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let texts: usize = self.blocks.values().map(|block| block.len as usize).sum();
        self.budget.give_back(texts + self.pending_bytes);
    }
}

#[derive(Debug)]
pub struct LiveTexts {
    chat: String,
    targets: HashMap<Uuid, Target>,
    early: VecDeque<(Uuid, pb::Delta)>,
    early_bytes: usize,
    closed: VecDeque<Uuid>,
    opened: u64,
    /// There may be holes. Keeps the common path free of looking for them.
    suspect: bool,
    budget: Arc<Budget>,
}

impl LiveTexts {
    pub fn new(chat: String, budget: Arc<Budget>) -> Self {
        Self {
            chat,
            targets: HashMap::new(),
            early: VecDeque::new(),
            early_bytes: 0,
            closed: VecDeque::new(),
            opened: 0,
            suspect: false,
            budget,
        }
    }

    /// The event that opens `target` came out. `missed`: pieces may have passed unheard.
    pub fn open(
        &mut self,
        target: Uuid,
        epoch: i64,
        producer: Option<Uuid>,
        turn: Option<Uuid>,
        missed: bool,
        out: &mut impl FnMut(pb::Delta),
    ) {
        if let Some(known) = self.targets.get_mut(&target) {
            if known.epoch == epoch {
                known.producer = producer.or(known.producer);
                return;
            }
            if known.epoch > epoch {
                return;
            }
        } else if self.targets.len() >= TARGETS_MAX
            && let Some(oldest) = self.targets.iter().min_by_key(|(_, t)| t.opened).map(|(id, _)| *id)
        {
            self.close(oldest);
        }
        self.opened += 1;
        let mut opened = Target {
            epoch,
            producer,
            turn,
            blocks: BTreeMap::new(),
            pending_bytes: 0,
            ask_all: missed,
            opened: self.opened,
            budget: self.budget.clone(),
        };
        self.suspect |= missed;
        for (id, delta) in std::mem::take(&mut self.early) {
            if id != target || delta.epoch > epoch {
                self.early.push_back((id, delta));
                continue;
            }
            self.early_bytes -= cost(&delta);
            if delta.epoch == epoch {
                self.suspect |= opened.apply(delta, out);
            }
        }
        self.targets.insert(target, opened);
    }

    /// Nothing more is to come for `target`: its commit carries all of it, or it is void.
    pub fn close(&mut self, target: Uuid) {
        self.targets.remove(&target);
        if !self.closed.contains(&target) {
            self.closed.push_back(target);
            if self.closed.len() > CLOSED_MAX {
                self.closed.pop_front();
            }
        }
        let early_bytes = &mut self.early_bytes;
        self.early.retain(|(id, delta)| {
            let keep = *id != target;
            *early_bytes -= if keep { 0 } else { cost(delta) };
            keep
        });
    }

    /// No model writes for `turn` any more, but for `except`.
    pub fn close_turn(&mut self, turn: Uuid, except: Option<Uuid>) {
        let ended: Vec<_> = self
            .targets
            .iter()
            .filter(|(id, target)| target.turn == Some(turn) && Some(**id) != except)
            .map(|(id, _)| *id)
            .collect();
        for target in ended {
            self.close(target);
        }
    }

    /// A piece came, from a hint or from a refill.
    pub fn delta(&mut self, delta: pb::Delta, out: &mut impl FnMut(pb::Delta)) {
        let Some((target, block)) = address(delta.block.as_ref()) else { return };
        if delta.offset < 0 || delta.chat_id != self.chat {
            return;
        }
        match self.targets.get_mut(&target) {
            Some(known) if delta.epoch == known.epoch => {
                if known.blocks.len() < BLOCKS_MAX || known.blocks.contains_key(&block) {
                    self.suspect |= known.apply(delta, out);
                }
            }
            Some(known) if delta.epoch < known.epoch => {}
            _ => self.keep_early(target, delta),
        }
    }

    fn keep_early(&mut self, target: Uuid, delta: pb::Delta) {
        if self.closed.contains(&target) {
            return;
        }
        self.early_bytes += cost(&delta);
        self.early.push_back((target, delta));
        while self.early.len() > EARLY_MAX || self.early_bytes > EARLY_MAX_BYTES {
            if let Some((_, dropped)) = self.early.pop_front() {
                self.early_bytes -= cost(&dropped);
            }
        }
    }

    /// A producer said how much there is.
    pub fn length(&mut self, length: &pb::BlockLength) {
        let Some((target, block)) = address(length.block.as_ref()) else { return };
        let Some(known) = self.targets.get_mut(&target).filter(|known| known.epoch == length.epoch) else { return };
        match known.blocks.get_mut(&block) {
            Some(block) => {
                block.known = block.known.max(length.length);
                self.suspect |= block.known > block.len;
            }
            None if length.length > 0 => {
                known.ask_all = true;
                self.suspect = true;
            }
            None => {}
        }
    }

    /// The producer answered a request for all blocks of `target`.
    pub fn answered(&mut self, target: Uuid, epoch: i64) {
        if let Some(known) = self.targets.get_mut(&target).filter(|known| known.epoch == epoch) {
            known.ask_all = false;
        }
    }

    /// What is missing here and of whom it can be asked.
    pub fn holes(&mut self) -> Vec<Hole> {
        if !self.suspect {
            return Vec::new();
        }
        let mut holes = Vec::new();
        for (id, target) in &self.targets {
            let Some(producer) = target.producer else { continue };
            let hole = |block, from| Hole { target: *id, block, from, epoch: target.epoch, producer };
            if target.ask_all {
                holes.push(hole(-1, 0));
                continue;
            }
            let short = target.blocks.iter().filter(|(_, block)| block.known > block.len && !block.full);
            holes.extend(short.map(|(index, block)| hole(*index, block.len)));
        }
        self.suspect = !holes.is_empty();
        holes
    }

    /// How much there is of each live text now.
    pub fn marks(&self) -> Marks {
        let blocks = |(id, target): (&Uuid, &Target)| {
            let (id, epoch) = (*id, target.epoch);
            target.blocks.iter().map(move |(index, block)| ((id, *index), (epoch, block.len))).collect::<Vec<_>>()
        };
        self.targets.iter().flat_map(blocks).collect()
    }

    /// The live texts beyond `have`, as pieces.
    pub fn beyond(&self, have: &Marks) -> Vec<pb::Delta> {
        let mut pieces = Vec::new();
        let mut targets: Vec<_> = self.targets.iter().collect();
        targets.sort_by_key(|(_, target)| target.opened);
        for (id, target) in targets {
            for (index, block) in &target.blocks {
                let from = match have.get(&(*id, *index)) {
                    Some((epoch, len)) if *epoch == target.epoch => Some(*len),
                    _ => None,
                };
                block.pieces(from, |offset, piece| {
                    pieces.push(pb::Delta {
                        chat_id: self.chat.clone(),
                        block: Some(pb::BlockRef { target_id: id.to_string(), block: *index, kind: block.kind }),
                        epoch: target.epoch,
                        offset,
                        piece,
                        produced_unix_us: 0,
                        tool: block.tool.clone(),
                    });
                });
            }
        }
        pieces
    }
}

impl Target {
    /// True if something before this piece is missing.
    fn apply(&mut self, delta: pb::Delta, out: &mut impl FnMut(pb::Delta)) -> bool {
        let max_bytes = self.max_bytes();
        let Some(address) = delta.block.as_ref() else { return false };
        let (index, kind) = (address.block, address.kind);
        let mut fresh = false;
        let block = self.blocks.entry(index).or_insert_with(|| {
            fresh = true;
            Block {
                kind,
                tool: delta.tool[..delta.tool.floor_char_boundary(TOOL_NAME_MAX_BYTES)].to_owned(),
                chunks: Vec::new(),
                tail: BytesMut::new(),
                len: 0,
                known: 0,
                pending: BTreeMap::new(),
                full: false,
            }
        });
        block.known = block.known.max(delta.offset.saturating_add(delta.piece.len() as i64));
        if block.full {
            return false;
        }
        if delta.offset > block.len {
            keep_pending(block, delta, &mut self.pending_bytes, &self.budget);
            return true;
        }
        let mut freed = 0;
        block.take(delta, fresh, max_bytes, &self.budget, out);
        while let Some(entry) = block.pending.first_entry()
            && *entry.key() <= block.len
            && !block.full
        {
            let delta = entry.remove();
            freed += cost(&delta);
            self.budget.give_back(cost(&delta));
            block.take(delta, false, max_bytes, &self.budget, out);
        }
        if block.full {
            let dropped: usize = std::mem::take(&mut block.pending).values().map(cost).sum();
            freed += dropped;
            self.budget.give_back(dropped);
        }
        self.pending_bytes -= freed;
        block.known > block.len && !block.full
    }
}

/// What a piece that waits costs in memory.
fn cost(delta: &pb::Delta) -> usize {
    delta.encoded_len() + PIECE_OVERHEAD_BYTES
}

/// Keeps a piece that lies behind a hole, if there is room for it.
fn keep_pending(block: &mut Block, delta: pb::Delta, pending_bytes: &mut usize, budget: &Budget) {
    let bytes = cost(&delta);
    let had = block.pending.get(&delta.offset);
    if had.is_some_and(|had| had.piece.len() >= delta.piece.len()) {
        return;
    }
    let freed = had.map_or(0, cost);
    let places = block.pending.len() < PENDING_MAX || freed > 0;
    if !places || *pending_bytes - freed + bytes > PENDING_MAX_BYTES || !budget.take(bytes) {
        sampled::refused("live_pending");
        return;
    }
    budget.give_back(freed);
    *pending_bytes = *pending_bytes - freed + bytes;
    block.pending.insert(delta.offset, delta);
}

impl Block {
    /// A piece that begins at or before the end of what is here.
    fn take(
        &mut self,
        mut delta: pb::Delta,
        fresh: bool,
        max_bytes: i64,
        budget: &Budget,
        out: &mut impl FnMut(pb::Delta),
    ) {
        let had = (self.len - delta.offset) as usize;
        if had >= delta.piece.len() {
            // A first empty piece is passed on: it says that a block begins.
            if fresh && delta.piece.is_empty() {
                out(delta);
            }
            return;
        }
        let piece = delta.piece.slice(had..);
        if self.len + piece.len() as i64 > max_bytes || !budget.take(piece.len()) {
            self.full = true;
            return;
        }
        self.tail.extend_from_slice(&piece);
        if self.tail.len() >= CHUNK_BYTES {
            self.chunks.push(self.tail.split().freeze());
        }
        delta.offset = self.len;
        self.len += piece.len() as i64;
        delta.piece = piece;
        out(delta);
    }

    /// What is here from `from` on; from the beginning, and if need be as an empty piece, for `None`.
    fn pieces(&self, from: Option<i64>, mut out: impl FnMut(i64, Bytes)) {
        let skip = from.unwrap_or(0);
        let tail = Bytes::copy_from_slice(&self.tail);
        let mut offset = 0;
        for chunk in self.chunks.iter().chain(std::iter::once(&tail)) {
            let end = offset + chunk.len() as i64;
            if end > skip {
                let start = (skip - offset).max(0);
                out(offset + start, chunk.slice(start as usize..));
            }
            offset = end;
        }
        if offset == 0 && from.is_none() {
            out(0, Bytes::new());
        }
    }
}

fn address(block: Option<&pb::BlockRef>) -> Option<(Uuid, i32)> {
    let block = block?;
    (0..=i32::from(u16::MAX)).contains(&block.block).then_some(())?;
    Some((Uuid::try_parse(&block.target_id).ok()?, block.block))
}
