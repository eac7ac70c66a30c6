//! Starts telemetry once per process: logs to stderr, trace ids always, OTLP only where an endpoint is set.
//!
//! A process that exports nothing must not stand in a trace as a parent nobody ever sees. It therefore hands on the
//! context that it was given ([`PassThrough`]); its own ids serve its logs only.

use opentelemetry::{
    Context, KeyValue,
    propagation::TextMapCompositePropagator,
    trace::{Link, SpanContext, SpanId, SpanKind, TraceContextExt, TraceFlags, TraceId, TracerProvider as _},
};
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::{
    Resource,
    logs::{BatchConfigBuilder as LogBatch, BatchLogProcessor, SdkLoggerProvider},
    propagation::TraceContextPropagator,
    trace::{
        Sampler, SamplingDecision, SamplingResult, SdkTracerProvider, ShouldSample, SpanExporter as _,
        SpanProcessor as _,
    },
};
use std::{sync::OnceLock, time::Duration};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::writer::{BoxMakeWriter, MakeWriterExt as _};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::{FilterExt, Targets},
    layer::SubscriberExt,
};

use crate::{
    export::{BoundedLogs, Counted},
    log::JsonFormat,
    page,
    pipeline::Pipeline,
    spool::{self, Spool},
};

/// Log records that wait for the collector.
const OTLP_QUEUE_MAX: usize = 8192;
const OTLP_BATCH_MAX: usize = 512;
const OTLP_DELAY: Duration = Duration::from_millis(500);
const OTLP_TIMEOUT: Duration = Duration::from_secs(5);
/// The key under which [`PassThrough`] remembers the caller's span; never leaves the process.
const CALLER_KEY: &str = "reliant";

/// A larger log file is begun anew at the next start.
const LOG_FILE_KEEP_MAX_BYTES: u64 = 16 * 1024 * 1024;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One JSON object per line.
    #[default]
    Json,
    /// For a person at a terminal.
    Text,
}

#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// What is logged, for example "info" or "info,reliant_gateway=debug".
    pub log: String,
    /// "json" or "text".
    pub log_format: LogFormat,
    /// A file that gets the log beside stderr. Emptied at a start that finds it larger than 16 MiB.
    pub log_file: Option<std::path::PathBuf>,
    /// Where traces and logs go by OTLP over gRPC, for example "http://127.0.0.1:4317". Unset: nowhere.
    pub otlp_endpoint: Option<String>,
    /// Share of traces that are exported, 0 to 1. The same in every process.
    pub sample_ratio: f64,
    /// Where spans that other processes refer to wait for the collector, so that none is lost with a process that is
    /// killed: any process with the same directory sends what a dead one left. On one machine, private to its user.
    /// Unset: such spans leave at once, one request each.
    pub spool_dir: Option<std::path::PathBuf>,
    /// `service.name`; the role's name where it is empty.
    pub service_name: String,
    /// `service.instance.id`; made at start where it is empty.
    pub instance_id: String,
    /// Set by the role that web pages hand their spans to; see [`crate::page`].
    #[serde(skip)]
    pub takes_page_spans: bool,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            log: "info".into(),
            log_format: LogFormat::Json,
            log_file: None,
            otlp_endpoint: None,
            sample_ratio: 1.0,
            spool_dir: None,
            service_name: String::new(),
            instance_id: String::new(),
            takes_page_spans: false,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("telemetry.log '{filter}' is not a log filter; an example is \"info,reliant_api=debug\"")]
    Filter {
        filter: String,
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    #[error("telemetry.log_file {path} cannot be written")]
    LogFile {
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("telemetry.sample_ratio is {0}; it must be between 0 and 1")]
    Ratio(f64),
    #[error("telemetry.spool_dir {path} cannot be used; it takes a directory that this process's user may write")]
    Spool {
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("telemetry.otlp_endpoint '{endpoint}' cannot be used; an example is \"http://127.0.0.1:4317\"")]
    Otlp {
        endpoint: String,
        #[source]
        source: opentelemetry_otlp::ExporterBuildError,
    },
}

impl From<TelemetryError> for reliant_types::Failure {
    fn from(error: TelemetryError) -> Self {
        Self::new(reliant_types::Code::InvalidArgument, error.to_string())
    }
}

