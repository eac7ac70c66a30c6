//! A chat for which work was requested must be looked at: a chat whose `wanted > seen` stands still for 30 seconds with
//! every server up is a finding at once, and what explains it is saved while it still stands.
//!
//! The rules, by reading:
//! - The wait of a chat begins when it is first read as unseen, and again when its `seen` has advanced.
//! - Every wait begins again after a reading with a server under a fault, or with no worker free of one. It therefore
//!   has its full length after each fault.
//! - A chat whose row a test holds does not wait: no worker can write that it looked.
//! - Time is charged as [`Conditions`] say, and no more than [`CHARGED_MAX`] for one reading: what was not read in time
//!   is not held against the mesh.
//! - A reading that failed charges nothing.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use reliant_flows::{FlowsConfig, histories, workflow_id};
use reliant_harness::{Arena, Peer, UnseenChat};
use reliant_types::ChatId;
use tokio::{task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{conditions::Conditions, tally::Tally};

/// A worker looks at a requested chat at once; a lost signal is sent again by the relay after 2 seconds.
pub const UNSEEN_MAX: Duration = Duration::from_secs(30);
const READ_EVERY: Duration = Duration::from_secs(1);
pub const CHARGED_MAX: Duration = Duration::from_secs(2);
const LOG_LINES: usize = 400;
/// Chats whose evidence is saved; those beyond are named all the same.
const SAVED_MAX: usize = 12;

/// What is known of the mesh at one reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MeshState {
    /// Some server is under a fault, or no worker is free of one.
    pub hindered: bool,
    /// Faults that servers have had so far: tells of one that began and ended between two readings.
    pub server_faults: u64,
}

