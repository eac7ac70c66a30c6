//! What all parts of the worker share, and what follows a commit: hints and wakes, never on the commit's own path.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use reliant_bus::Bus;
use reliant_flows::{DriverError, Flows};
use reliant_models::Models;
use reliant_store::{Committed, Look, Step, Store, StoreError, Wake};
use reliant_telemetry::{TraceContext, chain, hop, metrics, sampled};
use reliant_types::{ChatId, Code, InstanceId, TurnId, pb};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::{
    bursts::Bursts, live::Live, load::Load, offers::Offers, publish::Publisher, rounds::Rounds,
    transcripts::Transcripts,
};

/// Wakes and other short errands under way at one time; past that they wait their turn.
const ERRANDS_MAX: usize = 256;

/// Why the worker could not do a step now; Temporal tries again.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the attempt was told to stop, and is tried again elsewhere")]
    Stopped,
}

impl From<EngineError> for DriverError {
    fn from(error: EngineError) -> Self {
        DriverError::new(error)
    }
}

pub struct Engine {
    pub store: Store,
    pub bus: Bus,
    pub flows: Flows,
    pub models: Models,
    pub publisher: Publisher,
    pub live: Live,
    pub rounds: Arc<Rounds>,
    pub bursts: Bursts,
    pub load: Load,
    pub transcripts: Transcripts,
    pub offers: Offers,
    /// Of calls that ask for none.
    pub tool_timeout: Duration,
    pub cancels: Cancels,
    pub instance: InstanceId,
    /// Results that come this soon after their dispatch are fed to the model without a detour.
    pub inline_wait: Duration,
    pub draining: CancellationToken,
    pub errands: Arc<Semaphore>,
    pub freed: Freed,
}

/// Says that places may have become free, where anybody waits for one.
#[derive(Default)]
pub struct Freed {
    waited_for: AtomicBool,
    notify: Notify,
}

impl Freed {
    /// Whether anybody waits, as of the last look.
    pub fn set_waited_for(&self, waits: bool) {
        self.waited_for.store(waits, Ordering::Relaxed);
    }

    pub fn is_waited_for(&self) -> bool {
        self.waited_for.load(Ordering::Relaxed)
    }

    /// Calls for a look.
    pub fn some(&self) {
        if self.is_waited_for() {
            self.notify.notify_one();
        }
    }

    pub async fn wait(&self) {
        self.notify.notified().await;
    }
}

impl Engine {
    pub fn errands() -> Arc<Semaphore> {
        sampled::places("errands", ERRANDS_MAX)
    }

    /// What the chat needs now.
    pub async fn next_step(self: &Arc<Self>, chat: ChatId, look: Look) -> Result<Step, EngineError> {
        let mut committed = match self.store.next_step(chat, look).await {
            Ok(committed) => committed,
            // A chat that is gone has nothing to do; asking again would change nothing.
            Err(StoreError::NotFound { .. }) => return Ok(Step::Idle),
            Err(error) => return Err(error.into()),
        };
        let step = std::mem::replace(&mut committed.value, Step::Idle);
        self.tell(committed);
        Ok(step)
    }

    /// Tells viewers of a commit, and wakes the chat where there is something to do.
    pub fn tell<T>(self: &Arc<Self>, committed: Committed<T>) {
        self.tell_with(committed, true);
    }

    pub fn tell_with<T>(self: &Arc<Self>, committed: Committed<T>, wake: bool) {
        let Committed { value: _, user, events, feed, wake: wanted } = committed;
        events.iter().for_each(measure);
        if events.iter().any(frees_a_place) {
            self.freed.some();
        }
        self.publisher.events(user, events);
        self.publisher.feed(user, feed);
        let Some(wanted) = wanted.filter(|_| wake) else { return };
        // Over the bound the relay wakes instead.
        let Ok(place) = self.errands.clone().try_acquire_owned() else { return sampled::refused("errands") };
        let engine = self.clone();
        tokio::spawn(async move {
            let _place = place;
            engine.wake(&wanted).await;
        });
    }

    /// By a hint where a worker has a burst of the chat, which looks again before it ends; else by a signal.
    pub async fn wake(&self, wake: &Wake) {
        let parent = TraceContext::from_traceparent(&wake.traceparent);
        if let Some(worker) = wake.burst {
            return self.hint(wake.chat, worker, &parent).await;
        }
        let span = tracing::info_span!("turn.wake", otel.kind = "producer", chat.id = %wake.chat);
        let trace = hop(&parent, span);
        let timer = metrics::guard(&metrics::WAKES, &[]);
        match self.flows.wake(wake.chat, &trace.traceparent).await {
            Ok(()) => timer.done("ok"),
            Err(error) => {
                timer.done("failed");
                tracing::debug!(error = %chain(&error), chat.id = %wake.chat, "a wake failed; the relay repeats it");
            }
        }
    }

