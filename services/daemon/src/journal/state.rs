//! What the journal decides, as a pure state machine: no clock, no disk. Each step answers and says what must be
//! written; a reload from any written prefix that holds every acknowledged synced write decides the same.
//!
//! The invariant: a call that is not repeatable is started at most once, whatever generations, cancels,
//! acknowledgements and crashes come in whatever order.
//!
//! What ended is remembered for ever, and costs little. The store dispatches no call that it has ended, so all that may
//! still come of one is a dispatch that was on its way, and that one says when it was written. The tombstone of a call
//! that the cloud acknowledged as ended has the time of the acknowledgement. After an hour, or when there are too many,
//! it is dropped, and the floor rises to its time: a dispatch of a call that is not known here starts nothing unless it
//! was written after the floor. All these times are of the cloud's clock; a wrong clock of this machine makes the floor
//! rise sooner or later, and never lets a call start twice.

use std::collections::{BTreeSet, HashMap};

use reliant_types::{ToolCallId, limits};

/// A call that the cloud has not ended, as far as is known here, may be dispatched again for so long.
pub const TOMBSTONE_KEEP_MS: i64 = 30 * 24 * 3600 * 1000;
/// A call that the cloud has ended has its own tombstone for so long; the floor stands for it from then on.
pub const SETTLED_KEEP_MS: i64 = 3600 * 1000;
/// Tombstones of such calls; past that the oldest goes first, into the floor.
const SETTLED_MAX: usize = 65_536;
/// No more than this part of the journal's limit goes to them.
const SETTLED_SHARE: u64 = 8;
/// How far the clocks of the cloud's machines are apart, at most.
const CLOUD_SKEW_MS: i64 = 10 * 1000;
/// A discarded result stays so long: a newer generation of its call may still ask for it.
pub const PARKED_KEEP_MS: i64 = 3600 * 1000;
/// Counted for each call besides its result, and for each tombstone.
const CALL_BYTES: u64 = 512;
const TOMBSTONE_BYTES: u64 = 64;
/// Room that a running call's result may need.
const RESULT_RESERVE_BYTES: u64 = limits::TOOL_RESULT_MAX_BYTES as u64 + 4096;

/// What is known of a call from its start on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Header {
    pub generation: i64,
    pub tool: String,
    /// One of our own read-only tools.
    pub repeatable: bool,
    pub started_ms: i64,
    /// When this generation was written, by the cloud's clock; 0: a worker of an older version did not say.
    pub dispatched_ms: i64,
    pub chat_id: String,
    pub user_id: String,
    pub traceparent: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Running,
    /// Ended; offered until acknowledged. `unknown`: its outcome is.
    Finished {
        bytes: u64,
        unknown: bool,
    },
    /// Ended and discarded by the cloud; not offered unless a newer generation asks.
    Parked {
        bytes: u64,
        unknown: bool,
        at_ms: i64,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub header: Header,
    pub phase: Phase,
}

/// A call that must not start at this generation or an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tombstone {
    pub generation: i64,
    /// By this machine's clock; of a settled call by the cloud's, and then no dispatch of the call is newer.
    pub at_ms: i64,
    /// It ran here: it starts again only if repeatable.
    pub ran: bool,
    /// The cloud has ended the call, and makes no dispatch of it any more; one may still be on its way.
    pub settled: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    Start,
    /// Runs already.
    Attached,
    /// Ended already; its result is offered (again).
    Finished,
    /// Overtaken, cancelled or done with: nothing happens.
    Tombstone,
    /// As old as calls whose tombstones are gone: it may be of one of them. The cloud sends it anew if it is not.
    Stale,
    /// No room for another call and its result.
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    /// It runs: stop it.
    Stop,
    /// It had ended, or this cancel is older than what runs.
    Known,
    /// Never seen here; it never will start at this generation.
    Unknown,
}

