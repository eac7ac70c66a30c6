//! One chat as its viewers here share it: the merge, the newest events, one snapshot, all encoded once.
//!
//! Whatever happens to a viewer (joining, resuming, falling behind), its next update is computed from a [`Cursor`]
//! against this state. Pure: [`Admit`] says what must be read first.

use std::sync::Arc;

use bytes::Bytes;
use reliant_telemetry::metrics;
use reliant_types::{
    limits,
    pb::{self, subscribe_response::Update},
};

use super::{
    budget::Budget,
    live::Marks,
    merge::{Merge, Output, marks_without},
    sequence::Window,
    wire::encode,
};

const WINDOW_MAX_BYTES: usize = 2 * 1024 * 1024;
/// A snapshot is given to further viewers while so few events came after it.
const SNAPSHOT_MAX_AGE: i64 = 64;

/// How far a viewer is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Cursor {
    /// The last event it has; below 0: it wants a snapshot.
    pub after: i64,
    /// Of the log that `after` counts in; 0: not known.
    pub log_epoch: i64,
    pub marks: Marks,
    /// It was not told yet that it caught up.
    pub greet: bool,
    /// The log was read to its end since it came.
    pub checked: bool,
}

/// Why the log cannot be read on from a cursor. The viewer begins anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unusable {
    /// It is past the log's end.
    Future,
    /// More came since than is replayed, or is kept.
    TooOld,
    /// It counts in another log.
    OtherLog,
}

impl Unusable {
    pub fn count(self) {
        let reason = match self {
            Self::Future => "future",
            Self::TooOld => "too_old",
            Self::OtherLog => "other_log",
        };
        metrics::VIEWER_RESYNCS.with_label_values(&[reason]).inc();
    }
}

impl Cursor {
    /// Whether it is a place in the log of `log_epoch`, which ends at `seq`.
    pub fn outside(&self, seq: i64, log_epoch: i64) -> Option<Unusable> {
        match self.after {
            // It asks to begin anew, and has no place.
            ..0 => None,
            _ if self.log_epoch != 0 && self.log_epoch != log_epoch => Some(Unusable::OtherLog),
            after if after > seq => Some(Unusable::Future),
            _ => None,
        }
    }
}

/// Stored events from before the window: those after `after`, contiguous.
#[derive(Debug)]
pub struct Older {
    pub after: i64,
    pub events: Vec<Bytes>,
}

/// What a viewer at a cursor gets next.
#[derive(Debug)]
pub enum Admit {
    /// These; after them it is at the end, and takes what comes.
    Ready(Vec<Bytes>),
    /// The log must be read to its end first.
    Behind,
    /// Events from before the window must be read.
    NeedOlder {
        after: i64,
    },
    NeedSnapshot,
}

#[derive(Debug)]
pub struct ChatState {
    chat: String,
    merge: Merge,
    window: Window<Bytes>,
    log_epoch: i64,
    snapshot: Option<(i64, Bytes)>,
}

impl ChatState {
    pub fn new(chat: String, snapshot: pb::ChatSnapshot, budget: Arc<Budget>) -> Self {
        let merge = Merge::new(chat.clone(), &snapshot, budget);
        let window = Window::new(snapshot.seq, limits::RESUME_EVENTS_MAX as usize, WINDOW_MAX_BYTES);
        let mut state = Self { chat, merge, window, log_epoch: snapshot.log_epoch, snapshot: None };
        state.set_snapshot(snapshot);
        state
    }

    pub fn merge(&mut self) -> &mut Merge {
        &mut self.merge
    }

    pub fn seq(&self) -> i64 {
        self.merge.seq()
    }

    /// The number before the oldest event that is here.
    pub fn window_base(&self) -> i64 {
        self.window.base()
    }

    /// Encodes what the merge gave, and keeps the events.
    pub fn record(&mut self, outputs: &[Output]) -> Vec<Bytes> {
        let encoded = |output: &Output| match output {
            Output::Delta(delta) => encode(Update::Delta(delta.clone())),
            Output::Event(event) => {
                let bytes = encode(Update::Event(event.clone()));
                self.window.push(bytes.clone(), bytes.len());
                bytes
            }
        };
        outputs.iter().map(encoded).collect()
    }

