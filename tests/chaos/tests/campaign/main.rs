//! A short campaign, and what campaigns are made of. A process of its own: its stressors take the cores from whatever runs
//! beside it.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod short;
mod stressors;
mod stuck;
