//! kill -9 of the real daemon at each step of its journal: right before and right after each of the syncs that a call has.

#![cfg(target_os = "linux")]

use std::{
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use reliant_harness::{Person, Rig, RigOptions, eventually, within};
use reliant_types::pb::{
    self,
    ToolCallStatus::{OutcomeUnknown, Succeeded},
};
use serde_json::json;

use super::{Start, calls};
use crate::scripts::{MODEL, PATIENCE, one_call, session};

/// The linker of the tests builds it.
fn preload(dir: &Path) -> Result<PathBuf> {
    let (source, library) = (dir.join("killsync.c"), dir.join("killsync.so"));
    std::fs::write(&source, include_str!("killsync.c"))?;
    let built =
        Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source).arg("-ldl").output()?;
    ensure!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    Ok(library)
}

#[derive(Debug, Clone, Copy)]
struct Case {
    name: &'static str,
    plan: &'static str,
    /// What may have become of the call, and how often its command ran then.
    ends: &'static [(pb::ToolCallStatus, usize)],
}

/// A process that dies leaves what it wrote to the kernel, so that a commit may be whole without its sync.
const CASES: &[Case] = &[
    Case { name: "before-started", plan: "1 before", ends: &[(Succeeded, 1), (OutcomeUnknown, 0)] },
    Case { name: "after-started", plan: "1 after", ends: &[(OutcomeUnknown, 0)] },
    Case { name: "before-finished", plan: "2 before", ends: &[(Succeeded, 1), (OutcomeUnknown, 1)] },
    Case { name: "after-finished", plan: "2 after", ends: &[(Succeeded, 1)] },
    Case { name: "before-acknowledged", plan: "3 before", ends: &[(Succeeded, 1)] },
    Case { name: "after-acknowledged", plan: "3 after", ends: &[(Succeeded, 1)] },
];

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_at_any_step_of_its_journal_runs_no_call_twice() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let library = preload(rig.dir())?;
    let mut begun = Vec::new();
    for case in CASES {
        let person = rig.person(case.name).await?;
        let (start, id) = Start::of(&rig, &person, case.name).await?;
        begun.push((case, person, start, id));
    }
    let cases = begun.into_iter().map(|(case, person, start, id)| {
        let (rig, library) = (&rig, &library);
        async move { step(rig, library, case, person, start, &id).await.context(case.name) }
    });
    futures::future::try_join_all(cases).await?;
    Ok(())
}

async fn step(rig: &Rig, library: &Path, case: &Case, person: Person, mut start: Start, id: &str) -> Result<()> {
    let plan = rig.dir().join(format!("plan-{}", case.name));
    start.env = vec![
        ("LD_PRELOAD".into(), library.to_string_lossy().into_owned()),
        ("TEST_KILL_PLAN".into(), plan.to_string_lossy().into_owned()),
    ];
    let daemon = start.spawn()?;
    rig.connected(&person, id, true).await?;
    std::fs::write(&plan, case.plan)?;
    let mut chat = session(&person, MODEL, pb::ChatMode::Auto).await?;
    let sent = chat.send(&one_call("shell", json!({ "command": "echo run >> runs; echo done" }))).await?;
    let turn = sent.turn.context("no turn")?.id.parse()?;
    let died = within("the daemon's end", PATIENCE, daemon.wait_with_output()).await??;
    ensure!(died.status.signal() == Some(9) && !plan.exists(), "it was not killed: {:?}", died.status);

    let _daemon = start.spawn()?;
    assert_eq!(chat.wait_turn(turn, PATIENCE).await?.status(), pb::TurnStatus::Succeeded);
    assert!(chat.verification().is_clean(), "{:?}", chat.verification());
    let call = calls(&person, turn).await?.pop().context("a call")?;
    let ran = std::fs::read_to_string(start.root.join("runs")).unwrap_or_default().lines().count();
    assert!(case.ends.contains(&(call.status(), ran)), "{}: ran {ran} times, {call:?}", case.name);
    if call.status() == OutcomeUnknown {
        assert_eq!(call.unknown_cause(), pb::UnknownCause::ProcessDied, "{call:?}");
    }
    eventually("an empty journal", PATIENCE, || async {
        let status = reliant_daemon::status(&start.state_dir)?;
        Ok(status.filter(|status| status.connected && status.unacknowledged == 0))
    })
    .await?;
    Ok(())
}
