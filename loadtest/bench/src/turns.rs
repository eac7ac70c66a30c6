//! Whole turns: one at a time for their times, 32 chats at a time for the rate and the CPU of each process.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use reliant_client::{ChatSession, TurnReport};
use reliant_devstack::Server;
use reliant_harness::Rig;
use reliant_types::{ChatId, pb};

use reliant_load::{Samples, cpu, samples::MS};

use crate::{Amount, Bench, report::Report};

pub const PLAIN: &str = "sim/text?tokens=20";
pub const TOOL: &str = "sim/tool?tool=noop&args=%7B%7D";
/// A turn with one call of the shell, which a person's own turns mostly make.
pub const SHELL: &str = "sim/tool?args=%7B%22command%22%3A%22true%22%7D";
pub const CHATS: usize = 32;
pub const PATIENCE: Duration = Duration::from_secs(60);

pub async fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let plain = one_by_one(bench, PLAIN).await?;
    let first = Samples::of(plain.iter().filter_map(TurnReport::first_token), MS);
    ensure!(first.len() == plain.len(), "a turn had no live text");
    report.set("first_token_ms_p50", first.at(0.5));
    report.set("first_token_ms_p95", first.at(0.95));
    report.set("plain_turn_ms_p50", Samples::of(plain.iter().map(TurnReport::total), MS).at(0.5));
    let tool = one_by_one(bench, TOOL).await?;
    ensure!(tool.iter().all(|turn| turn.tool_calls.len() == 1), "a turn did not have one call");
    let tool = Samples::of(tool.iter().map(TurnReport::total), MS);
    report.set("tool_turn_ms_p50", tool.at(0.5));
    report.set("tool_turn_ms_p95", tool.at(0.95));

    let before = cpu_by_role(bench).await?;
    let (turns, rate) = at_once(bench, PLAIN, bench.amount.rate_time).await?;
    report.set("turns_per_s_32", rate);
    for ((role, before), (_, after)) in before.into_iter().zip(cpu_by_role(bench).await?) {
        report.set(&format!("cpu_ms_per_turn_{role}"), (after - before) / turns as f64);
    }
    let before = cpu_by_role(bench).await?;
    let (turns, rate) = at_once(bench, TOOL, bench.amount.rate_time).await?;
    report.set("tool_turns_per_s_32", rate);
    for ((role, before), (_, after)) in before.into_iter().zip(cpu_by_role(bench).await?) {
        report.set(&format!("cpu_ms_per_tool_turn_{role}"), (after - before) / turns as f64);
    }
    Ok(())
}

pub async fn session(bench: &Bench, model: &str) -> Result<ChatSession> {
    let chat: ChatId = bench.ada.chat(model, pb::ChatMode::Auto).await?.id.parse()?;
    Ok(bench.ada.client.open(chat).await?)
}

async fn one_by_one(bench: &Bench, model: &str) -> Result<Vec<TurnReport>> {
    let mut session = session(bench, model).await?;
    let Amount { warm_up, one_by_one, .. } = bench.amount;
    let mut reports = Vec::with_capacity(one_by_one);
    for number in 0..warm_up + one_by_one {
        let report = session.send_and_wait("go", PATIENCE).await?;
        ensure!(report.succeeded(), "a turn failed: {:?}", report.turn);
        ensure!(report.verification.is_clean(), "the stream broke its promise: {:?}", report.verification);
        if number >= warm_up {
            reports.push(report);
        }
    }
    Ok(reports)
}

/// Turns done, and turns per second.
pub async fn at_once(bench: &Bench, model: &str, time: Duration) -> Result<(usize, f64)> {
    let mut sessions = Vec::with_capacity(CHATS);
    for _ in 0..CHATS {
        sessions.push(session(bench, model).await?);
    }
    let done = Arc::new(AtomicUsize::new(0));
    let begun = Instant::now();
    let work = sessions.into_iter().map(|mut session| {
        let done = done.clone();
        tokio::spawn(async move {
            while begun.elapsed() < time {
                let report = session.send_and_wait("go", PATIENCE).await?;
                ensure!(report.succeeded(), "a turn failed: {:?}", report.turn);
                ensure!(report.verification.is_clean(), "the stream broke its promise: {:?}", report.verification);
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })
    });
    for result in futures::future::join_all(work).await {
        result??;
    }
    let done = done.load(Ordering::Relaxed);
    Ok((done, done as f64 / begun.elapsed().as_secs_f64()))
}

/// CPU milliseconds used so far, by process; the processes of tool calls that have ended are not in the daemon's.
pub async fn cpu_by_role(bench: &Bench) -> Result<Vec<(&'static str, f64)>> {
    let rig = &bench.rig;
    let shared = Rig::shared_servers().await?;
    let all = |roles: &[reliant_devstack::RoleProcess]| roles.iter().map(reliant_devstack::RoleProcess::pid).collect();
    let server = |pid: Option<u32>| pid.into_iter().collect();
    let mut used = cpu::by_role([
        ("api", all(&rig.mesh.apis)),
        ("worker", all(&rig.mesh.workers)),
        ("gateway", all(&rig.mesh.gateways)),
        ("daemon", vec![bench.daemon.process.pid()]),
        ("model_sim", vec![rig.mesh.sim.pid()]),
        ("temporal", server(shared.pid(Server::Temporal))),
        ("postgres", server(shared.pid(Server::Postgres))),
        ("nats", server(rig.nats.pid(Server::Nats))),
    ]);
    // The roles are its children.
    used.push(("client", cpu::process_ms(std::process::id())));
    Ok(used)
}