/// One change of the disk. The changes of one step are written in one transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    Entry(ToolCallId, Entry),
    Result(ToolCallId, Vec<u8>),
    /// Entry and result go.
    Forget(ToolCallId),
    Tombstone(ToolCallId, Tombstone),
    DropTombstone(ToolCallId),
    /// Unknown calls start only if their dispatch is newer.
    Floor(i64),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    calls: HashMap<ToolCallId, Entry>,
    tombstones: HashMap<ToolCallId, Tombstone>,
    /// Those of settled calls, by age.
    settled: BTreeSet<(i64, ToolCallId)>,
    /// The newest dispatch, by the cloud's clock, that a settled call without a tombstone may have.
    floor_ms: i64,
    bytes: u64,
    max_bytes: u64,
}

fn cost(phase: Phase) -> u64 {
    CALL_BYTES
        + match phase {
            Phase::Running => RESULT_RESERVE_BYTES,
            Phase::Finished { bytes, .. } | Phase::Parked { bytes, .. } => bytes,
        }
}

impl State {
    pub fn new(max_bytes: u64) -> Self {
        Self {
            calls: HashMap::new(),
            tombstones: HashMap::new(),
            settled: BTreeSet::new(),
            floor_ms: 0,
            bytes: 0,
            max_bytes,
        }
    }

    /// Takes up one change, from the disk or from a step of its own.
    pub fn apply(&mut self, write: &Write) {
        match write {
            Write::Entry(id, entry) => {
                self.bytes += cost(entry.phase);
                if let Some(old) = self.calls.insert(*id, entry.clone()) {
                    self.bytes -= cost(old.phase);
                }
            }
            Write::Result(..) => {}
            Write::Forget(id) => {
                if let Some(old) = self.calls.remove(id) {
                    self.bytes -= cost(old.phase);
                }
            }
            Write::Tombstone(id, tombstone) => {
                match self.tombstones.insert(*id, *tombstone) {
                    Some(old) => drop(self.settled.remove(&(old.at_ms, *id))),
                    None => self.bytes += TOMBSTONE_BYTES,
                }
                if tombstone.settled {
                    self.settled.insert((tombstone.at_ms, *id));
                }
            }
            Write::DropTombstone(id) => {
                if let Some(old) = self.tombstones.remove(id) {
                    self.bytes -= TOMBSTONE_BYTES;
                    self.settled.remove(&(old.at_ms, *id));
                }
            }
            Write::Floor(at_ms) => self.floor_ms = *at_ms,
        }
    }

    fn step(&mut self, writes: Vec<Write>) -> Vec<Write> {
        for write in &writes {
            self.apply(write);
        }
        writes
    }

    pub fn get(&self, id: ToolCallId) -> Option<&Entry> {
        self.calls.get(&id)
    }

    pub fn calls(&self) -> impl Iterator<Item = (ToolCallId, &Entry)> {
        self.calls.iter().map(|(id, entry)| (*id, entry))
    }

    pub fn tombstones(&self) -> impl Iterator<Item = (ToolCallId, Tombstone)> {
        self.tombstones.iter().map(|(id, tombstone)| (*id, *tombstone))
    }

