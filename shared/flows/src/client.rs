//! The client: wakes chats. It reconnects in the background and never blocks a start.

use std::{collections::HashMap, str::FromStr, sync::Arc, time::Duration};

use reliant_telemetry::{ClientCall, TraceContext, chain, names::span};
use reliant_types::{ChatId, Code, Failure, boxed};
use temporalio_client::{
    Client, ClientKeepAliveOptions, ClientOptions, Connection, ConnectionOptions, GrpcCompression, RetryOptions,
    TlsOptions, Url, WorkflowIdConflictPolicy, WorkflowStartOptions, errors::WorkflowStartError,
};
use temporalio_common::protos::temporal::api::{
    common::v1::{Header, WorkflowExecution},
    enums::v1::{PendingActivityState, PendingWorkflowTaskState, WorkflowExecutionStatus},
    workflowservice::v1::{
        DescribeNamespaceRequest, DescribeWorkflowExecutionRequest, DescribeWorkflowExecutionResponse,
        RegisterNamespaceRequest,
    },
};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::Instrument;

use crate::{
    FlowsConfig, trace,
    workflow::{ChatInput, ChatWorkflow, Wake},
};

/// Long enough for a starved worker to finish a task, so that nothing is done twice. A task that a dead worker holds is
/// not waited for: the relay begins the run anew.
pub(crate) const WORKFLOW_TASK_TIMEOUT: Duration = Duration::from_secs(10);
/// Tasks of a run that failed or timed out one after another: it will not recover by itself.
pub const FAILED_TASKS_MAX: i32 = 3;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A Temporal frontend takes one ping in 10 s (`frontend.keepAliveMinTime`) and closes the connection at the third that
/// comes sooner. The second more is for pings that are late on their way. A dead connection is found in 16 s.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(11);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long histories of runs that ended can be looked at, in a namespace that is made here.
const NAMESPACE_RETENTION: Duration = Duration::from_secs(24 * 3600);
const NAMESPACE_LOOK_INTERVAL: Duration = Duration::from_secs(10);
const CONNECT_RETRY_MIN: Duration = Duration::from_millis(100);
const CONNECT_RETRY_MAX: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum FlowsError {
    #[error("the Temporal address '{address}' is not a URL such as http://127.0.0.1:7233")]
    Address { address: String },
    #[error("the Temporal API key file cannot be read")]
    ApiKey(#[source] std::io::Error),
    /// No connection yet, or the call failed; the relay wakes again.
    #[error("Temporal cannot be reached: {0}")]
    Unavailable(String),
    #[error("Temporal did not answer in {0:?}")]
    Timeout(Duration),
    #[error("the Temporal worker cannot be set up: {0}")]
    Worker(String),
}

impl From<FlowsError> for Failure {
    fn from(error: FlowsError) -> Self {
        let code = match &error {
            FlowsError::Address { .. } | FlowsError::ApiKey(_) => Code::InvalidArgument,
            FlowsError::Unavailable(_) | FlowsError::Timeout(_) => Code::Unavailable,
            FlowsError::Worker(_) => Code::Internal,
        };
        Failure::new(code, error.to_string())
    }
}

/// A handle to Temporal that is cheap to clone.
#[derive(Clone)]
pub struct Flows {
    inner: Arc<Inner>,
}

struct Inner {
    config: FlowsConfig,
    client: watch::Receiver<Option<Client>>,
    _connecting: DropGuard,
}

impl Flows {
    /// Checks the configuration, and connects in the background for as long as it takes.
    #[boxed]
    pub async fn connect(config: &FlowsConfig) -> Result<Self, FlowsError> {
        connection_options(config, "reliant")?;
        let (sender, mut client) = watch::channel(None);
        let stop = CancellationToken::new();
        let (task_config, task_stop) = (config.clone(), stop.clone());
        tokio::spawn(async move {
            if let Some(client) = connect_until(&task_config, "reliant", &task_stop).await {
                sender.send_replace(Some(client));
                // The channel below reconnects by itself from now on.
                task_stop.cancelled().await;
            }
        });
        // The usual case, a server that is there, is ready when this returns.
        let _ = tokio::time::timeout(Duration::from_secs(1), client.wait_for(Option::is_some)).await;
        Ok(Self { inner: Arc::new(Inner { config: config.clone(), client, _connecting: stop.drop_guard() }) })
    }

    fn client(&self) -> Result<Client, FlowsError> {
        self.inner.client.borrow().clone().ok_or_else(|| FlowsError::Unavailable("not connected yet".to_owned()))
    }

    /// Starts or signals the chat's workflow. Carries no state: a lost wake delays, it loses nothing.
    #[boxed]
    pub async fn wake(&self, chat: ChatId, traceparent: &str) -> Result<(), FlowsError> {
        let client = self.client()?;
        let (input, options) = self.start(chat, traceparent);
        let wake = Wake { traceparent: traceparent.to_owned() };
        let call = client.signal_with_start_workflow(ChatWorkflow::run, input, ChatWorkflow::wake, wake, options);
        self.started(traceparent, async { call.await.map(drop) }).await
    }

    /// Ends the chat's run, whatever it is, and begins a new one, which looks at Postgres at once. What the ended run had
    /// under way is void by its fence.
    #[boxed]
    pub async fn begin_anew(&self, chat: ChatId, traceparent: &str) -> Result<(), FlowsError> {
        let client = self.client()?;
        let (input, mut options) = self.start(chat, traceparent);
        options.id_conflict_policy = WorkflowIdConflictPolicy::TerminateExisting;
        let call = client.start_workflow(ChatWorkflow::run, input, options);
        self.started(traceparent, async { call.await.map(drop) }).await
    }

    fn start(&self, chat: ChatId, traceparent: &str) -> (ChatInput, WorkflowStartOptions) {
        let config = &self.inner.config;
        let mut options = WorkflowStartOptions::new(config.task_queue.clone(), workflow_id(chat))
            .task_timeout(WORKFLOW_TASK_TIMEOUT)
            .build();
        if !traceparent.is_empty() {
            let fields = HashMap::from([(trace::TRACEPARENT.to_owned(), trace::payload(traceparent))]);
            options.header = Some(Header { fields });
        }
        let linger_ms = config.linger.as_millis() as u64;
        (ChatInput { chat, linger_ms, run_turns: config.run_turns, heartbeat_timeout_ms: 0 }, options)
    }

    async fn started(
        &self,
        traceparent: &str,
        call: impl Future<Output = Result<(), WorkflowStartError>>,
    ) -> Result<(), FlowsError> {
        let config = &self.inner.config;
        // Nothing hangs on it: the workflow got the context of the wake, which has ended.
        let called =
            ClientCall::below(&TraceContext::from_traceparent(traceparent), span::TEMPORAL_WAKE, &config.address);
        match tokio::time::timeout(config.rpc_timeout, call.instrument(called.span().clone())).await {
            Err(_) => {
                called.settle(tonic::Code::DeadlineExceeded);
                Err(FlowsError::Timeout(config.rpc_timeout))
            }
            // Another one was quicker: the workflow runs, and the relay sees to the rest.
            Ok(Ok(()) | Err(WorkflowStartError::AlreadyStarted { .. })) => {
                called.settle(tonic::Code::Ok);
                Ok(())
            }
            Ok(Err(error)) => {
                called.settle(tonic::Code::Unavailable);
                Err(FlowsError::Unavailable(chain(&error).to_string()))
            }
        }
    }

    /// What Temporal says of the chat's run now.
    #[boxed]
    pub async fn run_state(&self, chat: ChatId) -> Result<RunState, FlowsError> {
        let client = self.client()?;
        let config = &self.inner.config;
        let execution = WorkflowExecution { workflow_id: workflow_id(chat), ..Default::default() };
        let mut request = tonic::Request::new(DescribeWorkflowExecutionRequest {
            namespace: config.namespace.clone(),
            execution: Some(execution),
        });
        request.set_timeout(config.rpc_timeout);
        let mut service = client.connection().workflow_service();
        match tokio::time::timeout(config.rpc_timeout, service.describe_workflow_execution(request)).await {
            Err(_) => Err(FlowsError::Timeout(config.rpc_timeout)),
            Ok(Ok(response)) => Ok(RunState::of(response.into_inner(), &config.task_queue)),
            Ok(Err(status)) if status.code() == tonic::Code::NotFound => Ok(RunState::None),
            Ok(Err(status)) => Err(FlowsError::Unavailable(status.message().to_owned())),
        }
    }

    /// Whether Temporal answers for our namespace.
    #[boxed]
    pub async fn ping(&self) -> Result<(), FlowsError> {
        let client = self.client()?;
        let limit = self.inner.config.rpc_timeout.min(Duration::from_secs(2));
        let request = DescribeNamespaceRequest { namespace: self.inner.config.namespace.clone(), ..Default::default() };
        let mut request = tonic::Request::new(request);
        request.set_timeout(limit);
        let mut service = client.connection().workflow_service();
        match tokio::time::timeout(limit, service.describe_namespace(request)).await {
            Err(_) => Err(FlowsError::Timeout(limit)),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => Err(FlowsError::Unavailable(status.message().to_owned())),
        }
    }

    pub fn config(&self) -> &FlowsConfig {
        &self.inner.config
    }

    pub fn is_connected(&self) -> bool {
        self.inner.client.borrow().is_some()
    }
}

/// Where a chat's run is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunState {
    /// There is none, or it has ended: a wake begins one.
    None,
    /// The id is in use by what is none of ours.
    Foreign { workflow_type: String },
    /// A workflow task waits for a worker. `attempt`, from 1, counts those that failed or timed out before it.
    TaskScheduled { attempt: i32 },
    /// A worker has a workflow task. `task` names this one, to tell it from a later one.
    TaskStarted { attempt: i32, task: String },
    /// A burst waits for a worker, or for its next try.
    BurstScheduled { attempt: i32 },
    /// A worker has a burst, and its heartbeats came in time.
    BurstStarted,
    /// It waits for a wake.
    Waiting,
}

