//! Workers that make runs no sound worker can go on with. Their workflow has the name of the chat's.

use std::{str::FromStr, time::Duration};

use reliant_flows::FlowsConfig;
use temporalio_client::{Client, ClientOptions, Connection, ConnectionOptions, Url};
use temporalio_macros::{workflow, workflow_methods};
use temporalio_sdk::{
    Runtime, SyncWorkflowContext, WorkerOptions, WorkflowContext, WorkflowContextView, WorkflowResult,
    runtime::RuntimeOptions,
};
use tokio::sync::oneshot;

/// What is wrong with a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Poison {
    /// Its history has other commands than the code gives.
    OtherCommands,
    /// Its tasks fail.
    Panics,
    /// It ignores its signals.
    Deaf,
}

macro_rules! poisoned {
    ($name:ident, $ctx:ident, $body:expr) => {
        #[workflow]
        pub struct $name;

        #[workflow_methods]
        impl $name {
            #[init]
            fn new(_ctx: &WorkflowContextView, _input: serde_json::Value) -> Self {
                Self
            }

            #[signal]
            pub fn wake(&mut self, _ctx: &mut SyncWorkflowContext<Self>, _wake: serde_json::Value) {}

            #[run(name = "chat")]
            pub async fn run($ctx: &mut WorkflowContext<Self>) -> WorkflowResult<()> {
                $body
            }
        }
    };
}

poisoned!(OtherCommands, ctx, {
    ctx.timer(Duration::from_secs(3600)).await;
    Ok(())
});
poisoned!(Panics, _ctx, panic!("on purpose"));
poisoned!(Deaf, ctx, {
    let _ = ctx.wait_condition(|_| false).await;
    Ok(())
});

pub struct Worker {
    stop: oneshot::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl Worker {
    pub async fn start(config: &FlowsConfig, poison: Poison) -> Self {
        let (address, queue) = (config.address.clone(), config.task_queue.clone());
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let own = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            own.block_on(async move {
                let url = Url::from_str(&address).unwrap();
                let connection = Connection::connect(ConnectionOptions::new(url).build()).await.unwrap();
                let client = Client::new(connection, ClientOptions::new("default").build()).unwrap();
                let runtime = Runtime::from_current_tokio(RuntimeOptions::builder().build().unwrap()).unwrap();
                let builder = WorkerOptions::new(queue);
                let options = match poison {
                    Poison::OtherCommands => builder.register_workflow::<OtherCommands>().unwrap().build(),
                    Poison::Panics => builder.register_workflow::<Panics>().unwrap().build(),
                    Poison::Deaf => builder.register_workflow::<Deaf>().unwrap().build(),
                };
                let mut worker = temporalio_sdk::Worker::new(&runtime, client, options).unwrap();
                let shutdown = worker.shutdown_handle();
                tokio::spawn(async move {
                    let _ = stopped.await;
                    shutdown();
                });
                let _ = tokio::time::timeout(Duration::from_secs(60), worker.run()).await;
            });
        });
        Self { stop, thread }
    }

    pub async fn stop(self) {
        let _ = self.stop.send(());
        tokio::task::spawn_blocking(move || self.thread.join().unwrap()).await.unwrap();
    }
}
