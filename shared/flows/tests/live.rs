//! The workflow on a real Temporal server, with a driver in memory in place of Postgres.
//!
//! Needs a server at `RELIANT_TEST_TEMPORAL`, which `make test` starts. With `RELIANT_RECORD=1` these tests write the
//! histories that `replay.rs` reads.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use reliant_flows::{
    DispatchOrder, Driver, DriverError, Flows, FlowsConfig, Heart, ModelOrder, ModelOutcome, Step, run_worker,
    workflow::ChatWorkflow,
};
use reliant_telemetry::trace::TraceContext;
use reliant_types::{ChatId, ToolCallId, TurnId};
use std::str::FromStr;
use temporalio_client::{Client, ClientOptions, Connection, ConnectionOptions, Url};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Phase {
    Model(i32),
    ToSend,
    Sent,
}

#[derive(Clone, Debug)]
struct Turn {
    id: TurnId,
    tool: bool,
    phase: Phase,
}

/// Postgres and everything behind it, for one chat.
#[derive(Default)]
struct Memory {
    turns: Mutex<VecDeque<Turn>>,
    ended: Mutex<Vec<TurnId>>,
    traces: Mutex<Vec<String>>,
    failures: Mutex<u32>,
    /// Model calls wait for this while it is set.
    hold: Mutex<Option<Arc<Notify>>>,
    stopped: Mutex<u32>,
    changed: Notify,
}

impl Memory {
    fn add(&self, tool: bool) -> TurnId {
        let id = TurnId::new();
        self.turns.lock().unwrap().push_back(Turn { id, tool, phase: Phase::Model(0) });
        id
    }

    fn end(&self, id: TurnId) {
        self.turns.lock().unwrap().retain(|turn| turn.id != id);
        self.ended.lock().unwrap().push(id);
        self.changed.notify_waiters();
    }

    fn result(&self, id: TurnId) {
        for turn in self.turns.lock().unwrap().iter_mut().filter(|turn| turn.id == id) {
            turn.phase = Phase::Model(1);
        }
    }

    fn step(&self) -> Step {
        match self.turns.lock().unwrap().front() {
            None => Step::Idle,
            Some(Turn { id, phase: Phase::Model(iteration), .. }) => {
                Step::CallModel { turn: *id, iteration: *iteration }
            }
            Some(Turn { id, phase: Phase::ToSend, .. }) => Step::Dispatch { turn: *id, calls: vec![ToolCallId::new()] },
            Some(Turn { id, phase: Phase::Sent, .. }) => Step::Wait { turn: *id, for_ms: None },
        }
    }

    async fn until(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(15);
        while !done(self) {
            assert!(Instant::now() < deadline, "no {what}: {:?}", self.turns.lock().unwrap());
            let _ = tokio::time::timeout(Duration::from_millis(5), self.changed.notified()).await;
        }
    }
}

#[async_trait]
impl Driver for Memory {
    async fn next_step(&self, _chat: ChatId, _trace: TraceContext) -> Result<Step, DriverError> {
        let mut failures = self.failures.lock().unwrap();
        if *failures > 0 {
            *failures -= 1;
            return Err(DriverError::new("the database is away"));
        }
        drop(failures);
        Ok(self.step())
    }

    async fn call_model(
        &self,
        order: ModelOrder,
        heart: Heart,
        trace: TraceContext,
    ) -> Result<ModelOutcome, DriverError> {
        self.traces.lock().unwrap().push(trace.traceparent);
        let hold = self.hold.lock().unwrap().clone();
        if let Some(hold) = hold {
            self.changed.notify_waiters();
            tokio::select! {
                () = hold.notified() => {}
                () = heart.stopped() => {
                    *self.stopped.lock().unwrap() += 1;
                    return Err(DriverError::new("stopped"));
                }
            }
        }
        let tool = self.turns.lock().unwrap().iter().any(|turn| turn.id == order.turn && turn.tool);
        if tool && order.iteration == 0 {
            for turn in self.turns.lock().unwrap().iter_mut().filter(|turn| turn.id == order.turn) {
                turn.phase = Phase::ToSend;
            }
        } else {
            self.end(order.turn);
        }
        Ok(ModelOutcome { next: Some(self.step()) })
    }

