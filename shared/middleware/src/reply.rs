//! How a layer answers in place of the handler.

use http::{HeaderMap, Response};
use reliant_types::Failure;
use tonic::body::Body;

/// A trailers-only gRPC response that carries the failure with its details.
pub fn refuse(failure: &Failure) -> Response<Body> {
    reliant_rpc::status(failure).into_http()
}

/// The failure as trailers, to end a stream that has begun.
pub fn trailers(failure: &Failure) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    if reliant_rpc::status(failure).add_header(&mut trailers).is_err() {
        // Only metadata that is no header can fail, and a failure's has none; the code alone is enough then.
        trailers.insert("grpc-status", http::HeaderValue::from(failure.code.class() as i32));
    }
    trailers
}

/// The gRPC status of headers or trailers, where they carry one.
pub fn code(headers: &HeaderMap) -> Option<tonic::Code> {
    headers.get("grpc-status").map(|value| tonic::Code::from_bytes(value.as_bytes()))
}
