//! The worker: drives turns. It runs the chat workflow's steps, calls models, sends tool calls, commits results.
//!
//! Stateless: whatever it holds is either in Postgres already or void. Any number of workers run side by side, and any of
//! them may die at any moment. It never keeps a conversation in Temporal, and reaches daemons only over NATS.

mod answer;
mod attempt;
mod burst;
mod bursts;
mod dispatch;
mod driver;
mod engine;
mod history;
mod kept;
mod listen;
mod live;
mod load;
mod offers;
mod presence;
mod prompt;
mod publish;
mod relay;
mod results;
mod rounds;
mod schema;
mod tools;
mod transcripts;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use reliant_bus::Bus;
use reliant_flows::{Flows, FlowsError};
use reliant_models::Models;
use reliant_runtime::{AdminServer, Drain, Role, TaskKind, check_fn};
use reliant_store::Store;
use reliant_types::{InstanceId, boxed, limits};
use serde::{Deserialize, Serialize};

use tokio_util::sync::CancellationToken;

use crate::{
    bursts::Bursts,
    driver::EngineDriver,
    engine::Engine,
    live::Live,
    load::Load,
    offers::Offers,
    publish::{Hints, Publisher},
    rounds::Rounds,
    transcripts::Transcripts,
};

/// What is left of a drain after the model calls had their time.
const DRAIN_REST: Duration = Duration::from_secs(15);

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerConfig {
    /// Where `/health`, `/ready` and `/metrics` are served.
    pub admin: SocketAddr,
    /// A tool result that comes within this time of its dispatch is fed to the model at once, without another round
    /// through Temporal. Zero switches that off.
    #[serde(with = "humantime_serde")]
    pub inline_wait: Duration,
    /// How long a tool call may run that does not ask for a time of its own, as a shell call can.
    #[serde(with = "humantime_serde")]
    pub tool_timeout: Duration,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            admin: SocketAddr::from(([127, 0, 0, 1], 7444)),
            inline_wait: Duration::from_millis(50),
            tool_timeout: limits::TOOL_TIMEOUT,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error("the address {addr} cannot be listened on; another process may hold it")]
    Bind {
        addr: SocketAddr,
        #[source]
        source: std::io::Error,
    },
}

/// What the role works with; made by whoever composes the process.
#[derive(Clone)]
pub struct WorkerDeps {
    pub store: Store,
    pub bus: Bus,
    pub flows: Flows,
    pub models: Models,
    /// Names this process as the producer of live text.
    pub instance: InstanceId,
}

/// A worker whose address is bound.
pub struct Worker {
    engine: Arc<Engine>,
    admin: AdminServer,
    hints: Hints,
    draining: CancellationToken,
}

/// Binds the listener; nothing is served or polled before [`Role::run`].
#[boxed]
pub async fn build(config: WorkerConfig, deps: WorkerDeps) -> Result<Worker, WorkerError> {
    let WorkerDeps { store, bus, flows, models, instance } = deps;
    let checks = {
        let (store, bus, flows) = (store.clone(), bus.clone(), flows.clone());
        vec![
            check_fn("postgres", move || {
                let store = store.clone();
                async move { store.ping().await }
            }),
            check_fn("nats", move || {
                let connected = bus.is_connected();
                async move { if connected { Ok(()) } else { Err("not connected") } }
            }),
            check_fn("temporal", move || {
                let flows = flows.clone();
                async move { flows.ping().await }
            }),
        ]
    };
    let admin = AdminServer::bind(config.admin, checks)
        .await
        .map_err(|source| WorkerError::Bind { addr: config.admin, source })?;
    let (publisher, hints) = Publisher::new();
    let slots = flows.config().worker.activity_slots;
    let draining = CancellationToken::new();
    let engine = Arc::new(Engine {
        store,
        bus,
        flows,
        models,
        publisher,
        live: Live::default(),
        rounds: Arc::new(Rounds::default()),
        bursts: Bursts::default(),
        load: Load::new(slots),
        transcripts: Transcripts::default(),
        offers: Offers::default(),
        tool_timeout: config.tool_timeout.min(limits::TOOL_TIMEOUT_MAX),
        cancels: Default::default(),
        instance,
        inline_wait: config.inline_wait,
        draining: draining.clone(),
        errands: Engine::errands(),
        freed: Default::default(),
    });
    Ok(Worker { engine, admin, hints, draining })
}

impl Role for Worker {
    type Error = WorkerError;
    const NAME: &'static str = "worker";

    fn local_addr(&self) -> Option<SocketAddr> {
        None
    }

    fn admin_addr(&self) -> Option<SocketAddr> {
        Some(self.admin.local_addr())
    }

    fn run(self, drain: Drain) -> BoxFuture<'static, Result<(), WorkerError>> {
        Box::pin(async move {
            let Worker { engine, admin, hints, draining } = self;
            let admin_addr = admin.local_addr();
            let config = engine.flows.config().clone();
            let limit = config.worker.drain + DRAIN_REST;
            drain.spawn(TaskKind::Upkeep("admin"), admin.serve(drain.clone()));
            drain.spawn(TaskKind::Upkeep("hints"), hints.send(engine.bus.clone()));
            drain.spawn(TaskKind::Upkeep("instance"), listen::heartbeat(engine.clone(), admin_addr, drain.clone()));
            drain.spawn(TaskKind::Upkeep("lengths"), listen::lengths(engine.clone()));
            drain.spawn(TaskKind::Upkeep("prefixes"), listen::prefixes(engine.clone()));
            drain.spawn(TaskKind::Upkeep("bursts"), bursts::observe(engine.clone()));
            drain.spawn(TaskKind::Upkeep("burst hints"), bursts::hints(engine.clone()));
            drain.spawn(TaskKind::Poller("relay"), relay::run(engine.clone()));
            drain.spawn(TaskKind::Poller("presence"), presence::run(engine.clone()));
            drain.spawn(TaskKind::Listener("results"), results::run(engine.clone()));
            let (token, driver) = (drain.token(), Arc::new(EngineDriver(engine.clone())));
            drain.spawn(TaskKind::Listener("temporal"), async move {
                reliant_flows::run_worker(config, driver, token).await?;
                // Viewers of what was committed last may still ask for its text.
                listen::until_forgotten(&engine).await;
                Ok::<_, FlowsError>(())
            });
            drain.draining().await;
            draining.cancel();
            drain.wait(limit).await;
            Ok(())
        })
    }
}
