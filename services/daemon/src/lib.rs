//! The daemon: runs tools on a developer's machine and keeps a journal of what it ran.
//!
//! It must never run one call twice, and never trust a path or a name from the wire. It has no database, no message
//! bus and no workflow engine: one gRPC stream, which it dials itself, is all its contact with the cloud.

pub mod config;
pub mod error;
pub mod journal;
pub mod mcp;
pub mod status;

mod calls;
mod confine;
mod daemon;
mod output;
mod roots;
mod state_dir;
mod tools;
mod tunnel;

pub use config::{DaemonConfig, Network, RootConfig};
pub use daemon::{Built, build};
pub use error::DaemonError;
pub use journal::reset_journal;
pub use mcp::trust::{PendingServer, pending_trust, trust};
pub use status::{Status, log_path, status, stop};
pub use tunnel::backoff;
