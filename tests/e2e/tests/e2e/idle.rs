//! A healthy mesh that nobody uses is quiet: nothing of ours keeps a connection alive more often than its peer allows, no
//! poll breaks, and nothing is logged above INFO. Temporal writes its gRPC log for it, which tells what it refused.
//!
//! The short form idles for a minute; a frontend strikes at the third ping that comes too soon, so that is long enough.
//! `RELIANT_TEST_IDLE_MINUTES` (`make test-idle`) idles longer, past the age at which a frontend closes each connection, and
//! then asks for one turn, which must be about as quick as those before.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use reliant_client::{ChatSession, Client, ClientConfig};
use reliant_harness::{eventually, init, reliant_binary};
use reliant_types::pb;
use serde_json::Value;
use tokio::{
    process::{Child, Command},
    time::{Instant, timeout},
};

use crate::scripts::PATIENCE;

const SHORT: Duration = Duration::from_secs(65);
const START_PATIENCE: Duration = Duration::from_secs(120);
const STOP_PATIENCE: Duration = Duration::from_secs(60);
/// Turns one after the other, the last half of which is what a busy mesh takes.
const BUSY_TURNS: usize = 20;
/// The first turn of an idle mesh over the median of a busy one: connections are asked for a sign of life, caches are cold.
const IDLE_RATIO_MAX: f64 = 4.0;
const MODEL: &str = "sim/text?tokens=20&rate=1000&ttft_ms=10";
/// Whose logs are ours.
const ROLES: [&str; 5] = ["api-0", "worker-0", "gateway-0", "daemon-0", "model-sim"];
/// And whose are not: this one tells what it refused.
const SERVERS: [&str; 1] = ["temporal"];

/// `reliant up`, as a person starts it.
struct Mesh {
    process: Child,
    data_dir: PathBuf,
    client: Client,
}

impl Mesh {
    async fn up(dir: &Path) -> Result<Self> {
        init();
        let (data_dir, root) = (dir.join("data"), dir.join("project"));
        std::fs::create_dir_all(&root)?;
        let mut command = Command::new(reliant_binary()?);
        command
            .args(["up", "--data-dir"])
            .arg(&data_dir)
            .arg("--root")
            .arg(&root)
            .env("GRPC_GO_LOG_SEVERITY_LEVEL", "info")
            .env("GRPC_GO_LOG_VERBOSITY_LEVEL", "99")
            .stdout(std::fs::File::create(dir.join("up.log"))?)
            .stderr(std::fs::File::create(dir.join("up.err"))?)
            .kill_on_drop(true);
        for variable in ["DATABASE_URL", "NATS_URL", "TEMPORAL_ADDRESS", "RELIANT_CONFIG", "OPENAI_API_KEY"] {
            command.env_remove(variable);
        }
        let process = command.spawn().context("`reliant up` could not be started")?;
        let ready = eventually("`reliant up` to be ready", START_PATIENCE, || async {
            let told = std::fs::read_to_string(dir.join("up.log"))?;
            Ok(told.contains("Ctrl-C stops everything").then_some(()))
        });
        ready.await.with_context(|| std::fs::read_to_string(dir.join("up.err")).unwrap_or_default())?;
        let up: Value = serde_json::from_slice(&std::fs::read(data_dir.join("up.json"))?)?;
        let text = |key: &str| up[key].as_str().map(str::to_owned).with_context(|| format!("up.json has no {key}"));
        let client = Client::connect(ClientConfig::new(text("api_url")?, text("token")?)).await?;
        Ok(Self { process, data_dir, client })
    }

    fn log(&self, name: &str) -> Result<Vec<String>> {
        let path = self.data_dir.join("logs").join(format!("{name}.log"));
        let text = std::fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        Ok(String::from_utf8_lossy(&text).lines().map(str::to_owned).collect())
    }

