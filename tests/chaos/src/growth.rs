//! Chats that grow: some outgrow their model's window during the campaign, so that their prompts are cut, and one does
//! hundreds of turns, so that it is longer than a run of its workflow.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use reliant_harness::{Arena, Host, Visitor};
use reliant_types::pb;
use tokio::time::{Instant, sleep, sleep_until};

use crate::{
    chance::Chance,
    crowd::{Context, until_ended},
    scripts::{call, last, long_message, message, round},
    seat::{Ledger, Seat},
};

/// A model with a small window; the simulator refuses a longer prompt, as a provider would.
pub const SMALL_MODEL: &str = "sim/text?window=16384";
/// Its limits, for the roles' configuration.
pub const SMALL_MODEL_CONFIG: &str = "[[models.models]]\nid = \"sim/text?window=16384\"\ncontext_window = 16384\n\
                                      max_output_tokens = 1024\n\n";
/// Of each message to the small model: some ten of them are more than its window takes.
const MESSAGE_BYTES: usize = 6000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Growth {
    /// Chats with the small model.
    pub small_windows: usize,
    /// Turns of the long chat, spread over the time in which faults are done; 0: there is no such chat.
    pub long_turns: usize,
}

impl Growth {
    pub const NONE: Self = Self { small_windows: 0, long_turns: 0 };
}

/// Somebody with such chats and a daemon.
pub struct Growing {
    pub visitor: Visitor,
    pub host: Host,
    pub small: Vec<Seat>,
    pub long: Option<Seat>,
    growth: Growth,
    long_done: AtomicUsize,
}

impl Growing {
    pub async fn new(arena: &Arc<Arena>, growth: Growth, ledger: &Arc<Ledger>) -> Result<Self> {
        let visitor = arena.visitor("growing").await?;
        let host = arena.host(&visitor, "growing").await?;
        let mut small = Vec::new();
        for _ in 0..growth.small_windows {
            small.push(Seat::take_with(&visitor.client, SMALL_MODEL, pb::ChatMode::Auto, ledger).await?);
        }
        let long = match growth.long_turns {
            0 => None,
            _ => Some(Seat::take(&visitor.client, pb::ChatMode::Auto, ledger).await?),
        };
        Ok(Self { visitor, host, small, long, growth, long_done: AtomicUsize::new(0) })
    }

    /// Turns of the long chat that have ended.
    pub fn long_turns(&self) -> usize {
        self.long_done.load(Ordering::Relaxed)
    }

    /// Until told to stop, and then to the end of the last turns. `span`: over which the long chat's turns are spread.
    pub async fn live(&self, context: Context<'_>, seed: u64, span: Duration) {
        let Context { ledger, tally, stop, .. } = context;
        let small = self.small.iter().enumerate().map(|(number, seat)| async move {
            let mut chance = Chance::new(seed, 800_000 + number as u64);
            while !stop.is_cancelled() {
                let key = ledger.key("growing");
                let text = long_message(&key, MESSAGE_BYTES, small_rounds(&key, &mut chance));
                if let Err(error) = one(context, seat, &key, &text).await {
                    tally.problem(format!("{key}: {error:#}"));
                }
                sleep(chance.between(50, 500)).await;
            }
        });
        tokio::join!(futures::future::join_all(small), self.live_long(context, span));
    }

    async fn live_long(&self, context: Context<'_>, span: Duration) {
        let Context { ledger, tally, stop, .. } = context;
        let Some(seat) = &self.long else { return };
        let begun = Instant::now();
        for number in 0..self.growth.long_turns {
            // What is late is not waited for; what has time waits, so that faults meet the chat at every length.
            let due = begun + span * number as u32 / self.growth.long_turns as u32;
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep_until(due) => {}
            }
            let key = ledger.key("long");
            let rounds = match number % 4 {
                0 => vec![round(6, 60.0, vec![call(&key, 0.02)]), last(&key)],
                _ => vec![round(12, 60.0, vec![])],
            };
            match one(context, seat, &key, &message(&key, rounds)).await {
                Ok(()) => {
                    self.long_done.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => tally.problem(format!("{key}: {error:#}")),
            }
        }
    }
}

/// Several rounds, so that a cut which takes one of the current turn lets the model make its call again.
fn small_rounds(key: &str, chance: &mut Chance) -> Vec<serde_json::Value> {
    let mut rounds: Vec<_> = (0..chance.below(4)).map(|_| round(10, 60.0, vec![call(key, 0.05)])).collect();
    rounds.push(last(key));
    rounds
}

async fn one(context: Context<'_>, seat: &Seat, key: &str, text: &str) -> Result<()> {
    let turn = seat.send(key, text).await?;
    until_ended(context, seat, &turn, false).await
}
