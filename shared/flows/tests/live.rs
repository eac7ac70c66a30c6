//! The workflow on a real Temporal server, with a driver in memory in place of Postgres.
//!
//! Needs a server at `RELIANT_TEST_TEMPORAL`, which `make test` starts. With `RELIANT_RECORD=1` these tests write the
//! histories that `replay.rs` reads.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::VecDeque,
    path::PathBuf,
    str::FromStr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use reliant_flows::{
    BurstEnd, BurstOrder, Driver, DriverError, FAILED_TASKS_MAX, Flows, FlowsConfig, RunState, run_worker,
    workflow::ChatWorkflow,
};
use reliant_telemetry::trace::TraceContext;
use reliant_types::{ChatId, TurnId};
use temporalio_client::{Client, ClientOptions, Connection, ConnectionOptions, Url, WorkflowHistory};
use temporalio_common::protos::temporal::api::operatorservice::v1::DeleteNamespaceRequest;
use temporalio_sdk::workflow_replayer::{WorkflowReplayer, WorkflowReplayerOptions};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

mod poison;

use poison::Poison;

#[derive(Clone, Debug)]
struct Turn {
    id: TurnId,
    /// It waits for the result of a tool.
    waits: bool,
}

/// Postgres and everything behind it, for one chat.
#[derive(Default)]
struct Memory {
    turns: Mutex<VecDeque<Turn>>,
    ended: Mutex<Vec<TurnId>>,
    traces: Mutex<Vec<String>>,
    failures: AtomicUsize,
    bursts: AtomicUsize,
    /// Bursts wait for this while it is set.
    hold: Mutex<Option<Arc<Notify>>>,
    stopped: AtomicUsize,
    /// Turns that end in one burst.
    turns_per_burst: usize,
    changed: Notify,
}

impl Memory {
    fn add(&self, waits: bool) -> TurnId {
        let id = TurnId::new();
        self.turns.lock().unwrap().push_back(Turn { id, waits });
        id
    }

    fn result(&self, id: TurnId) {
        self.turns.lock().unwrap().iter_mut().filter(|turn| turn.id == id).for_each(|turn| turn.waits = false);
    }

    fn bursts(&self) -> usize {
        self.bursts.load(Ordering::Relaxed)
    }

    async fn until(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !done(self) {
            assert!(Instant::now() < deadline, "no {what}: {:?}", self.turns.lock().unwrap());
            let _ = tokio::time::timeout(Duration::from_millis(5), self.changed.notified()).await;
        }
    }
}

#[async_trait]
impl Driver for Memory {
    async fn burst(
        &self,
        _order: BurstOrder,
        stop: CancellationToken,
        trace: TraceContext,
    ) -> Result<BurstEnd, DriverError> {
        if self.failures.try_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            return Err(DriverError::new("the database is away"));
        }
        self.traces.lock().unwrap().push(trace.traceparent);
        // Before it counts: who has seen the burst may let the next one through.
        let hold = self.hold.lock().unwrap().clone();
        self.bursts.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_waiters();
        if let Some(hold) = hold {
            tokio::select! {
                () = hold.notified() => {}
                () = stop.cancelled() => {
                    self.stopped.fetch_add(1, Ordering::Relaxed);
                    return Err(DriverError::new("stopped"));
                }
            }
        }
        let mut end = BurstEnd::default();
        let mut turns = self.turns.lock().unwrap();
        while turns.front().is_some_and(|turn| !turn.waits) {
            if end.turns as usize >= self.turns_per_burst.max(1) {
                end.look_after_ms = Some(0);
                break;
            }
            end.turns += 1;
            self.ended.lock().unwrap().extend(turns.pop_front().map(|turn| turn.id));
        }
        drop(turns);
        self.changed.notify_waiters();
        Ok(end)
    }
}

struct Rig {
    config: FlowsConfig,
    flows: Flows,
    memory: Arc<Memory>,
    chat: ChatId,
    client: Client,
    drain: CancellationToken,
    worker: tokio::task::JoinHandle<()>,
}

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

