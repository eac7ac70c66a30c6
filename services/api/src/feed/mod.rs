//! The live feed: what every viewer of this replica gets, each event once and in order, each live text without a hole.
//!
//! ```text
//!  NATS ──► chat_feed (one task per chat with viewers) ──► viewer (one bounded queue per stream) ──► socket
//!              merge · window · live texts                   never waited for: full means lagged
//!  Postgres ──┘ at the start, behind gaps, each second      Lagged → catches up from the chat's state
//! ```
//! A chat's task subscribes before it reads, never waits for a viewer, a database or a producer: reads and refills run
//! beside it. Nothing here is the truth; all of it can be read or asked for again.

mod budget;
mod chat_feed;
mod hub;
mod live;
mod merge;
pub mod poll;
mod refill;
mod roster;
mod sequence;
mod state;
mod table;
mod user_feed;
mod viewer;
mod wire;

#[cfg(test)]
mod merge_tests;

pub use budget::Budget;
pub use chat_feed::Deps;
pub use hub::{Hub, Place, Ticket};
pub use wire::SharedCodec;
