//! Traces, metrics and logs: one start-up, one list of names, one registry. Telemetry never decides anything and never
//! blocks: a collector that is away costs counted drops, not time.

mod chain;
mod client_call;
mod export;
mod init;
mod log;
pub mod metrics;
pub mod names;
pub mod page;
mod pipeline;
#[cfg(target_os = "linux")]
mod process;
pub mod sampled;
mod spool;
pub mod trace;

pub use chain::{Chain, chain};
pub use client_call::{ClientCall, code_label};
pub use init::{Guard, LogFormat, TelemetryConfig, TelemetryError, init};
pub use trace::{TraceContext, hop, hop_span};