impl MeshState {
    fn read(arena: &Arena) -> Self {
        let claimed = arena.claimed();
        let server = claimed.iter().any(|peer| matches!(peer, Peer::Server(_)));
        let workers = arena.roles_of("worker");
        let free = workers.iter().any(|worker| !claimed.contains(&Peer::Role(worker.name.clone())));
        Self { hindered: server || !free, server_faults: arena.server_faults() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StuckChat {
    pub chat: ChatId,
    pub wanted: i64,
    pub seen: i64,
    pub waited: Duration,
}

#[derive(Debug)]
struct Wait {
    seen: i64,
    waited: Duration,
    reported: bool,
}

/// The rules, apart from where the readings come from.
#[derive(Debug)]
pub struct Liveness {
    conditions: Arc<Conditions>,
    waits: HashMap<ChatId, Wait>,
    charged: Duration,
    server_faults: u64,
}

impl Liveness {
    pub fn new(conditions: Arc<Conditions>) -> Self {
        let charged = conditions.charged();
        Self { conditions, waits: HashMap::new(), charged, server_faults: 0 }
    }

    /// Takes in one reading and returns the chats that are found by it, each once until its `seen` advances. `unseen` is
    /// `None` where the rows could not be read.
    pub fn observe(&mut self, mesh: MeshState, unseen: Option<&[UnseenChat]>) -> Vec<StuckChat> {
        let charged = self.conditions.charged();
        let passed = charged.saturating_sub(self.charged).min(CHARGED_MAX);
        self.charged = charged;
        let disturbed = mesh.hindered || mesh.server_faults != self.server_faults;
        self.server_faults = mesh.server_faults;
        if disturbed {
            self.waits.values_mut().filter(|wait| !wait.reported).for_each(|wait| wait.waited = Duration::ZERO);
        }
        let Some(unseen) = unseen else { return Vec::new() };
        let waiting: HashMap<ChatId, &UnseenChat> =
            unseen.iter().filter(|one| !one.held).map(|one| (one.chat, one)).collect();
        self.waits.retain(|chat, wait| waiting.get(chat).is_some_and(|one| one.seen == wait.seen));
        let mut found = Vec::new();
        for (chat, one) in waiting {
            let Some(wait) = self.waits.get_mut(&chat) else {
                self.waits.insert(chat, Wait { seen: one.seen, waited: Duration::ZERO, reported: false });
                continue;
            };
            if disturbed || wait.reported {
                continue;
            }
            wait.waited += passed;
            if wait.waited >= UNSEEN_MAX {
                wait.reported = true;
                found.push(StuckChat { chat, wanted: one.wanted, seen: one.seen, waited: wait.waited });
            }
        }
        found
    }
}

/// The check at work, until it is stopped or the mesh is gone.
pub struct Monitor {
    stop: CancellationToken,
    reading: JoinHandle<()>,
}

impl Monitor {
    pub fn start(arena: &Arc<Arena>, conditions: &Arc<Conditions>, tally: &Arc<Tally>, evidence: &Path) -> Self {
        let stop = CancellationToken::new();
        let reading = watch(
            Arc::downgrade(arena),
            Liveness::new(conditions.clone()),
            tally.clone(),
            evidence.to_owned(),
            stop.clone(),
        );
        Self { reading: tokio::spawn(reading), stop }
    }

    /// Ends after the reading that is under way.
    pub async fn stop(self) {
        self.stop.cancel();
        // It has no other end than this one, and a panic has been printed.
        let _ = self.reading.await;
    }
}

async fn watch(
    arena: Weak<Arena>,
    mut liveness: Liveness,
    tally: Arc<Tally>,
    evidence: PathBuf,
    stop: CancellationToken,
) {
    let mut saved = 0;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(READ_EVERY) => {}
        }
        let Some(arena) = arena.upgrade() else { return };
        let unseen = arena.observer.unseen_chats().await;
        // Read after the rows, so that a fault which began meanwhile is known.
        let mesh = MeshState::read(&arena);
        for stuck in liveness.observe(mesh, unseen.as_deref().ok()) {
            let dir = evidence.join(format!("stuck-{}", stuck.chat));
            saved += 1;
            let place = match saved <= SAVED_MAX {
                true => save(&arena, &stuck, &dir).await,
                false => "nothing saved, others were".to_owned(),
            };
            tally.stuck(format!(
                "chat {} was not looked at for {:.0} s with every server up: wanted {}, seen {}; {place}",
                stuck.chat,
                stuck.waited.as_secs_f64(),
                stuck.wanted,
                stuck.seen
            ));
        }
    }
}

/// Saves what explains it and says where. What cannot be had is said in its place.
async fn save(arena: &Arena, stuck: &StuckChat, dir: &Path) -> String {
    let config = FlowsConfig {
        address: arena.temporal_url(),
        task_queue: arena.task_queue().to_owned(),
        ..FlowsConfig::default()
    };
    let history = histories::newest_history_json(&config, &workflow_id(stuck.chat)).await;
    let mut files = vec![match history {
        Ok(json) => ("history.json".to_owned(), json),
        Err(error) => ("no-history.txt".to_owned(), error.to_string().into_bytes()),
    }];
    let rows = arena.observer.chat_rows(stuck.chat).await;
    files.push(("rows.json".to_owned(), rows.unwrap_or_else(|error| format!("{error:#}")).into_bytes()));
    for worker in arena.roles_of("worker") {
        files.push((format!("{}.log", worker.name), worker.log_tail(LOG_LINES).await.into_bytes()));
    }
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(dir)?;
        files.iter().try_for_each(|(name, content)| std::fs::write(dir.join(name), content))
    };
    match write() {
        Ok(()) => format!("its history, rows and the workers' logs are in {}", dir.display()),
        Err(error) => format!("nothing could be saved in {}: {error}", dir.display()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const QUIET: MeshState = MeshState { hindered: false, server_faults: 0 };

    struct Bench {
        conditions: Arc<Conditions>,
        liveness: Liveness,
        chat: ChatId,
    }

    impl Bench {
        fn new() -> Self {
            let conditions = Arc::new(Conditions::default());
            Self { liveness: Liveness::new(conditions.clone()), conditions, chat: ChatId::new() }
        }

        fn unseen(&self, seen: i64) -> UnseenChat {
            UnseenChat { chat: self.chat, wanted: 77, seen, held: false }
        }

        /// So many seconds, read each second; how many findings they bring.
        async fn pass(&mut self, seconds: u32, mesh: MeshState, unseen: Option<UnseenChat>) -> usize {
            let mut found = 0;
            for _ in 0..seconds {
                advance(SECOND).await;
                let rows: Vec<UnseenChat> = unseen.into_iter().collect();
                found += self.liveness.observe(mesh, Some(&rows)).len();
            }
            found
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_chat_that_stands_still_for_thirty_seconds_is_found_once() {
        let mut bench = Bench::new();
        let chat = Some(bench.unseen(42));
        assert_eq!(bench.pass(30, QUIET, chat).await, 0);
        advance(SECOND).await;
        let rows = [bench.unseen(42)];
        let found = bench.liveness.observe(QUIET, Some(&rows));
        let expected = StuckChat { chat: bench.chat, wanted: 77, seen: 42, waited: 30 * SECOND };
        assert_eq!(found, [expected]);
        assert_eq!(bench.pass(300, QUIET, chat).await, 0);
        // Looked at, and unseen again.
        let chat = Some(bench.unseen(43));
        assert_eq!(bench.pass(30, QUIET, chat).await, 0);
        assert_eq!(bench.pass(1, QUIET, chat).await, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_chat_that_is_looked_at_begins_anew() {
        let mut bench = Bench::new();
        for seen in 0..10 {
            let chat = Some(bench.unseen(seen));
            assert_eq!(bench.pass(25, QUIET, chat).await, 0);
        }
        assert_eq!(bench.pass(1, QUIET, None).await, 0);
        let chat = Some(bench.unseen(9));
        assert_eq!(bench.pass(30, QUIET, chat).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn waits_begin_again_when_a_fault_of_a_server_ends() {
        let mut bench = Bench::new();
        let chat = Some(bench.unseen(42));
        assert_eq!(bench.pass(25, QUIET, chat).await, 0);
        let away = MeshState { hindered: true, server_faults: 1 };
        assert_eq!(bench.pass(120, away, chat).await, 0);
        let back = MeshState { hindered: false, server_faults: 1 };
        assert_eq!(bench.pass(29, back, chat).await, 0);
        // One that began and ended between two readings.
        let again = MeshState { hindered: false, server_faults: 2 };
        assert_eq!(bench.pass(30, again, chat).await, 0);
        assert_eq!(bench.pass(1, again, chat).await, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_greedy_neighbour_stretches_the_limit_fourfold() {
        let mut bench = Bench::new();
        let chat = Some(bench.unseen(42));
        assert_eq!(bench.pass(1, QUIET, chat).await, 0);
        bench.conditions.set_cpu_taken(0.75);
        assert_eq!(bench.pass(119, QUIET, chat).await, 0);
        assert_eq!(bench.pass(1, QUIET, chat).await, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_row_that_is_held_and_a_reading_that_failed_do_not_count() {
        let mut bench = Bench::new();
        let held = Some(UnseenChat { held: true, ..bench.unseen(42) });
        assert_eq!(bench.pass(100, QUIET, held).await, 0);
        let chat = Some(bench.unseen(42));
        assert_eq!(bench.pass(20, QUIET, chat).await, 0);
        for _ in 0..100 {
            advance(SECOND).await;
            assert!(bench.liveness.observe(QUIET, None).is_empty());
        }
        assert_eq!(bench.pass(10, QUIET, chat).await, 0);
        assert_eq!(bench.pass(1, QUIET, chat).await, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_read_late_is_charged_as_two_seconds() {
        let mut bench = Bench::new();
        let chat = Some(bench.unseen(42));
        assert_eq!(bench.pass(1, QUIET, chat).await, 0);
        let rows = [bench.unseen(42)];
        for _ in 0..14 {
            advance(60 * SECOND).await;
            assert!(bench.liveness.observe(QUIET, Some(&rows)).is_empty());
        }
        advance(60 * SECOND).await;
        assert_eq!(bench.liveness.observe(QUIET, Some(&rows)).len(), 1);
    }
}
