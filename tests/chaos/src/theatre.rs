//! A mesh with its people: opened, played with, and checked when it closes.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use reliant_harness::{Arena, ArenaOptions, Fault, Node};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    checker,
    crowd::Neighbour,
    plan::Plan,
    report::{Report, Tally, say},
    seat::Ledger,
    step::Stage,
    takeover::Audience,
};

/// People are not to be limited, a provider that went silent is given up sooner than after a minute, and logs tell what
/// went wrong.
const CONFIG: &str =
    "[api.limits.rate]\ncalls_per_second = 0.0\n\n[models]\nstall = \"10s\"\n\n[telemetry]\nlog = \"info\"\n";

/// Who is there.
#[derive(Debug, Clone)]
pub struct Cast {
    pub apis: usize,
    pub workers: usize,
    pub gateways: usize,
    /// Somebody for one aimed fault at a time each.
    pub stages: usize,
    /// People of the crowd, each with a daemon.
    pub neighbours: usize,
    /// Chats of each of them.
    pub chats: usize,
}

pub struct Theatre {
    pub arena: Arc<Arena>,
    pub ledger: Arc<Ledger>,
    pub tally: Arc<Tally>,
    pub stages: Vec<Stage>,
    pub neighbours: Vec<Neighbour>,
    pub audience: Audience,
    pub seed: u64,
    begun: Instant,
}

impl Theatre {
    pub async fn open(cast: &Cast, seed: u64) -> Result<Self> {
        Self::open_with(cast, seed, "").await
    }

    /// With more TOML for all roles.
    pub async fn open_with(cast: &Cast, seed: u64, config: &str) -> Result<Self> {
        let begun = Instant::now();
        let Cast { apis, workers, gateways, .. } = *cast;
        let config = format!("{CONFIG}\n{config}");
        let options = ArenaOptions { apis, workers, gateways, config, ..ArenaOptions::default() };
        let arena = Arena::start(options).await.context("the mesh did not start")?;
        say(&format!("logs are in {}", arena.logs().display()));
        let (ledger, tally) = (Arc::new(Ledger::default()), Arc::new(Tally::default()));
        let mut stages = Vec::new();
        for number in 0..cast.stages {
            stages.push(Stage::new(&arena, &format!("stage{number}"), &ledger).await?);
        }
        let mut neighbours = Vec::new();
        for number in 0..cast.neighbours {
            neighbours.push(Neighbour::new(&arena, &format!("crowd{number}"), cast.chats, &ledger).await?);
        }
        let audience = Audience::new(&arena, "audience", &ledger).await?;
        say(&format!("up after {:.0} s", begun.elapsed().as_secs_f64()));
        Ok(Self { arena, ledger, tally, stages, neighbours, audience, seed, begun })
    }

    /// The crowd goes on while `play` does, and then to the end of its turns.
    pub async fn while_crowded<T>(&self, play: impl Future<Output = T>) -> T {
        let stop = CancellationToken::new();
        let lives = (0..).zip(&self.neighbours).map(|(number, neighbour)| {
            neighbour.live(&self.arena, self.seed.wrapping_add(number), &self.ledger, &self.tally, &stop)
        });
        let played = async {
            let played = play.await;
            stop.cancel();
            played
        };
        tokio::join!(played, futures::future::join_all(lives)).0
    }

    /// Does one fault and waits until it is healed.
    pub async fn fault(&self, node: Node, fault: Fault) -> Result<()> {
        let claim = self.arena.claim(&node).context("another fault is at it")?;
        self.tally.done(&node.peer().to_string(), &fault);
        self.arena.strike(claim, &node, &fault).await?.heal().await
    }

    /// Checks everything.
    pub async fn close(self) -> Result<Report> {
        self.close_by(Plan::default(), false).await
    }

    /// Checks everything, and the plan.
    pub(crate) async fn close_by(self, plan: Plan, keep: bool) -> Result<Report> {
        let Self { arena, ledger, tally, stages, neighbours, audience, seed, begun } = self;
        let (mut hosts, mut seats, mut people) = (Vec::new(), Vec::new(), Vec::new());
        for Stage { visitor, host, auto, ask, .. } in stages {
            hosts.push(host);
            seats.extend([auto, ask]);
            people.push(visitor);
        }
        for Neighbour { visitor, host, seats: own, .. } in neighbours {
            hosts.push(host);
            seats.extend(own);
            people.push(visitor);
        }
        let (own, visitor) = audience.into_parts();
        seats.extend(own);
        people.push(visitor);
        let subject = checker::Subject { arena: &arena, ledger: &ledger, hosts: &hosts, tally: &tally };
        let findings = checker::check(&subject, seats).await.context("the checker could not read everything")?;
        let mut report = Report::new(seed, begun.elapsed(), plan, &tally, findings);
        report.collapses = arena.collapses().iter().map(|one| format!("{}: {}", one.name, one.log_tail)).collect();
        report.failed_calls = ledger.failed_calls.lock().clone();
        if keep || !report.verdict().is_empty() {
            drop((people, hosts));
            arena.keep_files();
        }
        Ok(report)
    }
}

/// Started again at once.
pub const AT_ONCE: Duration = Duration::from_millis(50);
