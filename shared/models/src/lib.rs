//! Model providers over HTTP: the OpenAI chat-completions and the Anthropic messages wire formats, streamed.
//!
//! What this crate promises: a provider, however broken or hostile, costs bounded memory and ends in a typed
//! [`ModelError`]; a stream that ends without the provider's own end is an error, never a short answer; neither keys nor
//! bodies are logged. It does not know chats, turns or tools beyond their shapes, and it stores nothing.

mod catalog;
mod client;
mod config;
mod error;
mod event;
mod history;
mod lenient;
mod metrics;
mod request;
mod resolved;
pub mod retry;
pub mod sse;
mod stream;
mod wire;

pub use client::Models;
pub use config::{ModelConfig, ModelsConfig, ModelsConfigError, ProviderConfig, ProviderKind};
pub use error::ModelError;
pub use event::{BlockKind, ModelEvent};
pub use history::{CountedPrompt, FitReport, fit_history, mend_history};
pub use request::{ChatMessage, ChatRole, ModelRequest, Part, ToolSpec};
pub use resolved::ResolvedModel;
pub use retry::{RetryPolicy, tried_again};
pub use stream::ModelStream;
