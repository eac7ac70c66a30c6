//! Each kind of NATS subject has a traced round trip: the list in `shared/bus/src/subject.rs` is the list of this test.

use std::collections::HashSet;

use anyhow::{Context as _, Result};
use reliant_bus::DECLARED as SUBJECTS;
use reliant_client::{Client, ClientConfig, ClientUpdate};
use reliant_harness::{DaemonOptions, Rig, RigOptions, eventually};
use reliant_observe::{Observe, ObserveConfig, Span, Store, tree};
use reliant_telemetry::names::attr;
use reliant_types::{TurnId, pb};
use serde_json::json;

use super::{bad_input::metrics, faults::turn_of};
use crate::scripts::{MODEL, PATIENCE, one_call, session};

pub fn all(store: &Store) -> Vec<Span> {
    store.list("", false, usize::MAX).iter().flat_map(|trace| store.spans(&trace.trace_id)).collect()
}

fn of<'a>(spans: &'a [Span], template: &'a str, kind: &'a str) -> impl Iterator<Item = &'a Span> {
    spans.iter().filter(move |span| {
        span.kind == kind
            && span.text(attr::MESSAGING_SYSTEM) == "nats"
            && span.text(attr::MESSAGING_TEMPLATE) == template
    })
}

/// A consumer's span right below a producer's, of one trace.
fn has_round_trip(spans: &[Span], template: &str) -> bool {
    let sent: HashSet<_> =
        of(spans, template, "producer").map(|span| (span.trace_id.as_str(), span.span_id.as_str())).collect();
    of(spans, template, "consumer").any(|span| sent.contains(&(span.trace_id.as_str(), span.parent_id.as_str())))
}

/// Messages that the roles took in.
fn consumed(metrics: &str, template: &str) -> usize {
    let series = format!("messaging_client_consumed_messages_total{{messaging_destination_template=\"{template}\"}} ");
    metrics.lines().filter_map(|line| line.strip_prefix(&series)?.parse::<usize>().ok()).sum()
}

async fn cancel(client: &Client, turn: TurnId) -> Result<()> {
    client.cancel_turn(pb::CancelTurnRequest { turn_id: turn.to_string() }).await?;
    Ok(())
}

/// Does something of each kind. A receiver of its own sees this mesh alone.
pub async fn everything(rig: &Rig) -> Result<()> {
    let ada = rig.person("ada").await?;
    let other = Client::connect(ClientConfig::new(rig.mesh.api_url(1), ada.token.clone())).await?;
    let mut feed = ada.client.subscribe(&[], true);
    tokio::spawn(async move { while feed.next().await.is_ok() {} });
    let daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;

    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let report = chat.send_and_wait(&one_call("shell", json!({ "command": "true" })), PATIENCE).await?;
    assert!(report.succeeded(), "{report:?}");

    // Who comes late asks the worker for what was said; then the turn is cancelled.
    let mut chat = session(&ada, "sim/text?tokens=2000&rate=40", pb::ChatMode::Auto).await?;
    let turn = turn_of(&chat.send("hello").await?);
    while !matches!(chat.next().await?, ClientUpdate::Delta(_)) {}
    let mut late = other.open(chat.chat()).await?;
    while !matches!(late.next().await?, ClientUpdate::Delta(_)) {}
    cancel(&ada.client, turn).await?;
    chat.wait_turn(turn, PATIENCE).await?;

    // The same of a daemon.
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let command = "for n in $(seq 600); do echo line $n; sleep 0.1; done";
    let turn = turn_of(&chat.send(&one_call("shell", json!({ "command": command }))).await?);
    let is_output = |update: &ClientUpdate| {
        matches!(update, ClientUpdate::Delta(delta)
            if delta.block.as_ref().is_some_and(|block| block.kind() == pb::StreamKind::Stdout))
    };
    while !is_output(&chat.next().await?) {}
    let mut late = other.open(chat.chat()).await?;
    while !is_output(&late.next().await?) {}
    cancel(&ada.client, turn).await?;
    chat.wait_turn(turn, PATIENCE).await?;

    ada.client.revoke_daemon(pb::RevokeDaemonRequest { daemon_id: daemon.id.clone() }).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_subject_has_a_traced_round_trip() -> Result<()> {
    let listen = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let observe = Observe::start(ObserveConfig { listen, ..ObserveConfig::default() }).await?;
    let env = vec![("RELIANT_TELEMETRY__OTLP_ENDPOINT".to_owned(), observe.url())];
    let rig = Rig::start(RigOptions { apis: 2, env, ..Default::default() }).await?;
    everything(&rig).await?;

    let store = observe.store();
    for subject in SUBJECTS {
        let template = subject.template;
        let what = format!("a traced round trip on {template}");
        let seen = eventually(&what, PATIENCE, || async { Ok(has_round_trip(&all(store), template).then_some(())) });
        seen.await.with_context(|| format!("nothing traced was sent and taken on {template}"))?;
    }
    // Not once, but each time; save where the list says why not.
    for subject in SUBJECTS {
        let template = subject.template;
        let what = format!("a span for each message on {template}");
        let counts = eventually(&what, PATIENCE, || async {
            let taken = consumed(&metrics(&rig).await?, template);
            let spans = of(&all(store), template, "consumer").count();
            let fits = if subject.spanless.is_some() { spans < taken } else { spans == taken };
            Ok(fits.then_some((taken, spans)))
        });
        let (taken, spans) = counts.await.with_context(|| {
            let spans = of(&all(store), template, "consumer").count();
            format!("{spans} spans on {template}; without one: {:?}", subject.spanless)
        })?;
        eprintln!("{template}: {taken} messages, {spans} spans");
    }
    // What the gateway passes on to the daemon, and gets from it.
    let spans = all(store);
    for (service, frame) in [
        ("reliant-daemon", "dispatch"),
        ("reliant-daemon", "cancel"),
        ("reliant-daemon", "prefix"),
        ("reliant-gateway", "result"),
    ] {
        let taken = spans
            .iter()
            .find(|span| span.service == service && span.name == "tunnel.receive" && span.text(attr::FRAME) == frame);
        let taken = taken.with_context(|| format!("no {service} took a {frame} frame"))?;
        let above = spans.iter().find(|span| span.span_id == taken.parent_id && span.trace_id == taken.trace_id);
        assert_eq!(
            above.map(|span| span.kind),
            Some("producer"),
            "{frame}\n{}",
            tree::text(&store.spans(&taken.trace_id))
        );
    }
    Ok(())
}
