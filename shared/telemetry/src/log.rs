//! One JSON object per log line: time, level, target, message, the event's fields, the fields of the spans around it, and
//! the ids that lead from the line to its trace.

use crate::chain;
use opentelemetry::trace::TraceContextExt;
use serde_json::{Map, Value};
use std::fmt;
use tracing::{Event, Subscriber, field::Field};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields, format::Writer},
    registry::LookupSpan,
};

pub(crate) struct JsonFormat {
    pub service: String,
}

impl<S, N> FormatEvent<S, N> for JsonFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut line = Map::new();
        let mut put = |key: &str, value: Value| line.insert(key.to_owned(), value);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        put("timestamp", Value::from(rfc3339(now.as_secs(), now.subsec_micros())));
        put("level", Value::from(event.metadata().level().as_str()));
        put("target", Value::from(event.metadata().target()));
        put("service", Value::from(self.service.as_str()));
        for span in ctx.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            put("span", Value::from(span.name()));
            let extensions = span.extensions();
            let fields = extensions.get::<FormattedFields<N>>().map(|fields| fields.fields.as_str()).unwrap_or("");
            if let Ok(Value::Object(fields)) = serde_json::from_str(fields) {
                for (key, value) in fields {
                    put(&key, value);
                }
            }
        }
        event.record(&mut Fields(&mut line));
        // Entering a span activates its OpenTelemetry context, so the current one is the event's.
        let context = opentelemetry::Context::current();
        let context = context.span().span_context().clone();
        if context.is_valid() {
            line.insert("trace_id".into(), Value::from(context.trace_id().to_string()));
            line.insert("span_id".into(), Value::from(context.span_id().to_string()));
        }
        let text = serde_json::to_string(&line).map_err(|_| fmt::Error)?;
        writeln!(writer, "{text}")
    }
}

struct Fields<'a>(&'a mut Map<String, Value>);

impl Fields<'_> {
    fn put(&mut self, field: &Field, value: Value) {
        self.0.insert(field.name().trim_start_matches("r#").to_owned(), value);
    }
}

impl tracing::field::Visit for Fields<'_> {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, Value::from(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, Value::from(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, Value::from(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, Value::from(value));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, Value::from(value));
    }

    /// The whole chain, in one line, where the error is handled.
    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, Value::from(chain(value).to_string()));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, Value::from(format!("{value:?}")));
    }
}

/// UTC, with microseconds. The civil-from-days rule of Howard Hinnant's date algorithms.
fn rfc3339(unix: u64, micros: u32) -> String {
    let (days, second) = ((unix / 86_400) as i64, unix % 86_400);
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use std::{io::Write, sync::Arc};
    use tracing_subscriber::{fmt::format::JsonFields, layer::SubscriberExt};

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_leads_to_its_trace_and_holds_the_chain() {
        use opentelemetry::trace::TracerProvider as _;
        let sink = Sink::default();
        let provider = opentelemetry_sdk::trace::SdkTracerProvider::builder().build();
        let writer = sink.clone();
        let subscriber = tracing_subscriber::registry()
            .with(tracing_opentelemetry::layer().with_tracer(provider.tracer("test")))
            .with(
                tracing_subscriber::fmt::layer()
                    .with_writer(move || writer.clone())
                    .fmt_fields(JsonFields::new())
                    .event_format(JsonFormat { service: "api".into() }),
            );
        let expected = tracing::subscriber::with_default(subscriber, || {
            let span = tracing::info_span!("turn.accept", chat.id = "c1");
            span.in_scope(|| {
                let source = std::io::Error::other("inner");
                let error = std::io::Error::other(source);
                tracing::warn!(error = %crate::chain(&error), n = 3, "a \"quoted\"\nline");
            });
            crate::TraceContext::of(&span)
        });
        let text = String::from_utf8(sink.0.lock().clone()).expect("UTF-8");
        assert_eq!(text.lines().count(), 1, "{text}");
        let line: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(line["trace_id"].as_str().map(str::to_owned), expected.trace_id());
        assert_eq!(line["chat.id"], "c1");
        assert_eq!(line["span"], "turn.accept");
        assert_eq!((&line["n"], &line["error"]), (&Value::from(3), &Value::from("inner")));
        assert_eq!(line["message"], "a \"quoted\"\nline");
        assert!(line["span_id"].as_str().is_some_and(|id| id.len() == 16));
    }

    #[test]
    fn times_are_utc() {
        assert_eq!(rfc3339(0, 0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(rfc3339(1_709_164_799, 5), "2024-02-28T23:59:59.000005Z");
        assert_eq!(rfc3339(1_709_164_800, 0), "2024-02-29T00:00:00.000000Z");
        assert_eq!(rfc3339(4_102_444_800, 0), "2100-01-01T00:00:00.000000Z");
    }
}
