//! The api role: one listener for gRPC, gRPC-web and the web page, and the live feed of every viewer.
//!
//! A replica holds nothing that another lacks: Postgres is right about what was accepted, and everything kept here can be
//! read or asked for again. Daemons are reached over NATS alone.

mod app;
mod config;
mod effects;
mod feed;
mod services;
mod stack;
mod upkeep;
mod web;

use std::{net::SocketAddr, sync::Arc};

use futures::future::BoxFuture;
use reliant_bus::ControlSubject;
use reliant_middleware::StoreAuthenticator;
use reliant_rpc::{
    approval_service_server::ApprovalServiceServer, chat_service_server::ChatServiceServer,
    daemon_service_server::DaemonServiceServer, identity_service_server::IdentityServiceServer,
    message_service_server::MessageServiceServer, model_service_server::ModelServiceServer,
    project_service_server::ProjectServiceServer, telemetry_service_server::TelemetryServiceServer,
    token_service_server::TokenServiceServer, turn_service_server::TurnServiceServer,
};
use reliant_runtime::{AdminServer, Connections, Drain, Role, TaskKind, check_fn};
use reliant_types::{Code, Failure, boxed, limits, pb};
use tokio::net::TcpListener;
use tonic::{server::NamedService, service::Routes, transport::Server};
use tonic_health::{ServingStatus, server::HealthReporter};

pub use config::{ApiConfig, ApiLimits};

use crate::{app::App, effects::Effects, feed::Hub, services::*};

/// A dead browser or proxy is noticed in these two together.
const KEEPALIVE_INTERVAL: std::time::Duration = std::time::Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// One client may hold all its update streams on one connection, and make calls beside them.
const STREAMS_PER_CONNECTION: u32 = 1024;

/// What the role works with; made by whoever composes the process.
#[derive(Clone)]
pub struct ApiDeps {
    pub store: reliant_store::Store,
    pub bus: reliant_bus::Bus,
    pub flows: reliant_flows::Flows,
    pub models: reliant_models::Models,
    /// Must be able to sign, or nobody can sign in by a link here.
    pub jwt: reliant_middleware::Jwt,
    /// How long who signed in by a link stays signed in.
    pub access_token_ttl: std::time::Duration,
    pub instance: reliant_types::InstanceId,
}

/// Why the role could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("the address {addr} cannot be listened on; another process may hold it")]
    Bind {
        addr: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("api.cors_origins holds '{0}', which is not an origin such as https://example.com")]
    Origin(String),
    #[error("gRPC reflection cannot be set up")]
    Reflection(#[source] tonic_reflection::server::Error),
    #[error("revocations cannot be followed")]
    Control(#[source] reliant_bus::BusError),
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        let code = match error {
            ApiError::Bind { .. } | ApiError::Origin(_) => Code::InvalidArgument,
            ApiError::Reflection(_) => Code::Internal,
            ApiError::Control(_) => Code::Unavailable,
        };
        Failure::new(code, error.to_string())
    }
}

/// An api whose addresses are bound.
pub struct Api {
    config: ApiConfig,
    deps: ApiDeps,
    listener: TcpListener,
    addr: SocketAddr,
    admin: AdminServer,
}

/// Binds the listeners; nothing is served before [`Role::run`].
#[boxed]
pub async fn build(config: ApiConfig, deps: ApiDeps) -> Result<Api, ApiError> {
    let bind = |addr| move |source| ApiError::Bind { addr, source };
    stack::check_origins(&config.cors_origins)?;
    let listener = TcpListener::bind(config.listen).await.map_err(bind(config.listen))?;
    let addr = listener.local_addr().map_err(bind(config.listen))?;
    let (store, bus, flows) = (deps.store.clone(), deps.bus.clone(), deps.flows.clone());
    let checks = vec![
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
    ];
    let admin = AdminServer::bind(config.admin, checks).await.map_err(bind(config.admin))?;
    Ok(Api { config, deps, listener, addr, admin })
}

impl Api {
    /// As people reach it: for sign-in links.
    pub fn public_url(&self) -> String {
        match self.config.public_url.trim_end_matches('/') {
            "" => format!("http://{}", self.addr),
            url => url.to_owned(),
        }
    }
}

impl Role for Api {
    type Error = ApiError;
    const NAME: &'static str = "api";

    fn local_addr(&self) -> Option<SocketAddr> {
        Some(self.addr)
    }

    fn admin_addr(&self) -> Option<SocketAddr> {
        Some(self.admin.local_addr())
    }

