//! Metrics of a mesh at work: each declared one is really there, nothing else is, and no label names a person's thing.

use std::collections::BTreeSet;

use anyhow::Result;
use reliant_client::Approvals;
use reliant_harness::{DaemonOptions, Rig, RigOptions, eventually};
use reliant_telemetry::metrics::DECLARED;
use reliant_types::pb;
use serde_json::json;

use super::{bad_input::metrics, subjects::everything, succeeded};
use crate::scripts::{MODEL, PATIENCE, one_call, session};

/// What a mesh whose roles work shows nothing of, and why.
const UNSEEN: &[(&str, &str)] = &[
    ("reliant_rpc_refused_total", "nothing was refused"),
    ("reliant_bus_undecodable_total", "nobody sends garbage"),
    ("reliant_tool_outcome_unknown_total", "every outcome is known"),
    ("reliant_turn_failed_total", "no turn failed"),
    ("reliant_daemon_frames_refused_total", "the daemon is an honest one"),
    ("reliant_queue_refused_total", "no queue was full"),
    ("reliant_viewer_resyncs_total", "no viewer missed anything"),
    ("reliant_viewer_refills_total", "nobody came late to this text"),
    ("reliant_relay_rewakes_total", "no wake was lost"),
    ("temporal_workflow_task_execution_failed_total", "no workflow task failed"),
    ("reliant_chats_unseen_found_total", "each chat was looked at in time"),
    ("reliant_chat_runs_begun_anew_total", "each run answered"),
    ("reliant_model_cost_microusd_total", "the simulator costs nothing"),
    ("reliant_otlp_lost_total", "the collector takes everything"),
    ("reliant_otlp_adopted_total", "whether a killed process left spans behind is chance"),
    ("reliant_task_failures_total", "no task failed"),
    ("reliant_journal_calls", "a daemon's own"),
    ("rpc_client_call_duration_seconds", "of the Temporal client; seen in the roles that wake"),
];

/// The values of a line's labels.
fn labels(line: &str) -> Vec<&str> {
    let inner = line.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}')).map_or("", |(inner, _)| inner);
    inner.split("\",").filter_map(|pair| Some(pair.split_once("=\"")?.1.trim_end_matches('"'))).collect()
}

fn holds_an_id(value: &str) -> bool {
    value.split(|c: char| !(c.is_ascii_hexdigit() || c == '-')).any(|part| uuid::Uuid::parse_str(part).is_ok())
}

fn value(all: &str, series: &str) -> f64 {
    all.lines().filter_map(|line| line.strip_prefix(series)?.trim().parse::<f64>().ok()).sum()
}

/// A bit of everything that a mesh does on a good day, and on a middling one.
async fn a_day(rig: &Rig) -> Result<()> {
    everything(rig).await?;
    let bob = rig.person("bob").await?;
    let _daemon = rig.daemon(&bob, "desk", DaemonOptions::default()).await?;
    let mut chat = session(&bob, "sim/fault?kind=503&times=2&retry_after=0.1", pb::ChatMode::Auto).await?;
    succeeded("refused twice", &chat.send_and_wait("hello", PATIENCE).await?);
    let mut chat = session(&bob, MODEL, pb::ChatMode::Ask).await?.approvals(Approvals::ApproveOnce);
    let report = chat.send_and_wait(&one_call("shell", json!({ "command": "true" })), PATIENCE).await?;
    succeeded("approved", &report);
    // Leases are renewed by the clock.
    eventually("a renewed lease", PATIENCE, || async {
        Ok(metrics(rig).await?.contains("reliant_lease_renewals_total{").then_some(()))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn each_declared_metric_is_seen_and_no_label_is_an_id() -> Result<()> {
    let rig = Rig::start(RigOptions { apis: 2, traced: true, ..Default::default() }).await?;
    a_day(&rig).await?;
    let all = metrics(&rig).await?;
    let series: Vec<&str> = all.lines().filter(|line| !line.starts_with('#')).collect();
    let names: BTreeSet<&str> = series.iter().map(|line| line.split(['{', ' ']).next().unwrap_or_default()).collect();
    let of = |name: &str| {
        let parts = ["_bucket", "_sum", "_count"];
        let base = parts.iter().find_map(|part| name.strip_suffix(part)).unwrap_or(name);
        DECLARED.iter().any(|metric| metric.name == name || (metric.kind == "histogram" && metric.name == base))
    };
    let undeclared: Vec<_> = names.iter().filter(|name| !name.starts_with("process_") && !of(name)).collect();
    assert!(undeclared.is_empty(), "not declared: {undeclared:?}");
    let seen = |name: &str| names.contains(name) || names.contains(format!("{name}_count").as_str());
    let reasoned = |name: &str| UNSEEN.iter().any(|(unseen, _)| *unseen == name);
    let missing: Vec<_> =
        DECLARED.iter().map(|metric| metric.name).filter(|name| !seen(name) && !reasoned(name)).collect();
    assert!(missing.is_empty(), "declared, and shown by no role: {missing:?}");
    for line in &series {
        for label in labels(line) {
            assert!(!holds_an_id(label), "an id is a label: {line}");
            assert!(label.len() < 100, "a label without bound: {line}");
        }
    }
    // What a dashboard divides by, or begins with.
    for series in [
        "reliant_runtime_threads ",
        "reliant_runtime_busy_seconds_total ",
        "reliant_runtime_lag_seconds_count ",
        "reliant_queue_limit{queue=\"hints\"} ",
        "reliant_queue_limit{queue=\"calls\"} ",
        "reliant_queue_limit{queue=\"tunnel\"} ",
        "reliant_tool_run_seconds_count{status=\"succeeded\",tool=\"shell\"} ",
        "temporal_worker_task_slots_available{worker_type=\"ActivityWorker\"} ",
        "temporal_activity_schedule_to_start_latency_seconds_count ",
        "temporal_workflow_task_schedule_to_start_latency_seconds_count ",
        "temporal_sticky_cache_hit_total ",
        "process_resident_memory_bytes ",
    ] {
        assert!(value(&all, series) > 0.0, "nothing is counted in {series}\n{all}");
    }
    Ok(())
}

#[test]
fn an_id_in_a_label_would_be_found() {
    let line = r#"x_total{chat="0192f0c1-7b1c-7a55-8c3e-2f0f7d1c9a11",queue="a,b"} 1"#;
    assert_eq!(labels(line), ["0192f0c1-7b1c-7a55-8c3e-2f0f7d1c9a11", "a,b"]);
    assert!(holds_an_id(labels(line)[0]) && holds_an_id("chat:0192f0c1-7b1c-7a55-8c3e-2f0f7d1c9a11"));
    assert!(!holds_an_id("reliant.v1.update.{user}.{chat}"));
}
