//! Private Postgres, NATS and Temporal as child processes, for `reliant up` and for tests.
//!
//! Invariant: a child never outlives the process that started it (also when that one is killed), and one data
//! directory has one living [`Stack`] at a time. What a child wrote survives kill -9 of anybody.
//! This crate knows how to run servers, not what is in them: no schema, no subjects' meaning, no workflows.

mod config;
mod error;
mod external;
mod leash;
mod lock;
mod mesh;
mod nats;
mod ports;
mod postgres;
mod process;
mod roles;
mod secrets;
mod stack;
mod temporal;
mod tools;

pub use config::{Placement, Server, StackConfig};
pub use error::StackError;
pub use external::reachable;
pub use lock::{DataDirLock, running_info, write_private};
pub use mesh::{Addresses, RoleProcess, RoleSpec, http_get, is_ready, resident_kib};
pub use nats::{NatsRole, NatsUser};
pub use ports::free_port;
pub use roles::{DaemonSpec, Mesh, MeshSpec};
pub use stack::Stack;
pub use tools::{PostgresTools, Tools};
