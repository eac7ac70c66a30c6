//! Postgres: what was accepted and committed. The only crate that names sqlx.
//!
//! Invariants: a change of an entity and the event that tells of it are one transaction; whatever changes a chat holds the
//! chat's row first and a user's row last; everything done for a person is scoped by that person's id.

mod approvals;
mod attempt;
mod chat_tx;
mod chats;
mod checks;
mod daemons;
pub mod decide;
mod dispatch;
mod drive;
mod error;
mod feed;
mod history;
mod instances;
mod lead;
mod messages;
mod model;
mod new_calls;
mod openings;
mod pages;
mod places;
mod pool;
mod projects;
mod relay;
mod results;
mod rows;
mod secret;
mod settle;
mod stored_events;
mod tokens;
mod turns;
mod users;

pub use daemons::DAEMON_SCOPE;
pub use drive::model_never_answered;
pub use error::StoreError;
pub use history::{History, Transcript};
pub use lead::Lead;
pub use model::*;
pub use places::{Placed, TurnsConfig};
pub use pool::{Store, StoreConfig};

pub type Result<T, E = StoreError> = std::result::Result<T, E>;
