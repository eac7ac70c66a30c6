//! `reliant model-sim`.

use anyhow::{Context as _, Result};
use reliant_devstack::Addresses;
use reliant_model_sim::SimConfig;
use reliant_runtime::{Drain, InstanceId};

use crate::{
    args::{Global, ModelSimArgs},
    config::Config,
    server,
};

pub async fn run(global: Global, args: ModelSimArgs) -> Result<()> {
    let config = Config::load(&global)?;
    let guard = server::telemetry(&config, "reliant-model-sim", InstanceId::new())?;
    let drain = Drain::new();
    drain.watch_signals().context("could not listen for signals")?;
    let sim = reliant_model_sim::build(SimConfig { listen: args.listen })
        .await
        .with_context(|| format!("the simulator cannot listen on {}", args.listen))?;
    if let Some(path) = &args.address_file {
        server::write_addresses(path, Addresses { listen: Some(sim.local_addr()), admin: None })?;
    }
    let stop = drain.token();
    sim.run(async move { stop.cancelled().await }).await?;
    guard.shutdown();
    Ok(())
}
