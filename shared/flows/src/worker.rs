//! The worker: polls Temporal for workflow tasks and model calls until it is told to drain.

use reliant_types::boxed;
use std::{collections::HashSet, sync::Arc, time::Duration};

use reliant_telemetry::chain;
use temporalio_client::{Client, WorkflowTerminateOptions};
use temporalio_common::{
    telemetry::{TelemetryOptions, metrics::CoreMeter},
    worker::{WorkerDeploymentOptions, WorkerDeploymentVersion},
};
use temporalio_sdk::{
    Runtime, Worker, WorkerOptions,
    runtime::{
        PollerBehavior, RuntimeOptions, WorkflowErrorType,
        worker_tuner::{FixedSizeSlotSupplier, TunerHolder},
    },
};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::{
    FlowsConfig, FlowsError,
    activities::Activities,
    client::{connect_until, ensure_namespace, namespace_gone},
    driver::Driver,
    meter::Meter,
    trace,
    watchdog::{self, Running, Watchdog},
    workflow::ChatWorkflow,
};

/// A workflow whose worker died is offered to all workers after this long; one that is late has so long to take it without
/// a replay.
const STICKY_TIMEOUT: Duration = Duration::from_secs(2);
/// The SDK's own default is 0.8 of the heartbeat timeout, too close to it.
const HEARTBEAT_THROTTLE: Duration = Duration::from_secs(1);
/// After the drain's limit, attempts that were told to stop have this long.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// Of a process whose workflow code did not return.
const EXIT_LOOPING: i32 = 70;
const RESTART_MIN: Duration = Duration::from_millis(200);
const RESTART_MAX: Duration = Duration::from_secs(5);

/// Polls until `drain` is cancelled and what runs has ended, or was stopped at the drain's limit. A worker that broke
/// (the namespace is gone, the server was replaced) is set up again.
#[boxed]
pub async fn run_worker(
    config: FlowsConfig,
    driver: Arc<dyn Driver>,
    drain: CancellationToken,
) -> Result<(), FlowsError> {
    let runtime = Arc::new(core_runtime()?);
    let identity = format!("reliant-worker-{}", std::process::id());
    let running = Running::default();
    let mut delay = RESTART_MIN;
    loop {
        let Some(client) = connect_until(&config, &identity, &drain).await else { return Ok(()) };
        ensure_namespace(&client, &config).await;
        let options = chat_options(&config, driver.clone(), running.clone())?;
        let began = tokio::time::Instant::now();
        let stop = drain.child_token();
        let (watched, watch_config, gone) = (client.clone(), config.clone(), stop.clone());
        let watch = tokio::spawn(async move {
            namespace_gone(&watched, &watch_config).await;
            gone.cancel();
        });
        let ended = poll(runtime.clone(), client, options, &stop, config.worker.drain, &running).await;
        watch.abort();
        match ended {
            _ if drain.is_cancelled() => return Ok(()),
            Ok(()) => tracing::warn!("the Temporal worker stopped by itself; starting another"),
            Err(error) => tracing::warn!(error = %chain(&error), "the Temporal worker broke; starting another"),
        }
        if began.elapsed() > RESTART_MAX {
            delay = RESTART_MIN;
        }
        tokio::select! {
            () = drain.cancelled() => return Ok(()),
            () = tokio::time::sleep(delay) => {}
        }
        delay = (delay * 2).min(RESTART_MAX);
    }
}

fn chat_options(config: &FlowsConfig, driver: Arc<dyn Driver>, running: Running) -> Result<WorkerOptions, FlowsError> {
    let builder = WorkerOptions::new(config.task_queue.clone())
        .max_cached_workflows(config.worker.cached_workflows)
        .sticky_queue_schedule_to_start_timeout(STICKY_TIMEOUT)
        .max_heartbeat_throttle_interval(HEARTBEAT_THROTTLE)
        .default_heartbeat_throttle_interval(HEARTBEAT_THROTTLE)
        .graceful_shutdown_period(config.worker.drain)
        .tuner(
            TunerHolder::builder()
                .workflow_task_slot_supplier(FixedSizeSlotSupplier::new(config.worker.workflow_slots))
                .activity_task_slot_supplier(FixedSizeSlotSupplier::new(config.worker.activity_slots))
                // There are none; the tuner wants a number.
                .local_activity_task_slot_supplier(FixedSizeSlotSupplier::new(1))
                .nexus_task_slot_supplier(FixedSizeSlotSupplier::new(1))
                .build(),
        )
        .workflow_task_poller_behavior(PollerBehavior::SimpleMaximum(config.worker.workflow_pollers.max(2)))
        .activity_task_poller_behavior(PollerBehavior::SimpleMaximum(config.worker.activity_pollers.max(1)))
        .deployment_options(deployment())
        // A run that cannot be replayed ends at once; the next wake begins another from Postgres.
        .workflow_failure_errors(HashSet::from([WorkflowErrorType::Nondeterminism]))
        .workflow_interceptor(trace::interceptor(running))
        .register_activities(Activities { driver });
    Ok(builder.register_workflow::<ChatWorkflow>().map_err(|e| FlowsError::Worker(e.to_string()))?.build())
}