    async fn hint(&self, chat: ChatId, worker: InstanceId, parent: &TraceContext) {
        if worker == self.instance {
            return self.bursts.hint(chat);
        }
        let hint = pb::BurstHint { chat_id: chat.to_string(), ..Default::default() };
        if let Err(error) = self.bus.hint_burst(worker, &hint, parent).await {
            tracing::debug!(error = %chain(&error), chat.id = %chat, "a hint was not published; its worker finds what is wanted");
        }
    }
}

/// Model calls of this worker that a hint may end at once.
#[derive(Default)]
pub struct Cancels {
    tokens: Mutex<HashMap<TurnId, (u64, CancellationToken)>>,
    count: AtomicU64,
}

impl Cancels {
    pub fn register(&self, turn: TurnId) -> CancelGuard<'_> {
        let token = CancellationToken::new();
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        self.tokens.lock().insert(turn, (number, token.clone()));
        CancelGuard { cancels: self, turn, number, token }
    }

    /// Those whose models are being called.
    pub fn turns(&self) -> Vec<TurnId> {
        self.tokens.lock().keys().copied().collect()
    }

    pub fn cancel(&self, turn: TurnId) {
        if let Some((_, token)) = self.tokens.lock().get(&turn) {
            token.cancel();
        }
    }
}

pub struct CancelGuard<'a> {
    cancels: &'a Cancels,
    turn: TurnId,
    number: u64,
    pub token: CancellationToken,
}

impl Drop for CancelGuard<'_> {
    fn drop(&mut self) {
        let mut tokens = self.cancels.tokens.lock();
        // A younger attempt of the same turn may have taken the place.
        if tokens.get(&self.turn).is_some_and(|(number, _)| *number == self.number) {
            tokens.remove(&self.turn);
        }
    }
}

/// A model's message is committed, or a turn has ended.
fn frees_a_place(event: &pb::ChatEvent) -> bool {
    match &event.kind {
        Some(pb::chat_event::Kind::MessageCommitted(message)) => message.role() == pb::Role::Assistant,
        Some(pb::chat_event::Kind::TurnChanged(turn)) => turn.ended_at.is_some(),
        _ => false,
    }
}

/// Turns and calls are counted where their end is committed, turns by the database's clock.
fn measure(event: &pb::ChatEvent) {
    let turn = match &event.kind {
        Some(pb::chat_event::Kind::TurnChanged(turn)) => turn,
        Some(pb::chat_event::Kind::ToolCallChanged(changed)) => {
            if let Some(call) = changed.tool_call.as_ref().filter(|call| call.ended_at.is_some()) {
                measure_call(call);
            }
            return;
        }
        _ => return,
    };
    let status = match turn.status() {
        pb::TurnStatus::Succeeded => "succeeded",
        pb::TurnStatus::Failed => "failed",
        pb::TurnStatus::Cancelled => "cancelled",
        _ => return,
    };
    if status == "failed" {
        metrics::TURN_FAILED.with_label_values(&[Code::parse(&turn.error_code).as_str()]).inc();
    }
    if let Some(time) = between(turn.created_at.as_ref(), turn.ended_at.as_ref()) {
        metrics::TURN_DURATION.with_label_values(&[status]).observe(time.as_secs_f64());
    }
}

/// A call that ended: how long it ran, as far as is known.
fn measure_call(call: &pb::ToolCall) {
    let unknown = |cause| metrics::TOOL_UNKNOWN.with_label_values(&[cause]).inc();
    match call.unknown_cause() {
        pb::UnknownCause::Unspecified => {}
        pb::UnknownCause::ProcessDied => unknown("process_died"),
        pb::UnknownCause::JournalLost => unknown("journal_lost"),
        pb::UnknownCause::DaemonAway => unknown("daemon_away"),
    }
    let status = call.status().as_str_name().trim_start_matches("TOOL_CALL_STATUS_").to_ascii_lowercase();
    let ran = between(call.started_at.as_ref(), call.ended_at.as_ref()).unwrap_or_default();
    metrics::TOOL_RUN.with_label_values(&[metrics::tool_label(&call.tool), &status]).observe(ran.as_secs_f64());
}

/// The time between two of the database's stamps.
pub fn between(from: Option<&prost_types::Timestamp>, to: Option<&prost_types::Timestamp>) -> Option<Duration> {
    let micros = |time: &prost_types::Timestamp| time.seconds * 1_000_000 + i64::from(time.nanos / 1000);
    let micros = micros(to?).checked_sub(micros(from?))?;
    Some(Duration::from_micros(u64::try_from(micros).ok()?))
}
