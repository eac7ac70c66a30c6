//! A short campaign, by the clock's seed or by that in `CHAOS_SEED`.

use anyhow::Context as _;
use reliant_chaos::{Campaign, clock_seed};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost() -> anyhow::Result<()> {
    let seed = match std::env::var("CHAOS_SEED") {
        Ok(seed) => seed.parse().context("CHAOS_SEED is a number")?,
        Err(_) => clock_seed(),
    };
    let report = Campaign::short(seed).run().await?;
    let verdict = report.verdict();
    assert!(verdict.is_empty(), "{}\n{}", report.table(), verdict.join("\n"));
    Ok(())
}