    /// How many lines each log has.
    fn logged(&self) -> Result<BTreeMap<&'static str, usize>> {
        ROLES.into_iter().chain(SERVERS).map(|name| Ok((name, self.log(name)?.len()))).collect()
    }

    async fn session(&self) -> Result<ChatSession> {
        let request = pb::CreateChatRequest {
            title: "idle".into(),
            model: MODEL.into(),
            mode: pb::ChatMode::Auto as i32,
            ..Default::default()
        };
        let (chat, _) = self.client.new_chat(request).await?;
        Ok(self.client.open(chat).await?)
    }

    /// What the logs say since then that a quiet mesh would not say.
    fn noise(&self, since: &BTreeMap<&'static str, usize>) -> Result<Vec<String>> {
        let mut noise = Vec::new();
        for (name, lines) in since {
            for line in self.log(name)?.into_iter().skip(*lines) {
                let heard = if ROLES.contains(name) { is_loud(&line) } else { is_refusal(&line) };
                if heard {
                    noise.push(format!("{name}: {line}"));
                }
            }
        }
        Ok(noise)
    }

    async fn stop(mut self) -> Result<()> {
        let pid = self.process.id().context("`reliant up` has ended")?;
        let stopped = Command::new("kill").args(["-TERM", &pid.to_string()]).status().await?;
        ensure!(stopped.success(), "`reliant up` could not be stopped");
        let status = timeout(STOP_PATIENCE, self.process.wait()).await.context("`reliant up` did not stop")??;
        ensure!(status.success(), "`reliant up` ended with {status}");
        Ok(())
    }
}

/// A line of ours that is above INFO, or no line of our log at all; or that tells of a stream that broke.
fn is_loud(line: &str) -> bool {
    let quiet = match serde_json::from_str::<Value>(line) {
        Ok(line) => ["INFO", "DEBUG", "TRACE"].contains(&line["level"].as_str().unwrap_or_default()),
        Err(_) => line.trim().is_empty(),
    };
    !quiet || line.to_lowercase().contains("broken pipe") || line.contains("a daemon left")
}

/// gRPC's word of a client that pings too often: "too_many_pings" on the wire, "too many pings" in its log.
fn is_refusal(line: &str) -> bool {
    let line = line.to_lowercase().replace('_', " ");
    line.contains("too many pings") || line.contains("enhance your calm")
}

async fn turn(session: &mut ChatSession) -> Result<Duration> {
    let report = session.send_and_wait("say something", PATIENCE).await?;
    ensure!(report.succeeded(), "{:?}", report.turn);
    Ok(report.total())
}

/// Somebody looks at a chat meanwhile: the stream that is open for hours.
async fn idle(viewer: &mut ChatSession, until: Instant) -> Result<()> {
    while let Ok(update) = tokio::time::timeout_at(until, viewer.next()).await {
        update?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_idle_mesh_is_quiet() -> Result<()> {
    let minutes = std::env::var("RELIANT_TEST_IDLE_MINUTES").ok().map(|minutes| minutes.parse::<u64>());
    let minutes = minutes.transpose().context("RELIANT_TEST_IDLE_MINUTES is a number of minutes")?;
    let dir = tempfile::TempDir::with_prefix("reliant-idle-")?;
    let mesh = Mesh::up(dir.path()).await?;
    let mut chat = mesh.session().await?;
    let mut took = Vec::new();
    for _ in 0..BUSY_TURNS {
        took.push(turn(&mut chat).await?);
    }
    let mut settled = took.split_off(BUSY_TURNS / 2);
    settled.sort();
    let busy = settled[settled.len() / 2];

    let since = mesh.logged()?;
    let grpc_logs = mesh.log("temporal")?.iter().any(|line| line.contains("[core]") || line.contains("[transport]"));
    ensure!(grpc_logs, "Temporal does not write gRPC's log, so that its silence says nothing");
    let reconnects = chat.verification().reconnects;
    let time = minutes.map_or(SHORT, |minutes| Duration::from_secs(60 * minutes));
    idle(&mut chat, Instant::now() + time).await?;
    let noise = mesh.noise(&since)?;
    assert!(noise.is_empty(), "an idle mesh said after {time:?}:\n{}", noise.join("\n"));
    assert_eq!(chat.verification().reconnects, reconnects, "the viewer's stream was cut");

    let first = turn(&mut chat).await?;
    eprintln!("after {time:?} of idling a turn took {first:?}; while busy, {busy:?}");
    if minutes.is_some() {
        let ratio = first.as_secs_f64() / busy.as_secs_f64();
        assert!(ratio <= IDLE_RATIO_MAX, "the first turn after {time:?} took {first:?}, {ratio:.1} times {busy:?}");
    }
    mesh.stop().await
}