impl RunState {
    /// For metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Foreign { .. } => "foreign",
            Self::TaskScheduled { .. } => "task_scheduled",
            Self::TaskStarted { .. } => "task_started",
            Self::BurstScheduled { .. } => "burst_scheduled",
            Self::BurstStarted => "burst_started",
            Self::Waiting => "waiting",
        }
    }

    fn of(run: DescribeWorkflowExecutionResponse, task_queue: &str) -> Self {
        let Some(info) = &run.workflow_execution_info else { return Self::None };
        if info.status() != WorkflowExecutionStatus::Running {
            return Self::None;
        }
        let workflow_type = info.r#type.as_ref().map(|of| of.name.clone()).unwrap_or_default();
        if workflow_type != CHAT_TYPE || info.task_queue != task_queue {
            return Self::Foreign { workflow_type };
        }
        if let Some(task) = &run.pending_workflow_task {
            let attempt = task.attempt;
            return match (task.state(), &task.started_time) {
                (PendingWorkflowTaskState::Started, Some(started)) => {
                    let run_id = info.execution.as_ref().map(|run| run.run_id.as_str()).unwrap_or_default();
                    let task = format!("{run_id} {} {}.{:09}", info.history_length, started.seconds, started.nanos);
                    Self::TaskStarted { attempt, task }
                }
                _ => Self::TaskScheduled { attempt },
            };
        }
        match run.pending_activities.first() {
            None => Self::Waiting,
            Some(burst) if burst.state() == PendingActivityState::Started => Self::BurstStarted,
            Some(burst) => Self::BurstScheduled { attempt: burst.attempt },
        }
    }
}

