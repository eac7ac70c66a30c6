//! The one drain of a process: not ready, stop taking work, wait for what runs, force, and only then flush traces.
//!
//! Every task of a role is spawned here with its [`TaskKind`], so that nothing outlives the drain unseen.

use reliant_types::boxed;
use std::{
    future::Future,
    panic::AssertUnwindSafe,
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use reliant_telemetry::metrics::{PANICS, TASK_FAILURES};
use tokio::task::JoinHandle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

use crate::tasks::{OnDrain, TaskKind, TaskOutput};

/// How long the last step waits for tasks that were told to stop.
const CANCEL_GRACE: Duration = Duration::from_secs(2);
/// The exit code of a second signal: the usual 128 + SIGINT.
const SECOND_SIGNAL_EXIT_CODE: i32 = 130;

/// How a drain went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// All work came to its own end.
    Clean,
    /// The deadline passed; so many pieces of work were cut.
    Forced { tasks: usize },
}

/// Shared by all tasks of one process (or of one role, in tests and in `reliant up`). Clones are the same drain.
#[derive(Debug, Clone, Default)]
pub struct Drain(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    begun: CancellationToken,
    forced: CancellationToken,
    last: CancellationToken,
    work: TaskTracker,
    rest: TaskTracker,
    reason: OnceLock<String>,
}

impl Drain {
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancelled when the drain begins. Listeners and pollers stop taking work then.
    pub fn token(&self) -> CancellationToken {
        self.0.begun.clone()
    }

    /// Cancelled when the deadline of the drain has passed: hand over now.
    pub fn forced(&self) -> CancellationToken {
        self.0.forced.clone()
    }

    pub fn is_draining(&self) -> bool {
        self.0.begun.is_cancelled()
    }

    /// Begins the drain; the first reason stands.
    pub fn begin(&self, reason: impl Into<String>) {
        let reason = reason.into();
        if self.0.reason.set(reason.clone()).is_ok() {
            tracing::info!(reason, "drain begins");
        }
        self.0.begun.cancel();
    }

    /// Why the drain began, once it has.
    pub fn reason(&self) -> Option<&str> {
        self.0.reason.get().map(String::as_str)
    }

    /// Returns when the drain begins.
    #[boxed]
    pub async fn draining(&self) {
        self.0.begun.cancelled().await;
    }

    /// Runs `future` until it ends, or until the drain treats it as its kind says. The span of the caller is not
    /// carried along: what outlives a request must not keep its span open.
    pub fn spawn<F>(&self, kind: TaskKind, future: F) -> JoinHandle<()>
    where
        F: Future + Send + 'static,
        F::Output: TaskOutput,
    {
        self.spawn_boxed(kind, Box::pin(future.map(TaskOutput::into_error)))
    }

    /// [`Self::spawn`] without its types, so that it is compiled once.
    fn spawn_boxed(&self, kind: TaskKind, future: BoxFuture<'static, Option<String>>) -> JoinHandle<()> {
        let drain = self.clone();
        let stop = match kind.on_drain() {
            OnDrain::Finish => self.0.forced.clone(),
            OnDrain::CancelAtOnce => self.0.begun.clone(),
            OnDrain::CancelLast => self.0.last.clone(),
        };
        let task = async move {
            let outcome = tokio::select! {
                biased;
                outcome = AssertUnwindSafe(future).catch_unwind() => outcome,
                () = stop.cancelled() => return,
            };
            let error = match outcome {
                Ok(error) => error,
                Err(panic) => {
                    PANICS.inc();
                    Some(format!("panicked: {}", panic_text(panic.as_ref())))
                }
            };
            let Some(error) = error else { return };
            TASK_FAILURES.with_label_values(&[kind.name()]).inc();
            if kind.failure_ends_process() && !drain.is_draining() {
                tracing::error!(task = kind.name(), error, "a task failed that the process cannot be without");
                drain.begin(format!("the task '{kind}' failed: {error}"));
            } else {
                tracing::warn!(task = kind.name(), error, "a task failed");
            }
        }
        .instrument(tracing::Span::none());
        match kind.on_drain() {
            OnDrain::Finish => self.0.work.spawn(task),
            OnDrain::CancelAtOnce | OnDrain::CancelLast => self.0.rest.spawn(task),
        }
    }

    /// Listeners and pieces of work that have not ended.
    pub fn work_count(&self) -> usize {
        self.0.work.len()
    }

