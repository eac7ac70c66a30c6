//! Exporters that count what the collector did not take, and say so rarely: a collector that is away fails every batch.

use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    logs::{LogBatch, LogExporter},
    trace::{SpanData, SpanExporter},
};
use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::metrics::OTLP_LOST;

const SAY_EVERY: Duration = Duration::from_secs(60);

/// `E`, counted.
#[derive(Debug)]
pub(crate) struct Counted<E> {
    inner: E,
    signal: &'static str,
    /// Unix seconds.
    said: AtomicU64,
}

impl<E> Counted<E> {
    pub fn new(inner: E, signal: &'static str) -> Self {
        Self { inner, signal, said: AtomicU64::new(0) }
    }

    fn settle(&self, records: usize, result: OTelSdkResult) -> OTelSdkResult {
        if let Err(error) = &result {
            OTLP_LOST.with_label_values(&[self.signal]).inc_by(records as u64);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            if now.saturating_sub(self.said.load(Ordering::Relaxed)) >= SAY_EVERY.as_secs() {
                self.said.store(now, Ordering::Relaxed);
                tracing::warn!(target: "reliant_telemetry", %error, signal = self.signal, "the collector takes nothing; what it misses is lost and counted");
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
        self.settle(records, result)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}