/// The build's name in Temporal; without it the SDK hashes the whole executable at start.
pub(crate) fn deployment() -> WorkerDeploymentOptions {
    WorkerDeploymentOptions::new(
        WorkerDeploymentVersion::builder().deployment_name("reliant").build_id(env!("CARGO_PKG_VERSION")).build(),
    )
    .build()
}

/// Runs one worker on a thread of its own: its future holds every workflow's state and cannot move between threads.
/// Activities run on the shared runtime.
pub(crate) async fn poll(
    runtime: Arc<Runtime>,
    client: Client,
    options: WorkerOptions,
    drain: &CancellationToken,
    limit: Duration,
    running: &Running,
) -> Result<(), FlowsError> {
    let handle = tokio::runtime::Handle::current();
    let (done_sender, mut done) = oneshot::channel();
    let stop = drain.clone();
    let watchdog = Watchdog::default();
    let (alive, (thread_sender, thread)) = (watchdog.clone(), oneshot::channel());
    let terminate = client.clone();
    std::thread::Builder::new()
        .name("reliant-workflows".to_owned())
        .spawn(move || {
            let _ = thread_sender.send(watchdog::this_thread());
            let ended = handle.block_on(async move {
                let mut worker =
                    Worker::new(&runtime, client, options).map_err(|e| FlowsError::Worker(e.to_string()))?;
                let shutdown = worker.shutdown_handle();
                let watch = tokio::spawn(async move {
                    stop.cancelled().await;
                    shutdown();
                });
                let ended = tokio::select! {
                    ended = worker.run() => ended.map_err(|e| FlowsError::Unavailable(e.to_string())),
                    () = alive.alive() => Ok(()),
                };
                watch.abort();
                ended
            });
            let _ = done_sender.send(ended);
        })
        .map_err(|e| FlowsError::Worker(e.to_string()))?;
    let gone = || FlowsError::Worker("the workflow thread panicked".to_owned());
    let looping = async {
        match thread.await {
            Ok(thread) => watchdog.watch(thread, running).await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        ended = &mut done => return ended.unwrap_or_else(|_| Err(gone())),
        () = drain.cancelled() => {}
        workflow = looping => give_up(&terminate, &workflow).await,
    }
    match tokio::time::timeout(limit + STOP_GRACE, done).await {
        Ok(ended) => ended.unwrap_or_else(|_| Err(gone())),
        Err(_) => {
            tracing::warn!("the Temporal worker did not end within its drain; leaving it");
            Ok(())
        }
    }
}

/// The workflow's code does not return, and neither will the thread: the run is ended, so that it harms no other worker, and
/// then this process.
async fn give_up(client: &Client, workflow: &str) {
    tracing::error!(
        workflow.id = workflow,
        "the code of a workflow does not return; its run is ended, and this process with it. The chat goes on in a new run"
    );
    let handle = client.get_workflow_handle::<ChatWorkflow>(workflow);
    let options = WorkflowTerminateOptions::builder().reason("its code does not return").build();
    match tokio::time::timeout(STOP_GRACE, handle.terminate(options)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(error = %chain(&error), workflow.id = workflow, "the run was not ended"),
        Err(_) => tracing::error!(workflow.id = workflow, "the run was not ended in time"),
    }
    #[expect(
        clippy::disallowed_methods,
        reason = "a thread of it can be stopped by nothing else, and holds every chat here"
    )]
    std::process::exit(EXIT_LOOPING);
}

pub(crate) fn core_runtime() -> Result<Runtime, FlowsError> {
    let telemetry = TelemetryOptions::builder().metrics(Arc::new(Meter::default()) as Arc<dyn CoreMeter>).build();
    let options = RuntimeOptions::builder().telemetry_options(telemetry).build().map_err(FlowsError::Worker)?;
    Runtime::from_current_tokio(options).map_err(|e| FlowsError::Worker(e.to_string()))
}
