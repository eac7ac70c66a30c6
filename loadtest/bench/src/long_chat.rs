//! Whether a turn of a chat of two thousand costs what one of a new chat costs: at each mark a turn of the long chat and
//! one of a new chat, by turns, so that whatever else this machine does falls on both alike.

use anyhow::{Context as _, Result, ensure};
use reliant_client::{ChatSession, TurnReport};
use reliant_devstack::Server;
use reliant_harness::Rig;

use reliant_load::{Samples, samples::MS};

use crate::{
    Bench,
    report::Report,
    turns::{PATIENCE, PLAIN, session},
};

const MARKS: &[usize] = &[10, 100, 1000, 2000];
/// Turns of each chat at a mark.
const AT_A_MARK: usize = 20;

pub async fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let mut long = session(bench, PLAIN).await?;
    let mut turns = 0;
    for mark in MARKS {
        // Half of them before it, half behind.
        while turns + AT_A_MARK / 2 < *mark {
            turn(&mut long).await?;
            turns += 1;
        }
        let mut new = session(bench, PLAIN).await?;
        // Its first turn also starts its workflow.
        turn(&mut new).await?;
        let (mut in_long, mut in_new) = (Vec::new(), Vec::new());
        for _ in 0..AT_A_MARK {
            in_long.push(turn(&mut long).await?.total());
            in_new.push(turn(&mut new).await?.total());
            turns += 1;
        }
        let (in_long, in_new) = (Samples::of(in_long, MS).at(0.5), Samples::of(in_new, MS).at(0.5));
        report.set(&format!("turn_ms_at_{mark}"), in_long);
        report.set(&format!("turn_at_{mark}_over_new"), in_long / in_new);
    }
    let log = Rig::shared_servers().await?.log_file(Server::Temporal);
    let text = std::fs::read_to_string(&log).with_context(|| format!("could not read {}", log.display()))?;
    let warned = text.lines().filter(|line| line.contains("exceeds warn limit")).count();
    report.set("temporal_history_warnings", warned as f64);
    Ok(())
}

async fn turn(chat: &mut ChatSession) -> Result<TurnReport> {
    let report = chat.send_and_wait("go", PATIENCE).await?;
    ensure!(report.succeeded(), "a turn failed: {:?}", report.turn);
    ensure!(report.verification.is_clean(), "the stream broke its promise: {:?}", report.verification);
    Ok(report)
}