/// Holds the exporters. Call [`Guard::shutdown`] last in a process.
#[must_use = "without shutdown the last spans are lost"]
#[derive(Default)]
pub struct Guard {
    traces: Option<SdkTracerProvider>,
    logs: Option<SdkLoggerProvider>,
}

impl Guard {
    /// Sends what is queued. Takes at most the export timeout; a collector that is away costs the queue only.
    pub fn shutdown(self) {
        if let Some(traces) = self.traces {
            let _ = traces.shutdown_with_timeout(OTLP_TIMEOUT);
            if let Some(pages) = page::pipeline() {
                let _ = pages.shutdown_with_timeout(OTLP_TIMEOUT);
            }
        }
        if let Some(logs) = self.logs {
            let _ = logs.shutdown_with_timeout(OTLP_TIMEOUT);
        }
    }
}

/// What this process does with traces; set once by [`init`].
struct Sampling {
    exports: bool,
    ratio: f64,
}

static STARTING: parking_lot::Mutex<()> = parking_lot::Mutex::new(());
static SAMPLING: OnceLock<Sampling> = OnceLock::new();

fn writer(config: &TelemetryConfig) -> Result<BoxMakeWriter, TelemetryError> {
    let Some(path) = &config.log_file else { return Ok(BoxMakeWriter::new(std::io::stderr)) };
    let open = || {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
        if file.metadata()?.len() > LOG_FILE_KEEP_MAX_BYTES {
            file.set_len(0)?;
        }
        Ok(file)
    };
    let file = open().map_err(|source| TelemetryError::LogFile { path: path.clone(), source })?;
    Ok(BoxMakeWriter::new(std::io::stderr.and(std::sync::Arc::new(file))))
}

/// Starts telemetry for the process. A later call changes nothing and is no error, so that several roles in one process
/// and many tests in one binary can each call it. With an endpoint it must be called within a tokio runtime.
pub fn init(config: &TelemetryConfig) -> Result<Guard, TelemetryError> {
    if !(0.0..=1.0).contains(&config.sample_ratio) {
        return Err(TelemetryError::Ratio(config.sample_ratio));
    }
    let filter = EnvFilter::try_new(with_quiet_libraries(&config.log))
        .map_err(|source| TelemetryError::Filter { filter: config.log.clone(), source })?;
    let endpoint = config.otlp_endpoint.as_deref().filter(|endpoint| !endpoint.is_empty());
    let sampling = Sampling { exports: endpoint.is_some(), ratio: config.sample_ratio };
    // A second caller returns only once the first is through.
    let _one_at_a_time = STARTING.lock();
    if SAMPLING.set(sampling).is_err() {
        return Ok(Guard::default());
    }
    opentelemetry::global::set_text_map_propagator(TextMapCompositePropagator::new(vec![Box::new(
        TraceContextPropagator::new(),
    )]));

    let resource = resource(config);
    let otlp_error = |source| TelemetryError::Otlp { endpoint: endpoint.unwrap_or_default().to_owned(), source };
    let mut traces = SdkTracerProvider::builder().with_resource(resource.clone());
    traces = match endpoint {
        None => traces.with_sampler(PassThrough),
        Some(endpoint) => {
            let exporter = |resource: &Resource| {
                let mut exporter = opentelemetry_otlp::SpanExporter::builder()
                    .with_tonic()
                    .with_endpoint(endpoint)
                    .with_timeout(OTLP_TIMEOUT)
                    .build()
                    .map_err(otlp_error)?;
                exporter.set_resource(resource);
                Ok(exporter)
            };
            if config.takes_page_spans {
                let pages = TelemetryConfig { service_name: page::SERVICE.into(), ..config.clone() };
                page::start(Pipeline::start(Counted::new(exporter(&self::resource(&pages))?, "traces"), None));
            }
            let exporter = exporter(&resource)?;
            let spool = open_spool(config, &resource, endpoint)?;
            traces
                .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.sample_ratio))))
                .with_span_processor(Pipeline::start(Counted::new(exporter, "traces"), spool))
        }
    };
    let traces = traces.build();
    let logs = match endpoint {
        None => None,
        Some(endpoint) => {
            let exporter = opentelemetry_otlp::LogExporter::builder()
                .with_tonic()
                .with_endpoint(endpoint)
                .with_timeout(OTLP_TIMEOUT)
                .build()
                .map_err(otlp_error)?;
            let batch = LogBatch::default()
                .with_max_queue_size(OTLP_QUEUE_MAX)
                .with_max_export_batch_size(OTLP_BATCH_MAX)
                .with_scheduled_delay(OTLP_DELAY)
                .build();
            let exporter = Counted::new(exporter, "logs");
            let under_way = exporter.under_way();
            let processor = BatchLogProcessor::builder(exporter).with_batch_config(batch).build();
            let processor = BoundedLogs::new(processor, under_way, OTLP_QUEUE_MAX);
            Some(SdkLoggerProvider::builder().with_resource(resource).with_log_processor(processor).build())
        }
    };

    let tracer = traces.tracer("reliant");
    let spans = tracing_opentelemetry::layer()
        .with_tracer(tracer)
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false)
        .with_filter(span_targets());
    // A line that cannot be written must not be told of on the same full disk: that would panic.
    let stderr = tracing_subscriber::fmt::layer().log_internal_errors(false).with_writer(writer(config)?);
    let written: Box<dyn Layer<_> + Send + Sync> = match config.log_format {
        LogFormat::Json => stderr
            .fmt_fields(tracing_subscriber::fmt::format::JsonFields::new())
            .event_format(JsonFormat { service: service_name(config).to_owned() })
            .with_filter(filter.clone())
            .boxed(),
        LogFormat::Text => stderr
            .compact()
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .with_filter(filter.clone())
            .boxed(),
    };
    // The exporter's own events are kept from it: they would feed themselves.
    let exported = logs.as_ref().map(|provider| {
        opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge::new(provider)
            .with_filter(filter.and(own_targets()))
    });
    let subscriber = Registry::default().with(spans).with(written).with(exported);
    // Err: somebody else's subscriber stands (a test's); then ours stays out of the way.
    let _ = tracing::subscriber::set_global_default(subscriber);
    opentelemetry::global::set_tracer_provider(traces.clone());
    Ok(Guard { traces: Some(traces), logs })
}

