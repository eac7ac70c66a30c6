//! `reliant trace` and `reliant up --observe` as a person types them: what they print, and how they end.

use std::{
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use reliant_harness::{DaemonOptions, RigOptions, eventually, reliant_binary, within};
use reliant_telemetry::metrics::Phase;
use reliant_types::pb;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

use super::{checked, succeeded, traced};
use crate::scripts::{MODEL, PATIENCE, one_call, session};

/// Postgres, Temporal, NATS and five roles, from nothing, on a machine that other tests keep busy.
const START_PATIENCE: Duration = Duration::from_secs(90);
/// Each phase and their sum are rounded to a tenth of a millisecond.
const ROUNDING_MS: f64 = 0.05;

/// The program, told of no mesh by its surroundings.
fn reliant(data_dir: &Path) -> Result<Command> {
    let mut command = Command::new(reliant_binary()?);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy().into_owned();
        if text.starts_with("RELIANT_") && text != "RELIANT_CACHE" {
            command.env_remove(name);
        }
    }
    command.env("RELIANT_DATA_DIR", data_dir).stdin(Stdio::null()).kill_on_drop(true);
    Ok(command)
}

async fn ended(mut command: Command, what: &str) -> Result<Output> {
    Ok(within(what, PATIENCE, command.output()).await??)
}

/// What `reliant trace` prints with these arguments.
async fn printed(data_dir: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = reliant(data_dir)?;
    command.arg("trace").args(arguments);
    let output = ended(command, "reliant trace").await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(0), "reliant trace {arguments:?} ended with {}: {said}", output.status);
    ensure!(said.is_empty(), "reliant trace {arguments:?} complains: {said}");
    Ok(String::from_utf8(output.stdout)?)
}

/// It ends with 1, prints nothing, and says this.
async fn refused(data_dir: &Path, arguments: &[&str], why: &str) -> Result<()> {
    let mut command = reliant(data_dir)?;
    command.arg("trace").args(arguments);
    let output = ended(command, "reliant trace").await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "reliant trace {arguments:?} ended with {}: {said}", output.status);
    ensure!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    ensure!(said.contains(why), "reliant trace {arguments:?} said: {said}");
    ensure!(!said.contains("panicked"), "{said}");
    Ok(())
}

/// Names and milliseconds of the line of phases, which must make the sum that it says.
fn phases(printed: &str) -> Result<Vec<(&str, f64)>> {
    let line = printed.lines().find_map(|line| line.strip_prefix("phases, ms: "));
    let (parts, sum) = line.and_then(|line| line.split_once(" = ")).with_context(|| format!("no phases: {printed}"))?;
    let mut phases = Vec::new();
    for part in parts.split(" + ") {
        let (name, ms) = part.rsplit_once(' ').with_context(|| part.to_owned())?;
        ensure!(Phase::ALL.iter().any(|phase| phase.as_str() == name), "'{name}' is no phase: {line:?}");
        phases.push((name, ms.parse()?));
    }
    let off = (phases.iter().map(|(_, ms)| ms).sum::<f64>() - sum.parse::<f64>()?).abs();
    ensure!(off <= ROUNDING_MS * (phases.len() + 1) as f64, "the phases do not make their sum: {line:?}");
    Ok(phases)
}

#[tokio::test(flavor = "multi_thread")]
async fn reliant_trace_prints_where_a_turns_time_went() -> Result<()> {
    let (rig, sink) = traced(RigOptions::default()).await?;
    let ada = rig.person("ada").await?;
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let report = chat.send_and_wait(&one_call("shell", json!({ "command": "sleep 0.3" })), PATIENCE).await?;
    succeeded("printed", &report);
    let spans = checked(sink, "printed", &report.turn).await?;
    let (trace, chat) = (report.turn.trace_id.as_str(), chat.chat().to_string());
    let nothing_here = rig.dir().join("no-mesh");

    let whole = printed(&nothing_here, &["--url", sink.url(), trace]).await?;
    let mut lines = whole.lines();
    assert_eq!(lines.next(), Some(format!("trace {trace}").as_str()));
    let seconds = phases(&whole)?;
    let tool = seconds.iter().find(|(name, _)| *name == "tool_run").context("no time of the tool")?.1;
    assert!((300.0..5_000.0).contains(&tool), "the tool slept for 0.3 s and ran {tool} ms: {whole}");
    assert!(whole.contains(&format!("{} spans in ", spans.len())), "{whole}");
    for name in ["client.send_message", "turn.accept", "turn.round", "execute_tool shell"] {
        let line = whole.lines().find(|line| line.contains(name)).with_context(|| format!("no {name}: {whole}"))?;
        // The way to the tool and the tool itself are what the end waited for.
        assert!(line.contains(" * "), "{line}");
    }
    assert!(whole.lines().any(|line| line.contains(" ms   ")), "the end waited for everything: {whole}");
    assert!(!whole.contains("ORPHAN"), "{whole}");

    // By whatever a person has at hand, and however it is written.
    let (upper_trace, upper_chat) = (trace.to_uppercase(), chat.to_uppercase());
    let slashed = format!("{}/", sink.url());
    for id in [&trace[..16], &upper_trace, &chat, &chat[..13], &upper_chat] {
        assert_eq!(printed(&nothing_here, &["--url", &slashed, id]).await?, whole, "{id}");
    }
    // The newest turn of all; others' tests send theirs here, too.
    let newest = printed(&nothing_here, &["--url", sink.url()]).await?;
    let newest = newest.lines().next().and_then(|line| line.strip_prefix("trace ")).context("no id")?.to_owned();
    let turns = sink.store().list(&newest, true, 1);
    assert_eq!(turns.first().map(|turn| turn.trace_id.as_str()), Some(newest.as_str()));

    let away = format!("http://127.0.0.1:{}", reliant_devstack::free_port(0)?);
    let api = rig.mesh.api_url(0);
    for (arguments, why) in [
        (["--url", sink.url(), "what is this?"], "neither a trace id nor a chat id"),
        (["--url", sink.url(), "../status"], "neither a trace id nor a chat id"),
        (["--url", sink.url(), "00000000deadbeef00000000deadbeef"], "no trace of a turn here begins with"),
        (["--url", sink.url(), "00000000-dead-beef-0000-000000000000"], "no trace of a turn here begins with"),
        (["--url", away.as_str(), trace], "does not answer"),
        (["--url", "http://example.com/x", trace], "is not an address such as"),
        (["--url", api.as_str(), trace], "the trace receiver said something else than"),
    ] {
        refused(&nothing_here, &arguments, why).await?;
    }
    refused(&nothing_here, &[trace], "no trace receiver is known here").await
}

