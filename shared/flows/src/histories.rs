//! Histories of chats' runs: listed, fetched, and replayed against the workflow code of this build.
//!
//! A run whose history does not replay stands still for ever once its worker has lost its copy of it, so a test replays
//! what it left behind. Bounded: one history is in memory at a time, each call and each replay has a limit, and so has the
//! whole.

use std::{future::Future, time::Duration};

use reliant_telemetry::chain;
use reliant_types::boxed;
use temporalio_client::{Client, WorkflowHistory};
use temporalio_common::protos::temporal::api::{
    common::v1::WorkflowExecution,
    enums::v1::EventType,
    history::v1::{History, HistoryEvent},
    workflowservice::v1::{GetWorkflowExecutionHistoryRequest, ListWorkflowExecutionsRequest},
};
use temporalio_sdk::workflow_replayer::{WorkflowReplayer, WorkflowReplayerOptions};
use tokio::{sync::oneshot, time::Instant};

use crate::{
    FlowsConfig, FlowsError,
    client::{CHAT_TYPE, connect_once},
    workflow::ChatWorkflow,
};

const IDENTITY: &str = "reliant-replay";
const RUNS_PER_PAGE: i32 = 200;
/// The server ends a run at 51,200 events; a longer history is none of ours.
const EVENTS_MAX: usize = 60_000;
/// Differing histories that a report holds in full; of those beyond it has the ids and the error.
const KEPT_HISTORIES_MAX: usize = 8;
/// A replay that was told to stop and has not by then blocks its thread.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// How long replaying may take.
#[derive(Debug, Clone, Copy)]
pub struct ReplayLimits {
    /// Of one history.
    pub each: Duration,
    /// From the first call to the last replay; runs that are left then are skipped, and the report says how many.
    pub total: Duration,
}

impl Default for ReplayLimits {
    fn default() -> Self {
        Self { each: Duration::from_secs(30), total: Duration::from_secs(180) }
    }
}

/// A run that Temporal still has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatRun {
    pub workflow_id: String,
    pub run_id: String,
}

/// A run whose history the workflow code of this build does not reproduce.
#[derive(Debug, Clone)]
pub struct Difference {
    pub workflow_id: String,
    pub run_id: String,
    pub error: String,
    /// The history as JSON, in the form that [`replay_json`] reads. Empty where the report holds enough of them.
    pub history_json: Vec<u8>,
}

/// What became of the runs.
#[derive(Debug, Clone, Default)]
pub struct ReplayReport {
    /// Replayed to their end, the differing ones included.
    pub replayed: usize,
    pub differences: Vec<Difference>,
    /// No worker has completed a task of them, so there is nothing to compare.
    pub not_started: usize,
    /// Not replayed: retention removed them meanwhile, the server did not answer, or the time was over.
    pub skipped: usize,
    /// Why the first of them was skipped.
    pub skipped_because: Option<String>,
}

impl ReplayReport {
    fn skip(&mut self, runs: usize, why: String) {
        self.skipped += runs;
        self.skipped_because.get_or_insert(why);
    }
}

/// Fetches every run of every chat on `config`'s task queue, closed or open, and replays it.
#[boxed]
pub async fn replay_chats(config: &FlowsConfig, limits: ReplayLimits) -> Result<ReplayReport, FlowsError> {
    let deadline = Instant::now() + limits.total;
    let client = connect_once(config, IDENTITY).await?;
    let runs = list_runs(&client, config).await?;
    let mut report = ReplayReport::default();
    for (number, run) in runs.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            report.skip(runs.len() - number, format!("{:?} were over", limits.total));
            break;
        }
        let events = match fetch_events(&client, config, run).await {
            Ok(events) => events,
            Err(error) => {
                report.skip(1, format!("{}: {error}", run.workflow_id));
                continue;
            }
        };
        if !events.iter().any(|event| event.event_type() == EventType::WorkflowTaskCompleted) {
            report.not_started += 1;
            continue;
        }
        let history = History { events };
        let replayed = replay_on_thread(history.clone(), limits.each.min(left)).await;
        match replayed {
            Replayed::Same => report.replayed += 1,
            // Not for want of its own time, but of the whole's.
            Replayed::TimedOut if left < limits.each => {
                report.skip(runs.len() - number, format!("{:?} were over", limits.total));
                break;
            }
            Replayed::TimedOut => {
                report.replayed += 1;
                report.add_difference(run, format!("its replay had not ended after {:?}", limits.each), history).await;
            }
            Replayed::Differs(error) => {
                report.replayed += 1;
                report.add_difference(run, error, history).await;
            }
            Replayed::Blocked => {
                report.replayed += 1;
                report.add_difference(run, "its replay blocks its thread".to_owned(), history).await;
                report.skip(runs.len() - number - 1, "a replay before them blocks its thread".to_owned());
                break;
            }
        }
    }
    Ok(report)
}

