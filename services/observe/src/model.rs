//! Spans and log lines as they are kept: ids as hex, values as JSON, texts cut.

use std::collections::BTreeMap;

use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, KeyValue, any_value::Value as Any},
    logs::v1::LogRecord,
    trace::v1::{Span as WireSpan, span::SpanKind, status::StatusCode},
};
use serde::{Serialize, Serializer};
use serde_json::Value;

/// Of one attribute's text, and of one log line.
pub(crate) const TEXT_MAX_BYTES: usize = 2048;
pub(crate) const ATTRIBUTES_MAX: usize = 64;
const LINKS_MAX: usize = 32;
const ARRAY_MAX: usize = 32;

/// Another span that this one continues without being its child.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Link {
    pub trace_id: String,
    pub span_id: String,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Span {
    pub trace_id: String,
    pub span_id: String,
    /// Empty: a root.
    pub parent_id: String,
    pub name: String,
    /// internal, server, client, producer, consumer.
    pub kind: &'static str,
    #[serde(rename = "start_us", serialize_with = "micros")]
    pub start_ns: u64,
    #[serde(rename = "end_us", serialize_with = "micros")]
    pub end_ns: u64,
    pub error: bool,
    pub attributes: BTreeMap<String, Value>,
    pub links: Vec<Link>,
    /// The role: `service.name`.
    pub service: String,
    /// The process: `service.instance.id`.
    pub instance: String,
}

/// Microseconds fit a number of JavaScript, nanoseconds do not.
fn micros<S: Serializer>(ns: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(ns / 1000)
}

