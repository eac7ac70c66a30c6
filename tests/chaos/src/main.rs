//! `make chaos`: kills, cuts and stalls everything, at every step, and checks that nothing was lost.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use reliant_chaos::{Campaign, say};

const USAGE: &str = "reliant-chaos [--short] [--seed N] [--cells N] [--takeovers N] [--lanes N] [--neighbours N] [--chats N] \
                     [--workers N] [--minutes N] [--only TEXT] [--keep]";

/// What one flag does to the campaign.
type Change = Box<dyn FnOnce(&mut Campaign)>;

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let mut seed = None;
    let mut short = false;
    let mut changes: Vec<Change> = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value; {USAGE}"));
        match arg.as_str() {
            "--short" => short = true,
            "--keep" => changes.push(Box::new(|campaign| campaign.keep = true)),
            "--seed" => seed = Some(value()?.parse().context("a seed is a number")?),
            "--cells" | "--takeovers" | "--lanes" | "--neighbours" | "--chats" | "--workers" | "--minutes" => {
                let (name, number) = (arg.clone(), value()?.parse()?);
                changes.push(Box::new(move |campaign| set(campaign, &name, number)));
            }
            "--only" => {
                let only = value()?;
                changes.push(Box::new(move |campaign| (campaign.only, campaign.longest) = (Some(only), None)));
            }
            other => bail!("there is no '{other}'; {USAGE}"),
        }
    }
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) ^ now());
    let mut campaign = if short { Campaign::short(seed) } else { Campaign::full(seed) };
    changes.into_iter().for_each(|change| change(&mut campaign));
    let report = campaign.run().await?;
    let out = std::env::var_os("CHAOS_OUT").map_or_else(|| "tests/chaos/results/latest.json".into(), PathBuf::from);
    report.write(&out)?;
    say(&report.table());
    let verdict = report.verdict();
    for line in &verdict {
        say(line);
    }
    say(&format!("written to {}", out.display()));
    if verdict.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    say(&format!("{} findings; seed {seed}; logs were kept", verdict.len()));
    Ok(ExitCode::FAILURE)
}

fn set(campaign: &mut Campaign, name: &str, number: usize) {
    match name {
        "--cells" => campaign.cells = number,
        "--takeovers" => campaign.takeovers = number,
        "--lanes" => campaign.cast.stages = number,
        "--neighbours" => campaign.cast.neighbours = number,
        "--chats" => campaign.cast.chats = number,
        "--workers" => campaign.cast.workers = number,
        // Who says how long it may go on has another campaign in mind than the one with a promise of its own.
        _ => (campaign.limit, campaign.longest) = (std::time::Duration::from_secs(number as u64 * 60), None),
    }
}

fn now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    now.as_secs()
}
