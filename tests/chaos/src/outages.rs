//! Outages that overlap: a server is away or paused, and meanwhile another one, or a worker, is stopped, killed or paused.

use std::{collections::BTreeSet, fmt, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use reliant_harness::{Arena, Claim, Fault, Network, Node};
use tokio::time::{Instant, sleep};

use crate::{
    chance::Chance,
    conditions::Conditions,
    matrix::Process,
    tally::{Tally, say},
};

const SERVERS: [Process; 3] = [Process::Postgres, Process::Nats, Process::Temporal];
/// Between two pairs.
const GAP_MS: (u64, u64) = (3000, 8000);
/// Both processes must be free of other faults.
const CLAIM_PATIENCE: Duration = Duration::from_secs(60);
const CLAIM_EVERY: Duration = Duration::from_millis(100);
/// A pair that was begun needs so long.
const PAIR_MIN: Duration = Duration::from_secs(15);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outage {
    Cut,
    Stopped,
    Killed,
    Paused,
}

impl Outage {
    const fn name(self) -> &'static str {
        match self {
            Self::Cut => "cut",
            Self::Stopped => "stopped",
            Self::Killed => "killed",
            Self::Paused => "paused",
        }
    }

    /// `lasting` counts from when the process has ended, where it is asked to end.
    fn fault(self, lasting: Duration) -> Fault {
        match self {
            Self::Cut => Fault::Network { network: Network::Cut, lasting, only: None },
            Self::Stopped => Fault::Terminate { back_after: lasting },
            Self::Killed => Fault::Kill { back_after: lasting },
            Self::Paused => Fault::Pause(lasting),
        }
    }
}

/// The second outage begins while the first one lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    pub first: (Process, Outage),
    pub second: (Process, Outage),
}

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ((first, how), (second, also)) = (self.first, self.second);
        write!(f, "{first} {} + {second} {}", how.name(), also.name())
    }
}

impl Pair {
    fn processes(&self) -> (Process, Process) {
        (self.first.0, self.second.0)
    }

    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for first in SERVERS {
            let others = SERVERS.into_iter().filter(|other| *other != first);
            for second in others.chain([Process::Worker]) {
                // A worker that is asked to end drains for longer than any server is away.
                let ends = if second == Process::Worker { Outage::Killed } else { Outage::Stopped };
                for how in [Outage::Cut, Outage::Stopped, Outage::Paused] {
                    all.extend([ends, Outage::Paused].map(|also| Self { first: (first, how), second: (second, also) }));
                }
            }
        }
        all
    }
}

/// So many pairs in an order of the seed. Where there is room, each two processes come in either order before any two
/// come again.
pub fn plan(seed: u64, count: usize) -> Vec<Pair> {
    let mut all = Pair::all();
    Chance::new(seed, 3).shuffle(&mut all);
    let mut plan = Vec::new();
    while plan.len() < count && !all.is_empty() {
        let mut had = BTreeSet::new();
        let (now, later) = all.into_iter().partition::<Vec<_>, _>(|pair: &Pair| had.insert(pair.processes()));
        plan.extend(now);
        all = later;
    }
    plan.truncate(count);
    plan
}

/// One pair after another, none while servers are spared and none that could not end before `deadline`.
pub async fn run(
    arena: &Arc<Arena>,
    conditions: &Conditions,
    pairs: &[Pair],
    seed: u64,
    deadline: Instant,
    tally: &Tally,
) {
    let mut chance = Chance::new(seed, 700_000);
    for pair in pairs {
        conditions.until_not_calm().await;
        if Instant::now() + PAIR_MIN > deadline {
            return;
        }
        match strike(arena, *pair, &mut chance, tally).await {
            Ok(()) => tally.overlapped(*pair),
            Err(error) => tally.problem(format!("{pair}: {error:#}")),
        }
        sleep(chance.between(GAP_MS.0, GAP_MS.1)).await;
    }
}

async fn strike(arena: &Arc<Arena>, pair: Pair, chance: &mut Chance, tally: &Tally) -> Result<()> {
    let first = node(arena, pair.first.0, chance)?;
    let second = node(arena, pair.second.0, chance)?;
    let (claim, other_claim) =
        claims(arena, &first, &second).await.context("other faults were at them all the time")?;
    let fault = pair.first.1.fault(chance.between(6000, 10_000));
    let other_fault = pair.second.1.fault(match pair.second.1 {
        Outage::Stopped | Outage::Killed => chance.between(0, 500),
        Outage::Cut | Outage::Paused => chance.between(2000, 4000),
    });
    say(&format!("  {pair}"));
    tally.done(&first.peer().to_string(), &fault);
    // Healed whatever becomes of this campaign.
    let healing = tokio::spawn(arena.strike(claim, &first, &fault).await?.heal());
    sleep(chance.between(1000, 2500)).await;
    tally.done(&second.peer().to_string(), &other_fault);
    let other_healing = tokio::spawn(arena.strike(other_claim, &second, &other_fault).await?.heal());
    let (healed, other_healed) = tokio::join!(healing, other_healing);
    healed?.with_context(|| format!("{} did not come back", first.peer()))?;
    other_healed?.with_context(|| format!("{} did not come back", second.peer()))
}

fn node(arena: &Arena, process: Process, chance: &mut Chance) -> Result<Node> {
    if let Some(server) = process.server() {
        return Ok(Node::Server(server));
    }
    let roles = arena.roles_of(process.name());
    anyhow::ensure!(!roles.is_empty(), "there is no {process}");
    Ok(Node::Role(chance.pick(&roles).clone()))
}

/// Both or none, so that two that wait for each other's process do not wait for ever.
async fn claims(arena: &Arc<Arena>, first: &Node, second: &Node) -> Option<(Claim, Claim)> {
    let deadline = Instant::now() + CLAIM_PATIENCE;
    while Instant::now() < deadline {
        // The first claim ends with this attempt where the second one fails.
        if let Some(claim) = arena.claim(first)
            && let Some(other) = arena.claim(second)
        {
            return Some((claim, other));
        }
        sleep(CLAIM_EVERY).await;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_two_processes_come_in_either_order_before_any_come_again() {
        let kinds: BTreeSet<_> = Pair::all().iter().map(Pair::processes).collect();
        assert_eq!(kinds.len(), 9);
        for seed in 0..20 {
            let pairs = plan(seed, 24);
            assert_eq!(pairs, plan(seed, 24));
            assert_eq!(pairs.iter().collect::<BTreeSet<_>>().len(), 24);
            for part in pairs.chunks_exact(9) {
                assert_eq!(part.iter().map(Pair::processes).collect::<BTreeSet<_>>(), kinds);
            }
        }
        assert_ne!(plan(1, 24), plan(2, 24));
        assert_eq!(plan(1, 1).len(), 1);
        assert_eq!(plan(1, 1000).len(), Pair::all().len());
        let named = Pair { first: (Process::Postgres, Outage::Cut), second: (Process::Temporal, Outage::Stopped) };
        assert!(Pair::all().contains(&named));
        assert_eq!(named.to_string(), "Postgres cut + Temporal stopped");
    }
}
