//! Words that every crate shares: the protobuf messages, typed ids, the code table, limits. No I/O here.

pub mod code;
pub mod environment;
pub mod id;
pub mod limits;
pub mod secret;
pub mod url;
pub mod visible;

/// Makes an async function return a boxed future. What a crate offers to others carries it: the compiler then generates
/// the function's code once, in its own crate, and not again in each that awaits it. The price is an allocation a call.
pub use async_recursion::async_recursion as boxed;
pub use code::{Code, Failure};
pub use id::*;
pub use secret::Secret;
pub use visible::visible;

/// The protobuf messages of `proto/reliant/v1`, without services.
#[allow(clippy::all, clippy::unwrap_used, missing_docs)]
pub mod pb {
    include!(concat!(env!("OUT_DIR"), "/reliant.v1.rs"));

    /// All files with their imports, for gRPC reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/reliant.fds"));
}

/// A time as protobuf carries it.
pub fn timestamp(time: chrono::DateTime<chrono::Utc>) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: time.timestamp(), nanos: time.timestamp_subsec_nanos() as i32 }
}

/// Unix time in microseconds, for measuring only.
pub fn unix_us() -> i64 {
    chrono::Utc::now().timestamp_micros()
}
