//! What is read when somebody asks for `/metrics`, and costs nothing before: how full the bounded queues are, and what the
//! runtime does. Only the runtime's lag is measured on the way.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, mpsc},
    time::{Instant, sleep_until},
};

use crate::metrics::{
    QUEUE_DEPTH, QUEUE_LIMIT, QUEUE_REFUSED, RUNTIME_BUSY, RUNTIME_LAG, RUNTIME_QUEUE, RUNTIME_TASKS, RUNTIME_THREADS,
};

const PROBE_INTERVAL: Duration = Duration::from_millis(250);
/// So many watched queues are there before the ones that are gone are looked for.
const WATCHED_MIN: usize = 64;

/// How many wait in a queue; none: the queue is gone.
type Depth = Box<dyn Fn() -> Option<usize> + Send>;

struct Watched {
    name: &'static str,
    limit: usize,
    depth: Depth,
}

struct Queues {
    list: Vec<Watched>,
    /// Names that were ever watched, so that one whose last queue has gone reads 0.
    names: BTreeMap<&'static str, usize>,
    look_at: usize,
}

static QUEUES: Mutex<Queues> = Mutex::new(Queues { list: Vec::new(), names: BTreeMap::new(), look_at: WATCHED_MIN });

impl Queues {
    fn watch(&mut self, watched: Watched) {
        self.names.insert(watched.name, watched.limit);
        if self.list.len() >= self.look_at {
            self.list.retain(|watched| (watched.depth)().is_some());
            self.look_at = (2 * self.list.len()).max(WATCHED_MIN);
        }
        self.list.push(watched);
    }

    /// The depth of the fullest queue of each name, and the room in one of them.
    fn read(&mut self) -> BTreeMap<&'static str, (usize, usize)> {
        let mut fullest: BTreeMap<_, _> = self.names.iter().map(|(name, limit)| (*name, (0, *limit))).collect();
        self.list.retain(|watched| {
            let depth = (watched.depth)();
            let fullest = fullest.entry(watched.name).or_default();
            fullest.0 = fullest.0.max(depth.unwrap_or_default());
            depth.is_some()
        });
        fullest
    }
}

/// Shows how full something with `limit` places is. `depth` answers none once it is gone, and must not block.
pub fn watch(name: &'static str, limit: usize, depth: impl Fn() -> Option<usize> + Send + 'static) {
    QUEUES.lock().watch(Watched { name, limit, depth: Box::new(depth) });
}

/// A bounded channel whose depth is shown.
pub fn channel<T: Send + 'static>(name: &'static str, limit: usize) -> (mpsc::Sender<T>, mpsc::Receiver<T>) {
    let (sender, receiver) = mpsc::channel(limit);
    let weak = sender.downgrade();
    watch(name, limit, move || weak.upgrade().map(|sender| limit - sender.capacity()));
    (sender, receiver)
}

/// Places of which so many are taken.
pub fn places(name: &'static str, limit: usize) -> Arc<Semaphore> {
    let limit = limit.min(Semaphore::MAX_PERMITS);
    let places = Arc::new(Semaphore::new(limit));
    let weak: Weak<Semaphore> = Arc::downgrade(&places);
    watch(name, limit, move || weak.upgrade().map(|places| limit.saturating_sub(places.available_permits())));
    places
}

/// Counts what a full queue refused, or what was dropped for it. By the queue's name.
pub fn refused(name: &'static str) {
    QUEUE_REFUSED.with_label_values(&[name]).inc();
}

/// Brings the sampled metrics up to date.
pub(crate) fn read() {
    for (name, (depth, limit)) in QUEUES.lock().read() {
        QUEUE_DEPTH.with_label_values(&[name]).set(number(depth));
        QUEUE_LIMIT.with_label_values(&[name]).set(number(limit));
    }
    let Ok(handle) = Handle::try_current() else { return };
    let runtime = handle.metrics();
    RUNTIME_THREADS.set(number(runtime.num_workers()));
    RUNTIME_TASKS.set(number(runtime.num_alive_tasks()));
    RUNTIME_QUEUE.set(number(runtime.global_queue_depth()));
    let busy: Duration = (0..runtime.num_workers()).map(|worker| runtime.worker_total_busy_duration(worker)).sum();
    RUNTIME_BUSY.inc_by((busy.as_secs_f64() - RUNTIME_BUSY.get()).max(0.0));
}

fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Measures how late the runtime takes up a task whose time has come. Never ends.
pub async fn probe_runtime() -> ! {
    let mut due = Instant::now() + PROBE_INTERVAL;
    loop {
        sleep_until(due).await;
        let now = Instant::now();
        RUNTIME_LAG.observe((now - due).as_secs_f64());
        due = now + PROBE_INTERVAL;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(name: &str) -> Option<(i64, i64)> {
        let text = crate::metrics::render();
        let value = |metric: &str| {
            let start = format!("{metric}{{queue=\"{name}\"}} ");
            text.lines().find_map(|line| line.strip_prefix(&start)?.parse().ok())
        };
        Some((value("reliant_queue_depth")?, value("reliant_queue_limit")?))
    }

    #[tokio::test]
    async fn the_fullest_queue_of_a_name_is_shown_until_it_is_gone() {
        assert_eq!(shown("test_queue"), None);
        let (one, _empty) = channel::<u8>("test_queue", 10);
        let (two, mut fuller) = channel("test_queue", 10);
        one.try_send(1).unwrap();
        (0..4).for_each(|n| two.try_send(n).unwrap());
        assert_eq!(shown("test_queue"), Some((4, 10)));
        fuller.recv().await;
        assert_eq!(shown("test_queue"), Some((3, 10)));
        drop((one, two));
        assert_eq!(shown("test_queue"), Some((0, 10)));

        let taken = places("test_places", 3);
        let _place = taken.clone().try_acquire_owned().unwrap();
        assert_eq!(shown("test_places"), Some((1, 3)));
    }

    #[test]
    fn queues_that_are_gone_do_not_pile_up_where_nobody_looks() {
        let mut queues = Queues { list: Vec::new(), names: BTreeMap::new(), look_at: WATCHED_MIN };
        for round in 0..10_000 {
            queues.watch(Watched { name: "gone", limit: 1, depth: Box::new(move || (round % 100 == 0).then_some(1)) });
        }
        assert!(queues.list.len() <= 2 * 100 + 1, "{}", queues.list.len());
        assert_eq!(queues.read()["gone"], (1, 1));
        assert_eq!(queues.list.len(), 100);
    }

    #[tokio::test]
    async fn the_runtime_is_shown() {
        let held = tokio::spawn(std::future::pending::<()>());
        tokio::time::timeout(2 * PROBE_INTERVAL, probe_runtime()).await.unwrap_err();
        read();
        assert!(RUNTIME_THREADS.get() >= 1 && RUNTIME_TASKS.get() >= 1);
        assert!(RUNTIME_LAG.get_sample_count() >= 1);
        held.abort();
    }
}
