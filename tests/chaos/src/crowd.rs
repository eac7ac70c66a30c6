//! Everybody else: chats that go on all the time, so that each fault strikes many turns at many steps.

use std::{sync::Arc, time::Duration};

use anyhow::Result;
use reliant_harness::{Arena, Host, Visitor};
use reliant_types::{Failure, pb};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    chance::Chance,
    conditions::Conditions,
    scripts::{call, last, message, round},
    seat::{Accepted, Ledger, Seat},
    step::describe,
    tally::Tally,
};

/// As for the chats that faults are aimed at, and the fault of another on top.
const END_PATIENCE: Duration = Duration::from_secs(240);

/// What all chats of a campaign share.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    pub arena: &'a Arena,
    pub conditions: &'a Arc<Conditions>,
    pub ledger: &'a Ledger,
    pub tally: &'a Tally,
    /// Told: no new turn.
    pub stop: &'a CancellationToken,
}

pub struct Neighbour {
    pub visitor: Visitor,
    pub host: Host,
    pub seats: Vec<Seat>,
    name: String,
}

impl Neighbour {
    pub async fn new(arena: &Arc<Arena>, name: &str, chats: usize, ledger: &Arc<Ledger>) -> Result<Self> {
        let visitor = arena.visitor(name).await?;
        let host = arena.host(&visitor, name).await?;
        let mut seats = Vec::new();
        for number in 0..chats {
            let mode = if number % 3 == 2 { pb::ChatMode::Ask } else { pb::ChatMode::Auto };
            seats.push(Seat::take(&visitor.client, mode, ledger).await?);
        }
        Ok(Self { visitor, host, seats, name: name.to_owned() })
    }

    /// Until told to stop, and then to the end of the last turn.
    pub async fn live(&self, context: Context<'_>, seed: u64) {
        let Context { ledger, tally, stop, .. } = context;
        let lives = self.seats.iter().enumerate().map(|(number, seat)| async move {
            let mut chance = Chance::new(seed, 500_000 + number as u64);
            let asks = number % 3 == 2;
            while !stop.is_cancelled() {
                let key = ledger.key(&self.name);
                if let Err(error) = one_turn(context, seat, &key, asks, &mut chance).await {
                    tally.problem(format!("{key}: {error:#}"));
                }
                tokio::time::sleep(chance.between(100, 1500)).await;
            }
        });
        let reads = self.read_on(Chance::new(seed, 600_000), ledger, stop);
        tokio::join!(futures::future::join_all(lives), reads);
    }

    /// Looks into its chats until told to stop, as open pages do.
    async fn read_on(&self, mut chance: Chance, ledger: &Ledger, stop: &CancellationToken) {
        while !self.seats.is_empty() && !stop.is_cancelled() {
            let seat = chance.pick(&self.seats);
            if let Err(failure) = read(seat).await {
                ledger.failed_calls.lock().push(format!("GetChat or ListMessages: {failure}"));
            }
            tokio::time::sleep(chance.between(100, 400)).await;
        }
    }
}

async fn read(seat: &Seat) -> Result<(), Failure> {
    let chat_id = seat.chat.to_string();
    seat.client.get_chat(pb::GetChatRequest { chat_id: chat_id.clone() }).await?;
    seat.client.list_messages(pb::ListMessagesRequest { chat_id, ..Default::default() }).await?;
    Ok(())
}

async fn one_turn(context: Context<'_>, seat: &Seat, key: &str, asks: bool, chance: &mut Chance) -> Result<()> {
    let tokens = 20 + chance.below(60);
    let seconds = 0.05 + chance.below(15) as f64 / 10.0;
    let rounds = match chance.below(4) {
        0 => vec![round(tokens, 20.0, vec![])],
        1 => vec![round(tokens, 25.0, vec![call(key, seconds)]), last(key)],
        2 => vec![round(tokens, 40.0, (0..3).map(|_| call(key, seconds)).collect()), last(key)],
        _ => {
            let one = || round(8, 30.0, vec![call(key, seconds / 3.0)]);
            vec![one(), one(), one(), last(key)]
        }
    };
    let turn = seat.send(key, &message(key, rounds)).await?;
    until_ended(context, seat, &turn, asks).await
}

/// Waits for the end of a turn as its viewer sees it, and approves what it asks for.
pub async fn until_ended(context: Context<'_>, seat: &Seat, turn: &Accepted, asks: bool) -> Result<()> {
    let Context { arena, conditions, tally, .. } = context;
    let patience = conditions.patience(END_PATIENCE);
    loop {
        if let Some(status) = seat.ended(turn.turn, Instant::now() + Duration::from_millis(700)).await {
            if status != pb::TurnStatus::Succeeded {
                tally.problem(format!("{}: the turn ended as {status:?}", turn.key));
            }
            return Ok(());
        }
        // Without approvals to decide, the viewer alone says when it is over.
        if asks && let Ok(look) = arena.observer.turn(turn.turn).await {
            for approval in &look.approvals_pending {
                // Asked for again at the next look.
                let _ = seat.approve(&approval.to_string()).await;
            }
        }
        if patience.is_over() {
            let look = arena.observer.turn(turn.turn).await;
            let rows = look.map_or_else(|error| error.to_string(), |look| describe(&look));
            anyhow::bail!("the viewer saw no end of turn {}; rows: {rows}", turn.turn);
        }
    }
}
