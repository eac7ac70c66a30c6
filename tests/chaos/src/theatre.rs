//! A mesh with its people: opened, played with, and checked when it closes.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use reliant_harness::{Arena, ArenaOptions, Fault, Node, eventually};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    checker,
    conditions::Conditions,
    crowd::{Context, Neighbour},
    growth::{Growing, Growth, SMALL_MODEL_CONFIG},
    liveness::Monitor,
    plan::Plan,
    replay,
    report::{Findings, Report},
    seat::Ledger,
    step::Stage,
    takeover::Audience,
    tally::{Tally, say},
};

/// The longest of replaying all histories.
const REPLAY_MAX: Duration = Duration::from_secs(180);
/// What was under a fault when the last one was done must be well by then.
const HEAL_PATIENCE: Duration = Duration::from_secs(120);
/// Kept of a campaign's time for its report, and for what is dropped to end.
const REPORT: Duration = Duration::from_secs(5);

/// People are not to be limited, and a provider that went silent is given up sooner than after a minute.
const CONFIG: &str = "[api.limits.rate]\ncalls_per_second = 0.0\n\n[models]\nstall = \"10s\"\n\n";
/// Logs tell what went wrong. Daemons get what begins here.
const LOG_CONFIG: &str = "[telemetry]\nlog = \"info\"\n";

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

/// What only a campaign has.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub growth: Growth,
    /// Postgres waits for its disk.
    pub durable: bool,
    /// Where what explains a finding is saved.
    pub evidence: Option<PathBuf>,
    /// More TOML for all roles.
    pub config: String,
}

pub struct Theatre {
    pub arena: Arc<Arena>,
    pub ledger: Arc<Ledger>,
    pub tally: Arc<Tally>,
    pub stages: Vec<Stage>,
    pub neighbours: Vec<Neighbour>,
    pub audience: Audience,
    pub seed: u64,
    pub(crate) conditions: Arc<Conditions>,
    growing: Option<Growing>,
    monitor: Monitor,
    evidence: PathBuf,
    begun: Instant,
}

impl Theatre {
    pub async fn open(cast: &Cast, seed: u64) -> Result<Self> {
        Self::open_with(cast, seed, "").await
    }

    /// With more TOML for all roles.
    pub async fn open_with(cast: &Cast, seed: u64, config: &str) -> Result<Self> {
        let settings = Settings { growth: Growth::NONE, durable: false, evidence: None, config: config.to_owned() };
        Self::open_campaign(cast, seed, settings).await
    }

    pub(crate) async fn open_campaign(cast: &Cast, seed: u64, settings: Settings) -> Result<Self> {
        let begun = Instant::now();
        let Settings { growth, durable, evidence, config } = settings;
        let Cast { apis, workers, gateways, .. } = *cast;
        let config = format!("{CONFIG}{SMALL_MODEL_CONFIG}{LOG_CONFIG}\n{config}");
        let options = ArenaOptions { apis, workers, gateways, config, durable };
        let arena = Arena::start(options).await.context("the mesh did not start")?;
        say(&format!("logs are in {}", arena.logs().display()));
        let (ledger, tally) = (Arc::new(Ledger::default()), Arc::new(Tally::new(seed)));
        let conditions = Arc::new(Conditions::default());
        let evidence = evidence.unwrap_or_else(|| arena.dir().join("evidence"));
        let monitor = Monitor::start(&arena, &conditions, &tally, &evidence);
        let mut stages = Vec::new();
        for number in 0..cast.stages {
            stages.push(Stage::new(&arena, &format!("stage{number}"), &ledger, &conditions).await?);
        }
        let mut neighbours = Vec::new();
        for number in 0..cast.neighbours {
            neighbours.push(Neighbour::new(&arena, &format!("crowd{number}"), cast.chats, &ledger).await?);
        }
        let audience = Audience::new(&arena, "audience", &ledger).await?;
        let growing = match growth == Growth::NONE {
            true => None,
            false => Some(Growing::new(&arena, growth, &ledger).await?),
        };
        say(&format!("up after {:.0} s", begun.elapsed().as_secs_f64()));
        Ok(Self {
            arena,
            ledger,
            tally,
            stages,
            neighbours,
            audience,
            seed,
            conditions,
            growing,
            monitor,
            evidence,
            begun,
        })
    }

