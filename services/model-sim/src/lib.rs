//! A deterministic model server on OpenAI's and Anthropic's wire formats, for trying Reliant without a key, for tests and
//! for measurements. The same request gets the same answer; only counted faults and stamps change.
//!
//! The script is chosen by the model's name with parameters (`text?tokens=200&rate=50`), or by a line `sim: {…}` in the
//! person's last message; see the modules `script` and `plan`. Requests are checked as strictly as the real providers do.

mod answer;
mod anthropic;
mod ask;
mod fault;
mod flows;
mod openai;
mod plan;
mod schema;
mod script;
mod serve;
mod stream;

use reliant_types::boxed;
use std::{
    future::Future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::serve::ListenerExt;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;

/// Streams that run when the server is stopped get so long to end.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SimConfig {
    /// Port 0: any free one.
    pub listen: SocketAddr,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 7445)) }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SimError {
    #[error("model-sim cannot listen on {address}; choose another port")]
    Listen {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("model-sim stopped serving")]
    Serve(#[source] std::io::Error),
}

/// What the server did, for tests.
#[derive(Debug, Default)]
pub struct Stats {
    requests: AtomicU64,
    refused: AtomicU64,
    open_streams: AtomicI64,
}

impl Stats {
    /// Model calls received.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Of these, answered with an error status by the checks (not by a scripted fault).
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Streams under way.
    pub fn open_streams(&self) -> i64 {
        self.open_streams.load(Ordering::Relaxed)
    }
}

/// A server that is bound and does not serve yet.
pub struct Built {
    listener: TcpListener,
    address: SocketAddr,
    stats: Arc<Stats>,
}

/// Binds.
#[boxed]
pub async fn build(cfg: SimConfig) -> Result<Built, SimError> {
    let failed = |source| SimError::Listen { address: cfg.listen, source };
    let listener = TcpListener::bind(cfg.listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok(Built { listener, address, stats: Arc::default() })
}

impl Built {
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// As a provider's `base_url`, for both wire formats.
    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    pub fn stats(&self) -> Arc<Stats> {
        self.stats.clone()
    }

    /// Serves until `shutdown`; then streams get a second to end.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), SimError> {
        let stopped = Arc::new(tokio::sync::Notify::new());
        let signal = {
            let stopped = stopped.clone();
            async move {
                shutdown.await;
                stopped.notify_one();
            }
        };
        let listener = self.listener.tap_io(|io| {
            // Each piece leaves when it is due.
            let _ = io.set_nodelay(true);
        });
        let served = axum::serve(listener, serve::router(self.stats)).with_graceful_shutdown(signal);
        tokio::select! {
            done = served => done.map_err(SimError::Serve),
            () = async { stopped.notified().await; tokio::time::sleep(SHUTDOWN_GRACE).await } => Ok(()),
        }
    }
}
