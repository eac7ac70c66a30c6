//! One commit's bench: kept running and asked for slices where it knows them, else run whole for each round.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

use super::Commit;

/// Until a mesh stands.
const START_LIMIT: Duration = Duration::from_secs(180);
const SLICE_LIMIT: Duration = Duration::from_secs(180);
const WHOLE_LIMIT: Duration = Duration::from_secs(1200);
/// After its input ended.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// By name.
pub type Figures = BTreeMap<String, f64>;

#[derive(Debug)]
pub struct Bench {
    name: String,
    binaries: PathBuf,
    scratch: PathBuf,
    slices: Option<Slices>,
}

#[derive(Debug)]
struct Slices {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    parts: Vec<String>,
}

impl Bench {
    /// Both in the same manner: by slices if both know them.
    pub async fn start(
        binaries: &[PathBuf; 2],
        commits: &[Commit; 2],
        parts: &[String],
        scratch: &Path,
    ) -> Result<[Self; 2]> {
        let bench = |side: usize, letter: char| Self {
            name: format!("{letter} ({})", commits[side].short()),
            binaries: binaries[side].clone(),
            scratch: scratch.to_owned(),
            slices: None,
        };
        let (mut a, mut b) = (bench(0, 'A'), bench(1, 'B'));
        if let Some(first) = a.try_slices().await?
            && let Some(second) = b.try_slices().await?
        {
            for part in parts {
                let known = |slices: &Slices| slices.parts.contains(part);
                ensure!(
                    known(&first) && known(&second),
                    "there is no slice of '{part}'; A has {}, B has {}",
                    first.parts.join(", "),
                    second.parts.join(", ")
                );
            }
            (a.slices, b.slices) = (Some(first), Some(second));
        }
        Ok([a, b])
    }

    pub fn has_slices(&self) -> bool {
        self.slices.is_some()
    }

    pub fn manner(&self) -> &'static str {
        if self.has_slices() { "by slices" } else { "by whole runs (one of the two knows no slices)" }
    }

    /// The figures of these parts, measured now.
    pub async fn measure(&mut self, parts: &[String]) -> Result<Figures> {
        let name = self.name.clone();
        let measured = match &mut self.slices {
            Some(slices) => slices.measure(parts).await,
            None => self.whole(parts).await,
        };
        measured.with_context(|| format!("{name}, {}", parts.join(", ")))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.binaries.join("reliant-bench"));
        command.env("TMPDIR", &self.scratch).stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        for variable in ["DATABASE_URL", "NATS_URL", "TEMPORAL_ADDRESS", "ARGS", "MAKEFLAGS", "MAKELEVEL"] {
            command.env_remove(variable);
        }
        command
    }

    /// `None` where the bench ends at once, as one does that does not know the flag.
    async fn try_slices(&self) -> Result<Option<Slices>> {
        let mut command = self.command();
        let mut child = command
            .arg("--slices")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("the bench of {} could not be started", self.name))?;
        let input = child.stdin.take().expect("it is piped");
        let mut output = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let errors = child.stderr.take().expect("it is piped");
        let first = timeout(START_LIMIT, output.next_line());
        let Some(line) = first.await.with_context(|| format!("the mesh of {} did not start", self.name))?? else {
            let mut said = String::new();
            let _ = tokio::io::AsyncReadExt::read_to_string(&mut BufReader::new(errors), &mut said).await;
            if said.contains("--slices") {
                return Ok(None);
            }
            bail!("the bench of {} ended at its start: {}", self.name, said.trim());
        };
        // What it says from now on is nobody's to read, and must not fill its pipe.
        tokio::spawn(async move {
            let mut errors = BufReader::new(errors);
            let _ = tokio::io::copy(&mut errors, &mut tokio::io::stderr()).await;
        });
        let parts: BTreeMap<String, Vec<String>> =
            serde_json::from_str(&line).with_context(|| format!("the bench of {} said: {line}", self.name))?;
        let parts = parts.into_values().next().unwrap_or_default();
        Ok(Some(Slices { child, input, output, parts }))
    }

    async fn whole(&self, parts: &[String]) -> Result<Figures> {
        let out = self.scratch.join("figures.json");
        let _ = std::fs::remove_file(&out);
        let mut command = self.command();
        command.arg(parts.join(",")).env("BENCH_OUT", &out).stderr(Stdio::piped());
        let child = command.spawn().context("the bench could not be started")?;
        let ended = timeout(WHOLE_LIMIT, child.wait_with_output()).await.context("the bench did not end")??;
        let said = String::from_utf8_lossy(&ended.stderr);
        ensure!(ended.status.success(), "the bench ended with {}: {}", ended.status, said.trim());
        let text = std::fs::read(&out).context("the bench wrote no figures")?;
        let json: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&text)?;
        Ok(json.into_iter().filter_map(|(name, value)| Some((name, value.as_f64()?))).collect())
    }

    pub async fn stop(self) {
        if let Some(Slices { mut child, input, .. }) = self.slices {
            drop(input);
            if timeout(STOP_LIMIT, child.wait()).await.is_err() {
                let _ = child.kill().await;
            }
        }
    }
}

impl Slices {
    async fn measure(&mut self, parts: &[String]) -> Result<Figures> {
        let mut figures = Figures::new();
        for part in parts {
            self.input.write_all(format!("{part}\n").as_bytes()).await.context("the bench has ended")?;
            let line = timeout(SLICE_LIMIT, self.output.next_line()).await.context("the bench did not answer")??;
            let line = line.context("the bench has ended")?;
            let answer: serde_json::Value = serde_json::from_str(&line).with_context(|| format!("it said: {line}"))?;
            if let Some(error) = answer["error"].as_str() {
                bail!("{error}");
            }
            let values = answer["values"].as_object().with_context(|| format!("it said: {line}"))?;
            figures.extend(values.iter().filter_map(|(name, value)| Some((name.clone(), value.as_f64()?))));
        }
        Ok(figures)
    }
}