    async fn dispatch(&self, order: DispatchOrder, _trace: TraceContext) -> Result<Step, DriverError> {
        for turn in self.turns.lock().unwrap().iter_mut().filter(|turn| turn.id == order.turn) {
            turn.phase = Phase::Sent;
        }
        self.changed.notify_waiters();
        Ok(self.step())
    }
}

struct Rig {
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
    let address = std::env::var("RELIANT_TEST_TEMPORAL")
        .expect("RELIANT_TEST_TEMPORAL is the address of a Temporal to test with; `make test` sets it");
    let _ = tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).try_init();
    let config = FlowsConfig {
        address: address.clone(),
        task_queue: format!("test-{}", ChatId::new()),
        linger: Duration::from_millis(300),
        ..config
    };
    let memory = Arc::new(Memory::default());
    let drain = CancellationToken::new();
    let (worker_config, driver, token) = (config.clone(), memory.clone(), drain.clone());
    let worker = tokio::spawn(async move { run_worker(worker_config, driver, token).await.unwrap() });
    let flows = Flows::connect(&config).await.unwrap();
    flows.ping().await.unwrap();
    let url = Url::from_str(&address).unwrap();
    let connection = Connection::connect(ConnectionOptions::new(url).build()).await.unwrap();
    let client = Client::new(connection, ClientOptions::new("default").build()).unwrap();
    Rig { flows, memory, chat: ChatId::new(), client, drain, worker }
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
    rig.memory.until("dispatch", |m| m.turns.lock().unwrap().iter().any(|t| t.phase == Phase::Sent)).await;
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
    rig.memory.until("dispatch", |m| m.turns.lock().unwrap().iter().any(|t| t.phase == Phase::Sent)).await;
    // Longer than the linger: the workflow completes while the tool runs, and the result starts another run.
    rig.closed().await;
    rig.memory.result(turns[1]);
    rig.wake().await;
    rig.ended(turns[2]).await;
    assert_eq!(*rig.memory.ended.lock().unwrap(), turns);
    rig.finish("resumed").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wake_during_a_call_changes_nothing_unless_the_turn_is_over() {
    let rig = rig().await;
    let hold = Arc::new(Notify::new());
    *rig.memory.hold.lock().unwrap() = Some(hold.clone());
    let first = rig.memory.add(false);
    rig.wake().await;
    rig.memory.until("call", |m| m.traces.lock().unwrap().len() == 1).await;
    let second = rig.memory.add(false);
    rig.wake().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(rig.memory.traces.lock().unwrap().len(), 1, "the first call goes on");
    // Cancelled: the workflow turns to the next turn at once, and the old attempt is told to stop by its heartbeat.
    *rig.memory.hold.lock().unwrap() = None;
    rig.memory.end(first);
    rig.wake().await;
    rig.ended(second).await;
    rig.memory.until("stop of the first call", |m| *m.stopped.lock().unwrap() == 1).await;
    rig.finish("cancelled_call").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_that_never_idles_goes_on_in_new_runs() {
    let rig = rig_with(FlowsConfig { run_turns: 2, ..Default::default() }).await;
    let turns: Vec<_> = (0..8).map(|n| rig.memory.add(n == 3)).collect();
    rig.wake().await;
    rig.memory.until("dispatch", |m| m.turns.lock().unwrap().iter().any(|t| t.phase == Phase::Sent)).await;
    rig.memory.result(turns[3]);
    rig.wake().await;
    rig.ended(turns[7]).await;
    assert_eq!(*rig.memory.ended.lock().unwrap(), turns, "in order, each once");
    let history = rig.closed().await;
    let calls = history.matches("ActivityTaskScheduledEventAttributes").count();
    assert!(!history.contains(r#""continued_execution_run_id":"""#), "the last run continues another");
    // One of them with a tool; the last run may have none, if the chat came to rest with a run's last turn.
    assert!(calls <= 3, "a run has two turns at most: {calls} calls in the last one");
    rig.finish("").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_the_database_delays_and_fails_nothing() {
    let rig = rig().await;
    *rig.memory.failures.lock().unwrap() = 9;
    let turn = rig.memory.add(false);
    rig.wake().await;
    rig.ended(turn).await;
    rig.finish("outage").await;
}