impl ReplayReport {
    async fn add_difference(&mut self, run: &ChatRun, error: String, history: History) {
        let full = self.differences.len() >= KEPT_HISTORIES_MAX;
        let history_json = if full { Vec::new() } else { to_json(history).await.unwrap_or_default() };
        let ChatRun { workflow_id, run_id } = run.clone();
        self.differences.push(Difference { workflow_id, run_id, error, history_json });
    }
}

/// The history of a workflow's newest run, as JSON.
#[boxed]
pub async fn newest_history_json(config: &FlowsConfig, workflow_id: &str) -> Result<Vec<u8>, FlowsError> {
    let client = connect_once(config, IDENTITY).await?;
    // No run id means the newest run.
    let run = ChatRun { workflow_id: workflow_id.to_owned(), run_id: String::new() };
    to_json(History { events: fetch_events(&client, config, &run).await? }).await
}

/// Replays one history that was kept as JSON. The error says where it differs.
#[boxed]
pub async fn replay_json(history: &[u8], limit: Duration) -> Result<(), String> {
    let history = WorkflowHistory::from_json(history).map_err(|error| chain(&error).to_string())?;
    let events = history.into_events().await.map_err(|error| chain(&error).to_string())?;
    match replay_on_thread(History { events }, limit).await {
        Replayed::Same => Ok(()),
        Replayed::Differs(error) => Err(error),
        Replayed::TimedOut | Replayed::Blocked => Err(format!("the replay had not ended after {limit:?}")),
    }
}

async fn to_json(history: History) -> Result<Vec<u8>, FlowsError> {
    let json = WorkflowHistory::from(history).to_json().await;
    json.map_err(|error| FlowsError::Worker(chain(&error).to_string()))
}

async fn list_runs(client: &Client, config: &FlowsConfig) -> Result<Vec<ChatRun>, FlowsError> {
    let query = format!("WorkflowType = '{CHAT_TYPE}' AND TaskQueue = '{}'", config.task_queue.replace('\'', "''"));
    let mut service = client.connection().workflow_service();
    let mut runs = Vec::new();
    let mut next_page_token = Vec::new();
    loop {
        let request = ListWorkflowExecutionsRequest {
            namespace: config.namespace.clone(),
            page_size: RUNS_PER_PAGE,
            next_page_token,
            query: query.clone(),
        };
        let page = call(config, service.list_workflow_executions(tonic::Request::new(request))).await?;
        let found = page.executions.into_iter().filter_map(|info| info.execution);
        runs.extend(found.map(|run| ChatRun { workflow_id: run.workflow_id, run_id: run.run_id }));
        next_page_token = page.next_page_token;
        if next_page_token.is_empty() {
            return Ok(runs);
        }
    }
}

async fn fetch_events(client: &Client, config: &FlowsConfig, run: &ChatRun) -> Result<Vec<HistoryEvent>, FlowsError> {
    let mut service = client.connection().workflow_service();
    let mut events = Vec::new();
    let mut next_page_token = Vec::new();
    loop {
        let ChatRun { workflow_id, run_id } = run.clone();
        let request = GetWorkflowExecutionHistoryRequest {
            namespace: config.namespace.clone(),
            execution: Some(WorkflowExecution { workflow_id, run_id }),
            next_page_token,
            ..Default::default()
        };
        let page = call(config, service.get_workflow_execution_history(tonic::Request::new(request))).await?;
        events.extend(page.history.map(|history| history.events).unwrap_or_default());
        next_page_token = page.next_page_token;
        if next_page_token.is_empty() {
            return Ok(events);
        }
        if events.len() > EVENTS_MAX {
            return Err(FlowsError::Worker(format!(
                "the history of {} has more than {EVENTS_MAX} events",
                run.workflow_id
            )));
        }
    }
}

