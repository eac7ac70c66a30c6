//! `make compare A=… B=…`: two commits of this repository, measured by turns on this machine.
//!
//! Each is built once, in release, and kept. Then both benches stand side by side and measure a few seconds by turns, in
//! the order A B, B A, A B …, so that whatever else the machine does falls on both alike. A commit whose bench does not
//! know slices is measured by whole runs, also by turns. What is told is B over A for each figure.

mod bench;
mod builds;
mod table;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use reliant_load::cpu;

use bench::{Bench, Figures};
use builds::Builds;
pub use table::Conclusion;
use table::Table;

/// Fewer carry no interval.
const ROUNDS_MIN: usize = 3;
const ROUNDS_MAX: usize = 200;
/// Five minutes of slices of the usual parts.
const ROUNDS_OF_SLICES: usize = 24;
/// Some twelve minutes.
const ROUNDS_OF_WHOLE_RUNS: usize = 6;
const USUAL_PARTS: &[&str] = &["floors", "turns"];
/// Rounds that may fail before the comparison is given up.
const FAILED_MAX: usize = 3;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A commit, branch or tag: what there was.
    #[arg(long, default_value = "")]
    a: String,
    /// Another, or the same: what there is now.
    #[arg(long, default_value = "")]
    b: String,
    /// Parts of the bench, with commas or blanks between them; nothing: floors and turns.
    #[arg(long, default_value = "")]
    parts: String,
    /// At least three; nothing: 24 of slices, 6 of whole runs.
    #[arg(long, default_value = "")]
    rounds: String,
    /// Where the figures are written as JSON.
    #[arg(long, env = "COMPARE_OUT", default_value = "loadtest/results/compare.json")]
    out: PathBuf,
}

/// A commit and what it was asked for as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Commit {
    pub sha: String,
    pub asked: String,
}

impl Commit {
    pub fn short(&self) -> &str {
        &self.sha[..self.sha.len().min(9)]
    }
}

pub async fn run(root: &Path, args: Args) -> Result<Conclusion> {
    let Args { a, b, parts, rounds, out } = args;
    ensure!(
        !a.is_empty() && !b.is_empty(),
        "which commits? Say make compare A=<commit> B=<commit>, such as A=HEAD~1 B=HEAD"
    );
    let parts = parts_of(&parts)?;
    let rounds = rounds_of(&rounds)?;
    let commits = [commit(root, &a)?, commit(root, &b)?];
    refuse_dirty_head(root, &commits)?;
    let builds = Builds::open(root, &Builds::usual_dir()?)?;
    let [first, second] = &commits;
    println!("comparing {} (A, {}) with {} (B, {})", first.asked, first.short(), second.asked, second.short());
    let binaries = [builds.build(first)?, builds.build(second)?];
    measure(&commits, &binaries, &parts, rounds, &out).await
}

/// Measures two builds by turns and tells how they differ.
async fn measure(
    commits: &[Commit; 2],
    binaries: &[PathBuf; 2],
    parts: &[String],
    rounds: Option<usize>,
    out: &Path,
) -> Result<Conclusion> {
    let scratch = builds::Scratch::new()?;
    let mut benches = Bench::start(binaries, commits, parts, scratch.dir()).await?;
    let usual = if benches[0].has_slices() { ROUNDS_OF_SLICES } else { ROUNDS_OF_WHOLE_RUNS };
    let rounds = rounds.unwrap_or(usual);
    println!("{}, {rounds} rounds of {}", benches[0].manner(), parts.join(", "));
    let (mut table, mut failed) = (Table::default(), 0);
    let (begun, busy, ours) = (Instant::now(), cpu::machine_ms(), cpu::tree_ms(std::process::id()));
    let mut round = 0;
    while round < rounds {
        match pair(&mut benches, parts, round % 2 == 1).await {
            Ok(figures) => {
                // The first round of slices warms up.
                if round > 0 || !benches[0].has_slices() {
                    table.add(figures);
                }
                round += 1;
                println!("  round {round} of {rounds}, {:.0} s", begun.elapsed().as_secs_f64());
            }
            Err(error) => {
                failed += 1;
                println!("  a round failed and is measured again: {error:#}");
                ensure!(failed <= FAILED_MAX, "{failed} rounds failed; the last one: {error:#}");
            }
        }
    }
    let ours = cpu::tree_ms(std::process::id()) - ours;
    // Servers of whole runs have ended, and took what they used with them.
    let others = benches[0].has_slices().then(|| {
        let others = cpu::machine_ms() - busy - ours;
        (others / 1000.0 / begun.elapsed().as_secs_f64()).max(0.0)
    });
    for bench in benches {
        bench.stop().await;
    }
    table.tell(commits, others, out)
}

