//! `make chaos`: kills, cuts and stalls everything, at every step, and checks that nothing was lost.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, ensure};
use reliant_chaos::{CAMPAIGN_MIN, Campaign, FULL, clock_seed, say, stressor};

const USAGE: &str = "reliant-chaos [--short] [--seed N] [--minutes N] [--cells N] [--takeovers N] [--pairs N] [--phases N] \
                     [--phase-seconds N] [--long-turns N] [--lanes N] [--neighbours N] [--chats N] [--workers N] [--only TEXT] \
                     [--keep]";

/// What one flag does to the campaign.
type Change = Box<dyn FnOnce(&mut Campaign)>;

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == stressor::ARGUMENT) {
        return stressor::run(&args[1..]).map(|()| ExitCode::SUCCESS);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(campaign(args))
}

async fn campaign(args: Vec<String>) -> Result<ExitCode> {
    let mut seed = None;
    let mut short = false;
    let mut changes: Vec<Change> = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value; {USAGE}"));
        match arg.as_str() {
            "--short" => short = true,
            "--keep" => changes.push(Box::new(|campaign| campaign.keep = true)),
            "--seed" => seed = Some(value()?.parse().context("a seed is a number")?),
            "--minutes" => {
                let total = Duration::from_secs(60 * value()?.parse::<u64>().context("minutes are a number")?);
                ensure!(total >= CAMPAIGN_MIN, "a campaign takes {} minutes or more", CAMPAIGN_MIN.as_secs() / 60);
                // What has no room in less than a full campaign's time need not be had.
                changes.push(Box::new(move |campaign| {
                    (campaign.total, campaign.limit) = (total, total);
                    campaign.whole &= total >= FULL;
                    campaign.least = if campaign.whole { campaign.least } else { 1 };
                }));
            }
            "--only" => {
                let only = value()?;
                changes.push(Box::new(move |campaign| (campaign.only, campaign.whole) = (Some(only), false)));
            }
            _ => {
                let set = setter(&arg).with_context(|| format!("there is no '{arg}'; {USAGE}"))?;
                let number = value()?.parse().with_context(|| format!("{arg} takes a number"))?;
                changes.push(Box::new(move |campaign| set(campaign, number)));
            }
        }
    }
    let seed = seed.unwrap_or_else(clock_seed);
    let mut campaign = if short { Campaign::short(seed) } else { Campaign::full(seed) };
    changes.into_iter().for_each(|change| change(&mut campaign));
    // Named by the seed, so that campaigns beside each other keep apart.
    let out = std::env::var_os("CHAOS_OUT")
        .map_or_else(|| format!("tests/chaos/results/seed-{seed}.json").into(), PathBuf::from);
    campaign.evidence = Some(std::path::absolute(out.with_extension("evidence"))?);
    let report = campaign.run().await?;
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

/// What a flag with a number sets.
fn setter(name: &str) -> Option<fn(&mut Campaign, usize)> {
    let set: fn(&mut Campaign, usize) = match name {
        "--cells" => |campaign, number| campaign.cells = number,
        "--takeovers" => |campaign, number| campaign.takeovers = number,
        "--pairs" => |campaign, number| campaign.pairs = number,
        "--phases" => |campaign, number| campaign.stress_phases = number,
        "--phase-seconds" => |campaign, number| campaign.phase = Duration::from_secs(number as u64),
        "--long-turns" => |campaign, number| campaign.long_turns = number,
        "--lanes" => |campaign, number| campaign.cast.stages = number,
        "--neighbours" => |campaign, number| campaign.cast.neighbours = number,
        "--chats" => |campaign, number| campaign.cast.chats = number,
        "--workers" => |campaign, number| campaign.cast.workers = number,
        _ => return None,
    };
    Some(set)
}
