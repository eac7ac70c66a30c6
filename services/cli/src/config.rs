//! The configuration of every role, composed of each concern's own struct.

use reliant_api::ApiConfig;
use reliant_bus::BusConfig;
use reliant_daemon::DaemonConfig;
use reliant_flows::FlowsConfig;
use reliant_gateway::GatewayConfig;
use reliant_middleware::AuthConfig;
use reliant_models::ModelsConfig;
use reliant_runtime::config::{self, ConfigError, Sources};
use reliant_store::{StoreConfig, TurnsConfig};
use reliant_telemetry::TelemetryConfig;
use reliant_worker::WorkerConfig;
use serde::{Deserialize, Serialize};

use crate::args::Global;

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub telemetry: TelemetryConfig,
    pub store: StoreConfig,
    pub bus: BusConfig,
    pub flows: FlowsConfig,
    pub turns: TurnsConfig,
    pub auth: AuthConfig,
    pub models: ModelsConfig,
    pub sim: SimConfig,
    pub api: ApiConfig,
    pub worker: WorkerConfig,
    pub gateway: GatewayConfig,
    pub daemon: DaemonConfig,
}

/// Where a `reliant model-sim` listens.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SimConfig {
    /// Its address with "/v1"; empty: there is none. Adds the providers `sim` and `sim-anthropic`.
    pub url: String,
}

impl Config {
    /// Flags over environment over file over defaults.
    pub fn load(global: &Global) -> Result<Self, ConfigError> {
        let mut config: Config = config::load(&sources(global)?)?;
        config.models = config.models.with_env(|name| std::env::var(name).ok());
        if !config.sim.url.is_empty() {
            config.models = config.models.with_sim(&config.sim.url);
        }
        Ok(config)
    }
}

/// Where values come from.
fn sources(global: &Global) -> Result<Sources, ConfigError> {
    let mut sources = Sources::from_process();
    sources.file = global.config.clone();
    sources.flags = settings(global)?;
    Ok(sources)
}

/// The keys and values of `--set`.
pub fn settings(global: &Global) -> Result<Vec<(String, String)>, ConfigError> {
    let pair = |setting: &String| match setting.split_once('=') {
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => Err(ConfigError::Incomplete(format!("--set {setting} has no '='; write --set key=value"))),
    };
    global.set.iter().map(pair).collect()
}
