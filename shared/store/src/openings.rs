//! New connections, opened where a busy process does not delay them.
//!
//! The pool opens a connection in the task that wants one. The handshake hashes the password 4,096 times and gives way to
//! other tasks after every fifth (`sqlx-postgres`, connection/sasl.rs), so in a process with hundreds of ready tasks one
//! handshake waits some 800 times for all of them: seconds, in which whoever waits for it is told that the database does
//! not answer. On a thread of its own it takes what it costs.

use reliant_types::boxed;
use std::sync::Arc;

use sqlx::PgPool;
use tokio::{runtime::Handle, sync::Semaphore};

use crate::{Result, StoreError};

/// Handshakes at one time, each on a thread.
const AT_ONCE: usize = 4;

#[derive(Clone, Debug)]
pub(crate) struct Openings(Arc<Semaphore>);

impl Openings {
    pub fn new() -> Self {
        Self(Arc::new(Semaphore::new(AT_ONCE)))
    }

    /// Returns when the pool has a connection to give, or as many as it may have, so that it need not open one.
    #[boxed]
    pub async fn spare(&self, pool: &PgPool) -> Result<()> {
        if !is_wanting(pool) {
            return Ok(());
        }
        match tokio::time::timeout(pool.options().get_acquire_timeout(), self.open(pool)).await {
            Ok(opened) => opened,
            Err(_) => Err(StoreError::Unavailable(sqlx::Error::PoolTimedOut)),
        }
    }

    async fn open(&self, pool: &PgPool) -> Result<()> {
        while is_wanting(pool) {
            // The permit goes with the work, which does not end when its caller does.
            let Ok(permit) = self.0.clone().acquire_owned().await else { return Ok(()) };
            if !is_wanting(pool) {
                break;
            }
            let (opening, runtime) = (pool.clone(), Handle::current());
            let opened = tokio::task::spawn_blocking(move || {
                let _permit = permit;
                runtime.block_on(async {
                    // Given back at once, not by a task that waits its turn.
                    opening.acquire().await?.return_to_pool().await;
                    Ok::<_, sqlx::Error>(())
                })
            });
            match opened.await {
                Ok(opened) => opened?,
                Err(_) => return Err(StoreError::Unavailable(sqlx::Error::WorkerCrashed)),
            }
        }
        Ok(())
    }
}

/// Whoever asks this pool for a connection now has to open it.
fn is_wanting(pool: &PgPool) -> bool {
    pool.num_idle() == 0 && pool.size() < pool.options().get_max_connections() && !pool.is_closed()
}
