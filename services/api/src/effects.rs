//! What follows a commit: hints to viewers, the wake of the workflow, words to daemons. All of it may be lost, and is
//! found again from Postgres; so it is bounded, done behind the answer, and given up rather than queued.

use std::{future::Future, sync::Arc};

use reliant_bus::{Bus, FeedSubject, UpdateSubject};
use reliant_flows::Flows;
use reliant_runtime::{Drain, TaskKind};
use reliant_store::{Committed, Wake};
use reliant_telemetry::{TraceContext, chain, hop, metrics, sampled};
use reliant_types::{ChatId, InstanceId, UserId, pb};
use tokio::sync::Semaphore;
use tracing::Instrument as _;

/// An event above this is not put into a hint: viewers see the jump and read it from Postgres.
const EVENT_MAX_BYTES: usize = 512 * 1024;

#[derive(Clone)]
pub struct Effects {
    bus: Bus,
    flows: Flows,
    drain: Drain,
    places: Arc<Semaphore>,
}

impl Effects {
    pub fn new(bus: Bus, flows: Flows, drain: Drain, max_tasks: usize) -> Self {
        Self { bus, flows, drain, places: sampled::places("effects", max_tasks) }
    }

    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Tells whom it concerns, behind the caller's back, and gives back the value.
    pub fn after<T>(&self, committed: Committed<T>) -> T {
        let Committed { value, user, events, feed, wake } = committed;
        if events.is_empty() && feed.is_empty() && wake.is_none() {
            return value;
        }
        let (bus, flows) = (self.bus.clone(), self.flows.clone());
        let update =
            if events.is_empty() { TraceContext::default() } else { Bus::context_of_publish::<UpdateSubject>() };
        let feed_context =
            if feed.is_empty() { TraceContext::default() } else { Bus::context_of_publish::<FeedSubject>() };
        let asked = TraceContext::incoming();
        self.spawn("hints and wake", async move {
            let hints = async {
                publish_events(&bus, &update, user, events).await;
                publish_feed(&bus, &feed_context, user, feed).await;
            };
            let wake = async {
                if let Some(wake) = wake {
                    match wake.burst {
                        Some(worker) => hint_burst(&bus, &wake, worker).await,
                        None => wake_chat(&flows, wake, &asked).await,
                    }
                }
            };
            tokio::join!(hints, wake);
        });
        value
    }

    /// Runs `task` behind the answer; a drain waits for it. Dropped, and counted, where too many run already.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        match self.places.clone().try_acquire_owned() {
            Ok(place) => {
                self.drain.spawn(TaskKind::Work(name), async move {
                    task.await;
                    drop(place);
                });
            }
            Err(_) => sampled::refused("effects"),
        }
    }
}

pub async fn publish_events(bus: &Bus, trace: &TraceContext, user: UserId, events: Vec<pb::ChatEvent>) {
    let Some(chat) = events.first().and_then(|event| event.chat_id.parse::<ChatId>().ok()) else { return };
    for events in batches(events) {
        let update = pb::ChatUpdate { events, ..Default::default() };
        if let Err(error) = bus.publish_with(trace, &UpdateSubject { user, chat }, &update).await {
            tracing::debug!(error = %chain(&error), "a hint was not published; viewers will find what it told of");
        }
    }
}

/// Events in portions that fit a message; what fits none is left out.
fn batches(events: Vec<pb::ChatEvent>) -> Vec<Vec<pb::ChatEvent>> {
    let mut batches = vec![Vec::new()];
    let mut bytes = 0;
    for event in events {
        let size = prost::Message::encoded_len(&event);
        if size > EVENT_MAX_BYTES {
            continue;
        }
        if bytes + size > EVENT_MAX_BYTES {
            batches.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        if let Some(batch) = batches.last_mut() {
            batch.push(event);
        }
    }
    batches.retain(|batch| !batch.is_empty());
    batches
}

async fn publish_feed(bus: &Bus, trace: &TraceContext, user: UserId, events: Vec<pb::FeedEvent>) {
    if events.is_empty() {
        return;
    }
    if let Err(error) = bus.publish_with(trace, &FeedSubject { user }, &pb::FeedUpdate { events }).await {
        tracing::debug!(error = %chain(&error), "a hint was not published; viewers will find what it told of");
    }
}

/// `asked`: the call that made the wake due. Where that is of another trace than the turn (a decision, a cancel), the two
/// are linked.
async fn wake_chat(flows: &Flows, wake: Wake, asked: &TraceContext) {
    let turn = TraceContext::from_traceparent(&wake.traceparent);
    let span = tracing::info_span!(parent: None, "turn.wake", otel.kind = "producer", chat.id = %wake.chat);
    if asked.trace_id() != turn.trace_id() {
        asked.link(&span);
    }
    let trace = hop(&turn, span);
    let timer = metrics::guard(&metrics::WAKES, &[]);
    match flows.wake(wake.chat, &trace.traceparent).instrument(tracing::Span::none()).await {
        Ok(()) => timer.done("ok"),
        Err(error) => {
            timer.done("failed");
            tracing::warn!(error = %chain(&error), chat.id = %wake.chat, "a chat was not woken; the relay will do it");
        }
    }
}

/// A worker has a burst of the chat: it looks again before the burst ends.
async fn hint_burst(bus: &Bus, wake: &Wake, worker: InstanceId) {
    let hint = pb::BurstHint { chat_id: wake.chat.to_string(), ..Default::default() };
    let parent = TraceContext::from_traceparent(&wake.traceparent);
    if let Err(error) = bus.hint_burst(worker, &hint, &parent).await {
        tracing::debug!(error = %chain(&error), chat.id = %wake.chat, "a hint was not published; its worker finds what is wanted");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_fit_a_message_and_leave_out_what_fits_none() {
        let event = |seq, size| pb::ChatEvent {
            seq,
            kind: Some(pb::chat_event::Kind::MessageCommitted(pb::Message {
                model: "x".repeat(size),
                ..Default::default()
            })),
            ..Default::default()
        };
        let big = EVENT_MAX_BYTES * 2 / 3;
        let batches = batches(vec![event(1, 10), event(2, big), event(3, EVENT_MAX_BYTES), event(4, big), event(5, 1)]);
        let seqs: Vec<Vec<_>> = batches.iter().map(|batch| batch.iter().map(|event| event.seq).collect()).collect();
        assert_eq!(seqs, [vec![1, 2], vec![4, 5]]);
        assert!(super::batches(Vec::new()).is_empty());
    }
}
