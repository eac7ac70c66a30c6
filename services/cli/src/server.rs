//! `reliant server …`: one role in one process. Telemetry, connections, build, run.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use reliant_api::ApiDeps;
use reliant_bus::{Bus, BusConfig};
use reliant_devstack::Addresses;
use reliant_flows::Flows;
use reliant_gateway::GatewayDeps;
use reliant_middleware::{Jwt, StoreAuthenticator};
use reliant_models::Models;
use reliant_runtime::{Drain, InstanceId, Role};
use reliant_store::Store;
use reliant_telemetry::chain;
use reliant_worker::WorkerDeps;

use crate::{
    args::{Global, RoleArgs, ServerCommand},
    config::Config,
};

const STORE_PATIENCE: Duration = Duration::from_secs(30);

pub async fn run(global: Global, command: ServerCommand) -> Result<()> {
    let config = Config::load(&global)?;
    let drain = Drain::new();
    drain.watch_signals().context("could not listen for signals")?;
    let instance = InstanceId::new();
    match command {
        ServerCommand::Api(args) => {
            let guard = telemetry(&config, "reliant-api", instance)?;
            let store = connect_store(&config).await?;
            store.migrate().await.context("the schema could not be brought up to date")?;
            let deps = ApiDeps {
                bus: connect_bus(&config, "api").await?,
                flows: Flows::connect(&config.flows).await?,
                models: Models::new(config.models.clone())?,
                jwt: config.auth.jwt()?,
                access_token_ttl: config.auth.access_token_ttl,
                store,
                instance,
            };
            serve(reliant_api::build(config.api, deps).await?, &args, drain).await?;
            guard.shutdown();
        }
        ServerCommand::Worker(args) => {
            let guard = telemetry(&config, "reliant-worker", instance)?;
            let deps = WorkerDeps {
                store: connect_store(&config).await?,
                bus: connect_bus(&config, "worker").await?,
                flows: Flows::connect(&config.flows).await?,
                models: Models::new(config.models.clone())?,
                instance,
            };
            serve(reliant_worker::build(config.worker, deps).await?, &args, drain).await?;
            guard.shutdown();
        }
        ServerCommand::Gateway(args) => {
            let guard = telemetry(&config, "reliant-gateway", instance)?;
            let store = connect_store(&config).await?;
            let jwt: Jwt = config.auth.jwt()?;
            let deps = GatewayDeps {
                authenticator: Arc::new(StoreAuthenticator::new(store.clone(), jwt)),
                bus: connect_bus(&config, "gateway").await?,
                store,
                instance,
            };
            serve(reliant_gateway::build(config.gateway, deps).await?, &args, drain).await?;
            guard.shutdown();
        }
    }
    Ok(())
}

async fn serve<R: Role>(role: R, args: &RoleArgs, drain: Drain) -> Result<()> {
    if let Some(path) = &args.address_file {
        write_addresses(path, Addresses { listen: role.local_addr(), admin: role.admin_addr() })?;
    }
    role.run(drain).await.with_context(|| format!("the {} ended", R::NAME))
}

pub fn write_addresses(path: &Path, addresses: Addresses) -> Result<()> {
    addresses.write(path).with_context(|| format!("could not write the addresses to {}", path.display()))
}

pub fn telemetry(config: &Config, service: &str, instance: InstanceId) -> Result<reliant_telemetry::Guard> {
    let mut telemetry = config.telemetry.clone();
    telemetry.service_name = service.to_owned();
    telemetry.instance_id = instance.to_string();
    telemetry.takes_page_spans = service == "reliant-api";
    reliant_telemetry::init(&telemetry).context("telemetry could not be started")
}

pub async fn connect_store(config: &Config) -> Result<Store> {
    let deadline = tokio::time::Instant::now() + STORE_PATIENCE;
    loop {
        let error = match Store::connect(&config.store).await {
            Ok(store) => return Ok(store.sharing(config.turns.clone())),
            Err(error) => error,
        };
        if !error.is_retryable() {
            return Err(error).context("Postgres cannot be used; check store.url, or DATABASE_URL of `reliant up`");
        }
        if tokio::time::Instant::now() >= deadline {
            return Err(error).context("Postgres cannot be reached; check store.url");
        }
        tracing::warn!(error = %chain(&error), "Postgres is not reachable yet; trying again");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn connect_bus(config: &Config, role: &str) -> Result<Bus> {
    let mut bus: BusConfig = config.bus.clone();
    bus.name = format!("reliant-{role}");
    Ok(Bus::connect(&bus).await?)
}
