//! The gRPC stubs of `reliant.v1`, and the one place where a `Failure` becomes a `tonic::Status` and back.
//! Messages are those of `reliant_types::pb`.

mod channel;
mod status;

#[allow(clippy::all, clippy::unwrap_used, missing_docs)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/reliant.v1.rs"));
}

pub use channel::{RpcError, channel, channel_lazy, endpoint};
pub use generated::*;
pub use status::{ERROR_DOMAIN, failure, status};

use reliant_telemetry::{
    TraceContext,
    names::{TRACEPARENT, TRACESTATE},
};
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};

/// Puts the context into a request's metadata.
pub fn inject<T>(request: &mut tonic::Request<T>, context: &TraceContext) {
    for (name, value) in [(TRACEPARENT, &context.traceparent), (TRACESTATE, &context.tracestate)] {
        if let Ok(value) = value.parse::<MetadataValue<Ascii>>()
            && !value.is_empty()
        {
            request.metadata_mut().insert(name, value);
        }
    }
}

/// The context of a request's metadata; empty where there is none or it is malformed.
pub fn extract(metadata: &MetadataMap) -> TraceContext {
    let text = |name| metadata.get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
    TraceContext::from_parts(text(TRACEPARENT), text(TRACESTATE))
}

/// Puts a bearer token into a request's metadata. False: the token has characters that no header can carry.
pub fn authorize<T>(request: &mut tonic::Request<T>, token: &str) -> bool {
    match format!("Bearer {token}").parse::<MetadataValue<Ascii>>() {
        Ok(mut value) => {
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
            true
        }
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trace_context_travels_in_metadata() {
        let context = TraceContext::from_parts("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "a=b");
        let mut request = tonic::Request::new(());
        inject(&mut request, &context);
        assert_eq!(extract(request.metadata()), context);
        let mut empty = tonic::Request::new(());
        inject(&mut empty, &TraceContext::default());
        assert!(empty.metadata().is_empty());
    }

    #[test]
    fn a_token_that_no_header_can_carry_is_said() {
        let mut request = tonic::Request::new(());
        assert!(!authorize(&mut request, "rlt_\n"));
        assert!(authorize(&mut request, "rlt_x"));
    }
}
