//! One chat as its viewer knows it.

use std::collections::BTreeMap;

use reliant_types::pb;

use super::{
    Applied, BlockKey, ClientUpdate, From, LiveBlock, Order, Start, Verification, behind,
    blocks::{Blocks, Piece},
    in_order,
};

/// Of each kind of thing, the newest so many are kept.
const KEPT_MAX: usize = 10_000;

#[derive(Debug)]
pub struct ChatView {
    /// The last event that was in order; `None` before the first.
    pub last_seq: Option<i64>,
    pub log_epoch: i64,
    pub caught_up: bool,
    pub chat: Option<pb::Chat>,
    /// By ordinal.
    pub messages: BTreeMap<i32, pb::Message>,
    /// By id, and so by age.
    pub turns: BTreeMap<String, pb::Turn>,
    pub tool_calls: BTreeMap<String, pb::ToolCallChanged>,
    pub approvals: BTreeMap<String, pb::Approval>,
    /// Attempts that are under way, by turn and iteration.
    pub attempts: BTreeMap<(String, i32), pb::MessageStarted>,
    blocks: Blocks,
    /// An event is missing; this stream's further updates are not applied.
    broken: bool,
    start: Start,
}

impl ChatView {
    pub(super) fn new(from: From) -> Self {
        let (last_seq, log_epoch) = match from {
            From::Start => (Some(0), 0),
            From::Snapshot => (None, 0),
            From::After { seq, log_epoch } => (Some(seq), log_epoch),
        };
        Self {
            last_seq,
            log_epoch,
            caught_up: false,
            chat: None,
            messages: BTreeMap::new(),
            turns: BTreeMap::new(),
            tool_calls: BTreeMap::new(),
            approvals: BTreeMap::new(),
            attempts: BTreeMap::new(),
            blocks: Blocks::default(),
            broken: false,
            start: Start::default(),
        }
    }

    /// Texts that grow: of messages not committed yet, and output of calls.
    pub fn live(&self) -> &BTreeMap<BlockKey, LiveBlock> {
        self.blocks.live()
    }

    pub fn live_block(&self, target: &str, block: i32) -> Option<&LiveBlock> {
        self.live().get(&BlockKey { target: target.to_owned(), block })
    }

    /// The messages of one turn, oldest first.
    pub fn messages_of(&self, turn: &str) -> impl Iterator<Item = &pb::Message> {
        self.messages.values().filter(move |message| message.turn_id == turn)
    }

    /// The calls of one turn, in the order they were asked for.
    pub fn tool_calls_of(&self, turn: &str) -> Vec<&pb::ToolCall> {
        let calls = self.tool_calls.values().filter_map(|changed| changed.tool_call.as_ref());
        let mut calls: Vec<_> = calls.filter(|call| call.turn_id == turn).collect();
        calls.sort_by_key(|call| (call.iteration, call.index));
        calls
    }

    pub(super) fn begin_stream(&mut self) -> (i64, i64) {
        self.broken = false;
        self.caught_up = false;
        self.start.begin_stream();
        self.blocks.restart();
        (self.last_seq.unwrap_or(-1), self.log_epoch)
    }

    pub(super) fn snapshot(&mut self, snapshot: pb::ChatSnapshot, seen: &mut Verification) -> Applied {
        if self.broken {
            return Applied::NOTHING;
        }
        let same_log = self.log_epoch == 0 || self.log_epoch == snapshot.log_epoch;
        if !self.start.believes(self.last_seq, snapshot.seq, same_log, seen) {
            return Applied::NOTHING;
        }
        self.start.passed();
        self.last_seq = Some(snapshot.seq);
        self.log_epoch = snapshot.log_epoch;
        self.chat = snapshot.chat.clone();
        self.messages = snapshot.messages.iter().map(|message| (message.ordinal, message.clone())).collect();
        self.turns = snapshot.turns.iter().map(|turn| (turn.id.clone(), turn.clone())).collect();
        self.approvals = snapshot.approvals.iter().map(|approval| (approval.id.clone(), approval.clone())).collect();
        let attempts = snapshot.started.iter().cloned();
        self.attempts = attempts.map(|started| ((started.turn_id.clone(), started.iteration), started)).collect();
        self.tool_calls.clear();

        let calls = snapshot.tool_calls.iter().filter_map(|changed| changed.tool_call.as_ref());
        let open = calls.filter(|call| has_run(call)).map(|call| (call.id.clone(), call.generation));
        let open = open.chain(snapshot.started.iter().map(|started| (started.message_id.clone(), started.epoch)));
        let open: BTreeMap<String, i64> = open.collect();
        self.blocks.keep_open(&open);
        for (target, epoch) in &open {
            self.blocks.open(target, *epoch);
        }
        self.blocks.restart();
        // A snapshot's texts need no check of their own: what was live and is committed by now was not seen to its end.
        let mut unchecked = Verification::default();
        for message in &snapshot.messages {
            self.blocks.commit(message, &mut unchecked);
        }
        for changed in &snapshot.tool_calls {
            self.tool_call(changed.clone(), &mut unchecked);
        }
        Applied::new(ClientUpdate::Snapshot(snapshot))
    }

