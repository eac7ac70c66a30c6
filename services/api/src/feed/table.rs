//! One task per subject with viewers here: started by the first lease, ended some seconds after the last one is gone.
//!
//! Leases are counted under the table's lock, so a task ends only when nobody holds it and nobody can be about to.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use reliant_telemetry::sampled;
use reliant_types::{Code, Failure};
use tokio::sync::{
    Notify,
    mpsc::{self, error::TrySendError},
    watch,
};

use super::{state::Cursor, viewer::Viewer};

/// A page that is loaded again finds the task still there, with its window.
pub const LINGER: Duration = Duration::from_secs(5);
const COMMANDS_MAX: usize = 256;

/// What a feed's task is asked.
pub enum Command {
    Join {
        viewer: Viewer,
        cursor: Cursor,
    },
    /// A lagged viewer has room again.
    Resume {
        viewer: u64,
    },
    /// The log was seen to reach `seq`.
    Reaches {
        seq: i64,
    },
    /// The log is another one: a standby was promoted.
    Reset,
}

type Ready = Option<Result<(), Failure>>;

#[derive(Debug, Default)]
struct Count {
    leases: AtomicUsize,
    none: Notify,
}

struct Entry {
    commands: mpsc::Sender<Command>,
    seq: Arc<AtomicI64>,
    ready: watch::Receiver<Ready>,
    count: Arc<Count>,
}

pub struct Table<K>(Mutex<HashMap<K, Entry>>);

/// Keeps a feed's task running.
pub struct Lease {
    commands: mpsc::Sender<Command>,
    count: Arc<Count>,
}

/// The task's side.
pub struct Station<K: Copy + Eq + Hash> {
    pub key: K,
    seq: Arc<AtomicI64>,
    ready: watch::Sender<Ready>,
    count: Arc<Count>,
    table: Arc<Table<K>>,
}

impl<K: Copy + Eq + Hash> Table<K> {
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::default()))
    }

    /// A lease on the task of `key`, started by `start` where there is none, once it is ready.
    pub async fn lease(
        self: &Arc<Self>,
        key: K,
        start: impl FnOnce(Station<K>, mpsc::Receiver<Command>),
    ) -> Result<Lease, Failure> {
        let (lease, mut ready, fresh) = {
            let mut entries = self.0.lock();
            let mut fresh = None;
            if entries.get(&key).is_none_or(|entry| entry.commands.is_closed()) {
                let (commands, receiver) = sampled::channel("feed_commands", COMMANDS_MAX);
                let (sender, ready) = watch::channel(None);
                let (seq, count) = (Arc::new(AtomicI64::new(i64::MAX)), Arc::<Count>::default());
                let entry = Entry { commands, seq: seq.clone(), ready, count: count.clone() };
                entries.insert(key, entry);
                fresh = Some((Station { key, seq, ready: sender, count, table: self.clone() }, receiver));
            }
            let entry = &entries[&key];
            entry.count.leases.fetch_add(1, Ordering::Relaxed);
            let lease = Lease { commands: entry.commands.clone(), count: entry.count.clone() };
            (lease, entry.ready.clone(), fresh)
        };
        // Not under the lock, which a station takes when it is dropped.
        if let Some((station, commands)) = fresh {
            start(station, commands);
        }
        let outcome = match ready.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone(),
            Err(_) => None,
        };
        match outcome {
            Some(Ok(())) => Ok(lease),
            Some(Err(failure)) => Err(failure),
            None => Err(ended()),
        }
    }

    /// Every running task with the last number it gave out.
    pub fn progress(&self) -> Vec<(K, i64)> {
        self.0.lock().iter().map(|(key, entry)| (*key, entry.seq.load(Ordering::Relaxed))).collect()
    }

    /// A command that may be lost: it comes again.
    pub fn tell(&self, key: &K, command: Command) {
        let entries = self.0.lock();
        let Some(entry) = entries.get(key) else { return };
        if let Err(TrySendError::Full(_)) = entry.commands.try_send(command) {
            sampled::refused("feed_commands");
        }
    }
}

impl Lease {
    pub async fn send(&self, command: Command) -> Result<(), Failure> {
        self.commands.send(command).await.map_err(|_| ended())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.count.leases.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.count.none.notify_one();
        }
    }
}

impl<K: Copy + Eq + Hash> Station<K> {
    pub fn ready(&self, outcome: Result<(), Failure>) {
        self.ready.send_replace(Some(outcome));
    }

    pub fn at(&self, seq: i64) {
        self.seq.store(seq, Ordering::Relaxed);
    }

    /// The last lease was given back. Another may have been taken since.
    pub async fn left(&self) {
        self.count.none.notified().await;
    }

    /// Takes the task out of the table if nobody holds it. True: it must end now.
    pub fn retire(&self) -> bool {
        let mut entries = self.table.0.lock();
        if self.count.leases.load(Ordering::Relaxed) > 0 {
            return false;
        }
        self.remove(&mut entries);
        true
    }

    fn remove(&self, entries: &mut HashMap<K, Entry>) {
        if entries.get(&self.key).is_some_and(|entry| Arc::ptr_eq(&entry.count, &self.count)) {
            entries.remove(&self.key);
        }
    }
}

impl<K: Copy + Eq + Hash> Drop for Station<K> {
    fn drop(&mut self) {
        let table = self.table.clone();
        self.remove(&mut table.0.lock());
    }
}

pub fn ended() -> Failure {
    Failure::new(Code::Unavailable, "the live feed was interrupted; subscribe again")
        .retry_after(Duration::from_millis(200))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(station: Station<u8>, mut commands: mpsc::Receiver<Command>) {
        tokio::spawn(async move {
            station.ready(Ok(()));
            loop {
                tokio::select! {
                    _ = commands.recv() => {}
                    () = station.left() => {
                        tokio::time::sleep(LINGER).await;
                        if station.retire() {
                            return;
                        }
                    }
                }
            }
        });
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_lives_as_long_as_its_leases_and_a_little_longer() {
        let table = Table::new();
        let first = table.lease(1, start).await.unwrap();
        let second = table.lease(1, |_, _| panic!("one task is enough")).await.unwrap();
        assert_eq!(table.progress().len(), 1);
        drop((first, second));
        tokio::time::sleep(LINGER / 2).await;
        let again = table.lease(1, |_, _| panic!("it lingers")).await.unwrap();
        tokio::time::sleep(LINGER * 2).await;
        assert_eq!(table.progress().len(), 1);
        drop(again);
        tokio::time::sleep(LINGER * 2).await;
        assert!(table.progress().is_empty());
    }

    #[tokio::test]
    async fn a_task_that_cannot_start_says_why_to_all_and_is_tried_anew() {
        let table = Table::new();
        let fail = |station: Station<u8>, _| station.ready(Err(Failure::new(Code::NotFound, "no")));
        assert_eq!(table.lease(1, fail).await.err().map(|failure| failure.code), Some(Code::NotFound));
        assert!(table.lease(1, start).await.is_ok());
    }
}
