//! End-to-end tests: real Postgres, NATS, Temporal, and the real roles as processes. One binary, so that the servers
//! start once.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod bad_input;
mod daemons;
mod foreign;
mod hostile;
mod idle;
mod limits;
mod mcp;
mod model_retries;
mod observability;
mod overload;
mod replicas;
mod scripts;
mod storm;
mod streams;
mod tools;
mod turns;
