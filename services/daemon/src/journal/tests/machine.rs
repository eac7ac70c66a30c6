//! Any order of dispatches, ends, acknowledgements, cancels and crashes, at any written prefix: a call runs at most
//! once, what was cancelled does not start, and no result is lost.

use std::collections::HashMap;

use proptest::prelude::*;
use reliant_types::ToolCallId;

use super::{
    super::state::{Cancelled, Decision, Header, Phase, State, Write},
    call, header, seeded,
};

const HOUR_MS: i64 = 3600 * 1000;
const GENERATIONS: i64 = 6;

#[derive(Debug, Clone)]
enum Op {
    /// `fails`: the disk refuses the started record.
    Dispatch {
        call: u8,
        generation: i64,
        fails: bool,
    },
    Finish {
        call: u8,
        unknown: bool,
    },
    Acknowledge {
        call: u8,
        generation: i64,
        committed: bool,
    },
    Cancel {
        call: u8,
        generation: i64,
    },
    Trim {
        hours: i64,
    },
    /// So much of what was not synced survives.
    Crash {
        kept: usize,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let generation = 1i64..GENERATIONS;
    prop_oneof![
        4 => (0u8..3, generation.clone(), prop::bool::weighted(0.1)).prop_map(|(call, generation, fails)| Op::Dispatch { call, generation, fails }),
        3 => (0u8..3, any::<bool>()).prop_map(|(call, unknown)| Op::Finish { call, unknown }),
        2 => (0u8..3, generation.clone(), any::<bool>()).prop_map(|(call, generation, committed)| Op::Acknowledge { call, generation, committed }),
        1 => (0u8..3, generation).prop_map(|(call, generation)| Op::Cancel { call, generation }),
        1 => (0i64..3).prop_map(|hours| Op::Trim { hours }),
        2 => (0usize..10).prop_map(|kept| Op::Crash { kept }),
    ]
}

/// Call 0 is repeatable.
fn repeatable(n: u8) -> bool {
    n == 0
}

struct World {
    state: State,
    log: Vec<Vec<Write>>,
    synced: usize,
    now: i64,
    ran: HashMap<u8, Vec<i64>>,
    cancelled: HashMap<u8, i64>,
    owed: HashMap<u8, i64>,
    /// When the store wrote each generation.
    sent: HashMap<(u8, i64), i64>,
    /// How far this machine's clock is from the cloud's.
    skew: i64,
}

impl World {
    fn new(skew: i64) -> Self {
        let (state, log) = (State::new(u64::MAX), Vec::new());
        let (ran, cancelled, owed, sent) = Default::default();
        Self { state, log, synced: 0, now: 100 * 24 * HOUR_MS, ran, cancelled, owed, sent, skew }
    }

    /// A generation is written once, and never after a later one.
    fn sent(&mut self, n: u8, generation: i64) -> i64 {
        let later = (generation..GENERATIONS).filter_map(|g| self.sent.get(&(n, g))).min().copied();
        *self.sent.entry((n, generation)).or_insert(later.unwrap_or(self.now))
    }

    fn written(&mut self, writes: Vec<Write>, synced: bool) {
        self.log.push(writes);
        if synced {
            self.synced = self.log.len();
        }
    }

    fn crash(&mut self, kept: usize) {
        let left = self.synced + kept % (self.log.len() - self.synced + 1);
        self.log.truncate(left);
        self.state = State::new(u64::MAX);
        for writes in &self.log {
            writes.iter().for_each(|w| self.state.apply(w));
        }
        // As the daemon does at its start.
        let unfinished: Vec<_> = self.state.running().map(|(id, _)| id).collect();
        for id in unfinished {
            let writes = self.state.finish(id, b"unknown".to_vec(), true).unwrap();
            self.written(writes, true);
        }
        // What was not synced may be owed again, never the other way round.
        for n in 0..3 {
            if let Some(entry) = self.state.get(call(n)).filter(|e| matches!(e.phase, Phase::Finished { .. })) {
                self.owed.insert(n, entry.header.generation);
            }
        }
    }

