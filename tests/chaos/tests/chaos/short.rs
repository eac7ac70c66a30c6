//! A short campaign with a fixed seed.

use reliant_chaos::Campaign;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost() -> anyhow::Result<()> {
    let report = Campaign::short(20).run().await?;
    let verdict = report.verdict();
    assert!(verdict.is_empty(), "{}\n{}", report.table(), verdict.join("\n"));
    Ok(())
}
