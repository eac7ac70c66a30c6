//! Nothing lost: the sequences that have a name.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod decisions;
mod half_open;
mod hand_over;
mod outages;