    pub fn floor_ms(&self) -> i64 {
        self.floor_ms
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Calls that had started and have no result.
    pub fn running(&self) -> impl Iterator<Item = (ToolCallId, &Entry)> {
        self.calls.iter().filter(|(_, e)| e.phase == Phase::Running).map(|(id, e)| (*id, e))
    }

    /// Calls whose result is not acknowledged.
    pub fn finished(&self) -> impl Iterator<Item = (ToolCallId, &Entry)> {
        self.calls.iter().filter(|(_, e)| matches!(e.phase, Phase::Finished { .. })).map(|(id, e)| (*id, e))
    }

    /// What [`State::dispatch`] would answer, without doing it.
    pub fn decide(&self, id: ToolCallId, generation: i64, repeatable: bool, dispatched_ms: i64) -> Decision {
        if let Some(tombstone) = self.tombstones.get(&id)
            && (tombstone.generation >= generation || (tombstone.ran && !repeatable))
        {
            return Decision::Tombstone;
        }
        match self.calls.get(&id) {
            Some(entry) if entry.header.generation > generation => Decision::Tombstone,
            Some(Entry { phase: Phase::Running, .. }) => Decision::Attached,
            Some(Entry { header, phase: Phase::Finished { unknown, .. } | Phase::Parked { unknown, .. } }) => {
                // An unknown outcome of a read-only tool is what a newer generation is for.
                if *unknown && header.repeatable && repeatable && generation > header.generation {
                    self.room()
                } else {
                    Decision::Finished
                }
            }
            None if dispatched_ms > 0 && dispatched_ms <= self.floor_ms => Decision::Stale,
            None => self.room(),
        }
    }

    fn room(&self) -> Decision {
        if self.bytes + cost(Phase::Running) + TOMBSTONE_BYTES > self.max_bytes {
            Decision::Full
        } else {
            Decision::Start
        }
    }

    /// A dispatch came. `Start` and a generation that rose must be durable before the answer leaves.
    pub fn dispatch(&mut self, id: ToolCallId, header: Header) -> (Decision, Vec<Write>) {
        let decision = self.decide(id, header.generation, header.repeatable, header.dispatched_ms);
        let writes = match decision {
            Decision::Start => {
                let mut writes = Vec::with_capacity(2);
                if self.calls.contains_key(&id) {
                    writes.push(Write::Forget(id));
                }
                // A tombstone of an earlier generation stays: should this start fail, it still holds.
                writes.push(Write::Entry(id, Entry { header, phase: Phase::Running }));
                writes
            }
            // A newer generation takes the call over, so that the cloud accepts its result.
            Decision::Attached | Decision::Finished => match self.calls.get(&id) {
                Some(entry) => {
                    let mut taken = entry.clone();
                    taken.header.generation = header.generation;
                    taken.header.dispatched_ms = header.dispatched_ms;
                    if let Phase::Parked { bytes, unknown, .. } = taken.phase {
                        taken.phase = Phase::Finished { bytes, unknown };
                    }
                    if taken == *entry { Vec::new() } else { vec![Write::Entry(id, taken)] }
                }
                None => Vec::new(),
            },
            Decision::Tombstone | Decision::Stale | Decision::Full => Vec::new(),
        };
        (decision, self.step(writes))
    }

    /// The started record could not be written: nothing ran. What is older stays overtaken.
    pub fn abandon(&mut self, id: ToolCallId) -> Vec<Write> {
        let Some(Entry { header, phase: Phase::Running }) = self.calls.get(&id) else { return Vec::new() };
        let mut writes = vec![Write::Forget(id)];
        let old = self.tombstones.get(&id);
        let generation = header.generation - 1;
        if generation > old.map_or(0, |t| t.generation) {
            let ran = old.is_some_and(|t| t.ran);
            writes.push(Write::Tombstone(id, Tombstone { generation, at_ms: header.started_ms, ran, settled: false }));
        }
        self.step(writes)
    }

    /// A running call ended. Must be durable before the result leaves. `None`: it does not run.
    pub fn finish(&mut self, id: ToolCallId, result: Vec<u8>, unknown: bool) -> Option<Vec<Write>> {
        let entry = self.calls.get(&id).filter(|e| e.phase == Phase::Running)?;
        let phase = Phase::Finished { bytes: result.len() as u64, unknown };
        let header = entry.header.clone();
        Some(self.step(vec![Write::Result(id, result), Write::Entry(id, Entry { header, phase })]))
    }

    /// A cancel came. A tombstone must be durable before the answer leaves.
    pub fn cancel(&mut self, id: ToolCallId, generation: i64, now_ms: i64) -> (Cancelled, Vec<Write>) {
        if let Some(entry) = self.calls.get(&id) {
            if entry.phase != Phase::Running || entry.header.generation > generation {
                return (Cancelled::Known, Vec::new());
            }
            let mut taken = entry.clone();
            taken.header.generation = generation;
            let writes = if taken == *entry { Vec::new() } else { vec![Write::Entry(id, taken)] };
            return (Cancelled::Stop, self.step(writes));
        }
        match self.tombstones.get(&id).copied() {
            Some(old) if old.generation >= generation => {
                (if old.ran { Cancelled::Known } else { Cancelled::Unknown }, Vec::new())
            }
            Some(old) => {
                let at_ms = if old.settled { old.at_ms } else { now_ms };
                let writes = vec![Write::Tombstone(id, Tombstone { generation, at_ms, ..old })];
                (if old.ran { Cancelled::Known } else { Cancelled::Unknown }, self.step(writes))
            }
            None => {
                let writes =
                    vec![Write::Tombstone(id, Tombstone { generation, at_ms: now_ms, ran: false, settled: false })];
                (Cancelled::Unknown, self.step(writes))
            }
        }
    }

    /// The cloud took the result (`committed`, with which it ended the call, at `cloud_ms` by its clock or earlier) or
    /// threw it away. `None`: the word is of an older generation. Need not be synced: a lost acknowledgement means one
    /// more offer.
    pub fn acknowledge(
        &mut self,
        id: ToolCallId,
        generation: i64,
        committed: bool,
        now_ms: i64,
        cloud_ms: i64,
    ) -> Option<Vec<Write>> {
        let entry = self.calls.get(&id)?;
        let Phase::Finished { bytes, unknown } = entry.phase else { return None };
        if entry.header.generation > generation {
            return None;
        }
        let writes = if committed {
            let generation = entry.header.generation;
            let settled = cloud_ms > 0;
            let at_ms = if settled { cloud_ms.saturating_add(CLOUD_SKEW_MS) } else { now_ms };
            vec![Write::Forget(id), Write::Tombstone(id, Tombstone { generation, at_ms, ran: true, settled })]
        } else {
            let phase = Phase::Parked { bytes, unknown, at_ms: now_ms };
            vec![Write::Entry(id, Entry { header: entry.header.clone(), phase })]
        };
        let mut writes = self.step(writes);
        writes.extend(self.lower(i64::MIN));
        Some(writes)
    }

    /// Settled calls of before a time, and the oldest of too many, lose their tombstones; the floor rises to them. Both
    /// are written in one transaction.
    fn lower(&mut self, before_ms: i64) -> Vec<Write> {
        let share = (self.max_bytes / SETTLED_SHARE / TOMBSTONE_BYTES).min(SETTLED_MAX as u64) as usize;
        let too_many = self.settled.len().saturating_sub(share);
        let old = self.settled.iter().enumerate().take_while(|(n, (at_ms, _))| *n < too_many || *at_ms < before_ms);
        let (mut floor_ms, mut writes) = (self.floor_ms, Vec::new());
        for (_, (at_ms, id)) in old {
            floor_ms = floor_ms.max(*at_ms);
            writes.push(Write::DropTombstone(*id));
        }
        if floor_ms > self.floor_ms {
            writes.push(Write::Floor(floor_ms));
        }
        self.step(writes)
    }

    /// Old tombstones go, old parked results become tombstones.
    pub fn trim(&mut self, now_ms: i64) -> Vec<Write> {
        let mut writes: Vec<Write> = self
            .tombstones
            .iter()
            .filter(|(_, t)| !t.settled && now_ms - t.at_ms > TOMBSTONE_KEEP_MS)
            .map(|(id, _)| Write::DropTombstone(*id))
            .collect();
        for (id, entry) in &self.calls {
            if let Phase::Parked { at_ms, .. } = entry.phase
                && now_ms - at_ms > PARKED_KEEP_MS
            {
                writes.push(Write::Forget(*id));
                let generation = entry.header.generation;
                writes.push(Write::Tombstone(*id, Tombstone { generation, at_ms: now_ms, ran: true, settled: false }));
            }
        }
        let mut writes = self.step(writes);
        writes.extend(self.lower(now_ms - SETTLED_KEEP_MS));
        writes
    }
}
