//! Real servers and real role processes for tests: private Postgres, NATS and Temporal, the `reliant` binary, port 0,
//! and a database of its own for each mesh. Nothing here is a stand-in but the model provider (`reliant model-sim`).

mod rig;
mod wait;

pub use rig::{DaemonOptions, Person, Rig, RigOptions, TestDaemon, init, tools_dir};
pub use wait::{eventually, within};
