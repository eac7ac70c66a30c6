//! A trace receiver for one machine: takes OTLP over gRPC, keeps the newest traces in memory, shows them as a page.
//!
//! It is for looking, never for keeping: everything is bounded, the oldest trace goes first, and what was dropped is
//! counted. It listens on loopback, asks nobody who they are, and must therefore not be reached from elsewhere. Nothing
//! in the mesh waits for it.

mod model;
mod page;
mod receive;
mod store;
pub mod tree;

use std::net::SocketAddr;

use reliant_telemetry::chain;
use reliant_types::{Code, Failure, boxed};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;

pub use model::{Link, Log, Span};
pub use store::{Limits, Status, Store, Summary};

#[derive(Debug, Clone)]
pub struct ObserveConfig {
    /// One listener for OTLP and for the page. Port 0: any free one.
    pub listen: SocketAddr,
    pub limits: Limits,
}

impl Default for ObserveConfig {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 7446)), limits: Limits::default() }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    #[error("the address {addr} cannot be listened on; another process may hold it")]
    Bind {
        addr: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("{addr} is not an address of this machine alone; traces are shown to whoever asks, so listen on 127.0.0.1")]
    NotLoopback { addr: SocketAddr },
}

impl From<ObserveError> for Failure {
    fn from(error: ObserveError) -> Self {
        Failure::new(Code::InvalidArgument, error.to_string())
    }
}

/// A receiver that runs until it is dropped.
#[derive(Debug)]
pub struct Observe {
    addr: SocketAddr,
    store: Store,
    server: tokio::task::JoinHandle<()>,
}

impl Observe {
    #[boxed]
    pub async fn start(config: ObserveConfig) -> Result<Self, ObserveError> {
        let addr = config.listen;
        if !addr.ip().is_loopback() {
            return Err(ObserveError::NotLoopback { addr });
        }
        let bind = |source| ObserveError::Bind { addr, source };
        let listener = TcpListener::bind(addr).await.map_err(bind)?;
        let addr = listener.local_addr().map_err(bind)?;
        let store = Store::new(config.limits);
        let routes = receive::routes(store.clone()).into_axum_router().merge(page::router(store.clone()));
        let server = tonic::transport::Server::builder()
            // The page comes as HTTP/1.1.
            .accept_http1(true)
            .add_routes(tonic::service::Routes::from(routes))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let server = tokio::spawn(async move {
            if let Err(error) = server.await {
                tracing::error!(error = %chain(&error), "the trace receiver ended");
            }
        });
        Ok(Self { addr, store, server })
    }

    /// For `telemetry.otlp_endpoint`, and for a browser.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub fn store(&self) -> &Store {
        &self.store
    }
}

impl Drop for Observe {
    fn drop(&mut self) {
        self.server.abort();
    }
}