    fn run(self, drain: Drain) -> BoxFuture<'static, Result<(), ApiError>> {
        Box::pin(async move {
            let Api { config, deps, listener, addr, admin } = self;
            let authenticator = StoreAuthenticator::new(deps.store.clone(), deps.jwt.clone());
            let control = deps.bus.subscribe(&ControlSubject).await.map_err(ApiError::Control)?;
            let feeds = feed::Deps {
                store: deps.store.clone(),
                bus: deps.bus.clone(),
                budget: feed::Budget::new("live_text_bytes", config.limits.live_text_bytes),
                kept: feed::Budget::new("feed_bytes", config.limits.feed_bytes),
            };
            let hub = Arc::new(Hub::new(feeds, config.limits.streams, config.limits.user_streams, drain.clone()));
            let effects =
                Effects::new(deps.bus.clone(), deps.flows.clone(), drain.clone(), config.limits.background_tasks);

            drain.spawn(TaskKind::Upkeep("admin"), admin.serve(drain.clone()));
            drain.spawn(TaskKind::Upkeep("revocations"), authenticator.clone().watch_revocations());
            drain.spawn(
                TaskKind::Upkeep("revocation messages"),
                upkeep::hear_revocations(authenticator.clone(), control),
            );
            drain.spawn(
                TaskKind::Upkeep("instance"),
                upkeep::beat(deps.store.clone(), deps.instance, addr, drain.clone()),
            );
            drain.spawn(TaskKind::Poller("places"), upkeep::places(deps.store.clone()));
            drain.spawn(TaskKind::Poller("feeds"), feed::poll::run(hub.clone()));

            let turn_deadline = config.limits.turn_deadline;
            let app = Arc::new(App { deps, authenticator: authenticator.clone(), effects, hub, turn_deadline });
            let (reporter, services) = services(&app).await?;
            let front = stack::front(&config, Arc::new(authenticator), services)?;
            let server = Server::builder()
                // gRPC-web over plain HTTP comes as HTTP/1.1, and so does the page.
                .accept_http1(true)
                .max_concurrent_streams(STREAMS_PER_CONNECTION)
                .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
                .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
                .add_routes(Routes::from(axum::Router::new().fallback_service(stack::as_page(front))))
                .serve_with_incoming_shutdown(
                    Connections::new(listener, &config.limits.connections),
                    drain.token().cancelled_owned(),
                );
            drain.spawn(TaskKind::Listener("grpc"), server);
            tracing::info!(%addr, "the api listens");

            drain.draining().await;
            set_health(&reporter, ServingStatus::NotServing).await;
            drain.wait(config.limits.drain).await;
            Ok(())
        })
    }
}

/// Every service, with health and reflection.
async fn services(app: &Arc<App>) -> Result<(HealthReporter, Routes), ApiError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    set_health(&reporter, ServingStatus::Serving).await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    macro_rules! limited {
        ($server:ident, $service:expr) => {
            $server::new($service).max_decoding_message_size(limits::GRPC_MESSAGE_MAX_BYTES)
        };
    }
    let routes = Routes::new(health)
        .add_service(reflection().build_v1().map_err(ApiError::Reflection)?)
        // Some clients still ask for the older one.
        .add_service(reflection().build_v1alpha().map_err(ApiError::Reflection)?)
        .add_service(limited!(ApprovalServiceServer, Approvals(app.clone())))
        .add_service(limited!(ChatServiceServer, Chats(app.clone())))
        .add_service(limited!(DaemonServiceServer, Daemons(app.clone())))
        .add_service(limited!(IdentityServiceServer, Identity(app.clone())))
        .add_service(limited!(MessageServiceServer, Messages(app.clone())))
        .add_service(limited!(ModelServiceServer, ModelList(app.clone())))
        .add_service(limited!(ProjectServiceServer, Projects(app.clone())))
        .add_service(limited!(TelemetryServiceServer, Telemetry(app.clone())))
        .add_service(limited!(TokenServiceServer, Tokens(app.clone())))
        .add_service(limited!(TurnServiceServer, Turns(app.clone())))
        .add_service(UpdateServer(app.clone()));
    Ok((reporter, routes))
}

async fn set_health(reporter: &HealthReporter, status: ServingStatus) {
    let names = [
        "",
        <ApprovalServiceServer<Approvals> as NamedService>::NAME,
        <ChatServiceServer<Chats> as NamedService>::NAME,
        <DaemonServiceServer<Daemons> as NamedService>::NAME,
        <IdentityServiceServer<Identity> as NamedService>::NAME,
        <MessageServiceServer<Messages> as NamedService>::NAME,
        <ModelServiceServer<ModelList> as NamedService>::NAME,
        <ProjectServiceServer<Projects> as NamedService>::NAME,
        <TelemetryServiceServer<Telemetry> as NamedService>::NAME,
        <TokenServiceServer<Tokens> as NamedService>::NAME,
        <TurnServiceServer<Turns> as NamedService>::NAME,
        UpdateServer::NAME,
    ];
    for name in names {
        reporter.set_service_status(name, status).await;
    }
}
