//! Phases of a campaign: for a while a noisy neighbour takes CPU, memory or the disk; between them servers are spared, so
//! that the mesh must go on by itself.

use std::{fmt, sync::Arc, time::Duration};

use anyhow::{Result, ensure};
use reliant_harness::{Arena, Peer};
use serde_json::Value;
use tokio::time::{Instant, sleep, sleep_until};

use crate::{
    chance::Chance,
    conditions::Conditions,
    stressor::Stressor,
    tally::{Tally, say},
};

const HALF: f64 = 0.5;
const THREE_QUARTERS: f64 = 0.75;
/// Of what is available; the stressor itself keeps to its own maximum.
const MEMORY_SHARE: f64 = 0.35;
const DISK_MAX_BYTES: u64 = 4 << 30;
/// A stressor that got less than this part of what it was to take proves nothing.
const CPU_GOT_MIN: f64 = 0.6;
/// The same where it may not go before the mesh, and has to share with it.
const CPU_SHARED_GOT_MIN: f64 = 0.4;
/// A phase that could only be shorter is not begun.
const PHASE_MIN: Duration = Duration::from_secs(10);
/// Longer than a chat may stand still, so that one that does is found in it.
const CALM: Duration = Duration::from_secs(40);
/// The longest that the end of a server's fault is waited for.
const HEAL_PATIENCE: Duration = Duration::from_secs(45);
const HEAL_POLL: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    HalfOfCores,
    ThreeQuartersOfCores,
    AllCores,
    Memory,
    Disk,
    /// No stressor, and no fault of a server.
    Calm,
}

impl Phase {
    pub const STRESSED: [Self; 5] =
        [Self::HalfOfCores, Self::ThreeQuartersOfCores, Self::AllCores, Self::Memory, Self::Disk];

    /// As the report's JSON has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::HalfOfCores => "neighbour_half_of_cores",
            Self::ThreeQuartersOfCores => "neighbour_three_quarters_of_cores",
            Self::AllCores => "neighbour_all_cores",
            Self::Memory => "memory_pressure",
            Self::Disk => "slow_disk",
            Self::Calm => "calm",
        }
    }

    const fn cpu_share(self) -> f64 {
        match self {
            Self::HalfOfCores => HALF,
            Self::ThreeQuartersOfCores => THREE_QUARTERS,
            Self::AllCores => 1.0,
            Self::Memory | Self::Disk | Self::Calm => 0.0,
        }
    }

    fn stressor(self, arena: &Arena) -> Option<Stressor> {
        match self {
            Self::HalfOfCores | Self::ThreeQuartersOfCores | Self::AllCores => {
                Some(Stressor::Cpu { share: self.cpu_share() })
            }
            Self::Memory => Some(Stressor::Memory { share: MEMORY_SHARE }),
            Self::Disk => Some(Stressor::Disk { dir: arena.servers_dir().to_owned(), bytes_max: DISK_MAX_BYTES }),
            Self::Calm => None,
        }
    }

    /// Whether the stressor took what it was to take, by its own account.
    fn check(self, took: &Value) -> Result<()> {
        match self {
            Self::HalfOfCores | Self::ThreeQuartersOfCores | Self::AllCores => {
                let number = |key: &str| took[key].as_f64().unwrap_or_default();
                let part = if took["preferred"] == true { CPU_GOT_MIN } else { CPU_SHARED_GOT_MIN };
                let least = number("cores") * self.cpu_share() * part;
                ensure!(number("cores_taken") >= least, "the stressor got too little: {took}");
            }
            Self::Memory => ensure!(took["bytes_taken"].as_u64() > Some(0), "the stressor got no memory: {took}"),
            Self::Disk => ensure!(took["writes"].as_u64() > Some(0), "the stressor wrote nothing: {took}"),
            Self::Calm => {}
        }
        Ok(())
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    pub phase: Phase,
    pub lasting: Duration,
}

/// Each of them once, in an order of the seed, then any of them again; a calm after each.
pub fn plan(seed: u64, stressed: usize, lasting: Duration) -> Vec<Planned> {
    let mut chance = Chance::new(seed, 4);
    let mut order = Phase::STRESSED.to_vec();
    chance.shuffle(&mut order);
    while order.len() < stressed {
        order.push(*chance.pick(&Phase::STRESSED));
    }
    order.truncate(stressed);
    let calm = Planned { phase: Phase::Calm, lasting: CALM };
    order.into_iter().flat_map(|phase| [Planned { phase, lasting }, calm]).collect()
}