    pub(super) fn caught_up(&mut self, caught_up: &pb::CaughtUp, seen: &mut Verification) -> Applied {
        if let Some(nothing) = behind(&mut self.last_seq, caught_up.seq, &mut self.broken, seen) {
            return nothing;
        }
        self.log_epoch = caught_up.log_epoch;
        self.caught_up = true;
        self.start.passed();
        let chat = caught_up.chat_id.parse().ok();
        Applied::new(ClientUpdate::CaughtUp { chat, seq: caught_up.seq })
    }

    pub(super) fn delta(&mut self, delta: pb::Delta, seen: &mut Verification) -> Applied {
        if self.broken {
            return Applied::NOTHING;
        }
        match self.blocks.delta(delta, seen) {
            Piece::New(delta) => Applied::new(ClientUpdate::Delta(delta)),
            Piece::Nothing => Applied::NOTHING,
            Piece::Hole => Applied::HEAL,
        }
    }

    pub(super) fn event(&mut self, event: pb::ChatEvent, seen: &mut Verification) -> Applied {
        use pb::chat_event::Kind;
        if let Order::Wrong { heal } = in_order(self.last_seq, event.seq, &mut self.broken, seen) {
            return Applied { update: None, heal };
        }
        self.last_seq = Some(event.seq);
        self.start.passed();
        match event.kind.clone() {
            Some(Kind::MessageCommitted(message)) => {
                self.blocks.commit(&message, seen);
                if message.role() == pb::Role::Assistant {
                    self.attempts.remove(&(message.turn_id.clone(), message.iteration));
                }
                self.messages.insert(message.ordinal, message);
                keep_newest(&mut self.messages);
            }
            Some(Kind::MessageStarted(started)) => self.started(started, seen),
            Some(Kind::TurnChanged(turn)) => {
                if is_ended(turn.status()) {
                    self.end_attempts(&turn.id);
                }
                self.turns.insert(turn.id.clone(), turn);
                keep_newest(&mut self.turns);
            }
            Some(Kind::ToolCallChanged(changed)) => self.tool_call(changed, seen),
            Some(Kind::ApprovalChanged(approval)) => {
                self.approvals.insert(approval.id.clone(), approval);
                keep_newest(&mut self.approvals);
            }
            Some(Kind::ChatChanged(chat)) => self.chat = Some(chat),
            None => {}
        }
        Applied::new(ClientUpdate::Event(event))
    }

    fn started(&mut self, started: pb::MessageStarted, seen: &mut Verification) {
        let round = (started.turn_id.clone(), started.iteration);
        if let Some(before) = self.attempts.get(&round) {
            if started.epoch <= before.epoch {
                seen.reorderings += 1;
                return;
            }
            seen.epoch_changes += 1;
            if before.message_id != started.message_id {
                self.blocks.abandon(&before.message_id);
            }
        }
        self.blocks.open(&started.message_id, started.epoch);
        self.attempts.insert(round, started);
    }

    fn end_attempts(&mut self, turn: &str) {
        let Self { attempts, blocks, .. } = self;
        attempts.retain(|(of, _), started| {
            let stays = of != turn;
            if !stays {
                blocks.abandon(&started.message_id);
            }
            stays
        });
    }

    fn tool_call(&mut self, changed: pb::ToolCallChanged, seen: &mut Verification) {
        let Some(call) = &changed.tool_call else { return };
        if has_run(call) {
            if self.blocks.epoch(&call.id) != Some(call.generation) && self.blocks.open(&call.id, call.generation) {
                seen.epoch_changes += 1;
            }
            if is_settled(call.status()) {
                let known = self.blocks.end(&call.id, call.generation);
                seen.short_texts += u64::from((known as i64) < call.output_bytes);
            }
        }
        self.tool_calls.insert(call.id.clone(), changed);
        keep_newest(&mut self.tool_calls);
    }
}

fn keep_newest<K: Ord, V>(map: &mut BTreeMap<K, V>) {
    if map.len() > KEPT_MAX {
        map.pop_first();
    }
}

/// It was sent to a daemon at least once.
fn has_run(call: &pb::ToolCall) -> bool {
    call.generation > 0
}

pub(crate) fn is_ended(status: pb::TurnStatus) -> bool {
    matches!(status, pb::TurnStatus::Succeeded | pb::TurnStatus::Failed | pb::TurnStatus::Cancelled)
}

pub(crate) fn is_settled(status: pb::ToolCallStatus) -> bool {
    use pb::ToolCallStatus::*;
    matches!(status, Succeeded | Failed | Cancelled | TimedOut | OutcomeUnknown)
}
