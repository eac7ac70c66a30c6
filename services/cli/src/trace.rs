//! `reliant trace` and `reliant observe`: what a trace receiver on this machine has seen.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::{Context as _, Result, bail};
use reliant_observe::{Observe, ObserveConfig};
use reliant_runtime::Drain;
use serde::Deserialize;

use crate::{
    args::{ObserveArgs, TraceArgs},
    up::{Running, data_dir, say},
};

/// Where the receiver of `reliant up --observe` is, if one runs here.
pub fn running_receiver(given: &Option<PathBuf>) -> Option<String> {
    Running::read(&data_dir(given).ok()?)?.observe_url
}

#[derive(Deserialize)]
struct Listed {
    trace_id: String,
}

#[derive(Deserialize)]
struct Shown {
    trace_id: String,
    text: String,
}

pub async fn show(args: TraceArgs) -> Result<()> {
    let url = args.url.or_else(|| running_receiver(&args.data_dir));
    let url = url.context("no trace receiver is known here; start one with `reliant up --observe`, or give --url")?;
    let address: SocketAddr = url
        .trim_start_matches("http://")
        .trim_end_matches('/')
        .parse()
        .with_context(|| format!("'{url}' is not an address such as http://127.0.0.1:7446"))?;
    let wanted = args.id.unwrap_or_default();
    if !wanted.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-') {
        bail!("'{wanted}' is neither a trace id nor a chat id");
    }
    let get = async |path: String| {
        let answer = reliant_devstack::http_get(address, &path).await;
        answer.with_context(|| format!("the trace receiver at {url} does not answer; does `reliant up --observe` run?"))
    };
    if !wanted.is_empty() {
        let (status, body) = get(format!("/api/traces/{wanted}/text")).await?;
        if status == 200 {
            return print(&body);
        }
    }
    let (_, body) = get(format!("/api/traces?search={wanted}")).await?;
    let listed: Vec<Listed> =
        serde_json::from_str(&body).context("the trace receiver said something else than a list")?;
    let Some(newest) = listed.first() else {
        bail!("no trace of a turn here begins with '{wanted}', and none is of such a chat");
    };
    let (_, body) = get(format!("/api/traces/{}/text", newest.trace_id)).await?;
    print(&body)
}

fn print(body: &str) -> Result<()> {
    let shown: Shown = serde_json::from_str(body).context("the trace receiver said something else than a trace")?;
    say(&format!("trace {}", shown.trace_id));
    say("  begin, ms    length      * the end waited for it");
    say(shown.text.trim_end());
    Ok(())
}

pub async fn receive(args: ObserveArgs) -> Result<()> {
    let drain = Drain::new();
    drain.watch_signals().context("could not listen for signals")?;
    let observe = Observe::start(ObserveConfig { listen: args.listen, ..ObserveConfig::default() }).await?;
    say(&format!("traces     {}", observe.url()));
    say(&format!("send them  RELIANT_TELEMETRY__OTLP_ENDPOINT={} in the environment of each role", observe.url()));
    drain.draining().await;
    Ok(())
}