    /// The crowd goes on while `play` does, and then to the end of its turns.
    pub async fn while_crowded<T>(&self, play: impl Future<Output = T>) -> T {
        self.while_crowded_for(Duration::ZERO, play).await
    }

    /// `span`: over which the long chat spreads its turns.
    pub(crate) async fn while_crowded_for<T>(&self, span: Duration, play: impl Future<Output = T>) -> T {
        let stop = CancellationToken::new();
        let Self { arena, conditions, ledger, tally, .. } = self;
        let context = Context { arena, conditions, ledger, tally, stop: &stop };
        let lives = (0..)
            .zip(&self.neighbours)
            .map(|(number, neighbour)| neighbour.live(context, self.seed.wrapping_add(number)));
        let growing = async {
            if let Some(growing) = &self.growing {
                growing.live(context, self.seed, span).await;
            }
        };
        let played = async {
            let played = play.await;
            stop.cancel();
            played
        };
        tokio::join!(played, futures::future::join_all(lives), growing).0
    }

    /// Does one fault and waits until it is healed.
    pub async fn fault(&self, node: Node, fault: Fault) -> Result<()> {
        let claim = self.arena.claim(&node).context("another fault is at it")?;
        self.tally.done(&node.peer().to_string(), &fault);
        self.arena.strike(claim, &node, &fault).await?.heal().await
    }

    /// Checks everything.
    pub async fn close(self) -> Result<Report> {
        self.close_by(Plan::default(), false, None).await
    }

    /// Checks everything, and the plan; by `end`, if there is one.
    pub(crate) async fn close_by(self, plan: Plan, keep: bool, end: Option<Instant>) -> Result<Report> {
        let Self {
            arena, ledger, tally, stages, neighbours, audience, seed, growing, monitor, evidence, begun, ..
        } = self;
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
        let (mut long_turns, mut small_chats) = (0, Vec::new());
        if let Some(growing) = growing {
            long_turns = growing.long_turns();
            small_chats = growing.small.iter().map(|seat| seat.chat).collect();
            hosts.push(growing.host);
            seats.extend(growing.small.into_iter().chain(growing.long));
            people.push(growing.visitor);
        }
        let subject = checker::Subject { arena: &arena, ledger: &ledger, hosts: &hosts, tally: &tally };
        let check_by = end.map(|end| end - REPORT);
        let checked = within(check_by, async {
            until_healed(&arena).await?;
            checker::check(&subject, seats).await
        });
        let findings = match checked.await {
            Some(Ok(findings)) => findings,
            Some(Err(error)) => {
                tally.problem(format!("the checker could not read everything: {error:#}"));
                Findings::default()
            }
            None => {
                tally.problem("its time was over before everything was checked".to_owned());
                Findings::default()
            }
        };
        let mut shortened = Vec::new();
        for chat in small_chats {
            shortened.push(arena.observer.shortened_turns(chat).await.unwrap_or_default());
        }
        let left = check_by.map_or(REPLAY_MAX, |by| by.saturating_duration_since(Instant::now()).min(REPLAY_MAX));
        let histories = replay::check(&arena, &evidence, left).await;
        monitor.stop().await;
        let mut report = Report::new(seed, begun.elapsed(), plan, &tally, findings);
        report.histories = histories;
        report.outgrown = shortened.iter().filter(|turns| **turns > 0).count();
        report.shortened_turns = shortened.iter().sum::<i64>() as usize;
        report.long_turns = long_turns;
        report.collapses = arena.collapses().iter().map(|one| format!("{}: {}", one.name, one.log_tail)).collect();
        report.failed_calls = ledger.failed_calls.lock().clone();
        if keep || !report.verdict().is_empty() {
            drop((people, hosts));
            arena.keep_files();
        }
        Ok(report)
    }
}

/// Waits until nothing is under a fault, or being started again after one.
async fn until_healed(arena: &Arena) -> Result<()> {
    eventually("the end of all faults", HEAL_PATIENCE, || async { Ok(arena.claimed().is_empty().then_some(())) }).await
}

/// `None`: it was not done in time.
async fn within<T>(by: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match by {
        Some(by) => tokio::time::timeout_at(by, work).await.ok(),
        None => Some(work.await),
    }
}

/// Started again at once.
pub const AT_ONCE: Duration = Duration::from_millis(50);
