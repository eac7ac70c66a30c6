//! The floor under every turn: signal-with-start and three empty activities, one after another, on the same Temporal.
//! Its worker, its task queue and its workflow type are its own.

use reliant_types::boxed;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use temporalio_client::{WorkflowGetResultOptions, WorkflowStartOptions};
use temporalio_macros::{activities, workflow, workflow_methods};
use temporalio_sdk::{
    ActivityOptions, SyncWorkflowContext, WorkerOptions, WorkflowContext, WorkflowResult,
    activities::{ActivityContext, ActivityError},
    runtime::PollerBehavior,
};
use tokio_util::sync::CancellationToken;

use crate::{
    FlowsConfig, FlowsError,
    client::{WORKFLOW_TASK_TIMEOUT, connect_once},
    watchdog::Running,
    worker::{core_runtime, deployment, poll},
};

const ACTIVITIES: u32 = 3;
/// Far above anything a healthy server needs.
const RUN_TIMEOUT: Duration = Duration::from_secs(20);

pub struct Empty;

#[activities]
impl Empty {
    #[activity(name = "floor_empty")]
    pub async fn empty(_ctx: ActivityContext, index: u32) -> Result<u32, ActivityError> {
        Ok(index)
    }
}

#[workflow]
#[derive(Default)]
pub struct FloorWorkflow {
    poked: u64,
}

#[workflow_methods]
impl FloorWorkflow {
    #[run(name = "floor")]
    pub async fn run(ctx: &mut WorkflowContext<Self>, count: u32) -> WorkflowResult<u32> {
        for index in 0..count {
            let options = ActivityOptions::start_to_close_timeout(Duration::from_secs(10));
            ctx.execute_activity(Empty::empty, index, options).await?;
        }
        Ok(count)
    }

    #[signal]
    pub fn poke(&mut self, _ctx: &mut SyncWorkflowContext<Self>, by: u64) {
        self.poked += by;
    }
}

/// Measures `n` runs, one after another, from the signal-with-start to the result at the client.
#[boxed]
pub async fn run_floor(config: &FlowsConfig, n: usize) -> Result<Vec<Duration>, FlowsError> {
    let task_queue = format!("{}-floor-{}", config.task_queue, uuid::Uuid::now_v7().simple());
    let stop = CancellationToken::new();
    let runtime = Arc::new(core_runtime()?);
    let client = connect_once(config, "reliant-floor").await?;
    let options = WorkerOptions::new(task_queue.clone())
        .workflow_task_poller_behavior(PollerBehavior::SimpleMaximum(config.worker.workflow_pollers.max(2)))
        .activity_task_poller_behavior(PollerBehavior::SimpleMaximum(config.worker.activity_pollers.max(1)))
        .deployment_options(deployment())
        .register_activities(Empty)
        .register_workflow::<FloorWorkflow>()
        .map_err(|e| FlowsError::Worker(e.to_string()))?
        .build();
    let (worker_client, worker_stop) = (client.clone(), stop.clone());
    let worker = tokio::spawn(async move {
        {
            let running = Running::default();
            poll(runtime, worker_client, options, &worker_stop, Duration::from_secs(1), &running).await
        }
    });

    let measured = measure(&client, &task_queue, n).await;
    stop.cancel();
    let _ = worker.await;
    measured
}

async fn measure(client: &temporalio_client::Client, task_queue: &str, n: usize) -> Result<Vec<Duration>, FlowsError> {
    let mut times = Vec::with_capacity(n);
    for _ in 0..n {
        let id = format!("floor:{}", uuid::Uuid::now_v7());
        let options = WorkflowStartOptions::new(task_queue, id).task_timeout(WORKFLOW_TASK_TIMEOUT).build();
        let began = Instant::now();
        let run = async {
            let handle = client
                .signal_with_start_workflow(FloorWorkflow::run, ACTIVITIES, FloorWorkflow::poke, 1, options)
                .await
                .map_err(|e| FlowsError::Unavailable(e.to_string()))?;
            handle
                .get_result(WorkflowGetResultOptions::default())
                .await
                .map_err(|e| FlowsError::Unavailable(e.to_string()))
        };
        tokio::time::timeout(RUN_TIMEOUT, run).await.map_err(|_| FlowsError::Timeout(RUN_TIMEOUT))??;
        times.push(began.elapsed());
    }
    Ok(times)
}
