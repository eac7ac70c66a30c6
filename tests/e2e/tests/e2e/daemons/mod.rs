//! The daemon as a process of its own: what it makes of its files, of another one like it, of being killed at each step of
//! its journal, and of a lid that was closed for an hour.

mod files;
mod lives;
mod steps;
mod twins;

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result};
use reliant_harness::{Person, Rig, eventually};
use reliant_types::{TurnId, pb};
use tokio::process::{Child, Command};

use crate::scripts::PATIENCE;

const EXIT_PATIENCE: Duration = Duration::from_secs(20);

/// `reliant daemon start` as a person calls it, and nothing around it.
struct Start {
    binary: PathBuf,
    gateway: String,
    token: String,
    state_dir: PathBuf,
    root: PathBuf,
    more: Vec<String>,
    env: Vec<(String, String)>,
    /// Nobody, in a user namespace of its own, where files are ours and permissions count.
    unprivileged: bool,
}

/// How a process ended that was to end by itself.
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Start {
    fn new(binary: &Path, dir: &Path) -> Result<Self> {
        let (state_dir, root) = (dir.join("state"), dir.join("project"));
        std::fs::create_dir_all(&state_dir)?;
        std::fs::create_dir_all(&root)?;
        Ok(Self {
            binary: binary.to_owned(),
            // Nobody listens there.
            gateway: "http://127.0.0.1:9".into(),
            token: "rlt_none".into(),
            state_dir,
            root,
            more: Vec::new(),
            env: Vec::new(),
            unprivileged: false,
        })
    }

    /// Of this person, at a gateway of the mesh; registered under this name anew.
    async fn of(rig: &Rig, person: &Person, name: &str) -> Result<(Self, String)> {
        let made =
            person.client.register_daemon(pb::RegisterDaemonRequest { name: name.into(), replace: true }).await?;
        let mut start = Self::new(&rig.mesh.spec.binary, &rig.dir().join(format!("own-{name}")))?;
        (start.gateway, start.token) = (rig.mesh.gateway_url(0), made.token);
        Ok((start, made.daemon_id))
    }

    fn spawn(&self) -> Result<Child> {
        let mut command = match self.unprivileged {
            false => Command::new(&self.binary),
            true => {
                let mut command = Command::new("unshare");
                command.args(["--user", "--map-user=65534", "--map-group=65534", "--"]).arg(&self.binary);
                command
            }
        };
        command.args(["daemon", "start", "--gateway", &self.gateway, "--state-dir"]).arg(&self.state_dir);
        command.arg("--root").arg(&self.root).args(&self.more);
        command.env("RELIANT_DAEMON__TOKEN", &self.token).envs(self.env.iter().map(|(key, value)| (key, value)));
        command.current_dir(&self.root).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.kill_on_drop(true).spawn().context("the daemon was not started")
    }

    /// Starts what is to end by itself.
    async fn ends(&self) -> Result<Ended> {
        ended(self.spawn()?).await
    }
}

async fn ended(child: Child) -> Result<Ended> {
    let output = tokio::time::timeout(EXIT_PATIENCE, child.wait_with_output()).await.context("it did not end")??;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Ended { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) })
}

impl Ended {
    /// The last line, which is for the person.
    fn sentence(&self) -> &str {
        self.stderr.lines().rev().find(|line| line.starts_with("reliant: ")).unwrap_or_default()
    }
}

async fn calls(person: &Person, turn: TurnId) -> Result<Vec<pb::ToolCall>> {
    let request = pb::GetTurnRequest { turn_id: turn.to_string(), ..Default::default() };
    Ok(person.client.get_turn(request).await?.tool_calls)
}

async fn call_that_is(person: &Person, turn: TurnId, status: pb::ToolCallStatus) -> Result<pb::ToolCall> {
    eventually(&format!("a call that is {status:?}"), PATIENCE, || async {
        Ok(calls(person, turn).await?.into_iter().find(|call| call.status() == status))
    })
    .await
}

/// Whether it runs; a zombie does not.
pub(crate) fn runs(pid: &str) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.trim())).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
}

/// What a line was written to, once it was.
pub(crate) async fn file(path: &Path) -> Result<String> {
    eventually(&format!("the file {}", path.display()), PATIENCE, || async {
        Ok(std::fs::read_to_string(path).ok().filter(|text| text.ends_with('\n')))
    })
    .await
}
