//! Exporters that count what the collector did not take, and say so rarely: a collector that is away fails every batch.

use opentelemetry::InstrumentationScope;
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    logs::{LogBatch, LogExporter, LogProcessor, SdkLogRecord},
    trace::{SpanData, SpanExporter},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::{chain, metrics::OTLP_LOST};

const SAY_EVERY: Duration = Duration::from_secs(60);

/// `E`, counted.
#[derive(Debug)]
pub(crate) struct Counted<E> {
    inner: E,
    signal: &'static str,
    /// Records that were handed to what feeds this exporter and have not come out yet; see [`BoundedLogs`].
    under_way: Arc<AtomicUsize>,
    /// Unix seconds.
    said: AtomicU64,
}

impl<E> Counted<E> {
    pub fn new(inner: E, signal: &'static str) -> Self {
        Self { inner, signal, under_way: Arc::default(), said: AtomicU64::new(0) }
    }

    pub fn under_way(&self) -> Arc<AtomicUsize> {
        self.under_way.clone()
    }

    fn settle(&self, records: usize, result: OTelSdkResult) -> OTelSdkResult {
        if let Err(error) = &result {
            OTLP_LOST.with_label_values(&[self.signal]).inc_by(records as u64);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            if now.saturating_sub(self.said.load(Ordering::Relaxed)) >= SAY_EVERY.as_secs() {
                self.said.store(now, Ordering::Relaxed);
                tracing::warn!(target: "reliant_telemetry", error = %chain(error), signal = self.signal, "the collector takes nothing; what it misses is lost and counted");
            }
        }
        result
    }
}

impl<E: SpanExporter> SpanExporter for Counted<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let records = batch.len();
        let result = self.inner.export(batch).await;
        self.settle(records, result)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl<E: LogExporter> LogExporter for Counted<E> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        let records = batch.iter().count();
        let result = self.inner.export(batch).await;
        self.under_way.fetch_sub(records, Ordering::Relaxed);
        self.settle(records, result)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// A log processor before which no more than so many records wait: the SDK's own drops without a count.
#[derive(Debug)]
pub(crate) struct BoundedLogs<P> {
    inner: P,
    under_way: Arc<AtomicUsize>,
    max: usize,
}

impl<P> BoundedLogs<P> {
    /// `under_way`: of the exporter behind `inner`, whose own queue takes at least `max`.
    pub fn new(inner: P, under_way: Arc<AtomicUsize>, max: usize) -> Self {
        Self { inner, under_way, max }
    }
}

impl<P: LogProcessor> LogProcessor for BoundedLogs<P> {
    fn emit(&self, record: &mut SdkLogRecord, scope: &InstrumentationScope) {
        if self.under_way.fetch_add(1, Ordering::Relaxed) < self.max {
            return self.inner.emit(record, scope);
        }
        self.under_way.fetch_sub(1, Ordering::Relaxed);
        OTLP_LOST.with_label_values(&["logs"]).inc();
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::logs::{AnyValue, LogRecord as _, Logger as _, LoggerProvider as _};
    use opentelemetry_sdk::logs::{BatchConfigBuilder, BatchLogProcessor, SdkLoggerProvider};

    /// Takes nothing in until it may.
    #[derive(Debug)]
    struct Gate(std::sync::Mutex<std::sync::mpsc::Receiver<()>>);

    impl LogExporter for Gate {
        async fn export(&self, _: LogBatch<'_>) -> OTelSdkResult {
            // Open for good once the test has let the sender go.
            let _ = self.0.lock().expect("no panic").recv();
            Ok(())
        }
    }

    #[test]
    fn log_records_that_find_no_room_are_counted() {
        const ROOM: usize = 8;
        let (open, gate) = std::sync::mpsc::channel();
        let exporter = Counted::new(Gate(std::sync::Mutex::new(gate)), "logs");
        let under_way = exporter.under_way();
        let config = BatchConfigBuilder::default().with_max_queue_size(ROOM).with_max_export_batch_size(2).build();
        let inner = BatchLogProcessor::builder(exporter).with_batch_config(config).build();
        let processor = BoundedLogs::new(inner, under_way.clone(), ROOM);
        let provider = SdkLoggerProvider::builder().with_log_processor(processor).build();
        let logger = provider.logger("test");
        let before = OTLP_LOST.with_label_values(&["logs"]).get();
        for n in 0..100i64 {
            let mut record = logger.create_log_record();
            record.set_body(AnyValue::Int(n));
            logger.emit(record);
        }
        assert_eq!(OTLP_LOST.with_label_values(&["logs"]).get() - before, 100 - ROOM as u64);
        drop(open);
        provider.shutdown().expect("the rest goes out");
        assert_eq!(under_way.load(Ordering::Relaxed), 0);
    }
}