async fn rig() -> Rig {
    rig_with(FlowsConfig::default()).await
}

async fn rig_with(config: FlowsConfig) -> Rig {
    rig_of(config, Memory::default()).await
}

async fn rig_of(config: FlowsConfig, memory: Memory) -> Rig {
    let address = std::env::var("RELIANT_TEST_TEMPORAL")
        .expect("RELIANT_TEST_TEMPORAL is the address of a Temporal to test with; `make test` sets it");
    let _ = tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).try_init();
    let config = FlowsConfig {
        address: address.clone(),
        task_queue: format!("test-{}", ChatId::new()),
        linger: Duration::from_millis(300),
        ..config
    };
    let memory = Arc::new(memory);
    let drain = CancellationToken::new();
    let (worker_config, driver, token) = (config.clone(), memory.clone(), drain.clone());
    let worker = tokio::spawn(async move { run_worker(worker_config, driver, token).await.unwrap() });
    let flows = Flows::connect(&config).await.unwrap();
    if config.namespace == FlowsConfig::default().namespace {
        flows.ping().await.unwrap();
    }
    let url = Url::from_str(&address).unwrap();
    let connection = Connection::connect(ConnectionOptions::new(url).build()).await.unwrap();
    let client = Client::new(connection, ClientOptions::new("default").build()).unwrap();
    Rig { config, flows, memory, chat: ChatId::new(), client, drain, worker }
}

impl Rig {
    async fn wake(&self) {
        self.flows.wake(self.chat, PARENT).await.unwrap();
    }

    async fn ended(&self, turn: TurnId) {
        self.memory.until("end of the turn", |memory| memory.ended.lock().unwrap().contains(&turn)).await;
    }

    async fn closed(&self) -> String {
        let handle = self.client.get_workflow_handle::<ChatWorkflow>(reliant_flows::workflow_id(self.chat));
        tokio::time::timeout(Duration::from_secs(10), handle.get_result(Default::default())).await.unwrap().unwrap();
        let history = handle.fetch_history(Default::default()).to_json().await.unwrap();
        String::from_utf8(history).unwrap()
    }

