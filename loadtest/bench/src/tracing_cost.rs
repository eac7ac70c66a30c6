//! What tracing costs: CPU of the roles per one-tool turn with every trace exported, one in ten, and none. Three meshes
//! stand side by side; one works at a time, by turns and in another order each round, so that whatever else this machine
//! does falls on all alike. A cost is the median over the rounds of what a mesh took over what the untraced one took.

use std::time::Duration;

use anyhow::{Result, ensure};
use reliant_harness::{DaemonOptions, Rig, RigOptions, sink};

use reliant_load::{Samples, cpu::process_ms};

use crate::{
    Bench,
    report::Report,
    turns::{TOOL, at_once},
};

const ROUNDS: usize = 9;
const TIME: Duration = Duration::from_secs(4);
/// Name, and share of traces; none: no collector.
const VARIANTS: &[(&str, Option<&str>)] = &[("off", None), ("10", Some("0.1")), ("100", Some("1.0"))];

pub async fn run(report: &mut Report) -> Result<()> {
    let mut meshes = Vec::new();
    for (name, ratio) in VARIANTS {
        meshes.push((name, mesh(*ratio).await?, Vec::new()));
    }
    for round in 0..=ROUNDS {
        for place in 0..VARIANTS.len() {
            let (_, bench, measured) = &mut meshes[(round + place) % VARIANTS.len()];
            let before = cpu(bench);
            let (turns, _) = at_once(bench, TOOL, TIME).await?;
            ensure!(turns > 0, "no turn came to its end");
            // The first round warms up.
            if round > 0 {
                measured.push((cpu(bench) - before) / turns as f64);
            }
        }
    }
    let off = meshes[0].2.clone();
    for (name, _, measured) in meshes {
        let costs = measured.iter().zip(&off).map(|(with, without)| (with / without - 1.0) * 100.0);
        let cost = Samples::plain(costs).at(0.5);
        report.set(&format!("cpu_ms_per_tool_turn_traced_{name}"), Samples::plain(measured).at(0.5));
        if *name != "off" {
            report.set(&format!("tracing_cost_percent_{name}"), cost);
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
    Ok(Bench { rig, ada, daemon, amount: crate::WHOLE })
}

/// CPU milliseconds of the roles so far.
fn cpu(bench: &Bench) -> f64 {
    let mesh = &bench.rig.mesh;
    let roles = mesh.apis.iter().chain(&mesh.workers).chain(&mesh.gateways).chain([&bench.daemon.process]);
    roles.map(|role| process_ms(role.pid())).sum()
}
