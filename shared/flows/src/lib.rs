//! Driving turns with Temporal: the chat's workflow, its client and its worker.
//!
//! Invariant: Temporal only drives. A signal carries no state, payloads are ids, and whatever Temporal loses is found
//! again in Postgres by a relay. Nothing here reads or writes a conversation. The workflow's code is pure and tiny: one
//! thread runs all workflows of a worker.

mod activities;
mod client;
mod config;
mod driver;
pub mod floor;
pub mod histories;
mod meter;
mod trace;
mod watchdog;
mod worker;
pub mod workflow;

pub use client::{FAILED_TASKS_MAX, Flows, FlowsError, RunState, workflow_id};
pub use config::{FlowsConfig, WorkerTuning};
pub use driver::{BurstEnd, BurstOrder, Driver, DriverError};
pub use worker::run_worker;
pub use workflow::HEARTBEAT_TIMEOUT;
