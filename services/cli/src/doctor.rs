//! `reliant doctor`: what is reachable, what is wrong, and what to do about it.

use std::time::Duration;

use anyhow::{Result, bail};
use reliant_client::{Client, ClientConfig};
use reliant_devstack::{Server, StackConfig, Tools};
use reliant_types::pb;

use crate::{
    args::{FrontDoor, Global},
    config::Config,
    front,
    up::{data_dir, say},
};

const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Default)]
struct Report {
    wrong: usize,
}

impl Report {
    fn good(&mut self, what: &str) {
        say(&format!("  ok     {what}"));
    }

    fn bad(&mut self, what: &str, way_out: &str) {
        self.wrong += 1;
        say(&format!("  WRONG  {what}"));
        say(&format!("         → {way_out}"));
    }
}

pub async fn run(global: Global, front: FrontDoor) -> Result<()> {
    let mut report = Report::default();
    let config = match Config::load(&global) {
        Ok(config) => {
            report.good("the configuration is understood");
            config
        }
        Err(error) => {
            report.bad(&format!("the configuration: {error}"), "mend it; `reliant config` shows what is in force");
            Config::default()
        }
    };
    local(&mut report, &front).await?;
    api(&mut report, &front).await;
    models(&mut report, &config);
    if report.wrong > 0 {
        bail!("{} thing(s) wrong", report.wrong);
    }
    say("all well");
    Ok(())
}

async fn local(report: &mut Report, front: &FrontDoor) -> Result<()> {
    let tools = Tools::new(StackConfig::default_tools_dir());
    for (server, found) in [
        (Server::Postgres, tools.postgres(None).err()),
        (Server::Nats, tools.nats().err()),
        (Server::Temporal, tools.temporal().err()),
    ] {
        let variable = server.variable();
        if let Some(url) = std::env::var(variable).ok().filter(|url| !url.is_empty()) {
            match reliant_devstack::reachable(server, &url).await {
                Ok(()) => report.good(&format!("{server} answers where {variable} says")),
                Err(error) => report.bad(&error.to_string(), "`reliant up` cannot start before it answers"),
            }
        } else if let Some(error) = found {
            report.bad(&format!("{server} is not installed; `reliant up` needs it"), &error.to_string());
        } else {
            report.good(&format!("{server} is installed for `reliant up`"));
        }
    }
    let dir = data_dir(&front.data_dir)?;
    match reliant_devstack::running_info(&dir) {
        Some((pid, info)) => report.good(&format!("a mesh runs here: {} (process {pid})", info.unwrap_or_default())),
        None => say(&format!("  –      no mesh of `reliant up` runs with {}", dir.display())),
    }
    Ok(())
}

async fn api(report: &mut Report, front: &FrontDoor) {
    let (url, token) = match front::locate(front) {
        Ok(found) => found,
        Err(error) => return report.bad("no api to look at", &error.to_string()),
    };
    let config = ClientConfig::new(url.clone(), token).call_deadline(PATIENCE);
    let client = match Client::connect(config).await {
        Ok(client) => client,
        Err(failure) => {
            return report.bad(
                &format!("the api at {url} does not answer: {failure}"),
                "start it with `reliant up`, or check --api",
            );
        }
    };
    match client.get_current_user(pb::GetCurrentUserRequest {}).await {
        Ok(user) => report.good(&format!("the api at {url} knows you as {} ({})", user.name, user.role)),
        Err(failure) => {
            return report.bad(
                &format!("the api refuses the token: {failure} ({})", failure.code),
                "make a new one with `reliant token create`, or run `reliant up` again",
            );
        }
    }
    match client.list_daemons(pb::ListDaemonsRequest { include_revoked: false }).await {
        Ok(list) if list.daemons.is_empty() => report.bad(
            "no daemon is registered; agents have no tools",
            "run `reliant daemon register` and `reliant daemon start`",
        ),
        Ok(list) => {
            for daemon in list.daemons {
                if daemon.connected {
                    report.good(&format!("daemon '{}' is connected, with {} tools", daemon.name, daemon.tools.len()));
                } else {
                    report.bad(
                        &format!("daemon '{}' is away", daemon.name),
                        "run `reliant daemon start` on it, or look at `reliant daemon logs` there",
                    );
                }
            }
        }
        Err(failure) => report.bad(&format!("daemons cannot be listed: {failure}"), "look at the api's log"),
    }
}

fn models(report: &mut Report, config: &Config) {
    if config.models.providers.is_empty() {
        say(
            "  –      no model provider in this shell's configuration; set OPENAI_API_KEY or ANTHROPIC_API_KEY for a real model",
        );
    }
    for provider in &config.models.providers {
        report.good(&format!("model provider '{}' at {}", provider.name, provider.base_url));
    }
}