/// The name of the chat's workflow in Temporal: that of `run` in workflow.rs.
pub(crate) const CHAT_TYPE: &str = "chat";

/// The id under which a chat's workflow runs; at most one is open.
pub fn workflow_id(chat: ChatId) -> String {
    format!("chat:{chat}")
}

fn connection_options(config: &FlowsConfig, identity: &str) -> Result<ConnectionOptions, FlowsError> {
    let text =
        if config.address.contains("://") { config.address.clone() } else { format!("http://{}", config.address) };
    let url = match Url::from_str(&text) {
        Ok(url) if url.has_host() && matches!(url.scheme(), "http" | "https") => url,
        _ => return Err(FlowsError::Address { address: config.address.clone() }),
    };
    let api_key = match &config.api_key_file {
        Some(path) => Some(std::fs::read_to_string(path).map_err(FlowsError::ApiKey)?.trim().to_owned()),
        None => None,
    };
    let tls = (url.scheme() == "https").then(TlsOptions::default);
    Ok(ConnectionOptions::new(url)
        .identity(identity)
        .maybe_tls_options(tls)
        .maybe_api_key(api_key)
        .connect_timeout(CONNECT_TIMEOUT)
        .retry_options(RetryOptions::no_retries())
        .keep_alive(Some(
            ClientKeepAliveOptions::builder().interval(KEEPALIVE_INTERVAL).timeout(KEEPALIVE_TIMEOUT).build(),
        ))
        .grpc_compression(GrpcCompression::None)
        .build())
}

pub(crate) async fn connect_once(config: &FlowsConfig, identity: &str) -> Result<Client, FlowsError> {
    let options = connection_options(config, identity)?;
    let connection = tokio::time::timeout(CONNECT_TIMEOUT, Connection::connect(options))
        .await
        .map_err(|_| FlowsError::Timeout(CONNECT_TIMEOUT))?
        .map_err(|error| FlowsError::Unavailable(chain(&error).to_string()))?;
    Client::new(connection, ClientOptions::new(config.namespace.clone()).build())
        .map_err(|error| FlowsError::Worker(chain(&error).to_string()))
}

