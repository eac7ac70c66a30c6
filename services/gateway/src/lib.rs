//! The gateway role: daemons' streams, and the bridge between them and NATS.
//!
//! It decides nothing about a turn, keeps nothing that the daemon or Postgres does not hold, and is not needed for a
//! result that the daemon still has. Only a frame from the daemon answers a request for it.

mod allowance;
mod bridge;
mod config;
mod declare;
mod hub;
mod instance;
mod leases;
mod pending;
mod requests;
mod revocations;
mod session;
mod stack;
mod streams;
mod tunnel;
mod writer;

pub use config::GatewayConfig;

use futures::future::BoxFuture;
use hub::Hub;
use reliant_bus::{Bus, BusError, ControlSubject};
use reliant_middleware::Authenticator;
use reliant_rpc::tunnel_service_server::TunnelServiceServer;
use reliant_runtime::{AdminServer, Connections, Drain, Role, TaskKind, check_fn};
use reliant_store::Store;
use reliant_telemetry::sampled;
use reliant_types::{Code, Failure, InstanceId, boxed, limits, pb};
use std::{net::SocketAddr, sync::Arc};
use tokio::net::TcpListener;

/// Ended streams have so long to give their leases back.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_secs(3);

/// What the role works with; made by whoever composes the process.
#[derive(Clone)]
pub struct GatewayDeps {
    pub store: Store,
    pub bus: Bus,
    pub authenticator: Arc<dyn Authenticator>,
    pub instance: InstanceId,
}

/// Why the role could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    #[error("the address {addr} cannot be listened on; another process may hold it")]
    Bind {
        addr: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("gRPC reflection cannot be set up")]
    Reflection(#[source] tonic_reflection::server::Error),
    #[error("revocations cannot be followed")]
    Control(#[source] BusError),
}

impl From<GatewayError> for Failure {
    fn from(error: GatewayError) -> Self {
        let code = match error {
            GatewayError::Bind { .. } => Code::InvalidArgument,
            GatewayError::Reflection(_) => Code::Internal,
            GatewayError::Control(_) => Code::Unavailable,
        };
        Failure::new(code, error.to_string())
    }
}

/// A gateway whose addresses are bound.
pub struct Gateway {
    config: GatewayConfig,
    deps: GatewayDeps,
    listener: TcpListener,
    addr: SocketAddr,
    admin: AdminServer,
}

/// Binds the listeners; nothing is served before [`Role::run`].
#[boxed]
pub async fn build(config: GatewayConfig, deps: GatewayDeps) -> Result<Gateway, GatewayError> {
    let bind = |addr| move |source| GatewayError::Bind { addr, source };
    let listener = TcpListener::bind(config.listen).await.map_err(bind(config.listen))?;
    let addr = listener.local_addr().map_err(bind(config.listen))?;
    let (store, bus) = (deps.store.clone(), deps.bus.clone());
    let checks = vec![
        check_fn("postgres", move || {
            let store = store.clone();
            async move { store.ping().await }
        }),
        check_fn("nats", move || {
            let connected = bus.is_connected();
            async move { if connected { Ok(()) } else { Err("not connected") } }
        }),
    ];
    let admin = AdminServer::bind(config.admin, checks).await.map_err(bind(config.admin))?;
    Ok(Gateway { config, deps, listener, addr, admin })
}

impl Role for Gateway {
    type Error = GatewayError;
    const NAME: &'static str = "gateway";

    fn local_addr(&self) -> Option<SocketAddr> {
        Some(self.addr)
    }

    fn admin_addr(&self) -> Option<SocketAddr> {
        Some(self.admin.local_addr())
    }

    fn run(self, drain: Drain) -> BoxFuture<'static, Result<(), GatewayError>> {
        Box::pin(async move {
            let Gateway { config, deps, listener, addr, admin } = self;
            let hub = Arc::new(Hub::new(deps.instance, deps.store, deps.bus));
            let control = hub.bus.subscribe(&ControlSubject).await.map_err(GatewayError::Control)?;
            drain.spawn(TaskKind::Upkeep("admin"), admin.serve(drain.clone()));
            drain.spawn(TaskKind::Upkeep("leases"), leases::renew(hub.clone()));
            drain.spawn(TaskKind::Upkeep("nats watch"), leases::watch_bus(hub.clone()));
            drain.spawn(TaskKind::Upkeep("heartbeat"), instance::beat(hub.clone(), addr, drain.clone()));
            drain.spawn(TaskKind::Upkeep("revocations"), revocations::poll(hub.clone()));
            drain.spawn(TaskKind::Upkeep("revocation messages"), revocations::listen(hub.clone(), control));

            let places = sampled::places("daemons", config.max_daemons);
            let tunnel = tunnel::Tunnel {
                hub: hub.clone(),
                drain: drain.clone(),
                places: places.clone(),
                streams: streams::Streams::new(),
                admissions: sampled::places("admissions", config.admissions.max(1)),
            };
            let tunnel = TunnelServiceServer::new(tunnel).max_decoding_message_size(limits::GRPC_MESSAGE_MAX_BYTES);
            let (reporter, health) = tonic_health::server::health_reporter();
            reporter.set_serving::<TunnelServiceServer<tunnel::Tunnel>>().await;
            let server = stack::server(&config, deps.authenticator)
                .add_service(health)
                .add_service(reflection()?)
                .add_service(tunnel)
                .serve_with_incoming_shutdown(
                    Connections::new(listener, &config.connections),
                    drain.token().cancelled_owned(),
                );
            drain.spawn(TaskKind::Listener("grpc"), server);
            tracing::info!(%addr, "the gateway listens");

            drain.draining().await;
            reporter.set_not_serving::<TunnelServiceServer<tunnel::Tunnel>>().await;
            // Every stream has been told to move; a place is free again when its daemon has done so.
            let all_moved = places.acquire_many(u32::try_from(config.max_daemons).unwrap_or(u32::MAX));
            if tokio::time::timeout(config.drain, all_moved).await.is_err() {
                let daemons = hub.end_all(hub::End::Drained);
                tracing::warn!(daemons, "daemons that did not move in time are cut off");
            }
            drain.wait(LAST_WORDS).await;
            Ok(())
        })
    }
}

fn reflection() -> Result<
    tonic_reflection::server::v1::ServerReflectionServer<impl tonic_reflection::server::v1::ServerReflection>,
    GatewayError,
> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(GatewayError::Reflection)
}