    /// SIGTERM or SIGINT begins the drain; a second one ends the process at once.
    pub fn watch_signals(&self) -> std::io::Result<()> {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let drain = self.clone();
        // Not tracked: it must outlive the drain to hear the second signal.
        tokio::spawn(async move {
            for round in 0.. {
                let name = tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                };
                if round == 0 {
                    drain.begin(name);
                } else {
                    tracing::warn!(signal = name, "second signal: exiting at once");
                    #[expect(clippy::disallowed_methods, reason = "whoever signals twice wants no destructors")]
                    std::process::exit(SECOND_SIGNAL_EXIT_CODE);
                }
            }
        });
        Ok(())
    }

    /// Waits for the drain to begin, then for the work, at most `deadline` from then on; what is left is cut. Returns
    /// when no task of this drain runs any more, or two seconds after they were told to stop.
    #[boxed]
    pub async fn wait(&self, deadline: Duration) -> Drained {
        self.draining().await;
        self.0.work.close();
        let mut drained = Drained::Clean;
        if tokio::time::timeout(deadline, self.0.work.wait()).await.is_err() {
            let tasks = self.0.work.len();
            tracing::warn!(tasks, "the drain's deadline passed; what still runs is cut");
            drained = Drained::Forced { tasks };
            self.0.forced.cancel();
            let _ = tokio::time::timeout(CANCEL_GRACE, self.0.work.wait()).await;
        }
        self.0.last.cancel();
        self.0.rest.close();
        let _ = tokio::time::timeout(CANCEL_GRACE, self.0.rest.wait()).await;
        drained
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no text".to_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn work_is_waited_for_and_pollers_are_cancelled() {
        let drain = Drain::new();
        let finished = Arc::new(AtomicBool::new(false));
        let flag = finished.clone();
        drain.spawn(TaskKind::Work("work"), async move {
            tokio::time::sleep(Duration::from_secs(5)).await;
            flag.store(true, SeqCst);
        });
        let poller = drain.spawn(TaskKind::Poller("poller"), std::future::pending::<()>());
        drain.begin("test");
        assert_eq!(drain.wait(Duration::from_secs(10)).await, Drained::Clean);
        assert!(finished.load(SeqCst));
        assert!(poller.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn work_past_the_deadline_is_cut_and_counted() {
        let drain = Drain::new();
        let work = drain.spawn(TaskKind::Work("work"), tokio::time::sleep(LONG));
        drain.begin("test");
        assert_eq!(drain.wait(Duration::from_secs(1)).await, Drained::Forced { tasks: 1 });
        assert!(work.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn upkeep_outlives_the_work() {
        let drain = Drain::new();
        let upkeep = drain.spawn(TaskKind::Upkeep("upkeep"), std::future::pending::<()>());
        let seen = Arc::new(AtomicBool::new(false));
        let flag = seen.clone();
        drain.spawn(TaskKind::Work("work"), async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            flag.store(!upkeep.is_finished(), SeqCst);
        });
        drain.begin("test");
        assert_eq!(drain.wait(LONG).await, Drained::Clean);
        assert!(seen.load(SeqCst), "upkeep ended before the work did");
    }

    #[tokio::test]
    async fn a_failed_listener_or_a_panicking_poller_drains_the_process() {
        let drain = Drain::new();
        drain.spawn(TaskKind::Listener("grpc"), async { Err::<(), _>(std::io::Error::other("address lost")) });
        drain.draining().await;
        assert_eq!(drain.reason(), Some("the task 'grpc' failed: address lost"));

        let drain = Drain::new();
        async fn relay() {
            panic!("boom")
        }
        drain.spawn(TaskKind::Poller("relay"), relay());
        drain.draining().await;
        assert_eq!(drain.reason(), Some("the task 'relay' failed: panicked: boom"));
    }

    #[tokio::test]
    async fn failed_work_is_its_own_affair() {
        let drain = Drain::new();
        let task = drain.spawn(TaskKind::Work("errand"), async { Err::<(), _>(std::io::Error::other("no")) });
        task.await.unwrap();
        assert!(!drain.is_draining());
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_is_spawned_during_the_drain_is_waited_for_too() {
        let drain = Drain::new();
        let inner = drain.clone();
        let finished = Arc::new(AtomicBool::new(false));
        let flag = finished.clone();
        drain.spawn(TaskKind::Work("outer"), async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            inner.spawn(TaskKind::Work("inner"), async move {
                tokio::time::sleep(Duration::from_secs(1)).await;
                flag.store(true, SeqCst);
            });
        });
        drain.begin("test");
        assert_eq!(drain.wait(LONG).await, Drained::Clean);
        assert!(finished.load(SeqCst));
    }
}
