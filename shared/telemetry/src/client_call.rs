//! A gRPC call as its caller sees it: one span, one count, one time. What is dropped unsettled was cancelled.

use std::time::Instant;

use tonic::Code;
use tracing::{Span, field::Empty};

use crate::{TraceContext, metrics::RPC_CLIENT_DURATION};

pub struct ClientCall {
    method: &'static str,
    span: Span,
    begun: Instant,
    settled: bool,
}

impl ClientCall {
    /// `address`: a URL, a host with its port, or nothing where it is not known; only the host is told. A call that is made
    /// again stands beside the one `before` it, linked to it.
    pub fn start(method: &'static str, address: &str, before: &TraceContext) -> Self {
        Self::with(method, address, before, None)
    }

    /// Below this context, and not below the current span.
    pub fn below(parent: &TraceContext, method: &'static str, address: &str) -> Self {
        Self::with(method, address, &TraceContext::default(), Some(parent))
    }

    fn with(method: &'static str, address: &str, before: &TraceContext, parent: Option<&TraceContext>) -> Self {
        let span = tracing::info_span!(
            // names::span::RPC_CLIENT
            "rpc.client",
            otel.name = method,
            otel.kind = "client",
            otel.status_code = Empty,
            rpc.system.name = "grpc",
            rpc.method = method,
            rpc.response.status_code = Empty,
            server.address = host(address),
            error.type = Empty,
        );
        if let Some(parent) = parent {
            parent.set_parent(&span);
        }
        before.link(&span);
        Self { method, span, begun: Instant::now(), settled: false }
    }

    pub fn span(&self) -> &Span {
        &self.span
    }

    pub fn settle(mut self, code: Code) {
        self.end(code);
    }

    fn end(&mut self, code: Code) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        let label = code_label(code);
        RPC_CLIENT_DURATION.with_label_values(&[self.method, label]).observe(self.begun.elapsed().as_secs_f64());
        self.span.record("rpc.response.status_code", label);
        if code != Code::Ok {
            self.span.record("error.type", label);
            self.span.record("otel.status_code", "ERROR");
        }
    }
}

impl Drop for ClientCall {
    fn drop(&mut self) {
        self.end(Code::Cancelled);
    }
}

/// The host of an address.
fn host(address: &str) -> &str {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    let rest = rest.split('/').next().unwrap_or_default();
    let rest = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    match rest.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host.trim_matches(['[', ']']),
        _ => rest,
    }
}

/// The canonical upper-case name of a gRPC status.
pub fn code_label(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_host_is_told() {
        for (address, expected) in [
            ("http://127.0.0.1:7443", "127.0.0.1"),
            ("https://user:secret@api.example.com/x", "api.example.com"),
            ("[::1]:80", "::1"),
            ("localhost", "localhost"),
            ("", ""),
        ] {
            assert_eq!(host(address), expected, "{address}");
        }
    }

    #[test]
    fn a_dropped_call_counts_as_cancelled() {
        let count = |code| RPC_CLIENT_DURATION.with_label_values(&["test/Call", code]).get_sample_count();
        ClientCall::start("test/Call", "", &TraceContext::default()).settle(Code::Unavailable);
        drop(ClientCall::start("test/Call", "", &TraceContext::default()));
        assert_eq!((count("UNAVAILABLE"), count("CANCELLED")), (1, 1));
    }
}
