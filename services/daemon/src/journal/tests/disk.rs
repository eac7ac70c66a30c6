//! A disk that loses, tears and refuses what was not synced.

use std::{io, sync::Arc, time::Duration};

use parking_lot::Mutex;
use proptest::prelude::*;
use redb::StorageBackend;
use reliant_types::pb;

use super::{
    super::{
        BackendOpener, Journal,
        disk::Disk,
        state::{Decision, Phase, State, Write},
    },
    call, header, seeded,
};

const CASES: u32 = 256;
/// Of each case: crashes that leave a beginning, and crashes that leave any part.
const BEGINNINGS: usize = 40;
const PARTS: usize = 30;

#[derive(Debug, Clone)]
enum Pending {
    Write(u64, Vec<u8>),
    Len(u64),
}

#[derive(Debug, Default)]
struct Image {
    synced: Vec<u8>,
    current: Vec<u8>,
    pending: Vec<Pending>,
    syncs: usize,
    refuses: bool,
    /// What was synced, and what was not, at the beginning of each sync, while they are recorded.
    syncs_begun: Option<Vec<(Vec<u8>, Vec<Pending>)>>,
}

fn apply(bytes: &mut Vec<u8>, change: &Pending, torn: Option<usize>) {
    match change {
        Pending::Len(len) => bytes.resize(*len as usize, 0),
        Pending::Write(at, data) => {
            let data = &data[..torn.unwrap_or(data.len()).min(data.len())];
            let end = *at as usize + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*at as usize..end].copy_from_slice(data);
        }
    }
}

#[derive(Debug, Clone, Default)]
struct FaultyDisk(Arc<Mutex<Image>>);

impl FaultyDisk {
    /// The machine dies: each unsynced change survives by its bit, the one at `torn` in part.
    fn crash(&self, survives: u64, torn: usize) {
        let mut image = self.0.lock();
        let pending = std::mem::take(&mut image.pending);
        let mut bytes = std::mem::take(&mut image.synced);
        let torn_at = torn % pending.len().max(1);
        for (n, change) in pending.iter().enumerate().filter(|(n, _)| survives >> (n % 64) & 1 == 1) {
            apply(&mut bytes, change, (n == torn_at).then_some(torn % 4096));
        }
        image.current = bytes.clone();
        image.synced = bytes;
    }

    /// As it was when a sync began.
    fn as_of(synced: Vec<u8>, pending: Vec<Pending>) -> Self {
        Self(Arc::new(Mutex::new(Image { synced, pending, ..Image::default() })))
    }

    fn opener(&self) -> BackendOpener<impl Fn() -> FaultyDisk + Send + Sync + 'static> {
        let disk = self.clone();
        BackendOpener(move || disk.clone())
    }
}

impl StorageBackend for FaultyDisk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().current.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let image = self.0.lock();
        let end = offset as usize + out.len();
        let part = image.current.get(offset as usize..end).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(part);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Pending::Len(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut image = self.0.lock();
        if image.refuses {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let begun = (image.synced.clone(), image.pending.clone());
        if let Some(all) = &mut image.syncs_begun {
            all.push(begun);
        }
        image.syncs += 1;
        image.pending.clear();
        image.synced = image.current.clone();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Pending::Write(offset, data.to_vec()))
    }
}

impl FaultyDisk {
    fn change(&self, change: Pending) -> io::Result<()> {
        let mut image = self.0.lock();
        if image.refuses {
            return Err(io::ErrorKind::StorageFull.into());
        }
        apply(&mut image.current, &change, None);
        image.pending.push(change);
        Ok(())
    }
}

/// A beginning of the changes, cut within one: at least the last byte is missing.
fn beginning(mut changes: Vec<Pending>, cut: usize, bytes: usize) -> Vec<Pending> {
    changes.truncate(cut % changes.len() + 1);
    if let Some(Pending::Write(at, mut data)) = changes.pop() {
        data.truncate(bytes % data.len().max(1));
        changes.push(Pending::Write(at, data));
    }
    changes
}

/// Steps of a few calls.
fn steps(seed: &[(u8, u8)]) -> Vec<Vec<Write>> {
    let mut state = State::new(u64::MAX);
    let mut generations = [0i64; 4];
    seed.iter()
        .map(|(n, what)| {
            let id = call(n % 4);
            let generation = &mut generations[usize::from(n % 4)];
            match what % 4 {
                0 => {
                    *generation += 1;
                    state.dispatch(id, header(*generation, false)).1
                }
                1 => state.finish(id, vec![*what; usize::from(*n) * 20], false).unwrap_or_default(),
                2 => state.acknowledge(id, *generation, what % 8 == 2, 0, 0).unwrap_or_default(),
                _ => state.cancel(id, *generation, 0).1,
            }
        })
        .collect()
}

