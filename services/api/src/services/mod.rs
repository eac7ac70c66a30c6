//! The RPCs, one file per service.

mod approvals;
mod chats;
mod daemons;
mod identity;
mod messages;
mod models;
mod projects;
mod telemetry;
mod tokens;
mod turns;
mod updates;

pub use approvals::Approvals;
pub use chats::Chats;
pub use daemons::Daemons;
pub use identity::Identity;
pub use messages::Messages;
pub use models::ModelList;
pub use projects::Projects;
pub use telemetry::Telemetry;
pub use tokens::Tokens;
pub use turns::Turns;
pub use updates::UpdateServer;
