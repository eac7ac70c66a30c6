//! Finds publishes that were lost and that nothing followed, and turns that stand still: batched questions, once a second, over
//! what has viewers here.

use std::{sync::Arc, time::Duration};

use reliant_bus::{Bus, UpdateSubject};
use reliant_store::StoreError;
use reliant_telemetry::chain;
use tokio::time::{MissedTickBehavior, interval};

use super::{hub::Hub, table::Command};
use crate::effects;

const INTERVAL: Duration = Duration::from_secs(1);
/// A turn that is due and that no worker has looked at for so long: its person is told why.
const STANDS_AFTER: Duration = Duration::from_secs(10);
/// Subjects of one question.
const BATCH_MAX: usize = 10_000;

/// For ever; a drain cancels it.
pub async fn run(hub: Arc<Hub>) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut log_epoch = None;
    loop {
        ticks.tick().await;
        if let Err(error) = look(&hub, &mut log_epoch).await {
            tracing::debug!(error = %chain(&error), "the logs could not be compared");
        }
        if let Err(error) = tell_standing(&hub).await {
            tracing::debug!(error = %chain(&error), "the people of turns that stand were not told why");
        }
    }
}

async fn tell_standing(hub: &Hub) -> Result<(), StoreError> {
    let chats: Vec<_> = hub.chats.progress().into_iter().map(|((_, chat), _)| chat).collect();
    for batch in chats.chunks(BATCH_MAX) {
        for committed in hub.deps.store.tell_standing(batch, STANDS_AFTER).await? {
            let trace = Bus::context_of_publish::<UpdateSubject>();
            effects::publish_events(&hub.deps.bus, &trace, committed.user, committed.events).await;
        }
    }
    Ok(())
}

async fn look(hub: &Hub, log_epoch: &mut Option<i64>) -> Result<(), StoreError> {
    let (chats, users) = (hub.chats.progress(), hub.users.progress());
    if chats.is_empty() && users.is_empty() {
        return Ok(());
    }
    let epoch = hub.deps.store.log_epoch().await?;
    let reset = log_epoch.replace(epoch).is_some_and(|known| known != epoch);
    for batch in chats.chunks(BATCH_MAX) {
        let ids: Vec<_> = batch.iter().map(|((_, chat), _)| *chat).collect();
        let last: std::collections::HashMap<_, _> = hub.deps.store.last_seqs(&ids).await?.into_iter().collect();
        for (key, seq) in batch {
            // A log that is shorter than what was given out is another log.
            match last.get(&key.1) {
                Some(last) if reset || (last < seq && *seq != i64::MAX) => hub.chats.tell(key, Command::Reset),
                Some(last) if last > seq => hub.chats.tell(key, Command::Reaches { seq: *last }),
                _ => {}
            }
        }
    }
    for batch in users.chunks(BATCH_MAX) {
        let ids: Vec<_> = batch.iter().map(|(user, _)| *user).collect();
        let last: std::collections::HashMap<_, _> = hub.deps.store.feed_seqs(&ids).await?.into_iter().collect();
        for (user, seq) in batch {
            match last.get(user) {
                Some(_) if reset => hub.users.tell(user, Command::Reset),
                Some(last) if last > seq => hub.users.tell(user, Command::Reaches { seq: *last }),
                _ => {}
            }
        }
    }
    Ok(())
}
