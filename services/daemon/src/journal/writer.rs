//! The thread that owns the journal's disk. Steps that wait at the same time share one sync; those that need none ride
//! with the next one that does, or with each other after a while.
//!
//! A step that may not be lost (a result, a tombstone) is tried again for as long as the disk refuses it; a started
//! record that cannot be written is given back, so that its call is refused.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, RwLock};
use reliant_telemetry::chain;
use tokio::sync::oneshot;

use super::{
    JournalError,
    disk::{Disk, Opener},
    state::{State, Write},
};

/// Jobs of one commit.
const BATCH_MAX: usize = 512;
/// Lazy steps wait no longer than this, and no more of them, for a synced one to ride with.
const LAZY_MAX: Duration = Duration::from_secs(2);
const LAZY_MAX_JOBS: usize = 256;
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Synced; given back on failure.
    Start,
    /// Synced; tried until it is written.
    Must,
    /// Nobody waits for it; a crash may lose it.
    Lazy,
}

pub struct Job {
    pub writes: Vec<Write>,
    pub kind: Kind,
    pub done: Option<oneshot::Sender<Result<(), JournalError>>>,
}

/// The state and what of it is not on disk yet; one lock, so that the disk sees the order of the decisions.
pub struct Queue {
    pub state: State,
    pub jobs: VecDeque<Job>,
    /// How many of the jobs are not lazy.
    pub awaited: usize,
    pub closed: bool,
    /// Why the disk refuses, while it does.
    pub failing: Option<JournalError>,
}

impl Queue {
    pub fn new(state: State) -> Self {
        Self { state, jobs: VecDeque::new(), awaited: 0, closed: false, failing: None }
    }

    /// Whether the thread is to be woken for it.
    pub fn push(&mut self, job: Job) -> bool {
        self.awaited += usize::from(job.kind != Kind::Lazy);
        self.jobs.push_back(job);
        self.ready() || self.jobs.len() == 1
    }

    fn ready(&self) -> bool {
        self.awaited > 0 || self.jobs.len() >= LAZY_MAX_JOBS || self.closed
    }

    fn take(&mut self) -> Vec<Job> {
        let count = self.jobs.len().min(BATCH_MAX);
        let batch: Vec<Job> = self.jobs.drain(..count).collect();
        self.awaited -= awaited(&batch);
        batch
    }
}

fn awaited(jobs: &[Job]) -> usize {
    jobs.iter().filter(|job| job.kind != Kind::Lazy).count()
}

pub struct Shared {
    pub queue: Mutex<Queue>,
    pub wake: Condvar,
    pub disk: RwLock<Option<Disk>>,
    pub opener: Box<dyn Opener>,
}

pub fn run(shared: Arc<Shared>) {
    let mut retry = RETRY_MIN;
    loop {
        let batch = {
            let mut queue = shared.queue.lock();
            while !queue.ready() {
                if queue.jobs.is_empty() {
                    shared.wake.wait(&mut queue);
                } else if shared.wake.wait_for(&mut queue, LAZY_MAX).timed_out() {
                    break;
                }
            }
            if queue.jobs.is_empty() {
                break;
            }
            queue.take()
        };
        let began = Instant::now();
        let outcome = match &*shared.disk.read() {
            Some(disk) => disk.commit(batch.iter().flat_map(|j| &j.writes)),
            None => Err(JournalError::Io("the file is not open".into())),
        };
        match outcome {
            Ok(()) => {
                reliant_telemetry::metrics::JOURNAL_COMMIT.observe(began.elapsed().as_secs_f64());
                retry = RETRY_MIN;
                shared.queue.lock().failing = None;
                for job in batch {
                    if let Some(done) = job.done {
                        let _ = done.send(Ok(()));
                    }
                }
            }
            Err(error) => {
                tracing::error!(error = %chain(&error), "the journal refused a write");
                give_back(&shared, batch, &error);
                if wait_closed(&shared, retry) {
                    break;
                }
                retry = (retry * 2).min(RETRY_MAX);
                reopen(&shared);
            }
        }
    }
    *shared.disk.write() = None;
}

/// Started records fail now; the rest goes back to the head of the queue.
fn give_back(shared: &Shared, batch: Vec<Job>, error: &JournalError) {
    let mut queue = shared.queue.lock();
    queue.failing = Some(error.clone());
    for job in batch.into_iter().rev() {
        if job.kind != Kind::Start {
            queue.awaited += awaited(std::slice::from_ref(&job));
            queue.jobs.push_front(job);
        } else if let Some(done) = job.done {
            let _ = done.send(Err(error.clone()));
        }
    }
}

/// True when the journal was closed meanwhile: what could not be written is given up, as a crash would.
fn wait_closed(shared: &Shared, delay: Duration) -> bool {
    let deadline = Instant::now() + delay;
    let mut queue = shared.queue.lock();
    while !queue.closed {
        if shared.wake.wait_until(&mut queue, deadline).timed_out() {
            return false;
        }
    }
    queue.jobs.clear();
    queue.awaited = 0;
    true
}

fn reopen(shared: &Shared) {
    let mut slot = shared.disk.write();
    *slot = None;
    match Disk::open(&*shared.opener) {
        Ok((disk, _)) => *slot = Some(disk),
        Err(error) => tracing::error!(error = %chain(&error), "the journal cannot be opened again"),
    }
}
