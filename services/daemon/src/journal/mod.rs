//! The journal: two synced records per call, started before anything runs and finished before the result leaves.
//!
//! Decisions are made in memory by [`state::State`] and written in their order by one thread; nothing that was not
//! written is told to anybody. It never drops a result; when full it refuses new calls.

mod disk;
mod error;
pub mod state;
mod vet;
mod writer;

#[cfg(test)]
mod tests;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::{Condvar, Mutex, RwLock};
use prost::Message;
use reliant_types::{Incarnation, ToolCallId, pb};
use tokio::sync::oneshot;

pub use disk::{BackendOpener, FileOpener, Opener};
pub use error::JournalError;
use state::{Cancelled, Decision, Entry, Header, Phase, Tombstone};
use writer::{Job, Kind, Queue, Shared};

/// The file's name in the state directory.
pub const JOURNAL_FILE: &str = "journal.redb";
/// Steps that wait for the disk; past that, new calls and cancels are refused.
const QUEUE_MAX: usize = 4096;

/// Resolves when the step is on disk.
#[must_use]
#[derive(Debug)]
pub struct Ticket(Option<oneshot::Receiver<Result<(), JournalError>>>);

impl Ticket {
    const DONE: Self = Self(None);

    pub async fn durable(self) -> Result<(), JournalError> {
        match self.0 {
            None => Ok(()),
            Some(receiver) => receiver.await.unwrap_or(Err(JournalError::Closed)),
        }
    }
}

