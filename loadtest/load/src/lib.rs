//! What each load test needs and none should write again: open arrivals, CPU by process and by role, CPU quotas by cgroup,
//! samples, and the comparison of two series that were measured by turns.
//!
//! This crate knows nothing of chats, turns or roles: it takes futures, process ids and numbers.

pub mod arrivals;
pub mod cpu;
pub mod quota;
pub mod ratio;
pub mod samples;

pub use arrivals::{Arrivals, Outcome, open_loop};
pub use quota::{Quota, QuotaError};
pub use ratio::{Ratio, Verdict};
pub use samples::Samples;
