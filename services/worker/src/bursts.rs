//! The open bursts of this worker. What comes for their chats meanwhile is hinted to them here and not signalled to Temporal.
//!
//! A hint may be lost: each second Postgres is asked of which chats something is wanted, and which turns have ended.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use reliant_bus::{BurstSubject, BusError};
use reliant_telemetry::chain;
use reliant_types::ChatId;
use tokio::sync::Notify;

use crate::engine::Engine;

const OBSERVE_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Default)]
pub struct Bursts {
    open: Mutex<HashMap<ChatId, (u64, Arc<Notify>)>>,
    count: AtomicU64,
}

impl Bursts {
    /// Dropping it closes it.
    pub fn open(&self, chat: ChatId) -> OpenBurst<'_> {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let hint = Arc::new(Notify::new());
        self.open.lock().insert(chat, (number, hint.clone()));
        OpenBurst { bursts: self, chat, number, hint }
    }

    /// Something is wanted of the chat.
    pub fn hint(&self, chat: ChatId) {
        if let Some((_, hint)) = self.open.lock().get(&chat) {
            hint.notify_one();
        }
    }

    fn chats(&self) -> Vec<ChatId> {
        self.open.lock().keys().copied().collect()
    }
}

pub struct OpenBurst<'a> {
    bursts: &'a Bursts,
    chat: ChatId,
    number: u64,
    hint: Arc<Notify>,
}

impl OpenBurst<'_> {
    pub fn hinted(&self) -> &Notify {
        &self.hint
    }
}

impl Drop for OpenBurst<'_> {
    fn drop(&mut self) {
        let mut open = self.bursts.open.lock();
        // A younger burst of the same chat may have taken the place.
        if open.get(&self.chat).is_some_and(|(number, _)| *number == self.number) {
            open.remove(&self.chat);
        }
    }
}

/// Hints of other processes.
pub async fn hints(engine: Arc<Engine>) -> Result<(), BusError> {
    let mut hints = engine.bus.subscribe(&BurstSubject { worker: engine.instance.0 }).await?;
    while let Some(received) = hints.next().await {
        received.span().in_scope(|| {
            if let Ok(turn) = received.message.cancelled_turn_id.parse() {
                engine.cancels.cancel(turn);
            }
            if let Ok(chat) = received.message.chat_id.parse() {
                engine.bursts.hint(chat);
            }
        });
    }
    Ok(())
}

pub async fn observe(engine: Arc<Engine>) {
    let mut tick = tokio::time::interval(OBSERVE_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let chats = engine.bursts.chats();
        if chats.is_empty() {
            continue;
        }
        match engine.store.observe_bursts(engine.instance, &chats, &engine.cancels.turns()).await {
            Ok(observed) => {
                observed.chats.into_iter().for_each(|chat| engine.bursts.hint(chat));
                observed.ended.into_iter().for_each(|turn| engine.cancels.cancel(turn));
            }
            Err(error) => tracing::debug!(error = %chain(&error), "what is wanted of the chats at work was not read"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_hint_reaches_the_open_burst_of_its_chat_alone() {
        let bursts = Bursts::default();
        let (chat, other) = (ChatId::new(), ChatId::new());
        let first = bursts.open(chat);
        let second = bursts.open(other);
        bursts.hint(chat);
        first.hinted().notified().await;
        let limit = Duration::from_secs(1);
        assert!(tokio::time::timeout(limit, second.hinted().notified()).await.is_err());
        // A burst that was lost and begun again here: the older one's end leaves the younger one open.
        let again = bursts.open(chat);
        drop(first);
        bursts.hint(chat);
        again.hinted().notified().await;
        drop(again);
        assert_eq!(bursts.chats(), [other]);
    }
}
