//! W3C trace context, by value. What crosses a process is the context of a short span that has already ended, so that a
//! kill cannot orphan what follows. A malformed or hostile context is no context; it is never an error.

use opentelemetry::{
    Array, Context, StringValue, Value,
    trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState},
};
use std::str::FromStr;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::names::{TRACEPARENT, TRACESTATE};

/// W3C allows longer states; what is longer than this is dropped, which the standard allows too.
const TRACESTATE_MAX_BYTES: usize = 512;
const TRACEPARENT_BYTES: usize = 55;

/// The two W3C fields. Empty: no context. Non-empty ones were validated or made here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceContext {
    pub traceparent: String,
    pub tracestate: String,
}

impl TraceContext {
    /// The context of `tracing::Span::current()`.
    pub fn current() -> Self {
        Self::of(&Span::current())
    }

    /// The context of this span; empty when the span is disabled or telemetry was not started.
    pub fn of(span: &Span) -> Self {
        if span.is_disabled() {
            return Self::default();
        }
        Self::from_span_context(span.context().span().span_context())
    }

    fn from_span_context(context: &SpanContext) -> Self {
        if !context.is_valid() {
            return Self::default();
        }
        let own = (context.span_id(), context.trace_flags() & TraceFlags::SAMPLED);
        let (span, flags) = match crate::init::caller(context) {
            Some(caller) if crate::init::passes_through() => caller,
            _ => own,
        };
        Self {
            traceparent: format_parent(context.trace_id(), span, flags),
            tracestate: crate::init::outward_state(context),
        }
    }

    /// Malformed text gives an empty context.
    pub fn from_traceparent(traceparent: &str) -> Self {
        Self::from_parts(traceparent, "")
    }

    /// Malformed parts give an empty context; a malformed state alone is dropped.
    pub fn from_parts(traceparent: &str, tracestate: &str) -> Self {
        if parse(traceparent).is_none() {
            return Self::default();
        }
        let keep = tracestate.len() <= TRACESTATE_MAX_BYTES && TraceState::from_str(tracestate).is_ok();
        Self {
            traceparent: traceparent.to_owned(),
            tracestate: if keep { tracestate.to_owned() } else { String::new() },
        }
    }

    pub fn is_empty(&self) -> bool {
        self.traceparent.is_empty()
    }

    /// 32 hex digits.
    pub fn trace_id(&self) -> Option<String> {
        parse(&self.traceparent).map(|(trace, _, _)| trace.to_string())
    }

    /// 16 hex digits: the span that this context is of.
    pub fn span_id(&self) -> Option<String> {
        parse(&self.traceparent).map(|(_, span, _)| span.to_string())
    }

    pub(crate) fn ids(&self) -> Option<(TraceId, SpanId)> {
        parse(&self.traceparent).map(|(trace, span, _)| (trace, span))
    }

    pub fn is_sampled(&self) -> bool {
        parse(&self.traceparent).is_some_and(|(_, _, flags)| flags.is_sampled())
    }

    /// The same context with our own sampling decision: what a caller from outside asked for does not decide for us.
    /// For the edge only; inside, the flag is followed.
    pub fn at_edge(self) -> Self {
        let Some((trace, span, _)) = parse(&self.traceparent) else { return Self::default() };
        let flags = if crate::init::sampled_at_edge(trace) { TraceFlags::SAMPLED } else { TraceFlags::NOT_SAMPLED };
        Self { traceparent: format_parent(trace, span, flags), tracestate: self.tracestate }
    }

    pub fn inject_http(&self, headers: &mut http::HeaderMap) {
        let Ok(parent) = http::HeaderValue::from_str(&self.traceparent) else { return };
        if self.is_empty() {
            return;
        }
        headers.insert(TRACEPARENT, parent);
        if let Ok(state) = http::HeaderValue::from_str(&self.tracestate)
            && !self.tracestate.is_empty()
        {
            headers.insert(TRACESTATE, state);
        }
    }

    pub fn from_http(headers: &http::HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
        Self::from_parts(text(TRACEPARENT), text(TRACESTATE))
    }

    fn span_context(&self) -> Option<SpanContext> {
        let (trace, span, flags) = parse(&self.traceparent)?;
        let state = TraceState::from_str(&self.tracestate).unwrap_or_default();
        Some(SpanContext::new(trace, span, flags, true, state))
    }

    /// Makes `span` a child of this context. Call it before the span is first entered: an entered span has its ids.
    /// What leaves the process below it hangs on this context as well; see [`hop`].
    pub fn set_parent(&self, span: &Span) {
        if let Some(context) = self.span_context() {
            let incoming = Incoming(context.clone());
            // Err: no telemetry, or the span is filtered out. Neither concerns the caller.
            let _ = span.set_parent(Context::new().with_remote_span_context(context).with_value(incoming));
        }
    }