    /// Where a viewer is that had everything but these, the last outputs.
    pub fn cursor_before(&self, missed: &[Output]) -> Cursor {
        let first = missed.iter().find_map(|output| match output {
            Output::Event(event) => Some(event.seq),
            Output::Delta(_) => None,
        });
        Cursor {
            after: first.map_or(self.seq(), |seq| seq - 1),
            log_epoch: self.log_epoch,
            marks: marks_without(self.merge.marks(), missed),
            greet: false,
            checked: false,
        }
    }

    /// What is kept for viewers that join or fall behind: events and the snapshot, encoded.
    pub fn kept_bytes(&self) -> usize {
        self.window.bytes() + self.snapshot.as_ref().map_or(0, |(_, bytes)| bytes.len())
    }

    /// Keeps nothing of that: whoever needs it later has it read.
    pub fn forget_kept(&mut self) {
        self.window.clear();
        self.snapshot = None;
    }

    /// A newer snapshot was read.
    pub fn set_snapshot(&mut self, snapshot: pb::ChatSnapshot) {
        self.log_epoch = snapshot.log_epoch;
        self.snapshot = Some((snapshot.seq, encode(Update::Snapshot(snapshot))));
    }

    /// Keeps events that were read from before the window.
    pub fn keep_older(&mut self, older: &Older) {
        let base = self.window.base();
        let wanted = usize::try_from(base - older.after).unwrap_or(0);
        if wanted <= older.events.len() {
            self.window.extend_back(older.events[..wanted].iter().rev().map(|bytes| (bytes.clone(), bytes.len())));
        }
    }

    /// Why a viewer at `cursor` cannot be given the events after it.
    pub fn unusable(&self, cursor: &Cursor) -> Option<Unusable> {
        let missed = self.seq().saturating_sub(cursor.after);
        let too_old = cursor.after >= 0 && missed > limits::RESUME_EVENTS_MAX;
        cursor.outside(self.seq(), self.log_epoch).or(too_old.then_some(Unusable::TooOld))
    }

    /// What a viewer at `cursor` gets to be at the end.
    pub fn admit(&self, cursor: &Cursor, older: Option<&Older>) -> Admit {
        let unusable = self.unusable(cursor);
        if unusable == Some(Unusable::Future) && !cursor.checked {
            return Admit::Behind;
        }
        if cursor.after < 0 || unusable.is_some() {
            return self.admit_with_snapshot(cursor);
        }
        let mut updates = Vec::new();
        if let Some(events) = self.window.after(cursor.after) {
            updates.extend(events.cloned());
        } else {
            let base = self.window.base();
            match older.filter(|older| (older.after..=older.after + older.events.len() as i64).contains(&base)) {
                Some(older) if older.after <= cursor.after => {
                    let (from, to) = ((cursor.after - older.after) as usize, (base - older.after) as usize);
                    updates.extend(older.events[from..to].iter().cloned());
                    updates.extend(self.window.after(base).into_iter().flatten().cloned());
                }
                _ => return Admit::NeedOlder { after: cursor.after },
            }
        }
        self.finish(updates, cursor.greet, &cursor.marks)
    }

    fn admit_with_snapshot(&self, cursor: &Cursor) -> Admit {
        let Some((seq, bytes)) = &self.snapshot else { return Admit::NeedSnapshot };
        if *seq > self.seq() {
            return Admit::Behind;
        }
        match self.window.after(*seq) {
            Some(events) if self.seq() - seq <= SNAPSHOT_MAX_AGE => {
                let mut updates = vec![bytes.clone()];
                updates.extend(events.cloned());
                self.finish(updates, cursor.greet, &Marks::new())
            }
            _ => Admit::NeedSnapshot,
        }
    }

    fn finish(&self, mut updates: Vec<Bytes>, greet: bool, marks: &Marks) -> Admit {
        if greet {
            updates.push(encode(Update::CaughtUp(pb::CaughtUp {
                chat_id: self.chat.clone(),
                seq: self.seq(),
                log_epoch: self.log_epoch,
            })));
        }
        updates.extend(self.merge.live_beyond(marks).into_iter().map(|delta| encode(Update::Delta(delta))));
        Admit::Ready(updates)
    }
}