proptest! {
    #![proptest_config(seeded(ProptestConfig { cases: CASES, ..ProptestConfig::default() }))]

    /// Whatever survives of a commit that was cut, the journal opens, and holds the state before it or after it. In all that
    /// is 10,240 times a beginning of what one sync was to write, torn in its last write and never all of it, and 7,680 times
    /// any part of it. A commit that writes nothing is another case's, and not counted.
    #[test]
    fn every_crash_leaves_a_journal(
        seed in prop::collection::vec((any::<u8>(), any::<u8>()), 1..12),
        last in any::<u8>(),
        crashes in prop::collection::vec((any::<u64>(), any::<usize>()), BEGINNINGS + PARTS),
    ) {
        let steps = steps(&seed);
        let crash_at = usize::from(last) % steps.len();
        let faulty = FaultyDisk::default();
        let (disk, incarnation) = Disk::open(&faulty.opener()).unwrap();
        let mut whole = disk.load(u64::MAX).unwrap();
        for writes in &steps[..crash_at] {
            disk.commit(writes.iter()).unwrap();
            writes.iter().for_each(|w| whole.apply(w));
        }
        // The machine dies during the last one, in one of its syncs.
        let writes = &steps[crash_at];
        faulty.0.lock().syncs_begun = Some(Vec::new());
        disk.commit(writes.iter()).unwrap();
        let syncs = faulty.0.lock().syncs_begun.take().unwrap_or_default();
        prop_assert!(writes.is_empty() || !syncs.is_empty(), "a commit without a sync");
        let syncs: Vec<_> = syncs.into_iter().filter(|(_, pending)| !pending.is_empty()).collect();
        prop_assume!(!syncs.is_empty());
        let mut next = whole.clone();
        writes.iter().for_each(|w| next.apply(w));
        drop(disk);
        for (case, (survives, torn)) in crashes.into_iter().enumerate() {
            let (synced, pending) = syncs[torn % syncs.len()].clone();
            let crashed = if case < BEGINNINGS {
                let mut left = synced;
                beginning(pending, torn / syncs.len(), survives as usize).iter().for_each(|c| apply(&mut left, c, None));
                FaultyDisk::as_of(left, Vec::new())
            } else {
                FaultyDisk::as_of(synced, pending)
            };
            crashed.crash(survives, torn);
            let (disk, again) = match Disk::open(&crashed.opener()) {
                Ok(opened) => opened,
                Err(e) => return Err(TestCaseError::fail(format!("{e}"))),
            };
            prop_assert_eq!(again, incarnation);
            let loaded = disk.load(u64::MAX).unwrap();
            prop_assert!(loaded == whole || loaded == next, "a state that never was, or an old one");
        }
    }
}

#[tokio::test]
async fn steps_that_wait_together_share_a_sync() {
    let faulty = FaultyDisk::default();
    let journal = Journal::with(Box::new(faulty.opener()), u64::MAX).unwrap();
    for n in 200..205 {
        let before = faulty.0.lock().syncs;
        journal.dispatch(call(n), header(1, false)).unwrap().1.durable().await.unwrap();
        assert_eq!(faulty.0.lock().syncs - before, 1, "one step costs one sync");
    }
    let before = faulty.0.lock().syncs;
    let tickets: Vec<_> = (0..200).map(|n| journal.dispatch(call(n), header(1, false)).unwrap().1).collect();
    for ticket in tickets {
        ticket.durable().await.unwrap();
    }
    let syncs = faulty.0.lock().syncs - before;
    assert!(syncs < 150, "{syncs} syncs for 200 steps");
}

#[tokio::test]
async fn a_disk_that_refuses_costs_new_calls_and_no_result() {
    let faulty = FaultyDisk::default();
    let journal = Journal::with(Box::new(faulty.opener()), u64::MAX).unwrap();
    journal.dispatch(call(1), header(1, false)).unwrap().1.durable().await.unwrap();
    faulty.0.lock().refuses = true;
    let (decision, ticket) = journal.dispatch(call(2), header(1, false)).unwrap();
    assert_eq!(decision, Decision::Start);
    assert!(ticket.durable().await.is_err());
    journal.abandon(call(2));
    // From now on it is refused at once.
    assert!(journal.dispatch(call(3), header(1, false)).is_err());
    let result = pb::ToolResult { call_id: call(1).to_string(), content: "done".into(), ..Default::default() };
    let ticket = journal.finish(call(1), &result).unwrap();
    let waits = tokio::spawn(ticket.durable());
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waits.is_finished());
    faulty.0.lock().refuses = false;
    waits.await.unwrap().unwrap();
    assert_eq!(journal.result(call(1)).unwrap().unwrap().content, "done");
    assert_eq!(journal.dispatch(call(2), header(1, false)).unwrap().0, Decision::Start);
    journal.close();
    faulty.crash(0, 0);
    let again = Journal::with(Box::new(faulty.opener()), u64::MAX).unwrap();
    assert!(matches!(again.get(call(1)).unwrap().phase, Phase::Finished { .. }));
}
