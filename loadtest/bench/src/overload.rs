//! What is left of the throughput when the mesh has a half, a quarter and an eighth of the machine's cores, whether it
//! survives there the death of its only worker, and whether all is as before once the cores are back.
//!
//! All processes that this one has started are under the quota: the roles with the daemon and the simulator, and the
//! servers. This process, which makes the load, is not. Each level has chats of its own, whose runs are long when the
//! worker dies: what a worker must read again to go on is then at its largest.

use std::time::Duration;

use anyhow::{Context as _, Result};
use reliant_load::{Quota, QuotaError, cpu};
use tokio::time::{Instant, sleep, sleep_until};

use crate::{
    Bench,
    closed_loop::{ClosedLoop, Finished, Window},
    progress::Progress,
    report::Report,
    turns::{CHATS, SHELL, session},
};

pub const PART: &str = "overload";

/// Name, and the share of the machine's cores.
const LEVELS: [(&str, f64); 3] = [("half", 0.5), ("quarter", 0.25), ("eighth", 0.125)];
/// With those of [`ALONE`] some 75 turns a chat.
const WARM_UP_TURNS: usize = 55;
/// A slower machine begins with fewer turns.
const WARM_UP_MAX: Duration = Duration::from_secs(60);
const ALONE: Duration = Duration::from_secs(15);
const SETTLE: Duration = Duration::from_secs(5);
const LIMITED: Duration = Duration::from_secs(20);
/// From the kill to the window in which the throughput is to be back.
const TAKEOVER: Duration = Duration::from_secs(30);
const AFTER_KILL: Duration = Duration::from_secs(25);
/// From the end of the quota to the window in which turns are to take as long as before it.
const RECOVERY: Duration = Duration::from_secs(10);
const RECOVERED: Duration = Duration::from_secs(12);
/// Of the last turns of a level.
const STOP_PATIENCE: Duration = Duration::from_secs(40);
const RESTART_PATIENCE: Duration = Duration::from_secs(120);
const CONFINE_EVERY: Duration = Duration::from_millis(100);
const FAILURES_PRINTED_MAX: usize = 3;

pub async fn run(bench: &mut Bench, report: &mut Report) -> Result<()> {
    let cores = std::thread::available_parallelism().context("the number of cores is not known")?.get() as f64;
    let quota = match mesh_quota(cores) {
        Ok(quota) => quota,
        Err(error) => {
            report.leave_out(PART, &error.to_string());
            return Ok(());
        }
    };
    let progress = Progress::start("overload: opening chats");
    let (mut recovery, mut gap, mut failed, mut unended) = (0.0, 0.0, 0, 0);
    for (name, share) in LEVELS {
        let Level { windows, finished } = Box::pin(measure(bench, &quota, name, cores * share, &progress)).await?;
        let Finished { turns, failures, unended: left } = finished;
        let [alone, limited, after_kill, recovered] = windows;
        let rate = |window| turns.rate(window);
        if name == LEVELS[0].0 {
            report.set("overload_alone_turns_per_s", rate(alone));
        }
        report.set(&format!("overload_{name}_turns_per_s"), rate(limited));
        report.set(&format!("overload_{name}"), share_of(rate(limited), rate(alone)));
        report.set(&format!("overload_{name}_after_kill"), share_of(rate(after_kill), rate(limited)));
        recovery = f64::max(recovery, turns.p95_ms(recovered) / turns.p95_ms(alone));
        for window in [limited, after_kill] {
            gap = f64::max(gap, turns.worst_gap_over_median(window));
        }
        for failure in failures.iter().take(FAILURES_PRINTED_MAX) {
            report.say(&format!("overload, {name}: a turn failed: {failure}"));
        }
        failed += failures.len();
        unended += left;
    }
    report.set("overload_recovery_p95", recovery);
    report.set("overload_worst_gap", gap);
    report.set("overload_failed_turns", failed as f64);
    report.set("overload_unended_turns", unended as f64);
    Ok(())
}

struct Level {
    /// Alone, under the quota, after the kill, and when the quota was lifted.
    windows: [Window; 4],
    finished: Finished,
}

async fn measure(bench: &mut Bench, quota: &Quota, name: &str, cores: f64, progress: &Progress) -> Result<Level> {
    progress.set(&format!("overload: {CHATS} new chats have {WARM_UP_TURNS} turns each"));
    let mut sessions = Vec::with_capacity(CHATS);
    for _ in 0..CHATS {
        sessions.push(session(bench, SHELL).await?);
    }
    let chats = ClosedLoop::start(sessions);
    chats.until_each_had(WARM_UP_TURNS, Instant::now() + WARM_UP_MAX).await;
    let alone = Window::lasting(ALONE).await;

    progress.set(&format!("overload: the mesh has {cores} cores ({name})"));
    confine(quota);
    quota.limit(Some(cores))?;
    sleep(SETTLE).await;
    let limited = Window::lasting(LIMITED).await;

    progress.set(&format!("overload: the worker is killed and started again ({name})"));
    let killed = Instant::now();
    let after = async {
        sleep_until(killed + TAKEOVER).await;
        Window::lasting(AFTER_KILL).await
    };
    let (replaced, after_kill) = tokio::join!(replace_worker(bench, quota), after);
    replaced?;

    progress.set(&format!("overload: the quota is lifted ({name})"));
    quota.limit(None)?;
    sleep(RECOVERY).await;
    let recovered = Window::lasting(RECOVERED).await;
    let finished = chats.stop(STOP_PATIENCE).await;
    Ok(Level { windows: [alone, limited, after_kill, recovered], finished })
}

/// A quota that this user can set, without a limit and with the mesh in it.
fn mesh_quota(cores: f64) -> Result<Quota, QuotaError> {
    let quota = Quota::new("bench")?;
    quota.limit(Some(cores))?;
    quota.limit(None)?;
    if let Some(pid) = cpu::descendants(std::process::id()).first() {
        quota.add(*pid)?;
    }
    Ok(quota)
}

/// Puts the processes that this one has started into the group. What ends meanwhile cannot be put there, and need not.
fn confine(quota: &Quota) {
    let inside = quota.processes();
    for pid in cpu::descendants(std::process::id()) {
        if !inside.contains(&pid) {
            let _ = quota.add(pid);
        }
    }
}

/// Kills the only worker and starts it again at once, as a supervisor does. The new process is under the quota while it
/// starts.
async fn replace_worker(bench: &mut Bench, quota: &Quota) -> Result<()> {
    let worker = &mut bench.rig.mesh.workers[0];
    worker.kill();
    let mut restarted = std::pin::pin!(worker.restart(RESTART_PATIENCE));
    loop {
        tokio::select! {
            done = &mut restarted => return done.context("the worker did not start again"),
            () = sleep(CONFINE_EVERY) => confine(quota),
        }
    }
}

/// Nothing of nothing is nothing: a throughput that was lost before cannot be kept.
fn share_of(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}
