//! NATS: typed subjects, protobuf payloads, trace context in headers. NATS only hints and carries: whoever publishes here
//! has the truth somewhere else, and nothing here waits without a bound or buffers without one.

mod client;
mod error;
mod health;
pub mod probe;
mod subject;
mod subscription;

pub use client::{Bus, BusConfig};
pub use error::BusError;
pub use subject::{
    BurstSubject, ControlSubject, DECLARED, Declared, FeedSubject, PrefixSubject, PresenceSubject, RequestTopic,
    ResultSubject, ToolSubject, Topic, UpdateSubject,
};
pub use subscription::{Received, Subscription};
