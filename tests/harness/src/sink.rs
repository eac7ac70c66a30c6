//! Where the spans of a test go: the same receiver as a person's, one for the whole test process. It has a thread and a
//! runtime of its own, as each test's runtime ends with its test.

use reliant_types::boxed;
use std::{
    sync::{Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use reliant_observe::{Limits, Log, Observe, ObserveConfig, Span, Store};
use reliant_telemetry::TelemetryConfig;

use crate::wait::eventually;

/// Longer than any exporter gathers: a trace for which nothing came so long is whole.
const QUIET: Duration = Duration::from_millis(1500);
const PATIENCE: Duration = Duration::from_secs(30);

/// Takes the spans of every traced rig, and of the clients in this process.
pub struct Sink {
    url: String,
    store: Store,
}

static SINK: OnceLock<Sink> = OnceLock::new();
static STARTING: Mutex<()> = Mutex::new(());

/// Starts it at the first call, and this process's own telemetry with it.
pub fn sink() -> Result<&'static Sink> {
    let _one_at_a_time = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(sink) = SINK.get() {
        return Ok(sink);
    }
    let (sender, started) = std::sync::mpsc::channel();
    std::thread::Builder::new().name("sink".into()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let Ok(runtime) = runtime else { return };
        runtime.block_on(async move {
            // Of all tests together: none may lose its trace to another.
            let limits = Limits { bytes: 1024 * 1024 * 1024, traces: 50_000, spans: 500_000, ..Limits::default() };
            let listen = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
            let Ok(observe) = Observe::start(ObserveConfig { listen, limits }).await else { return };
            let telemetry = TelemetryConfig {
                log: std::env::var("TEST_LOG").unwrap_or_else(|_| "off".into()),
                otlp_endpoint: Some(observe.url()),
                service_name: "reliant-client".into(),
                ..TelemetryConfig::default()
            };
            let _guard = reliant_telemetry::init(&telemetry);
            let _ = sender.send(Sink { url: observe.url(), store: observe.store().clone() });
            std::future::pending::<()>().await;
        });
    })?;
    let sink = started.recv_timeout(PATIENCE).context("the trace receiver did not start")?;
    Ok(SINK.get_or_init(|| sink))
}

impl Sink {
    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The whole trace: waits until no exporter can still hold a part of it.
    #[boxed]
    pub async fn trace(&self, id: &str) -> Result<Vec<Span>> {
        let asked = Instant::now();
        eventually(&format!("whole trace {id}"), PATIENCE, || async {
            // What was quiet before may have had its end since.
            Ok(self.store.quiet_for(id).filter(|quiet| (*quiet).min(asked.elapsed()) >= QUIET))
        })
        .await?;
        Ok(self.store.spans(id))
    }

    pub fn logs(&self, id: &str) -> Vec<Log> {
        self.store.logs(id)
    }
}
