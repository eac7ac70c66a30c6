//! Notices workflow code that does not return. One thread runs the workflows of a worker, so one that loops holds all
//! chats of the worker, and the next worker that takes it. Such a run is ended, and the process with the thread, which nothing
//! else can stop; whoever supervises it starts another.
//!
//! The measure is the thread's own processor time since it last did anything else: on a busy machine a thread that waits
//! for the processor is not taken for one that loops.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;

/// Workflow code takes microseconds.
const LOOPS_AFTER: Duration = Duration::from_secs(3);
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Of `/proc/…/stat`; the same on all machines that Linux runs on here.
const TICKS_PER_SECOND: u64 = 100;

/// The workflow whose code runs now on this worker's thread.
#[derive(Clone, Default)]
pub(crate) struct Running(Arc<Mutex<Option<Arc<str>>>>);

impl Running {
    pub fn enter(&self, workflow: &Arc<str>) {
        *self.0.lock() = Some(workflow.clone());
    }

    pub fn leave(&self) {
        *self.0.lock() = None;
    }

    fn get(&self) -> Option<Arc<str>> {
        self.0.lock().clone()
    }
}

#[derive(Clone, Default)]
pub(crate) struct Watchdog {
    /// Grows whenever the thread comes back to its executor.
    turns: Arc<AtomicU64>,
}

impl Watchdog {
    /// To be run on the watched thread, beside what it does.
    pub async fn alive(&self) {
        let mut tick = tokio::time::interval(LOOK_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.turns.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// To be run elsewhere. Returns the workflow that does not return; never where processor times cannot be read.
    pub async fn watch(&self, thread: u32, running: &Running) -> Arc<str> {
        let (mut turns, mut since) = (u64::MAX, processor_time(thread));
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let (now, used) = (self.turns.load(Ordering::Relaxed), processor_time(thread));
            if now != turns {
                (turns, since) = (now, used);
                continue;
            }
            let loops = used.zip(since).is_some_and(|(used, since)| used.saturating_sub(since) > LOOPS_AFTER);
            if loops && let Some(workflow) = running.get() {
                return workflow;
            }
        }
    }
}

/// The number by which the kernel knows this thread.
pub(crate) fn this_thread() -> u32 {
    fs::read_link("/proc/thread-self")
        .ok()
        .and_then(|link| link.file_name()?.to_str()?.parse().ok())
        .unwrap_or_default()
}

fn processor_time(thread: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/self/task/{thread}/stat")).ok()?;
    // The name before it may contain anything.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut times = fields.split(' ').skip(11).map_while(|field| field.parse::<u64>().ok());
    let ticks = times.next()? + times.next()?;
    Some(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    /// A thread that runs `work` in the middle of its tasks, and whether the watchdog bites within some seconds.
    async fn bites(work: impl FnOnce(&AtomicBool) + Send + 'static) -> Option<Arc<str>> {
        let (watchdog, running, stop) = (Watchdog::default(), Running::default(), Arc::new(AtomicBool::new(false)));
        let (sender, number) = tokio::sync::oneshot::channel();
        let thread = std::thread::spawn({
            let (watchdog, running, stop) = (watchdog.clone(), running.clone(), stop.clone());
            let own = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            move || {
                let _ = sender.send(this_thread());
                own.block_on(async {
                    let task = async {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        running.enter(&Arc::from("chat:1"));
                        work(&stop);
                        running.leave();
                        while !stop.load(Ordering::Relaxed) {
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                    };
                    tokio::select! { () = task => {}, () = watchdog.alive() => {} }
                });
            }
        });
        let number = number.await.expect("the thread started");
        let limit = LOOPS_AFTER + Duration::from_secs(3);
        let found = tokio::time::timeout(limit, watchdog.watch(number, &running)).await.ok();
        stop.store(true, Ordering::Relaxed);
        thread.join().expect("the thread ended");
        found
    }

    #[tokio::test]
    async fn code_that_loops_is_named() {
        // However slow the machine is: it stops when it was found.
        let found = loop {
            if let Some(found) = bites(|stop| while !stop.load(Ordering::Relaxed) {}).await {
                break found;
            }
        };
        assert_eq!(&*found, "chat:1");
    }

    #[tokio::test]
    async fn a_thread_that_waits_or_works_is_let_be() {
        // It stops every task of its thread, and uses no processor.
        let (_held, waits) = std::sync::mpsc::channel::<()>();
        let blocks = move |_: &AtomicBool| _ = waits.recv_timeout(Duration::from_secs(4));
        assert_eq!(bites(blocks).await, None);
        assert_eq!(bites(|_| {}).await, None);
    }
}
