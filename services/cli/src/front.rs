//! Finding the api and who one is: flags, environment, then the mesh that `reliant up` runs here.

use anyhow::{Context as _, Result};
use reliant_client::{Client, ClientConfig};
use reliant_telemetry::{Guard, TelemetryConfig};
use reliant_types::pb;

use crate::{
    args::FrontDoor,
    up::{Running, data_dir},
};

/// The same as for the roles.
const OTLP_VARIABLE: &str = "RELIANT_TELEMETRY__OTLP_ENDPOINT";

/// Address and token.
pub fn locate(front: &FrontDoor) -> Result<(String, String)> {
    let running = Running::read(&data_dir(&front.data_dir)?);
    let api = front.api.clone().or_else(|| running.as_ref().map(|running| running.api_url.clone()));
    let api = api.context("no api is known here; start one with `reliant up`, or give --api and --token")?;
    let own = running.filter(|running| running.api_url == api).map(|running| running.token);
    let token = front.token.clone().or(own);
    let token = token.with_context(|| format!("no token for {api}; give --token or set RELIANT_TOKEN"))?;
    Ok((api, token))
}

/// A terminal's part of its turns' traces, where somebody takes them. It logs nothing: the terminal is for the chat.
pub fn telemetry(front: &FrontDoor) -> Result<Guard> {
    let given = std::env::var(OTLP_VARIABLE).ok().filter(|url| !url.is_empty());
    let config = TelemetryConfig {
        log: "off".into(),
        otlp_endpoint: given.or_else(|| crate::trace::running_receiver(&front.data_dir)),
        service_name: "reliant-client".into(),
        ..TelemetryConfig::default()
    };
    reliant_telemetry::init(&config).context("telemetry could not be started")
}

pub async fn connect(front: &FrontDoor) -> Result<Client> {
    let (api, token) = locate(front)?;
    Client::connect(ClientConfig::new(api.clone(), token))
        .await
        .map_err(|failure| anyhow::anyhow!("{failure}"))
        .with_context(|| format!("the api at {api} cannot be reached; is it running? `reliant doctor` looks closer"))
}

/// The daemon with this id or name; the only one if none is named; empty if there is none.
pub async fn daemon_id(client: &Client, wanted: Option<&str>) -> Result<String> {
    let daemons = client.list_daemons(pb::ListDaemonsRequest { include_revoked: false }).await?.daemons;
    let names = || daemons.iter().map(|daemon| daemon.name.as_str()).collect::<Vec<_>>().join(", ");
    match wanted {
        Some(wanted) => daemons
            .iter()
            .find(|daemon| daemon.id == wanted || daemon.name == wanted)
            .map(|daemon| daemon.id.clone())
            .with_context(|| format!("no daemon '{wanted}'; there is: {}", names())),
        None if daemons.len() == 1 => Ok(daemons[0].id.clone()),
        None if daemons.is_empty() => Ok(String::new()),
        None => anyhow::bail!("there are several daemons; choose one with --daemon: {}", names()),
    }
}
