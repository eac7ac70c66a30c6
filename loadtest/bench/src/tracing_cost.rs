//! What tracing costs: CPU of the roles per one-tool turn with every trace exported, one in ten, and none. Three meshes
//! stand side by side; one works at a time, by turns, so that whatever else this machine does falls on all alike.

use std::time::Duration;

use anyhow::{Result, ensure};
use reliant_devstack::cpu_ms;
use reliant_harness::{DaemonOptions, Rig, RigOptions, sink};

use crate::{
    Bench,
    report::{Report, Samples},
    turns::{TOOL, at_once},
};

const ROUNDS: usize = 5;
const TIME: Duration = Duration::from_secs(6);
/// Name, and share of traces; none: no collector.
const VARIANTS: &[(&str, Option<&str>)] = &[("off", None), ("10", Some("0.1")), ("100", Some("1.0"))];

pub async fn run(report: &mut Report) -> Result<()> {
    let mut meshes = Vec::new();
    for (name, ratio) in VARIANTS {
        meshes.push((name, mesh(*ratio).await?, Vec::new()));
    }
    for round in 0..=ROUNDS {
        for (_, bench, measured) in &mut meshes {
            let before = cpu(bench);
            let (turns, _) = at_once(bench, TOOL, TIME).await?;
            ensure!(turns > 0, "no turn came to its end");
            // The first round warms up.
            if round > 0 {
                measured.push((cpu(bench) - before) / turns as f64);
            }
        }
    }
    let mut off = f64::NAN;
    for (name, _, measured) in meshes {
        let median = Samples::plain(measured).at(0.5);
        report.set(&format!("cpu_ms_per_tool_turn_traced_{name}"), median);
        if *name == "off" {
            off = median;
        } else {
            report.set(&format!("tracing_cost_percent_{name}"), (median / off - 1.0) * 100.0);
        }
    }
    Ok(())
}

async fn mesh(ratio: Option<&str>) -> Result<Bench> {
    let mut env = Vec::new();
    if let Some(ratio) = ratio {
        env.push(("RELIANT_TELEMETRY__OTLP_ENDPOINT".to_owned(), sink()?.url().to_owned()));
        env.push(("RELIANT_TELEMETRY__SAMPLE_RATIO".to_owned(), ratio.to_owned()));
    }
    let config = "[api.limits.rate]\ncalls_per_second = 0.0\n\n[telemetry]\nlog = \"warn\"\n".to_owned();
    let rig = Rig::start(RigOptions { config, env, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let daemon = DaemonOptions { config: "bench_tools = true\n".into(), ..Default::default() };
    let daemon = rig.daemon(&ada, "bench", daemon).await?;
    Ok(Bench { rig, ada, daemon })
}

/// CPU milliseconds of the roles so far.
fn cpu(bench: &Bench) -> f64 {
    let mesh = &bench.rig.mesh;
    let roles = mesh.apis.iter().chain(&mesh.workers).chain(&mesh.gateways).chain([&bench.daemon.process]);
    roles.map(|role| cpu_ms(role.pid())).sum()
}
