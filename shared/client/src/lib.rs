//! The client of reliant that checks what it is told. `reliant chat`, the tests, the benchmark and the chaos runs use it.
//!
//! The server promises every event once and in order. [`View`] believes nothing: it counts each hole, repetition and
//! disorder, and compares live text with what was committed. [`Subscription`] reconnects by itself and heals.

mod calls;
mod config;
mod session;
mod subscription;
mod view;

pub use calls::Client;
pub use config::{ClientConfig, Token, TokenProvider};
pub use session::{Approvals, ChatSession, TurnReport, text_of};
pub use subscription::Subscription;
pub use view::{Applied, BlockKey, ChatView, ClientUpdate, FeedView, From, LiveBlock, Verification, View};