/// The id of the namespace; None where there is no such namespace.
async fn namespace_id(client: &Client, config: &FlowsConfig) -> Result<Option<String>, tonic::Status> {
    let request = DescribeNamespaceRequest { namespace: config.namespace.clone(), ..Default::default() };
    let mut request = tonic::Request::new(request);
    request.set_timeout(config.rpc_timeout);
    match client.connection().workflow_service().describe_namespace(request).await {
        Ok(response) => Ok(response.into_inner().namespace_info.map(|info| info.id)),
        Err(status) if status.code() == tonic::Code::NotFound => Ok(None),
        Err(status) => Err(status),
    }
}

/// Waits until the namespace is gone, or another one has its name: the polls of a worker would notice after a minute.
pub(crate) async fn namespace_gone(client: &Client, config: &FlowsConfig) {
    let mut known = None;
    loop {
        match namespace_id(client, config).await {
            Ok(None) => return,
            Ok(id) if known.is_some() && id != known => return,
            Ok(id) => known = id,
            // Temporal is away, or says nothing of it.
            Err(_) => {}
        }
        tokio::time::sleep(NAMESPACE_LOOK_INTERVAL).await;
    }
}

/// Makes the namespace where there is none: it was deleted, or the server is new. Nothing is lost with it: chats go on from
/// Postgres, in new runs.
pub(crate) async fn ensure_namespace(client: &Client, config: &FlowsConfig) {
    // What else is wrong is said by whoever needs the namespace.
    let Ok(None) = namespace_id(client, config).await else { return };
    let namespace = config.namespace.clone();
    let mut register = tonic::Request::new(RegisterNamespaceRequest {
        namespace: namespace.clone(),
        workflow_execution_retention_period: NAMESPACE_RETENTION.try_into().ok(),
        ..Default::default()
    });
    register.set_timeout(config.rpc_timeout);
    match client.connection().workflow_service().register_namespace(register).await {
        Ok(_) => {
            tracing::warn!(temporal.namespace = %namespace, "Temporal had no such namespace: it was made anew; chats go on in new runs")
        }
        Err(status) if status.code() == tonic::Code::AlreadyExists => {}
        Err(status) => tracing::error!(
            temporal.namespace = %namespace,
            error = status.message(),
            "Temporal has no such namespace, and it cannot be made from here: make it, or set flows.namespace to one that exists"
        ),
    }
}

/// `connect` of the SDK fails at once while the server is away, hence the loop.
pub(crate) async fn connect_until(config: &FlowsConfig, identity: &str, stop: &CancellationToken) -> Option<Client> {
    let mut delay = CONNECT_RETRY_MIN;
    let mut told = false;
    loop {
        let tried = tokio::select! {
            biased;
            () = stop.cancelled() => return None,
            tried = connect_once(config, identity) => tried,
        };
        match tried {
            Ok(client) => {
                if told {
                    tracing::info!(temporal.address = %config.address, "connected to Temporal");
                }
                return Some(client);
            }
            Err(error) if !told => {
                told = true;
                tracing::warn!(temporal.address = %config.address, error = %chain(&error), "Temporal is away; trying on");
            }
            Err(error) => tracing::debug!(error = %chain(&error), "Temporal is still away"),
        }
        tokio::select! {
            () = stop.cancelled() => return None,
            () = tokio::time::sleep(delay) => {}
        }
        delay = (delay * 2).min(CONNECT_RETRY_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked() {
        let check = |address: &str| {
            connection_options(&FlowsConfig { address: address.to_owned(), ..Default::default() }, "x").is_ok()
        };
        assert!(check("http://127.0.0.1:7233"));
        assert!(check("127.0.0.1:7233"));
        assert!(check("https://temporal.example:7233"));
        assert!(!check(""));
        assert!(!check("ftp://x"));
    }

    #[tokio::test]
    async fn a_wake_without_a_server_fails_at_once_and_by_type() {
        let config = FlowsConfig { address: "127.0.0.1:1".to_owned(), ..Default::default() };
        let flows = Flows::connect(&config).await.expect("starts without a server");
        assert!(matches!(flows.wake(ChatId::new(), "").await, Err(FlowsError::Unavailable(_))));
        assert!(!flows.is_connected());
    }
}
