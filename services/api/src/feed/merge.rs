//! Merges what is heard of one chat (hints, log reads, live pieces, refills) into the one order that every viewer gets:
//! each event once and by its number, each live text contiguous after the event that opened it.
//!
//! A pure state machine: it does no I/O and knows no viewers. [`Merge::has_gap`] and [`Merge::holes`] say what to fetch.

use std::sync::Arc;

use reliant_types::pb::{self, chat_event::Kind};
use uuid::Uuid;

use super::{
    budget::Budget,
    live::{Hole, LiveTexts, Marks},
    sequence::Sequencer,
};

/// What viewers get, in this order.
#[expect(clippy::large_enum_variant, reason = "a box for each event would cost more than the room")]
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    Event(pb::ChatEvent),
    Delta(pb::Delta),
}

/// Where an event was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Heard as it was committed: what follows it is heard too.
    Hint,
    /// Read later from the log: live pieces may have passed unheard.
    Log,
}

#[derive(Debug)]
pub struct Merge {
    line: Sequencer<(pb::ChatEvent, Source)>,
    live: LiveTexts,
}

impl Merge {
    /// The state of the chat at the snapshot; later events and pieces come out.
    pub fn new(chat: String, snapshot: &pb::ChatSnapshot, budget: Arc<Budget>) -> Self {
        let mut live = LiveTexts::new(chat, budget);
        let mut none = |_| {};
        for started in &snapshot.started {
            open_message(&mut live, started, true, &mut none);
        }
        for call in &snapshot.tool_calls {
            open_call(&mut live, call, true, &mut none);
        }
        Self { line: Sequencer::new(snapshot.seq), live }
    }

    /// The number of the last event that came out.
    pub fn seq(&self) -> i64 {
        self.line.last()
    }

    pub fn event(&mut self, event: pb::ChatEvent, source: Source, out: &mut Vec<Output>) {
        let live = &mut self.live;
        self.line.push(event.seq, (event, source), |(event, source)| {
            out.push(Output::Event(event.clone()));
            let missed = source == Source::Log;
            let mut deltas = |delta| out.push(Output::Delta(delta));
            match &event.kind {
                Some(Kind::MessageStarted(started)) => open_message(live, started, missed, &mut deltas),
                Some(Kind::MessageCommitted(message)) => {
                    if let Ok(id) = Uuid::try_parse(&message.id) {
                        live.close(id);
                    }
                    if message.role == pb::Role::Assistant as i32
                        && let Ok(turn) = Uuid::try_parse(&message.turn_id)
                    {
                        live.close_turn(turn, None);
                    }
                }
                Some(Kind::TurnChanged(turn)) if turn_ended(turn) => {
                    if let Ok(id) = Uuid::try_parse(&turn.id) {
                        live.close_turn(id, None);
                    }
                }
                Some(Kind::ToolCallChanged(changed)) => open_call(live, changed, missed, &mut deltas),
                _ => {}
            }
        });
    }

    pub fn delta(&mut self, delta: pb::Delta, out: &mut Vec<Output>) {
        self.live.delta(delta, &mut |delta| out.push(Output::Delta(delta)));
    }

    pub fn length(&mut self, length: &pb::BlockLength) {
        self.live.length(length);
    }

    /// A producer's answer for `hole`.
    pub fn refill(&mut self, hole: Hole, deltas: Vec<pb::Delta>, out: &mut Vec<Output>) {
        if hole.block < 0 {
            self.live.answered(hole.target, hole.epoch);
        }
        for delta in deltas {
            self.delta(delta, out);
        }
    }

    /// The log is known to reach `seq`.
    pub fn reaches(&mut self, seq: i64) {
        self.line.reaches(seq);
    }

    /// The log must be read after [`Merge::seq`].
    pub fn has_gap(&self) -> bool {
        self.line.has_gap()
    }

    /// The log was read to its end.
    pub fn read_to_end(&mut self) {
        self.line.read_to_end();
    }

    /// Several reads found nothing where hints said that there is something.
    pub fn drop_pending(&mut self) {
        self.line.drop_pending();
    }

    /// Live text that must be asked for.
    pub fn holes(&mut self) -> Vec<Hole> {
        self.live.holes()
    }

    pub fn marks(&self) -> Marks {
        self.live.marks()
    }

    /// Live text beyond what a viewer has.
    pub fn live_beyond(&self, have: &Marks) -> Vec<pb::Delta> {
        self.live.beyond(have)
    }
}

/// What a viewer has that got everything of this state but `missed`: the first pieces it did not get say where it is.
pub fn marks_without(mut marks: Marks, missed: &[Output]) -> Marks {
    for output in missed.iter().rev() {
        if let Output::Delta(delta) = output
            && let Some(block) = &delta.block
            && let Ok(target) = Uuid::try_parse(&block.target_id)
        {
            let key = (target, block.block);
            if delta.offset == 0 {
                // Nothing of it was seen, not even that it began.
                marks.remove(&key);
            } else {
                marks.insert(key, (delta.epoch, delta.offset));
            }
        }
    }
    marks
}

pub fn turn_ended(turn: &pb::Turn) -> bool {
    use pb::TurnStatus::{Cancelled, Failed, Succeeded};
    matches!(turn.status(), Succeeded | Failed | Cancelled)
}

fn open_message(live: &mut LiveTexts, started: &pb::MessageStarted, missed: bool, out: &mut impl FnMut(pb::Delta)) {
    let (Ok(id), Ok(turn)) = (Uuid::try_parse(&started.message_id), Uuid::try_parse(&started.turn_id)) else { return };
    // One model writes for a turn at a time: an attempt that died left its text under another message id.
    live.close_turn(turn, Some(id));
    live.open(id, started.epoch, Uuid::try_parse(&started.producer).ok(), Some(turn), missed, out);
}

fn open_call(live: &mut LiveTexts, changed: &pb::ToolCallChanged, missed: bool, out: &mut impl FnMut(pb::Delta)) {
    use pb::ToolCallStatus as Status;
    let Some(call) = &changed.tool_call else { return };
    let Ok(id) = Uuid::try_parse(&call.id) else { return };
    match call.status() {
        Status::Dispatched | Status::Running => {
            let producer = if changed.producer.is_empty() { &call.daemon_id } else { &changed.producer };
            live.open(id, call.generation, Uuid::try_parse(producer).ok(), None, missed, out);
        }
        Status::Succeeded | Status::Failed | Status::Cancelled | Status::TimedOut | Status::OutcomeUnknown => {
            live.close(id);
        }
        Status::Unspecified | Status::Pending | Status::WaitingApproval | Status::WaitingDaemon => {}
    }
}
