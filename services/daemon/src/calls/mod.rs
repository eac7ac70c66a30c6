//! Calls from their dispatch to their acknowledged result: decided by the journal, written, run, written, offered.
//!
//! The order of decisions is the order in which frames came: what a function here does before its future is awaited
//! is done at once. Nothing runs before its started record is on disk, and no result leaves before its own is.

mod outbox;
mod run;

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::{BoxFuture, FutureExt};
use parking_lot::Mutex;
use reliant_telemetry::{chain, trace::TraceContext};
use reliant_types::{Code, Failure, ToolCallId, limits, pb};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use outbox::Outbox;

use crate::{
    journal::{
        Journal, JournalError, Ticket, now_ms,
        state::{Cancelled, Decision, Header},
    },
    output::{CallOutput, LiveHub, Outputs},
    roots::Roots,
    status::RunningStatus,
    tools::{Prepared, Toolbox, is_read_only, process},
};

/// A call that runs now.
#[derive(Debug)]
struct Running {
    tool: String,
    started_ms: i64,
    cancel: CancellationToken,
    output: Arc<CallOutput>,
}

pub struct Calls {
    pub journal: Arc<Journal>,
    pub outbox: Arc<Outbox>,
    pub outputs: Arc<Outputs>,
    pub hub: Arc<LiveHub>,
    pub roots: Roots,
    pub toolbox: Arc<Toolbox>,
    max_running: usize,
    running_dir: PathBuf,
    running: Mutex<HashMap<ToolCallId, Running>>,
    draining: AtomicBool,
    tasks: TaskTracker,
}

/// What a [`Calls`] is made of.
pub struct Parts {
    pub journal: Arc<Journal>,
    pub outputs: Arc<Outputs>,
    pub roots: Roots,
    pub toolbox: Arc<Toolbox>,
    pub max_running: usize,
    pub running_dir: PathBuf,
}

impl Calls {
    pub fn new(parts: Parts) -> Arc<Self> {
        Arc::new(Self {
            journal: parts.journal,
            outbox: Arc::default(),
            outputs: parts.outputs,
            hub: Arc::default(),
            roots: parts.roots,
            toolbox: parts.toolbox,
            max_running: parts.max_running,
            running_dir: parts.running_dir,
            running: Mutex::default(),
            draining: AtomicBool::new(false),
            tasks: TaskTracker::new(),
        })
    }

    /// What an earlier process left: its leftovers are killed first, then its unfinished calls are recorded as what
    /// they are, and every result that waits is offered. Blocking.
    pub async fn recover(&self) -> Result<(), JournalError> {
        let unfinished = self.journal.running();
        let mut ids: Vec<ToolCallId> = unfinished.iter().map(|(id, _)| *id).collect();
        let dir = self.running_dir.clone();
        let killed = tokio::task::spawn_blocking(move || {
            // A journal that was lost knows nothing of what it had started; the processes are there all the same.
            ids.extend(process::left_running(&dir));
            process::kill_calls(&dir, &ids)
        });
        let killed = killed.await.unwrap_or(0);
        if killed > 0 || !unfinished.is_empty() {
            tracing::warn!(
                calls = unfinished.len(),
                killed,
                "an earlier daemon died while calls ran; their outcome is unknown"
            );
        }
        for (id, header) in unfinished {
            let result = run::died_with_daemon(id, &header, self.journal.incarnation());
            if let Some(ticket) = self.journal.finish(id, &result) {
                ticket.durable().await?;
            }
        }
        for (id, header) in self.journal.finished() {
            self.outbox.add(id, &header.traceparent, None);
        }
        Ok(())
    }

    /// The trace in which the journal first heard of a call, for what comes again.
    pub fn first_trace(&self, call: &str) -> TraceContext {
        let entry = call.parse::<ToolCallId>().ok().and_then(|id| self.journal.get(id));
        entry.map(|entry| TraceContext::from_traceparent(&entry.header.traceparent)).unwrap_or_default()
    }

