//! Short slices of parts, each when it is asked for: two builds whose benches run side by side take turns so, a few seconds
//! each, and whatever else the machine does falls on both alike.
//!
//! Standard input has a part's name a line; standard output one JSON object a line: first `{"parts": [...]}` when the mesh
//! stands, then for each name `{"values": {figure: number}}` or `{"error": "..."}`. The end of the input ends it.

use std::io::Write as _;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, BufReader};

use crate::{Bench, daemons, floors, report::Report, streams, turns};

/// The others take minutes, and compare within themselves already.
const PARTS: [&str; 4] = ["floors", "turns", "trips", "streams"];

pub async fn run(bench: &mut Bench) -> Result<()> {
    say(&json!({ "parts": PARTS }))?;
    let mut asked = BufReader::new(tokio::io::stdin()).lines();
    while let Some(part) = asked.next_line().await.context("standard input broke off")? {
        let mut report = Report::silent();
        match measure(bench, part.trim(), &mut report).await {
            Ok(()) => say(&json!({ "values": report.values() }))?,
            Err(error) => say(&json!({ "error": format!("{error:#}") }))?,
        }
    }
    Ok(())
}

async fn measure(bench: &mut Bench, part: &str, report: &mut Report) -> Result<()> {
    ensure!(PARTS.contains(&part), "there is no slice of '{part}'; there are {}", PARTS.join(", "));
    match part {
        "floors" => floors::run(bench, report).await,
        "turns" => turns::run(bench, report).await,
        "trips" => daemons::round_trips(bench, report).await,
        _ => streams::run(bench, report).await,
    }
}

fn say(line: &serde_json::Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).context("nobody reads the figures any more")
}