/// One phase after another, as long as they fit before `deadline`.
pub async fn run(
    arena: &Arc<Arena>,
    conditions: &Arc<Conditions>,
    phases: &[Planned],
    deadline: Instant,
    tally: &Tally,
) {
    for planned in phases {
        let left = deadline.saturating_duration_since(Instant::now());
        // A shorter calm would find nothing, and it may have to wait for servers.
        let least = match planned.phase {
            Phase::Calm => planned.lasting + HEAL_PATIENCE / 3,
            _ => PHASE_MIN.min(planned.lasting),
        };
        if left < least {
            return;
        }
        let lasting = planned.lasting.min(left);
        match one(arena, conditions, planned.phase, lasting).await {
            Ok(()) => tally.phase(planned.phase),
            Err(error) => say(&format!("   - {} did not count: {error:#}", planned.phase)),
        }
    }
}

async fn one(arena: &Arena, conditions: &Arc<Conditions>, phase: Phase, lasting: Duration) -> Result<()> {
    say(&format!("  {phase} for {:.0} s", lasting.as_secs_f64()));
    let Some(stressor) = phase.stressor(arena) else {
        let _ends = CalmGuard::begin(conditions);
        until_servers_are_up(arena).await;
        sleep(lasting).await;
        return Ok(());
    };
    let end = Instant::now() + lasting;
    let took = {
        // Its own limit is only for the case that nobody is there to end it.
        let process = stressor.start(lasting * 2)?;
        let _ends = CpuGuard::begin(conditions, phase.cpu_share());
        sleep_until(end).await;
        process.finish().await?
    };
    say(&format!("  {phase} ended: {took}"));
    phase.check(&took)
}

/// What was done to a server before the calm began may last on; the calm counts from its end.
async fn until_servers_are_up(arena: &Arena) {
    let patience = Instant::now() + HEAL_PATIENCE;
    while Instant::now() < patience && arena.claimed().iter().any(|peer| matches!(peer, Peer::Server(_))) {
        sleep(HEAL_POLL).await;
    }
}

/// Ends the calm also where the campaign is given up.
struct CalmGuard<'a>(&'a Conditions);

impl<'a> CalmGuard<'a> {
    fn begin(conditions: &'a Conditions) -> Self {
        conditions.set_calm(true);
        Self(conditions)
    }
}

impl Drop for CalmGuard<'_> {
    fn drop(&mut self) {
        self.0.set_calm(false);
    }
}

struct CpuGuard<'a>(&'a Conditions);

impl<'a> CpuGuard<'a> {
    fn begin(conditions: &'a Conditions, share: f64) -> Self {
        conditions.set_cpu_taken(share);
        Self(conditions)
    }
}

impl Drop for CpuGuard<'_> {
    fn drop(&mut self) {
        self.0.set_cpu_taken(0.0);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn each_kind_comes_before_any_comes_again_and_a_calm_follows_each() {
        for seed in 0..20 {
            let phases = plan(seed, 7, MINUTE);
            assert_eq!(phases, plan(seed, 7, MINUTE));
            assert_eq!(phases.len(), 14);
            let mut first: Vec<Phase> = phases.iter().step_by(2).take(5).map(|planned| planned.phase).collect();
            first.sort();
            assert_eq!(first, Phase::STRESSED);
            assert!(phases.iter().skip(1).step_by(2).all(|planned| planned.phase == Phase::Calm));
        }
        assert_ne!(plan(1, 5, MINUTE), plan(3, 5, MINUTE));
        assert!(CALM > crate::liveness::UNSEEN_MAX);
    }

    #[test]
    fn a_stressor_that_got_too_little_does_not_count() {
        let took = |cores_taken: f64| json!({ "cores": 2, "cores_taken": cores_taken, "preferred": true });
        assert!(Phase::ThreeQuartersOfCores.check(&took(1.48)).is_ok());
        assert!(Phase::ThreeQuartersOfCores.check(&took(0.85)).is_err());
        assert!(Phase::HalfOfCores.check(&took(0.85)).is_ok());
        assert!(Phase::AllCores.check(&took(1.7)).is_ok());
        let equal = json!({ "cores": 2, "cores_taken": 0.9, "preferred": false });
        assert!(Phase::AllCores.check(&equal).is_ok());
        assert!(Phase::Memory.check(&json!({ "bytes_taken": 0 })).is_err());
        assert!(Phase::Disk.check(&json!({ "writes": 3 })).is_ok());
    }
}
