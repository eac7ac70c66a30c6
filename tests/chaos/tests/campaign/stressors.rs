//! Stressors take what they are told to, let go, and do not outlive who started them.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use reliant_chaos::stressor::Stressor;
use tokio::time::sleep;

const MINUTE: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(20);

/// A zombie that nobody has waited for yet has ended all the same.
fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['R', 'S', 'D']))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stressor_tells_what_it_took_and_lets_go() -> Result<()> {
    let dir = std::env::temp_dir().join(format!("reliant-stressors-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let disk = Stressor::Disk { dir: dir.clone(), bytes_max: 8 << 20 };
    for (stressor, key) in [
        (Stressor::Cpu { share: 0.25 }, "cores_taken"),
        (Stressor::Memory { share: 0.01 }, "bytes_taken"),
        (disk, "bytes_written"),
    ] {
        let process = stressor.start(MINUTE)?;
        let pid = process.pid();
        sleep(Duration::from_secs(1)).await;
        let took = process.finish().await.with_context(|| format!("{stressor:?}"))?;
        assert!(took[key].as_f64() > Some(0.0), "{stressor:?}: {took}");
        assert!(!runs(pid));
    }
    assert_eq!(std::fs::read_dir(&dir)?.count(), 0);
    std::fs::remove_dir(&dir)?;
    Ok(())
}

/// A shell stands for a campaign that is killed: what held the stressor's standard input is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stressor_ends_with_who_started_it() -> Result<()> {
    let program = Path::new(env!("CARGO_BIN_EXE_reliant-chaos")).display().to_string();
    // The stressor's standard input is the end of a pipe that only the sleeping shell holds.
    let script = format!(
        "mkfifo \"$1/in\"; {program} stressor 60000 cpu 0.05 <\"$1/in\" & echo $! >\"$1/pid\"; exec sleep 60 >\"$1/in\""
    );
    let dir = std::env::temp_dir().join(format!("reliant-orphan-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let mut parent = std::process::Command::new("sh").args(["-c", &script, "sh"]).arg(&dir).spawn()?;
    let deadline = Instant::now() + PATIENCE;
    let pid: u32 = loop {
        let pid = std::fs::read_to_string(dir.join("pid")).ok().and_then(|text| text.trim().parse().ok());
        match pid {
            Some(pid) if runs(pid) => break pid,
            _ => anyhow::ensure!(Instant::now() < deadline, "the stressor did not start"),
        }
        sleep(Duration::from_millis(20)).await;
    };
    sleep(Duration::from_millis(500)).await;
    assert!(runs(pid), "it stays while its parent does");
    parent.kill()?;
    parent.wait()?;
    let deadline = Instant::now() + PATIENCE;
    while runs(pid) {
        anyhow::ensure!(Instant::now() < deadline, "the stressor outlives its parent");
        sleep(Duration::from_millis(20)).await;
    }
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