async fn call<T>(
    config: &FlowsConfig,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, FlowsError> {
    match tokio::time::timeout(config.rpc_timeout, call).await {
        Err(_) => Err(FlowsError::Timeout(config.rpc_timeout)),
        Ok(Err(status)) => Err(FlowsError::Unavailable(status.message().to_owned())),
        Ok(Ok(response)) => Ok(response.into_inner()),
    }
}

enum Replayed {
    Same,
    Differs(String),
    TimedOut,
    /// It did not stop when its time was over; its thread is left behind.
    Blocked,
}

/// Replays on a thread of its own: a replay's future holds a workflow's state and cannot move between threads.
async fn replay_on_thread(history: History, limit: Duration) -> Replayed {
    let runtime = tokio::runtime::Handle::current();
    let (sender, ended) = oneshot::channel();
    let replaying = std::thread::Builder::new().name("reliant-replay".to_owned()).spawn(move || {
        let replayed = runtime.block_on(async { tokio::time::timeout(limit, replay(history)).await });
        let _ = sender.send(match replayed {
            Ok(Ok(())) => Replayed::Same,
            Ok(Err(error)) => Replayed::Differs(error),
            Err(_) => Replayed::TimedOut,
        });
    });
    if let Err(error) = replaying {
        return Replayed::Differs(format!("no thread for its replay: {error}"));
    }
    match tokio::time::timeout(limit + STOP_GRACE, ended).await {
        Ok(Ok(replayed)) => replayed,
        Ok(Err(_)) => Replayed::Differs("its replay panicked".to_owned()),
        Err(_) => Replayed::Blocked,
    }
}

async fn replay(history: History) -> Result<(), String> {
    // The SDK's replayer would wait for ever.
    if history.events.first().map(HistoryEvent::event_type) != Some(EventType::WorkflowExecutionStarted) {
        return Err("its first event is not a workflow's start".to_owned());
    }
    let options = WorkflowReplayerOptions::new().register_workflow::<ChatWorkflow>();
    let options = options.map_err(|error| chain(&error).to_string())?.build();
    let replayer = WorkflowReplayer::new(options).map_err(|error| chain(&error).to_string())?;
    replayer.replay_workflow(history.into()).await.map_err(|error| chain(&error).to_string())
}

#[cfg(test)]
mod tests {
    use temporalio_common::protos::temporal::api::history::v1::history_event::Attributes;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    fn kept_histories() -> Vec<Vec<u8>> {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/histories");
        let files = std::fs::read_dir(folder).expect("the kept histories");
        files.map(|file| std::fs::read(file.expect("a file").path()).expect("a history")).collect()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn kept_histories_replay_and_altered_ones_differ() {
        let histories = kept_histories();
        assert!(!histories.is_empty());
        for json in histories {
            assert_eq!(replay_json(&json, LIMIT).await, Ok(()));
            let kept = WorkflowHistory::from_json(&json).expect("a history");
            let mut events = kept.into_events().await.expect("its events");
            let mut altered = 0;
            for event in &mut events {
                if let Some(Attributes::ActivityTaskScheduledEventAttributes(scheduled)) = &mut event.attributes {
                    scheduled.activity_type.get_or_insert_default().name = "another".to_owned();
                    altered += 1;
                }
            }
            assert!(altered > 0, "a chat's run schedules an activity");
            let json = to_json(History { events }).await.expect("JSON");
            assert!(replay_json(&json, LIMIT).await.is_err());
        }
    }

    #[tokio::test]
    async fn what_is_no_history_is_an_error() {
        assert!(replay_json(b"{", LIMIT).await.is_err());
        assert!(replay_json(br#"{"events":[]}"#, LIMIT).await.is_err());
    }

    #[tokio::test]
    async fn without_a_server_it_says_so() {
        let config = FlowsConfig { address: "127.0.0.1:1".to_owned(), ..FlowsConfig::default() };
        let replayed = replay_chats(&config, ReplayLimits::default()).await;
        assert!(matches!(replayed, Err(FlowsError::Unavailable(_) | FlowsError::Timeout(_))), "{replayed:?}");
    }
}