    async fn finish(self, record: &str) {
        let history = self.closed().await;
        if std::env::var("RELIANT_RECORD").is_ok() && !record.is_empty() {
            let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/histories/{record}.json"));
            std::fs::write(path, &history).unwrap();
        }
        self.drain.cancel();
        self.worker.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_turn_runs_lingers_and_completes() {
    let rig = rig().await;
    let turn = rig.memory.add(false);
    rig.wake().await;
    rig.ended(turn).await;
    assert_eq!(*rig.memory.traces.lock().unwrap(), [PARENT], "the trace reaches the activity");
    rig.finish("plain_turn").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tool_turn_waits_for_its_result() {
    let rig = rig().await;
    let turn = rig.memory.add(true);
    rig.wake().await;
    rig.memory.until("first burst", |memory| memory.bursts() == 1).await;
    rig.memory.result(turn);
    rig.wake().await;
    rig.ended(turn).await;
    rig.finish("tool_turn").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn turns_that_queue_run_in_order_and_a_closed_chat_is_started_again() {
    let rig = rig().await;
    let turns = [rig.memory.add(false), rig.memory.add(true), rig.memory.add(false)];
    rig.wake().await;
    rig.ended(turns[0]).await;
    // Longer than the linger: the workflow completes while the tool runs, and the result starts another run.
    rig.closed().await;
    assert_eq!(rig.flows.run_state(rig.chat).await.unwrap(), RunState::None);
    rig.memory.result(turns[1]);
    rig.wake().await;
    rig.ended(turns[2]).await;
    assert_eq!(*rig.memory.ended.lock().unwrap(), turns);
    rig.finish("resumed").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wake_during_a_burst_is_answered_by_another() {
    let rig = rig().await;
    let hold = Arc::new(Notify::new());
    *rig.memory.hold.lock().unwrap() = Some(hold.clone());
    rig.wake().await;
    rig.memory.until("burst", |memory| memory.bursts() == 1).await;
    assert_eq!(rig.flows.run_state(rig.chat).await.unwrap(), RunState::BurstStarted);
    for _ in 0..5 {
        rig.wake().await;
    }
    assert_eq!(rig.memory.bursts(), 1, "one burst of a chat at a time");
    *rig.memory.hold.lock().unwrap() = None;
    hold.notify_one();
    rig.memory.until("second burst", |memory| memory.bursts() == 2).await;
    rig.finish("woken_burst").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_that_never_idles_goes_on_in_new_runs() {
    let config = FlowsConfig { run_turns: 4, ..Default::default() };
    let rig = rig_of(config, Memory { turns_per_burst: 2, ..Memory::default() }).await;
    let turns: Vec<_> = (0..16).map(|n| rig.memory.add(n == 6)).collect();
    rig.wake().await;
    rig.ended(turns[5]).await;
    rig.memory.result(turns[6]);
    rig.wake().await;
    rig.ended(turns[15]).await;
    assert_eq!(*rig.memory.ended.lock().unwrap(), turns, "in order, each once");
    let history = rig.closed().await;
    let bursts = history.matches("ActivityTaskScheduledEventAttributes").count();
    assert!(!history.contains(r#""continued_execution_run_id":"""#), "the last run continues another");
    assert!(bursts <= 3, "a run has four turns at most: {bursts} bursts in the last one");
    rig.finish("").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_the_database_delays_and_fails_nothing() {
    let rig = rig().await;
    // More than the server tries by itself.
    rig.memory.failures.store(5, Ordering::Relaxed);
    let turn = rig.memory.add(false);
    rig.wake().await;
    rig.ended(turn).await;
    rig.finish("outage").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_whose_run_was_ended_is_told_to_stop_and_a_new_run_goes_on() {
    let rig = rig().await;
    let hold = Arc::new(Notify::new());
    *rig.memory.hold.lock().unwrap() = Some(hold);
    let turn = rig.memory.add(false);
    rig.wake().await;
    rig.memory.until("burst", |memory| memory.bursts() == 1).await;
    *rig.memory.hold.lock().unwrap() = None;
    rig.flows.begin_anew(rig.chat, PARENT).await.unwrap();
    rig.ended(turn).await;
    rig.memory.until("stop of the first burst", |memory| memory.stopped.load(Ordering::Relaxed) == 1).await;
    rig.finish("").await;
}

/// A run that no worker can go on with, whatever the cause, stands in nobody's way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poisoned_run_does_not_hold_its_chat() {
    for poison in [Poison::OtherCommands, Poison::Panics, Poison::Deaf] {
        let rig = rig_of(FlowsConfig::default(), Memory::default()).await;
        rig.drain.cancel();
        rig.worker.await.unwrap();
        // A worker of another mind begins the run, and is gone.
        let poisoned = poison::Worker::start(&rig.config, poison).await;
        rig.flows.wake(rig.chat, PARENT).await.unwrap();
        let until = async |what: &str, wanted: &dyn Fn(&RunState) -> bool| {
            let deadline = Instant::now() + Duration::from_secs(20);
            loop {
                let state = rig.flows.run_state(rig.chat).await.unwrap();
                if wanted(&state) {
                    return;
                }
                assert!(Instant::now() < deadline, "{poison:?}: not {what} but {state:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let fails = |state: &RunState| match state {
            RunState::TaskScheduled { attempt } | RunState::TaskStarted { attempt, .. } => *attempt >= FAILED_TASKS_MAX,
            _ => false,
        };
        match poison {
            Poison::Panics => until("failing", &fails).await,
            Poison::OtherCommands | Poison::Deaf => until("waiting", &|state| *state == RunState::Waiting).await,
        }
        poisoned.stop().await;

        let drain = CancellationToken::new();
        let (config, driver, token) = (rig.config.clone(), rig.memory.clone(), drain.clone());
        let worker = tokio::spawn(async move { run_worker(config, driver, token).await.unwrap() });
        let turn = rig.memory.add(false);
        if poison == Poison::OtherCommands {
            // It fails as soon as it is replayed, and then there is none: the next wake begins one.
            rig.flows.wake(rig.chat, PARENT).await.unwrap();
            until("ended", &|state| *state == RunState::None).await;
            rig.flows.wake(rig.chat, PARENT).await.unwrap();
        } else {
            rig.flows.begin_anew(rig.chat, PARENT).await.unwrap();
        }
        rig.memory.until("end of the turn", |memory| memory.ended.lock().unwrap().contains(&turn)).await;
        drain.cancel();
        worker.await.unwrap();
    }
}

/// Wakes at any moment, bursts of any length that fail now and then, runs that are put out of the cache all the time.
/// Temporal's caches of namespaces are refreshed every ten seconds.
const NAMESPACE_PATIENCE: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_that_is_gone_is_made_anew_and_the_chat_goes_on() {
    let namespace = format!("gone-{}", ChatId::new());
    let rig = rig_of(FlowsConfig { namespace: namespace.clone(), ..Default::default() }, Memory::default()).await;
    // As the relay does: it wakes again until somebody has looked.
    let goes_on = async |turn: TurnId| {
        let deadline = Instant::now() + NAMESPACE_PATIENCE;
        while !rig.memory.ended.lock().unwrap().contains(&turn) {
            assert!(Instant::now() < deadline, "the turn did not end");
            let _ = rig.flows.wake(rig.chat, PARENT).await;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    goes_on(rig.memory.add(false)).await;
    let request = DeleteNamespaceRequest { namespace, ..Default::default() };
    rig.client.connection().operator_service().delete_namespace(tonic::Request::new(request)).await.unwrap();
    goes_on(rig.memory.add(false)).await;
    rig.drain.cancel();
    rig.worker.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn histories_of_any_moments_replay() {
    let mut config = FlowsConfig { run_turns: 5, ..Default::default() };
    config.worker.cached_workflows = 2;
    let rig = rig_with(config).await;
    let chats: Vec<ChatId> = (0..12).map(|_| ChatId::new()).collect();
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let mut random = seed;
    let mut below = |max: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % max
    };
    for _ in 0..400 {
        let chat = chats[below(chats.len() as u64) as usize];
        rig.flows.wake(chat, PARENT).await.unwrap();
        match below(10) {
            0 => rig.memory.failures.store(below(4) as usize, Ordering::Relaxed),
            1 => *rig.memory.hold.lock().unwrap() = Some(Arc::new(Notify::new())),
            2 | 3 => {
                let held = rig.memory.hold.lock().unwrap().take();
                held.iter().for_each(|hold| (0..20).for_each(|_| hold.notify_one()));
                held.iter().for_each(|hold| hold.notify_waiters());
            }
            4 => drop(rig.memory.add(false)),
            5 => rig.flows.begin_anew(chat, PARENT).await.unwrap(),
            _ => {}
        }
        tokio::time::sleep(Duration::from_millis(below(12))).await;
    }
    rig.drain.cancel();
    let mut count = 0;
    for chat in chats {
        let handle = rig.client.get_workflow_handle::<ChatWorkflow>(reliant_flows::workflow_id(chat));
        let json = handle.fetch_history(Default::default()).to_json().await.unwrap();
        let history = WorkflowHistory::from_json(&json).unwrap();
        let options = WorkflowReplayerOptions::new().register_workflow::<ChatWorkflow>().unwrap().build();
        let replayed = WorkflowReplayer::new(options).unwrap().replay_workflow(history).await;
        assert!(replayed.is_ok(), "seed {seed}: {:?}\n{}", replayed.err(), String::from_utf8_lossy(&json));
        count += 1;
    }
    assert_eq!(count, 12);
}
