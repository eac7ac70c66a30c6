//! Waits are for a state, with a deadline.

use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::{Instant, sleep, timeout};

const POLL: Duration = Duration::from_millis(20);

/// Asks until the answer is `Some`, at most `patience`.
pub async fn eventually<T, F>(what: &str, patience: Duration, mut look: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<Option<T>>>,
{
    let deadline = Instant::now() + patience;
    loop {
        let found = look().await.with_context(|| format!("while waiting for: {what}"))?;
        if let Some(found) = found {
            return Ok(found);
        }
        anyhow::ensure!(Instant::now() < deadline, "after {patience:?} there was still no: {what}");
        sleep(POLL).await;
    }
}

/// `work` must end in time.
pub async fn within<T>(what: &str, patience: Duration, work: impl Future<Output = T>) -> Result<T> {
    timeout(patience, work).await.with_context(|| format!("not done after {patience:?}: {what}"))
}