/// This process's spool, and a task that sends what dead processes left beside it.
fn open_spool(config: &TelemetryConfig, resource: &Resource, endpoint: &str) -> Result<Option<Spool>, TelemetryError> {
    let Some(root) = &config.spool_dir else { return Ok(None) };
    let failed = |source| TelemetryError::Spool { path: root.clone(), source };
    let spool = Spool::open(root, resource).map_err(failed)?;
    let endpoint = tonic::transport::Endpoint::from_shared(endpoint.to_owned())
        .map_err(|source| failed(std::io::Error::other(source)))?
        .timeout(OTLP_TIMEOUT)
        .connect_timeout(OTLP_TIMEOUT);
    tokio::spawn(spool::adopt(root.clone(), endpoint));
    Ok(Some(spool))
}

/// Whether a context that came from outside is sampled: our ratio over its trace id, the same in every replica.
pub(crate) fn sampled_at_edge(trace: TraceId) -> bool {
    SAMPLING.get().is_some_and(|sampling| sampling.exports && within_ratio(trace, sampling.ratio))
}

/// Whether contexts are to be handed on as they came; see [`PassThrough`].
pub(crate) fn passes_through() -> bool {
    SAMPLING.get().is_some_and(|sampling| !sampling.exports)
}

/// The caller's context as [`PassThrough`] remembered it.
pub(crate) fn caller(context: &SpanContext) -> Option<(SpanId, TraceFlags)> {
    let (span, sampled) = context.trace_state().get(CALLER_KEY)?.split_once('-')?;
    let flags = if sampled == "1" { TraceFlags::SAMPLED } else { TraceFlags::NOT_SAMPLED };
    Some((SpanId::from_hex(span).ok()?, flags))
}

/// The state without what [`PassThrough`] put into it.
pub(crate) fn outward_state(context: &SpanContext) -> String {
    context.trace_state().delete(CALLER_KEY).map(|state| state.header()).unwrap_or_default()
}

/// As OpenTelemetry's own ratio sampler decides.
fn within_ratio(trace: TraceId, ratio: f64) -> bool {
    if ratio >= 1.0 {
        return true;
    }
    let bytes = trace.to_bytes();
    let low: [u8; 8] = bytes[8..].try_into().expect("half of 16 bytes");
    (u64::from_be_bytes(low) >> 1) < (ratio.max(0.0) * (1u64 << 63) as f64) as u64
}

/// Records nothing and keeps the caller's span in the trace state, where local children inherit it.
#[derive(Debug, Clone)]
struct PassThrough;