    /// The context that came into this process and that the current span is below; empty where its trace began here.
    pub fn incoming() -> Self {
        let span = Span::current();
        if span.is_disabled() {
            return Self::default();
        }
        let context = span.context();
        context.get::<Incoming>().map(|incoming| Self::from_span_context(&incoming.0)).unwrap_or_default()
    }

    /// Links `span` to this context: for retries, takeovers and live pieces.
    pub fn link(&self, span: &Span) {
        if let Some(context) = self.span_context() {
            span.add_link(context);
        }
    }
}

impl From<reliant_types::pb::TraceContext> for TraceContext {
    fn from(wire: reliant_types::pb::TraceContext) -> Self {
        Self::from_parts(&wire.traceparent, &wire.tracestate)
    }
}

impl From<TraceContext> for reliant_types::pb::TraceContext {
    fn from(context: TraceContext) -> Self {
        Self { traceparent: context.traceparent, tracestate: context.tracestate }
    }
}

/// The context that a process was given, remembered below the span that it became the parent of.
struct Incoming(SpanContext);

/// The context of a short span, which ends here: what is sent to another process. Without telemetry, empty.
///
/// Its parent is the context that came into this process, not the current span: that one is still open, and would leave
/// orphans behind if the process were killed. The span's name must be one of those that
/// [`crate::names::span::leaves_the_process`] knows.
pub fn hop_span(span: Span) -> TraceContext {
    TraceContext::incoming().set_parent(&span);
    TraceContext::of(&span)
}

/// Like [`hop_span`], but with `parent` as the span's parent, and `parent` itself where no span is recorded.
pub fn hop(parent: &TraceContext, span: Span) -> TraceContext {
    parent.set_parent(&span);
    let context = TraceContext::of(&span);
    if context.is_empty() { parent.clone() } else { context }
}

/// An attribute that is a list, which a field of a span cannot be.
pub fn record_list(span: &Span, key: &'static str, values: &[&'static str]) {
    let values: Vec<StringValue> = values.iter().map(|value| (*value).into()).collect();
    span.set_attribute(key, Value::Array(Array::String(values)));
}

fn format_parent(trace: TraceId, span: SpanId, flags: TraceFlags) -> String {
    format!("00-{trace:032x}-{span:016x}-{flags:02x}")
}

/// Version 00 exactly, lower-case hex, ids not zero.
fn parse(text: &str) -> Option<(TraceId, SpanId, TraceFlags)> {
    let bytes = text.as_bytes();
    if bytes.len() != TRACEPARENT_BYTES || !text.starts_with("00-") || bytes[35] != b'-' || bytes[52] != b'-' {
        return None;
    }
    let hex = |range: std::ops::Range<usize>| -> Option<&str> {
        let part = text.get(range)?;
        part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')).then_some(part)
    };
    let trace = TraceId::from_hex(hex(3..35)?).ok()?;
    let span = SpanId::from_hex(hex(36..52)?).ok()?;
    let flags = TraceFlags::new(u8::from_str_radix(hex(53..55)?, 16).ok()?) & TraceFlags::SAMPLED;
    (trace != TraceId::INVALID && span != SpanId::INVALID).then_some((trace, span, flags))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_good_context_survives_http() {
        let context = TraceContext::from_parts(GOOD, "vendor=1");
        assert!(context.is_sampled());
        assert_eq!(context.trace_id().as_deref(), Some("4bf92f3577b34da6a3ce929d0e0e4736"));
        let mut headers = http::HeaderMap::new();
        context.inject_http(&mut headers);
        assert_eq!(TraceContext::from_http(&headers), context);
    }

    #[test]
    fn malformed_and_hostile_contexts_are_none() {
        let long = format!("{GOOD}{}", "0".repeat(10_000));
        for bad in [
            "",
            "00",
            &GOOD[..54],
            &long,
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473+-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0\n",
            "00-\u{e9}bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
        ] {
            assert!(TraceContext::from_traceparent(bad).is_empty(), "{bad:?}");
        }
    }

    #[test]
    fn a_hostile_state_is_dropped_and_its_parent_kept() {
        let context = TraceContext::from_parts(GOOD, &"a=1,".repeat(1000));
        assert_eq!((context.traceparent.as_str(), context.tracestate.as_str()), (GOOD, ""));
        assert_eq!(TraceContext::from_parts(GOOD, "no equals sign").tracestate, "");
    }

    #[test]
    fn an_empty_context_touches_nothing() {
        let mut headers = http::HeaderMap::new();
        TraceContext::default().inject_http(&mut headers);
        assert!(headers.is_empty());
        assert!(TraceContext::default().trace_id().is_none());
    }
}