pub struct Journal {
    shared: Arc<Shared>,
    incarnation: Incarnation,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Journal {
    /// Opens the journal of a state directory, or makes one.
    pub fn open(state_dir: &Path, max_bytes: u64) -> Result<Self, JournalError> {
        Self::with(Box::new(FileOpener(state_dir.join(JOURNAL_FILE))), max_bytes)
    }

    pub fn with(opener: Box<dyn Opener>, max_bytes: u64) -> Result<Self, JournalError> {
        let (disk, incarnation) = disk::Disk::open(&*opener)?;
        let state = disk.load(max_bytes)?;
        let queue = Queue::new(state);
        let shared =
            Arc::new(Shared { queue: Mutex::new(queue), wake: Condvar::new(), disk: RwLock::new(Some(disk)), opener });
        let run = {
            let shared = shared.clone();
            move || writer::run(shared)
        };
        let thread = std::thread::Builder::new().name("journal".into()).spawn(run)?;
        Ok(Self { shared, incarnation, thread: Mutex::new(Some(thread)) })
    }

    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    fn push(&self, queue: &mut Queue, kind: Kind, writes: Vec<state::Write>) -> Ticket {
        if writes.is_empty() {
            return Ticket::DONE;
        }
        let (done, receiver) = oneshot::channel();
        if queue.closed {
            let _ = done.send(Err(JournalError::Closed));
        } else {
            let done = (kind != Kind::Lazy).then_some(done);
            if queue.push(Job { writes, kind, done }) {
                self.shared.wake.notify_one();
            }
        }
        if kind == Kind::Lazy { Ticket::DONE } else { Ticket(Some(receiver)) }
    }

    /// What a dispatch would be answered, without doing it.
    pub fn decide(&self, id: ToolCallId, generation: i64, repeatable: bool, dispatched_ms: i64) -> Decision {
        self.shared.queue.lock().state.decide(id, generation, repeatable, dispatched_ms)
    }

    /// The decision holds once the ticket is durable.
    pub fn dispatch(&self, id: ToolCallId, header: Header) -> Result<(Decision, Ticket), JournalError> {
        let mut queue = self.shared.queue.lock();
        let would = queue.state.decide(id, header.generation, header.repeatable, header.dispatched_ms);
        if would == Decision::Start {
            if let Some(error) = &queue.failing {
                return Err(error.clone());
            }
            if queue.jobs.len() >= QUEUE_MAX {
                return Err(JournalError::Io("too many steps wait for the disk".into()));
            }
        }
        let (decision, writes) = queue.state.dispatch(id, header);
        let kind = if decision == Decision::Start { Kind::Start } else { Kind::Must };
        let ticket = self.push(&mut queue, kind, writes);
        Ok((decision, ticket))
    }

    /// After a started record that could not be written.
    pub fn abandon(&self, id: ToolCallId) {
        let mut queue = self.shared.queue.lock();
        let writes = queue.state.abandon(id);
        let _lazy = self.push(&mut queue, Kind::Lazy, writes);
    }

    /// `None`: the call does not run.
    pub fn finish(&self, id: ToolCallId, result: &pb::ToolResult) -> Option<Ticket> {
        let unknown = result.status() == pb::ToolCallStatus::OutcomeUnknown;
        let bytes = result.encode_to_vec();
        let mut queue = self.shared.queue.lock();
        let writes = queue.state.finish(id, bytes, unknown)?;
        Some(self.push(&mut queue, Kind::Must, writes))
    }

    pub fn cancel(&self, id: ToolCallId, generation: i64) -> Result<(Cancelled, Ticket), JournalError> {
        let mut queue = self.shared.queue.lock();
        if queue.jobs.len() >= QUEUE_MAX {
            return Err(JournalError::Io("too many steps wait for the disk".into()));
        }
        let (outcome, writes) = queue.state.cancel(id, generation, now_ms());
        let ticket = self.push(&mut queue, Kind::Must, writes);
        Ok((outcome, ticket))
    }

    /// `cloud_ms`: when, by the cloud's clock; 0 where it did not say. False: the word was of an older generation, or of a
    /// call that is not finished.
    pub fn acknowledge(&self, id: ToolCallId, generation: i64, committed: bool, cloud_ms: i64) -> bool {
        let mut queue = self.shared.queue.lock();
        let Some(writes) = queue.state.acknowledge(id, generation, committed, now_ms(), cloud_ms) else { return false };
        let _lazy = self.push(&mut queue, Kind::Lazy, writes);
        true
    }

    pub fn trim(&self) {
        let mut queue = self.shared.queue.lock();
        let writes = queue.state.trim(now_ms());
        let _lazy = self.push(&mut queue, Kind::Lazy, writes);
    }

    pub fn get(&self, id: ToolCallId) -> Option<Entry> {
        self.shared.queue.lock().state.get(id).cloned()
    }

    /// Every call that has an entry.
    pub fn calls(&self) -> Vec<(ToolCallId, Entry)> {
        self.shared.queue.lock().state.calls().map(|(id, entry)| (id, entry.clone())).collect()
    }

    /// Every call that is done with here, or must not start.
    pub fn tombstones(&self) -> Vec<(ToolCallId, Tombstone)> {
        self.shared.queue.lock().state.tombstones().collect()
    }

    /// Calls that the cloud ended before this time, by its clock, may have left the journal.
    pub fn floor_ms(&self) -> i64 {
        self.shared.queue.lock().state.floor_ms()
    }

    /// Bytes that count against the limit.
    pub fn bytes(&self) -> u64 {
        self.shared.queue.lock().state.bytes()
    }

    /// Calls with a started record alone.
    pub fn running(&self) -> Vec<(ToolCallId, Header)> {
        self.shared.queue.lock().state.running().map(|(id, e)| (id, e.header.clone())).collect()
    }

    /// Calls whose result waits for its acknowledgement.
    pub fn finished(&self) -> Vec<(ToolCallId, Header)> {
        self.shared.queue.lock().state.finished().map(|(id, e)| (id, e.header.clone())).collect()
    }

    /// A finished call's result, under its present generation.
    pub fn result(&self, id: ToolCallId) -> Result<Option<pb::ToolResult>, JournalError> {
        let Some(Entry { header, phase: Phase::Finished { .. } }) = self.get(id) else { return Ok(None) };
        let bytes = match &*self.shared.disk.read() {
            Some(disk) => disk.result(id)?,
            None => return Err(JournalError::Closed),
        };
        let Some(bytes) = bytes else { return Ok(None) };
        let mut result = pb::ToolResult::decode(bytes.as_slice()).map_err(|e| JournalError::Corrupt(e.to_string()))?;
        result.generation = header.generation;
        Ok(Some(result))
    }

    /// Writes what waits, and closes the file.
    pub fn close(&self) {
        self.shared.queue.lock().closed = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.close();
    }
}

pub(crate) fn now_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}

/// Puts the journal of a state directory aside; the next start makes a new one, with a new incarnation. Answers where
/// the old one is, if there was one. The caller holds no daemon that runs.
pub fn reset_journal(state_dir: &Path) -> Result<Option<PathBuf>, crate::DaemonError> {
    let _lock = crate::state_dir::StateDir::open(state_dir)?;
    let path = state_dir.join(JOURNAL_FILE);
    let aside = state_dir.join(format!("journal-{}.old.redb", chrono::Utc::now().format("%Y%m%dT%H%M%S%.3f")));
    match std::fs::rename(&path, &aside) {
        Ok(()) => Ok(Some(aside)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(JournalError::from(e).into()),
    }
}