    fn step(&mut self, op: Op) -> Result<(), TestCaseError> {
        self.now += 1;
        let local = self.now + self.skew;
        match op {
            Op::Dispatch { call: n, generation, fails } => {
                let dispatched_ms = self.sent(n, generation);
                let would = self.state.decide(call(n), generation, repeatable(n), dispatched_ms);
                let header = Header { dispatched_ms, started_ms: local, ..header(generation, repeatable(n)) };
                let (decision, writes) = self.state.dispatch(call(n), header);
                prop_assert_eq!(would, decision);
                match decision {
                    Decision::Start if fails => {
                        // It may have reached the disk all the same.
                        self.written(writes, false);
                        let undone = self.state.abandon(call(n));
                        self.written(undone, false);
                        self.owed.remove(&n);
                    }
                    Decision::Start => {
                        self.written(writes, true);
                        self.owed.remove(&n);
                        let earlier = self.ran.entry(n).or_default();
                        prop_assert!(
                            earlier.iter().all(|g| *g < generation),
                            "{n} started again at {generation}: {earlier:?}"
                        );
                        prop_assert!(repeatable(n) || earlier.is_empty(), "{n} ran twice");
                        prop_assert!(
                            self.cancelled.get(&n).is_none_or(|g| *g < generation),
                            "{n} started after its cancel"
                        );
                        earlier.push(generation);
                    }
                    _ => {
                        self.written(writes, true);
                        if decision == Decision::Finished {
                            self.owed.insert(n, generation);
                        }
                    }
                }
            }
            Op::Finish { call: n, unknown } => {
                if let Some(writes) = self.state.finish(call(n), vec![n; 10], unknown) {
                    self.written(writes, true);
                    self.owed.insert(n, 0);
                }
            }
            Op::Acknowledge { call: n, generation, committed } => {
                if let Some(writes) = self.state.acknowledge(call(n), generation, committed, local, self.now) {
                    self.written(writes, false);
                    self.owed.remove(&n);
                    // The store dispatches it no more; what it wrote until now may come at any time.
                    if committed {
                        for generation in 1..GENERATIONS {
                            self.sent(n, generation);
                        }
                    }
                }
            }
            Op::Cancel { call: n, generation } => {
                let (outcome, writes) = self.state.cancel(call(n), generation, local);
                self.written(writes, true);
                if outcome == Cancelled::Unknown {
                    let last = self.cancelled.entry(n).or_insert(generation);
                    *last = generation.max(*last);
                }
            }
            Op::Trim { hours } => {
                self.now += hours * HOUR_MS;
                let writes = self.state.trim(self.now + self.skew);
                self.written(writes, false);
            }
            Op::Crash { kept } => self.crash(kept),
        }
        // Whoever reads the whole log knows what we know.
        let mut reloaded = State::new(u64::MAX);
        self.log.iter().flatten().for_each(|w| reloaded.apply(w));
        prop_assert_eq!(&reloaded, &self.state);
        for n in self.owed.keys() {
            prop_assert!(self.state.finished().any(|(id, _)| id == call(*n)), "the result of {n} was lost");
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(seeded(ProptestConfig { cases: 10_000, ..ProptestConfig::default() }))]

    #[test]
    fn a_call_runs_at_most_once(ops in prop::collection::vec(op(), 1..40), skew in -5i64..6) {
        let mut world = World::new(skew * HOUR_MS);
        for op in ops {
            world.step(op)?;
        }
    }
}

#[test]
fn a_call_from_dispatch_to_tombstone() {
    let mut state = State::new(u64::MAX);
    let decide = |state: &mut State, generation| state.dispatch(call(1), header(generation, false)).0;
    assert_eq!(decide(&mut state, 1), Decision::Start);
    assert_eq!(decide(&mut state, 1), Decision::Attached);
    assert_eq!(decide(&mut state, 2), Decision::Attached);
    assert_eq!(decide(&mut state, 1), Decision::Tombstone, "overtaken");
    assert!(state.finish(call(1), b"r".to_vec(), false).is_some());
    assert_eq!(decide(&mut state, 3), Decision::Finished);
    assert_eq!(state.finished().next().unwrap().1.header.generation, 3);
    assert!(state.acknowledge(call(1), 2, true, 0, 0).is_none(), "an older word");
    // Discarded because a newer dispatch was on its way: that one still gets the result.
    assert!(state.acknowledge(call(1), 3, false, 0, 0).is_some());
    assert_eq!(state.finished().count(), 0);
    assert_eq!(decide(&mut state, 4), Decision::Finished);
    assert!(state.acknowledge(call(1), 4, true, 0, 0).is_some());
    assert_eq!(decide(&mut state, 5), Decision::Tombstone);
    assert_eq!(state.trim(31 * 24 * HOUR_MS).len(), 1);
    assert_eq!(state.bytes(), 0);
}

#[test]
fn a_read_only_call_of_unknown_outcome_runs_again() {
    let mut state = State::new(u64::MAX);
    assert_eq!(state.dispatch(call(0), header(1, true)).0, Decision::Start);
    state.finish(call(0), b"?".to_vec(), true).unwrap();
    assert_eq!(state.decide(call(0), 1, true, 0), Decision::Finished);
    assert_eq!(state.dispatch(call(0), header(2, true)).0, Decision::Start);
    state.finish(call(0), b"ok".to_vec(), false).unwrap();
    state.acknowledge(call(0), 2, true, 0, 0).unwrap();
    assert_eq!(state.decide(call(0), 3, true, 0), Decision::Start);
}

#[test]
fn a_full_journal_refuses_calls_and_drops_nothing() {
    let mut state = State::new(190 * 1024);
    let mut started = 0;
    while state.dispatch(call(started), header(1, false)).0 == Decision::Start {
        started += 1;
    }
    assert!((2..10).contains(&started), "{started}");
    for n in 0..started {
        assert!(state.finish(call(n), vec![0; 48 * 1024], false).is_some());
    }
    assert!(state.bytes() <= 190 * 1024);
    assert_eq!(state.decide(call(100), 1, false, 0), Decision::Full);
    assert_eq!(state.decide(call(0), 1, false, 0), Decision::Finished);
    state.acknowledge(call(0), 1, true, 0, 0).unwrap();
    assert_eq!(state.decide(call(100), 1, false, 0), Decision::Start);
}

/// One call from its start to the cloud's word.
fn ends(state: &mut State, n: u32, dispatched_ms: i64, cloud_ms: i64) -> Vec<Write> {
    let id = numbered(n);
    let (decision, mut writes) = state.dispatch(id, Header { dispatched_ms, ..header(1, false) });
    assert_eq!(decision, Decision::Start, "call {n}");
    writes.extend(state.finish(id, b"r".to_vec(), false).unwrap());
    writes.extend(state.acknowledge(id, 1, true, cloud_ms, cloud_ms).unwrap());
    writes
}

fn numbered(n: u32) -> ToolCallId {
    ToolCallId(uuid::Uuid::from_u128(0x0190_0000_0000_7000_9000_0000_0000_0000 + u128::from(n)))
}

#[test]
fn calls_that_ended_cost_a_bounded_amount_and_start_no_second_time() {
    const MAX_BYTES: u64 = 1024 * 1024;
    const CALLS: u32 = 100_000;
    let sent = |n: u32| 1_000_000 + i64::from(n) * 20;
    let mut state = State::new(MAX_BYTES);
    let mut log = Vec::new();
    for n in 0..CALLS {
        log.extend(ends(&mut state, n, sent(n), sent(n) + 10));
        assert!(state.bytes() <= MAX_BYTES / 8, "{n}: {}", state.bytes());
    }
    let mut reloaded = State::new(MAX_BYTES);
    log.iter().for_each(|write| reloaded.apply(write));
    assert_eq!(reloaded, state);
    // A stray of any of them, as it was sent or as it was sent again before the end, starts nothing.
    for n in (0..CALLS).step_by(97) {
        for (generation, dispatched_ms) in [(1, sent(n)), (2, sent(n) + 9)] {
            let decision = state.decide(numbered(n), generation, false, dispatched_ms);
            assert!(matches!(decision, Decision::Stale | Decision::Tombstone), "{n}: {decision:?}");
        }
    }
    assert_eq!(state.decide(numbered(CALLS), 1, false, sent(CALLS)), Decision::Start);
}

#[test]
fn a_settled_call_leaves_after_an_hour_and_the_floor_stays() {
    let mut state = State::new(u64::MAX);
    ends(&mut state, 1, 1000, 2000);
    assert!(state.trim(HOUR_MS).is_empty());
    let now = 2 * HOUR_MS;
    let writes = state.trim(now);
    assert!(matches!(writes[..], [Write::DropTombstone(_), Write::Floor(floor)] if floor >= 2000), "{writes:?}");
    assert_eq!((state.bytes(), state.tombstones().count()), (0, 0));
    assert_eq!(state.decide(numbered(1), 2, false, 2000), Decision::Stale);
    assert_eq!(state.decide(numbered(2), 1, false, now), Decision::Start);
    // A worker of an older version does not say when.
    assert_eq!(state.decide(numbered(2), 1, false, 0), Decision::Start);
    // Nothing is old enough to raise it.
    ends(&mut state, 3, now, now);
    let floor = state.floor_ms();
    state.trim(now);
    assert_eq!(state.floor_ms(), floor);
}
