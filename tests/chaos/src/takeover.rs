//! How long a viewer waits when the worker that streams to it is killed: from the kill to the next piece, which comes
//! from another worker under a later epoch.

use std::{sync::Arc, time::Duration};

use anyhow::Result;
use reliant_harness::{Arena, Fault, Node, Visitor};
use reliant_types::pb;
use tokio::time::{Instant, sleep};

use crate::{
    chance::Chance,
    matrix::{Cell, Kind, Process, Step},
    scripts::{last, message, round},
    seat::{Accepted, Ledger, Seat},
    tally::{Hit, Tally, say},
};

/// Streams at one time; the killed worker has some of them.
const STREAMS: usize = 4;
const STREAM_PATIENCE: Duration = Duration::from_secs(30);
/// A takeover that takes longer is a problem of its own.
const TAKEOVER_PATIENCE: Duration = Duration::from_secs(60);
const END_PATIENCE: Duration = Duration::from_secs(120);
const CELL: Cell = Cell { process: Process::Worker, kind: Kind::Kill, step: Step::Streaming };

pub struct Audience {
    arena: Arc<Arena>,
    name: String,
    // Keeps the way of its people to the api open.
    visitor: Visitor,
    seats: Vec<Seat>,
    ledger: Arc<Ledger>,
}

impl Audience {
    pub async fn new(arena: &Arc<Arena>, name: &str, ledger: &Arc<Ledger>) -> Result<Self> {
        let visitor = arena.visitor(name).await?;
        let mut seats = Vec::new();
        for _ in 0..STREAMS {
            seats.push(Seat::take(&visitor.client, pb::ChatMode::Auto, ledger).await?);
        }
        Ok(Self { arena: arena.clone(), name: name.to_owned(), visitor, seats, ledger: ledger.clone() })
    }

    pub fn into_parts(self) -> (Vec<Seat>, Visitor) {
        (self.seats, self.visitor)
    }

    /// So many kills, or as many as fit before the deadline.
    pub async fn kill(&self, count: usize, deadline: Instant, seed: u64, tally: &Arc<Tally>) {
        let mut chance = Chance::new(seed, 900_000);
        let mut done = 0;
        while done < count && Instant::now() < deadline {
            match self.once(&mut chance, tally).await {
                Ok(true) => done += 1,
                Ok(false) => {}
                // Rows could not be read in time, for example: then it is not known what was hit.
                Err(error) => say(&format!("   - a takeover was not measured: {error:#}")),
            }
        }
    }

    async fn once(&self, chance: &mut Chance, tally: &Arc<Tally>) -> Result<bool> {
        let mut turns: Vec<(&Seat, Accepted)> = Vec::new();
        for seat in &self.seats {
            let key = self.ledger.key(&self.name);
            let rounds = vec![round(75, 25.0, vec![]), last(&key)];
            turns.push((seat, seat.send(&key, &message(&key, rounds)).await?));
        }
        let hit = self.strike(&turns, chance, tally).await;
        let deadline = Instant::now() + END_PATIENCE;
        for (seat, turn) in &turns {
            match seat.ended(turn.turn, deadline).await {
                Some(pb::TurnStatus::Succeeded) => {}
                other => tally.problem(format!("takeover: {} ended as {other:?}", turn.key)),
            }
        }
        hit
    }

    async fn strike(&self, turns: &[(&Seat, Accepted)], chance: &mut Chance, tally: &Arc<Tally>) -> Result<bool> {
        // All of them stream.
        let deadline = Instant::now() + STREAM_PATIENCE;
        for (seat, turn) in turns {
            if seat.until(deadline, |seat| seat.pieces(1, turn.at)).await.is_none() {
                return Ok(false);
            }
        }
        sleep(chance.between(0, 700)).await;
        let mut streams = Vec::new();
        for (seat, turn) in turns {
            let look = self.arena.observer.turn(turn.turn).await?;
            if let (true, Some(producer)) = (look.live, look.producer) {
                streams.push((*seat, turn, look.fence, producer));
            }
        }
        let Some((_, _, _, producer)) = streams.first().cloned() else { return Ok(false) };
        let Some(role) = self.arena.role_at(&producer) else { return Ok(false) };
        let node = Node::Role(role);
        let Some(claim) = self.arena.claim(&node) else { return Ok(false) };
        let fault = Fault::Kill { back_after: chance.between(100, 1000) };
        let since_ms = tally.wall_ms();
        let strike = self.arena.strike(claim, &node, &fault).await?;
        let at = strike.at;
        // Only what streamed from there at that moment counts.
        let mut struck = Vec::new();
        for (seat, turn, fence, of) in streams {
            let look = self.arena.observer.turn(turn.turn).await?;
            if of == producer && look.live && look.fence == fence {
                struck.push((seat, turn, fence));
            }
        }
        let counts = !struck.is_empty();
        if counts {
            tally.takeover_kill();
        }
        tally.hit(Hit { cell: CELL, node: node.peer().to_string(), counts, since_ms, fault });
        let healing = tokio::spawn(strike.heal());
        for (seat, turn, fence) in struck {
            let next = seat.until(at + TAKEOVER_PATIENCE, |seat| seat.pieces(fence + 1, at)).await;
            match next {
                Some((_, pieces)) => tally.takeover(pieces.first_at.duration_since(at)),
                None => tally.problem(format!("takeover: {} had no next piece in {TAKEOVER_PATIENCE:?}", turn.key)),
            }
        }
        healing.await??;
        Ok(counts)
    }
}