/// `reliant up --observe`, with the lines that it says.
struct Up {
    process: Child,
    lines: tokio::io::Lines<BufReader<tokio::process::ChildStdout>>,
}

impl Up {
    fn start(data_dir: &Path, root: &Path) -> Result<Self> {
        let mut command = reliant(data_dir)?;
        for variable in ["DATABASE_URL", "NATS_URL", "TEMPORAL_ADDRESS", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"] {
            command.env_remove(variable);
        }
        command.args(["up", "--observe", "--root"]).arg(root).stdout(Stdio::piped());
        let mut process = command.spawn().context("reliant up could not be started")?;
        let output = process.stdout.take().context("its output is piped")?;
        Ok(Self { process, lines: BufReader::new(output).lines() })
    }

    /// The line that begins with this word, without it.
    async fn says(&mut self, word: &str) -> Result<String> {
        while let Some(line) = self.lines.next_line().await? {
            if let Some(rest) = line.trim_start().strip_prefix(word) {
                return Ok(rest.trim().to_owned());
            }
        }
        anyhow::bail!("reliant up ended before it said '{word}'")
    }

    /// As Ctrl-C does.
    async fn interrupt(&mut self) -> Result<()> {
        let pid = self.process.id().context("reliant up has ended already")?;
        ensure!(Command::new("kill").args(["-INT", &pid.to_string()]).status().await?.success(), "kill failed");
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reliant_up_observe_shows_a_turn_of_its_own_mesh() -> Result<()> {
    let dir = TempDir::with_prefix("reliant-up-")?;
    let (data_dir, root): (PathBuf, PathBuf) = (dir.path().join("data"), dir.path().join("root"));
    std::fs::create_dir(&root)?;
    let mut up = Up::start(&data_dir, &root)?;
    let traces = within("reliant up --observe", START_PATIENCE, up.says("traces ")).await??;
    let url = traces.split(' ').next().context("no address")?;
    let address = url.trim_start_matches("http://").parse()?;
    let (status, page) = reliant_devstack::http_get(address, "/").await?;
    ensure!(status == 200 && page.contains("<title>reliant traces</title>"), "{status}: {page}");
    // Nothing was asked yet: no turn is there to print.
    refused(&data_dir, &[], "no trace of a turn here").await?;

    let mut chat = reliant(&data_dir)?;
    chat.args(["chat", "hello"]);
    let said = ended(chat, "reliant chat").await?;
    ensure!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));

    // The page's address comes from what `reliant up` left behind, and each role sends when it finds time.
    let parts = ["client.send_message [client", "turn.accept [api", "turn.round [worker", "[model-sim", " + fanout "];
    eventually("the whole turn in `reliant trace`", PATIENCE, || async {
        let shown = printed(&data_dir, &[]).await.unwrap_or_default();
        let is_whole = parts.iter().all(|part| shown.contains(part)) && !shown.contains("ORPHAN");
        Ok((is_whole && phases(&shown).is_ok()).then_some(()))
    })
    .await?;
    let (_, listed) = reliant_devstack::http_get(address, "/api/traces").await?;
    let listed: Value = serde_json::from_str(&listed)?;
    ensure!(listed.as_array().is_some_and(|turns| turns.len() == 1), "one turn was sent: {listed}");

    up.interrupt().await?;
    within("its end", START_PATIENCE, up.says("stopped")).await??;
    let status = within("its end", START_PATIENCE, up.process.wait()).await??;
    ensure!(status.success(), "reliant up ended with {status}");
    refused(&data_dir, &[], "no trace receiver is known here").await
}