/// Each part by both, one right after the other; in every second round B comes first.
async fn pair(benches: &mut [Bench; 2], parts: &[String], b_first: bool) -> Result<[Figures; 2]> {
    let mut figures = [BTreeMap::new(), BTreeMap::new()];
    let units: Vec<Vec<String>> = if benches[0].has_slices() {
        parts.iter().map(|part| vec![part.clone()]).collect()
    } else {
        vec![parts.to_vec()]
    };
    for unit in units {
        for side in if b_first { [1, 0] } else { [0, 1] } {
            figures[side].extend(benches[side].measure(&unit).await?);
        }
    }
    Ok(figures)
}

fn parts_of(text: &str) -> Result<Vec<String>> {
    let parts: Vec<String> = text.split([',', ' ']).filter(|part| !part.is_empty()).map(str::to_owned).collect();
    let is_name = |part: &String| part.chars().all(|char| char.is_ascii_lowercase());
    ensure!(
        parts.iter().all(is_name),
        "PARTS is '{text}'; it takes names of the bench's parts, such as PARTS=\"turns trips\""
    );
    Ok(if parts.is_empty() { USUAL_PARTS.iter().map(|part| (*part).to_owned()).collect() } else { parts })
}

fn rounds_of(text: &str) -> Result<Option<usize>> {
    if text.is_empty() {
        return Ok(None);
    }
    match text.parse() {
        Ok(rounds) if (ROUNDS_MIN..=ROUNDS_MAX).contains(&rounds) => Ok(Some(rounds)),
        _ => bail!("ROUNDS is '{text}'; it takes {ROUNDS_MIN} to {ROUNDS_MAX}"),
    }
}

fn commit(root: &Path, asked: &str) -> Result<Commit> {
    let name = format!("{asked}^{{commit}}");
    let Ok(sha) = git(root, &["rev-parse", "--verify", "--quiet", "--end-of-options", &name]) else {
        bail!("there is no commit '{asked}' in this repository; `git log --oneline` lists them");
    };
    let commit = Commit { sha, asked: asked.to_owned() };
    let has = |path: &str| git(root, &["cat-file", "-e", &format!("{}:{path}", commit.sha)]).is_ok();
    ensure!(
        has("loadtest/bench/Cargo.toml"),
        "the commit '{asked}' ({}) has no bench (loadtest/bench); compare later ones",
        commit.short()
    );
    Ok(commit)
}

/// What is not committed is not measured; whoever compares HEAD may think it is.
fn refuse_dirty_head(root: &Path, commits: &[Commit]) -> Result<()> {
    let head = git(root, &["rev-parse", "HEAD"]).context("this repository has no commit yet")?;
    let Some(commit) = commits.iter().find(|commit| commit.sha == head) else { return Ok(()) };
    let dirty = git(root, &["status", "--porcelain"])?;
    ensure!(
        dirty.is_empty(),
        "{} files differ from '{}', which would be measured without them; commit or stash them first",
        dirty.lines().count(),
        commit.asked
    );
    Ok(())
}

fn git(root: &Path, args: &[&str]) -> Result<String> {
    let output = Command::new("git").args(args).current_dir(root).output().context("git was not found; install it")?;
    ensure!(output.status.success(), "git {} failed: {}", args[0], String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests;