impl ShouldSample for PassThrough {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        _: TraceId,
        _: &str,
        _: &SpanKind,
        _: &[KeyValue],
        _: &[Link],
    ) -> SamplingResult {
        let trace_state = parent
            .map(|parent| parent.span().span_context().clone())
            .filter(SpanContext::is_valid)
            .map(|parent| {
                let state = parent.trace_state().clone();
                if !parent.is_remote() {
                    return state;
                }
                let caller = format!("{:016x}-{}", parent.span_id(), u8::from(parent.is_sampled()));
                state.insert(CALLER_KEY, caller).unwrap_or(state)
            })
            .unwrap_or_default();
        SamplingResult { decision: SamplingDecision::Drop, attributes: Vec::new(), trace_state }
    }
}

fn service_name(config: &TelemetryConfig) -> &str {
    if config.service_name.is_empty() { "reliant" } else { &config.service_name }
}

fn resource(config: &TelemetryConfig) -> Resource {
    let instance = match config.instance_id.as_str() {
        "" => reliant_types::InstanceId::new().to_string(),
        given => given.to_owned(),
    };
    Resource::builder()
        .with_service_name(service_name(config).to_owned())
        .with_attribute(KeyValue::new("service.instance.id", instance))
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build()
}

/// Libraries that log each event of theirs; what the OpenTelemetry SDK says of lost batches is said by [`Counted`].
/// The operator's own word for one of them comes later and wins.
fn with_quiet_libraries(log: &str) -> String {
    match log.trim() {
        "off" => "off".to_owned(),
        log => format!(
            "opentelemetry=warn,opentelemetry_sdk=off,async_nats=warn,h2=warn,hyper=warn,hyper_util=warn,tower=warn,sqlx=warn,temporalio_sdk_core=warn,{log}"
        ),
    }
}

/// Spans are made independently of the log level: a quiet log must not cut traces. Other crates' spans are not ours to
/// show.
fn span_targets() -> Targets {
    Targets::new().with_default(LevelFilter::OFF).with_target("reliant", LevelFilter::INFO)
}

fn own_targets() -> Targets {
    ["opentelemetry", "tonic", "h2", "hyper", "tower"]
        .into_iter()
        .fold(Targets::new().with_default(LevelFilter::TRACE), |targets, name| {
            targets.with_target(name, LevelFilter::OFF)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TraceContext, hop};

    fn started() {
        let _ = init(&TelemetryConfig { log: "off".into(), ..Default::default() });
    }

    #[test]
    fn bad_settings_are_refused_with_the_way_out() {
        let filter = TelemetryConfig { log: "=,=nonsense=".into(), ..Default::default() };
        assert!(init(&filter).is_err_and(|e| e.to_string().contains("telemetry.log")));
        let ratio = TelemetryConfig { sample_ratio: 1.5, ..Default::default() };
        assert!(init(&ratio).is_err_and(|e| e.to_string().contains("sample_ratio")));
    }

    #[test]
    fn without_an_endpoint_there_are_ids_and_a_second_start_is_fine() {
        started();
        started();
        let span = tracing::info_span!(target: "reliant_test", "turn.accept");
        let context = TraceContext::of(&span);
        assert!(!context.is_empty() && !context.is_sampled());
        let inner = span.in_scope(|| TraceContext::of(&tracing::info_span!(target: "reliant_test", "turn.wake")));
        assert_eq!(inner.trace_id(), context.trace_id());
    }

    #[test]
    fn without_an_endpoint_a_given_context_is_handed_on() {
        started();
        let given = TraceContext::from_parts("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "vendor=1");
        let span = tracing::info_span!(target: "reliant_test", "nats.process");
        given.set_parent(&span);
        assert_eq!(TraceContext::of(&span), given);
        let sent =
            span.in_scope(|| hop(&TraceContext::current(), tracing::info_span!(target: "reliant_test", "nats.send")));
        assert_eq!(sent, given);
    }

    #[test]
    fn the_edge_decides_by_itself() {
        let forced = TraceContext::from_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        started();
        assert!(!forced.clone().at_edge().is_sampled(), "nothing is exported here");
        assert_eq!(forced.clone().at_edge().trace_id(), forced.trace_id());
        let trace = TraceId::from_hex("4bf92f3577b34da6a3ce929d0e0e4736").expect("hex");
        assert!(within_ratio(trace, 1.0) && !within_ratio(trace, 0.0));
    }
}