    /// Takes a dispatch up. The future is the answer; `None`: a daemon that stops says nothing of calls that it does not
    /// know, so that they are sent again to the one that comes after it.
    pub fn dispatch(
        self: &Arc<Self>,
        dispatch: pb::Dispatch,
        trace: TraceContext,
    ) -> BoxFuture<'static, Option<pb::DispatchReply>> {
        let answer = Answer {
            call_id: dispatch.call_id.clone(),
            generation: dispatch.generation,
            incarnation: self.journal.incarnation().to_string(),
        };
        match self.take_up(dispatch, trace) {
            Ok((outcome, waits)) => async move {
                Some(match waits.await {
                    Ok(()) => answer.outcome(outcome),
                    Err(failure) => answer.refused(&failure),
                })
            }
            .boxed(),
            Err(failure) if failure.code == Code::Draining => futures::future::ready(None).boxed(),
            Err(failure) => futures::future::ready(Some(answer.refused(&failure))).boxed(),
        }
    }

    fn take_up(
        self: &Arc<Self>,
        dispatch: pb::Dispatch,
        trace: TraceContext,
    ) -> Result<(pb::DispatchOutcome, Waits), Failure> {
        let id: ToolCallId = dispatch.call_id.parse().map_err(|e| Failure::field("call_id", format!("{e}")))?;
        if dispatch.generation < 1 {
            return Err(Failure::field("generation", "a dispatch has a generation from 1 on"));
        }
        if dispatch.incarnation != self.journal.incarnation().to_string() {
            return Err(Failure::new(
                Code::DaemonReplaced,
                "this daemon's journal is not the one that the call was meant for; nothing was started",
            ));
        }
        let repeatable = is_read_only(&dispatch.tool);
        let mut running = self.running.lock();
        let prepared = match self.journal.decide(id, dispatch.generation, repeatable, dispatch.dispatched_at_ms) {
            Decision::Start => Some(self.prepare(&dispatch, running.len())?),
            _ => None,
        };
        let header = Header {
            generation: dispatch.generation,
            tool: dispatch.tool.clone(),
            repeatable,
            started_ms: now_ms(),
            dispatched_ms: dispatch.dispatched_at_ms,
            chat_id: dispatch.chat_id.clone(),
            user_id: dispatch.user_id.clone(),
            traceparent: trace.traceparent.clone(),
        };
        let (decision, ticket) = self.journal.dispatch(id, header).map_err(|e| e.failure())?;
        match (decision, prepared) {
            (Decision::Start, Some(prepared)) => {
                let output = self.outputs.begin(
                    id,
                    dispatch.generation,
                    &dispatch.chat_id,
                    &dispatch.user_id,
                    &trace.traceparent,
                );
                let cancel = CancellationToken::new();
                let entry = Running {
                    tool: dispatch.tool.clone(),
                    started_ms: now_ms(),
                    cancel: cancel.clone(),
                    output: output.clone(),
                };
                running.insert(id, entry);
                let (started, waits) = tokio::sync::oneshot::channel();
                let begun = run::Begun { id, dispatch, prepared, output, cancel, trace };
                self.tasks.spawn(run::run(self.clone(), begun, ticket, started));
                let waits = async move {
                    waits.await.unwrap_or_else(|_| Err(Failure::new(Code::Internal, "the call was dropped")))
                };
                Ok((pb::DispatchOutcome::Started, waits.boxed()))
            }
            (Decision::Attached, _) => {
                if let Some(entry) = running.get(&id) {
                    // Viewers follow the newer epoch from here on; what was before they are refilled with.
                    entry.output.generation.store(dispatch.generation, Ordering::Relaxed);
                }
                Ok((pb::DispatchOutcome::Attached, durable(ticket)))
            }
            (Decision::Finished, _) => {
                let outbox = self.outbox.clone();
                let waits = async move {
                    ticket.durable().await.map_err(|e| e.failure())?;
                    outbox.add(id, &trace.traceparent, None);
                    Ok(())
                };
                Ok((pb::DispatchOutcome::Finished, waits.boxed()))
            }
            (Decision::Tombstone, _) => Ok((pb::DispatchOutcome::Tombstone, durable(ticket))),
            // As for a lack of room, the cloud sends again what it still wants to run.
            (Decision::Stale, _) => {
                Err(Failure::new(Code::QueueFull, "the dispatch came too late to be believed; nothing was started"))
            }
            (Decision::Full, _) => Err(JournalError::Full.failure().retry_after(Duration::from_secs(10))),
            // Only this function starts calls, under the lock that it holds.
            (Decision::Start, None) => Err(Failure::new(Code::Internal, "the call was not prepared")),
        }
    }

    /// Everything that may be wrong with a call that is new here. Nothing is written yet.
    fn prepare(&self, dispatch: &pb::Dispatch, running: usize) -> Result<Prepared, Failure> {
        if self.draining.load(Ordering::Acquire) {
            return Err(Failure::new(Code::Draining, "the daemon is stopping; nothing was started"));
        }
        if running >= self.max_running {
            let text = format!("{running} calls run on this daemon, and no more can; nothing was started");
            return Err(Failure::new(Code::QueueFull, text).retry_after(Duration::from_secs(1)));
        }
        let root = self.roots.get(&dispatch.root_id).ok_or_else(|| {
            Failure::new(Code::PathOutsideRoot, format!("this daemon offers no root '{}'", dispatch.root_id))
        })?;
        self.toolbox.prepare(&root, &dispatch.tool, &dispatch.input_json)
    }

    /// Takes a cancel up. The future is the answer; `None`: it could not be recorded, and must be asked again.
    pub fn cancel(&self, cancel: pb::CancelCall) -> BoxFuture<'static, Option<pb::CancelReply>> {
        let Ok(id) = cancel.call_id.parse::<ToolCallId>() else {
            return futures::future::ready(Some(pb::CancelReply { call_id: cancel.call_id, known: false })).boxed();
        };
        let (outcome, ticket) = match self.journal.cancel(id, cancel.generation) {
            Ok(done) => done,
            Err(error) => {
                tracing::error!(error = %chain(&error), "a cancel could not be recorded");
                return futures::future::ready(None).boxed();
            }
        };
        if outcome == Cancelled::Stop
            && let Some(running) = self.running.lock().get(&id)
        {
            running.cancel.cancel();
        }
        async move {
            ticket.durable().await.ok()?;
            Some(pb::CancelReply { call_id: id.to_string(), known: outcome != Cancelled::Unknown })
        }
        .boxed()
    }

    /// The cloud took a result, or threw it away.
    pub fn acknowledge(&self, ack: &pb::ResultAck) {
        let Ok(id) = ack.call_id.parse::<ToolCallId>() else { return };
        let committed = match ack.outcome() {
            pb::AckOutcome::Committed => true,
            pb::AckOutcome::Discarded => false,
            pb::AckOutcome::Unspecified => return,
        };
        if self.journal.acknowledge(id, ack.generation, committed, ack.acknowledged_at_ms) {
            self.outbox.remove(id);
        }
    }

    pub fn running_ids(&self) -> Vec<String> {
        self.running.lock().keys().map(ToString::to_string).collect()
    }

    pub fn running_status(&self) -> Vec<RunningStatus> {
        let running = self.running.lock();
        let at = |ms| chrono::DateTime::from_timestamp_millis(ms).unwrap_or_default().to_rfc3339();
        running
            .iter()
            .map(|(id, r)| RunningStatus {
                call_id: id.to_string(),
                tool: r.tool.clone(),
                started_at: at(r.started_ms),
            })
            .collect()
    }

    /// No new calls; those that run get `grace`, and are then killed and recorded.
    pub async fn drain(&self, grace: Duration) {
        self.draining.store(true, Ordering::Release);
        self.tasks.close();
        if tokio::time::timeout(grace, self.tasks.wait()).await.is_ok() {
            return;
        }
        for running in self.running.lock().values() {
            running.cancel.cancel();
        }
        let _ = tokio::time::timeout(process::KILL_GRACE * 10, self.tasks.wait()).await;
    }

    fn timeout_of(dispatch: &pb::Dispatch) -> Duration {
        match u64::try_from(dispatch.timeout_ms) {
            Ok(ms) if ms > 0 => Duration::from_millis(ms).min(limits::TOOL_TIMEOUT_MAX),
            _ => limits::TOOL_TIMEOUT,
        }
    }
}

type Waits = BoxFuture<'static, Result<(), Failure>>;

fn durable(ticket: Ticket) -> Waits {
    async move { ticket.durable().await.map_err(|e| e.failure()) }.boxed()
}

/// A dispatch's answer, whatever it will be.
struct Answer {
    call_id: String,
    generation: i64,
    incarnation: String,
}

impl Answer {
    fn outcome(self, outcome: pb::DispatchOutcome) -> pb::DispatchReply {
        pb::DispatchReply {
            call_id: self.call_id,
            generation: self.generation,
            outcome: outcome as i32,
            error_code: String::new(),
            message: String::new(),
            incarnation: self.incarnation,
        }
    }

    fn refused(self, failure: &Failure) -> pb::DispatchReply {
        pb::DispatchReply {
            error_code: failure.code.as_str().into(),
            message: failure.message.clone(),
            ..self.outcome(pb::DispatchOutcome::Refused)
        }
    }
}
