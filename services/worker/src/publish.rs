//! Hints to viewers, in order, behind the commit path.
//!
//! One queue and one sender: what was enqueued first is published first, so that a viewer's replica does not see jumps
//! that are none. A full queue drops; Postgres has the events and the producer has the text.

use reliant_bus::{Bus, FeedSubject, UpdateSubject};
use reliant_telemetry::{TraceContext, chain, sampled};
use reliant_types::{ChatId, UserId, pb};
use tokio::sync::mpsc;

/// Hints that wait for NATS.
const QUEUE_MAX: usize = 4096;
/// An event above this is not put into a hint: viewers see the jump and read it from Postgres.
const EVENT_MAX_BYTES: usize = 512 * 1024;
/// Events and deltas of one hint.
const HINT_MAX_BYTES: usize = 768 * 1024;

enum Hint {
    Update(UpdateSubject, pb::ChatUpdate, TraceContext),
    Feed(FeedSubject, pb::FeedUpdate, TraceContext),
}

#[derive(Clone)]
pub struct Publisher {
    queue: mpsc::Sender<Hint>,
}

/// What was enqueued and is to be sent.
pub struct Hints {
    queue: mpsc::Receiver<Hint>,
}

impl Hints {
    pub async fn send(mut self, bus: Bus) {
        while let Some(hint) = self.queue.recv().await {
            let sent = match hint {
                Hint::Update(topic, update, trace) => bus.publish_with(&trace, &topic, &update).await,
                Hint::Feed(topic, update, trace) => bus.publish_with(&trace, &topic, &update).await,
            };
            if let Err(error) = sent {
                tracing::debug!(error = %chain(&error), "a hint was not published; viewers will find what it told of");
            }
        }
    }
}

impl Publisher {
    pub fn new() -> (Self, Hints) {
        let (sender, queue) = sampled::channel("hints", QUEUE_MAX);
        (Self { queue: sender }, Hints { queue })
    }

    /// Events that were just committed.
    pub fn events(&self, user: UserId, events: Vec<pb::ChatEvent>) {
        if events.is_empty() {
            return;
        }
        let trace = Bus::context_of_publish::<UpdateSubject>();
        let mut batch = Vec::new();
        let mut bytes = 0;
        for event in events {
            let size = prost::Message::encoded_len(&event);
            let other = batch.first().is_some_and(|first: &pb::ChatEvent| first.chat_id != event.chat_id);
            if other || bytes + size > HINT_MAX_BYTES {
                self.batch(user, std::mem::take(&mut batch), &trace);
                bytes = 0;
            }
            if size <= EVENT_MAX_BYTES {
                bytes += size;
                batch.push(event);
            }
        }
        self.batch(user, batch, &trace);
    }

    fn batch(&self, user: UserId, events: Vec<pb::ChatEvent>, trace: &TraceContext) {
        let Some(chat) = events.first().and_then(|event| event.chat_id.parse::<ChatId>().ok()) else { return };
        let update = pb::ChatUpdate { events, ..Default::default() };
        self.enqueue(Hint::Update(UpdateSubject { user, chat }, update, trace.clone()));
    }

    pub fn feed(&self, user: UserId, events: Vec<pb::FeedEvent>) {
        if !events.is_empty() {
            let trace = Bus::context_of_publish::<FeedSubject>();
            self.enqueue(Hint::Feed(FeedSubject { user }, pb::FeedUpdate { events }, trace));
        }
    }

    pub fn deltas(&self, user: UserId, chat: ChatId, deltas: Vec<pb::Delta>, trace: &TraceContext) {
        let mut batch = Vec::new();
        let mut bytes = 0;
        for delta in deltas {
            if bytes + delta.piece.len() > HINT_MAX_BYTES / 2 {
                self.delta_batch(user, chat, std::mem::take(&mut batch), trace);
                bytes = 0;
            }
            bytes += delta.piece.len();
            batch.push(delta);
        }
        self.delta_batch(user, chat, batch, trace);
    }

    fn delta_batch(&self, user: UserId, chat: ChatId, deltas: Vec<pb::Delta>, trace: &TraceContext) {
        if !deltas.is_empty() {
            let update = pb::ChatUpdate { deltas, ..Default::default() };
            self.enqueue(Hint::Update(UpdateSubject { user, chat }, update, trace.clone()));
        }
    }

    pub fn lengths(&self, user: UserId, chat: ChatId, lengths: Vec<pb::BlockLength>) {
        let update = pb::ChatUpdate { lengths, ..Default::default() };
        self.enqueue(Hint::Update(UpdateSubject { user, chat }, update, TraceContext::default()));
    }

    fn enqueue(&self, hint: Hint) {
        if self.queue.try_send(hint).is_err() {
            sampled::refused("hints");
        }
    }
}
