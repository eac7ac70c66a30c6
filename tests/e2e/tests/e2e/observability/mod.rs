//! Seen end to end: each turn is one trace without orphans, whoever dies; its phases add up; names are declared ones; bad
//! input decides nothing. `SHOW_TRACES=1` prints each trace.

mod bad_input;
mod command;
mod faults;
mod links;
mod logs;
mod metrics;
mod subjects;
mod turns;

use anyhow::{Context as _, Result};
use reliant_client::TurnReport;
use reliant_harness::{Rig, RigOptions, Sink, sink};
use reliant_observe::{Span, tree};
use reliant_telemetry::names::{attr, span};
use reliant_types::pb;

pub async fn traced(options: RigOptions) -> Result<(Rig, &'static Sink)> {
    let sink = sink()?;
    Ok((Rig::start(RigOptions { traced: true, ..options }).await?, sink))
}

/// The whole trace of a turn, which must be well formed whatever happened.
pub async fn checked(sink: &Sink, what: &str, turn: &pb::Turn) -> Result<Vec<Span>> {
    let spans = well_formed(sink, what, &turn.trace_id).await?;
    let roots: Vec<_> = spans.iter().filter(|span| span.parent_id.is_empty()).collect();
    assert_eq!(roots.len(), 1, "{what}: one trace has one root\n{}", tree::text(&spans));
    assert_eq!((roots[0].name.as_str(), roots[0].service.as_str()), (span::CLIENT_SEND, "reliant-client"), "{what}");
    assert!(tree::orphans(&spans).is_empty(), "{what}: orphans\n{}", tree::text(&spans));
    Ok(spans)
}

/// Names and attributes are of the list, and nothing came twice but what a kill repeats.
pub async fn well_formed(sink: &Sink, what: &str, trace: &str) -> Result<Vec<Span>> {
    let spans = sink.trace(trace).await.with_context(|| what.to_owned())?;
    if std::env::var_os("SHOW_TRACES").is_some() {
        eprintln!("--- {what}\n{}", tree::text(&spans));
    }
    for found in &spans {
        assert!(span::is_declared(&found.name), "{what}: the span name '{}' is not declared", found.name);
        for key in found.attributes.keys() {
            assert!(attr::is_declared(key), "{what}: the attribute '{key}' of '{}' is not declared", found.name);
        }
        for key in required(found) {
            assert!(found.attributes.contains_key(*key), "{what}: '{}' has no '{key}': {found:?}", found.name);
        }
    }
    // A kill between the collector's answer and the end of its spool's segment repeats that batch, once. All tests of this
    // process share the sink, and only some kill; whatever repeats without a kill repeats far more.
    let status = sink.store().status();
    assert!(status.repeated < 50 + status.spans as u64 / 100, "spans are exported twice: {status:?}");
    Ok(spans)
}

/// What OpenTelemetry's conventions ask of a span, by its kind and name.
fn required(found: &Span) -> &'static [&'static str] {
    let word = found.name.split(' ').next().unwrap_or_default();
    match (found.kind, word) {
        (_, span::DB) => &[attr::DB_SYSTEM, attr::DB_OPERATION],
        (_, span::MODEL_CALL) => {
            &[attr::GEN_AI_OPERATION, attr::GEN_AI_PROVIDER, attr::GEN_AI_MODEL, attr::SERVER_ADDRESS]
        }
        (_, span::TOOL_EXECUTE) => &[attr::GEN_AI_OPERATION, attr::GEN_AI_TOOL_NAME, attr::GEN_AI_TOOL_CALL_ID],
        (_, span::TOOL_PROCESS) => &[attr::PROCESS_EXECUTABLE, attr::PROCESS_PID],
        (_, span::BUS_PUBLISH | span::BUS_REQUEST | span::BUS_PROCESS) => &[
            attr::MESSAGING_SYSTEM,
            attr::MESSAGING_OPERATION,
            attr::MESSAGING_OPERATION_TYPE,
            attr::MESSAGING_TEMPLATE,
        ],
        ("client", _) if found.service == "reliant-web" => &[attr::RPC_SYSTEM, attr::RPC_METHOD, attr::RPC_STATUS],
        ("client", _) => &[attr::RPC_SYSTEM, attr::RPC_METHOD, attr::RPC_STATUS, attr::SERVER_ADDRESS],
        ("server", name) if name.contains('/') => &[attr::RPC_SYSTEM, attr::RPC_METHOD, attr::RPC_STATUS],
        _ => &[],
    }
}

/// The phases of a turn make the time between its acceptance and its end, by the database's clock, within 5%: whatever
/// happened to it on the way, as long as no worker died with a round that it had stored.
#[track_caller]
pub fn phases_fill(what: &str, spans: &[Span], turn: &pb::Turn) -> std::collections::BTreeMap<&'static str, f64> {
    let phases: std::collections::BTreeMap<_, _> = tree::phases(spans).into_iter().collect();
    let outside = |name: &str| phases.get(name).copied().unwrap_or_default();
    let sum: f64 = phases.values().sum::<f64>() - outside("accept") - outside("fanout");
    let seconds = |time: &Option<prost_types::Timestamp>| {
        time.as_ref().map_or(0.0, |time| time.seconds as f64 + f64::from(time.nanos) / 1e9)
    };
    let whole = seconds(&turn.ended_at) - seconds(&turn.created_at);
    eprintln!("{what}: the phases make {sum:.4} s of {whole:.4} s: {phases:?}");
    assert!((sum - whole).abs() < 0.05 * whole, "{what}: {sum:.4} s of {whole:.4} s\n{}", tree::text(spans));
    phases
}

/// Name, kind and role of a span.
pub type Hop<'a> = (&'a str, &'a str, &'a str);

/// Each of these is there, of this kind and role, and right below the one before it.
#[track_caller]
pub fn way<'a>(spans: &'a [Span], hops: &[Hop]) -> &'a Span {
    let mut above: Vec<&Span> = Vec::new();
    for (name, kind, service) in hops {
        let service = format!("reliant-{service}");
        let found = spans.iter().filter(|span| {
            let fits = (span.name.as_str(), span.kind, span.service.as_str()) == (*name, *kind, service.as_str());
            fits && (above.is_empty() || above.iter().any(|above| span.parent_id == above.span_id))
        });
        let found: Vec<_> = found.collect();
        assert!(
            !found.is_empty(),
            "no {kind} span '{name}' of {service} below '{}'\n{}",
            above.first().map_or("", |span| &span.name),
            tree::text(spans)
        );
        above = found;
    }
    above[0]
}

/// Spans of this word, whatever value follows it in the name.
pub fn named<'a>(spans: &'a [Span], word: &str) -> Vec<&'a Span> {
    spans.iter().filter(|span| span.name.split(' ').next() == Some(word)).collect()
}

#[track_caller]
pub fn succeeded(what: &str, report: &TurnReport) {
    assert!(report.succeeded(), "{what}: {:?}", report.turn);
    assert!(report.verification.is_clean(), "{what}: {:?}", report.verification);
}
