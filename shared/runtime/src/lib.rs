//! What every role's process has in common: configuration, tasks with a kind, one drain, the admin listener, back-off.
//!
//! A role is built first (which binds its addresses) and run afterwards; both halves are the role's own. This crate
//! holds no global state: a test runs as many roles in one process as it likes.

pub mod admin;
pub mod config;
pub mod connections;
pub mod drain;
mod open_files;
pub mod retry;
pub mod tasks;

use std::net::SocketAddr;

use futures::future::BoxFuture;

pub use admin::{AdminServer, Check, check_fn};
pub use config::{AdminConfig, ConfigError, ListenConfig, Sources};
pub use connections::{ConnectionLimits, Connections};
pub use drain::{Drain, Drained};
pub use reliant_types::{InstanceId, Secret};
pub use retry::{Backoff, Retry};
pub use tasks::{TaskKind, TaskOutput};

/// The version of this build, as instances and daemons report it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A built role: its addresses are known, and it serves until the drain ends it.
pub trait Role: Send + Sized {
    type Error: std::error::Error + Send + Sync + 'static;

    /// Names the role in logs: `api`, `worker`, `gateway`, `daemon`.
    const NAME: &'static str;

    /// Where clients connect; `None` for a role without a front listener.
    fn local_addr(&self) -> Option<SocketAddr>;

    fn admin_addr(&self) -> Option<SocketAddr>;

    /// Serves until `drain` begins and the role's work is handed over or done.
    fn run(self, drain: Drain) -> BoxFuture<'static, Result<(), Self::Error>>;
}