impl Span {
    /// An attribute's text; empty where there is none.
    pub fn text(&self, key: &str) -> &str {
        self.attributes.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    /// What it takes, about: without what allocators and maps add.
    pub(crate) fn bytes(&self) -> usize {
        let ids = [&self.trace_id, &self.span_id, &self.parent_id];
        let texts = ids.into_iter().chain([&self.name, &self.service, &self.instance]).map(String::capacity);
        let links = self.links.iter().map(|link| size_of::<Link>() + link.trace_id.len() + link.span_id.len());
        // Its id is in its trace's set, too.
        let own = size_of::<Self>() + size_of::<String>() + self.span_id.len();
        own + texts.chain(links).sum::<usize>() + bytes_of(&self.attributes)
    }

    pub fn seconds(&self) -> f64 {
        self.end_ns.saturating_sub(self.start_ns) as f64 / 1e9
    }
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Log {
    pub span_id: String,
    #[serde(rename = "time_us", serialize_with = "micros")]
    pub time_ns: u64,
    pub level: String,
    pub service: String,
    pub message: String,
    pub attributes: BTreeMap<String, Value>,
}

impl Log {
    /// What it takes, about.
    pub(crate) fn bytes(&self) -> usize {
        let texts = [&self.span_id, &self.level, &self.service, &self.message].map(String::capacity);
        size_of::<Self>() + texts.iter().sum::<usize>() + bytes_of(&self.attributes)
    }
}

fn bytes_of(attributes: &BTreeMap<String, Value>) -> usize {
    attributes.iter().map(|(key, value)| size_of::<String>() + key.capacity() + value_bytes(value)).sum()
}

fn value_bytes(value: &Value) -> usize {
    let inside = match value {
        Value::String(text) => text.capacity(),
        Value::Array(values) => values.iter().map(value_bytes).sum(),
        Value::Object(pairs) => {
            pairs.iter().map(|(key, value)| size_of::<String>() + key.capacity() + value_bytes(value)).sum()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    };
    size_of::<Value>() + inside
}

/// `None` where the ids are not what the protocol says.
pub(crate) fn span(wire: WireSpan, service: &str, instance: &str) -> Option<Span> {
    Some(Span {
        trace_id: id(&wire.trace_id, 16)?,
        span_id: id(&wire.span_id, 8)?,
        parent_id: id(&wire.parent_span_id, 8).unwrap_or_default(),
        kind: kind(wire.kind()),
        error: wire.status.as_ref().is_some_and(|status| status.code() == StatusCode::Error),
        start_ns: wire.start_time_unix_nano,
        end_ns: wire.end_time_unix_nano.max(wire.start_time_unix_nano),
        links: wire
            .links
            .iter()
            .take(LINKS_MAX)
            .filter_map(|link| Some(Link { trace_id: id(&link.trace_id, 16)?, span_id: id(&link.span_id, 8)? }))
            .collect(),
        attributes: attributes(wire.attributes),
        name: cut(wire.name),
        service: service.to_owned(),
        instance: instance.to_owned(),
    })
}

/// The trace it belongs to, and the line; `None` for one without a trace.
pub(crate) fn log(wire: LogRecord, service: &str) -> Option<(String, Log)> {
    let trace = id(&wire.trace_id, 16)?;
    let message = match wire.body.and_then(|body| body.value) {
        Some(Any::StringValue(text)) => cut(text),
        Some(other) => value(other, 0).to_string(),
        None => String::new(),
    };
    let log = Log {
        span_id: id(&wire.span_id, 8).unwrap_or_default(),
        time_ns: if wire.time_unix_nano > 0 { wire.time_unix_nano } else { wire.observed_time_unix_nano },
        level: cut(wire.severity_text),
        service: service.to_owned(),
        message,
        attributes: attributes(wire.attributes),
    };
    Some((trace, log))
}

fn id(bytes: &[u8], length: usize) -> Option<String> {
    (bytes.len() == length && bytes.iter().any(|byte| *byte != 0)).then(|| hex::encode(bytes))
}

const fn kind(kind: SpanKind) -> &'static str {
    match kind {
        SpanKind::Server => "server",
        SpanKind::Client => "client",
        SpanKind::Producer => "producer",
        SpanKind::Consumer => "consumer",
        SpanKind::Internal | SpanKind::Unspecified => "internal",
    }
}

pub(crate) fn attributes(wire: Vec<KeyValue>) -> BTreeMap<String, Value> {
    let pairs = wire.into_iter().take(ATTRIBUTES_MAX);
    pairs.filter_map(|pair| Some((cut(pair.key), value(pair.value?.value?, 0)))).collect()
}

fn value(wire: Any, depth: usize) -> Value {
    let inner = |value: AnyValue| value.value.map_or(Value::Null, |inner| self::value(inner, depth + 1));
    match wire {
        Any::StringValue(text) => Value::from(cut(text)),
        Any::BoolValue(flag) => Value::from(flag),
        Any::IntValue(number) => Value::from(number),
        Any::DoubleValue(number) => Value::from(number),
        Any::ArrayValue(array) if depth < 2 => {
            let mut kept: Vec<Value> = array.values.into_iter().take(ARRAY_MAX).map(inner).collect();
            // The space of the sender's long array may have been taken over.
            kept.shrink_to_fit();
            Value::Array(kept)
        }
        Any::KvlistValue(list) if depth < 2 => {
            let pairs = list.values.into_iter().take(ARRAY_MAX);
            Value::Object(pairs.filter_map(|pair| Some((cut(pair.key), inner(pair.value?)))).collect())
        }
        _ => Value::Null,
    }
}

fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(TEXT_MAX_BYTES));
    // What was cut off must not be kept as empty space.
    text.shrink_to_fit();
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry_proto::tonic::common::v1::ArrayValue;

    #[test]
    fn what_is_cut_off_is_let_go() {
        let text = |bytes| Any::StringValue("x".repeat(bytes));
        let element = AnyValue { value: Some(text(10)) };
        let array = Any::ArrayValue(ArrayValue { values: vec![element; 100_000] });
        for (what, wire) in [("a text", text(1_000_000)), ("an array", array)] {
            let kept = value(wire, 0);
            let space = match &kept {
                Value::String(text) => text.capacity(),
                Value::Array(values) => values.capacity() * size_of::<Value>(),
                other => panic!("{what} became {other}"),
            };
            assert!(space <= 2 * TEXT_MAX_BYTES, "{what} keeps {space} bytes");
            assert!(value_bytes(&kept) <= 2 * TEXT_MAX_BYTES, "{what} counts as {}", value_bytes(&kept));
        }
    }
}
