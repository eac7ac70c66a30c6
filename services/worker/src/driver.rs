//! The seam to the workflow: each burst within its span, its time measured.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use parking_lot::Mutex;
use reliant_flows::{BurstEnd, BurstOrder, Driver, DriverError};
use reliant_telemetry::{
    TraceContext, chain,
    metrics::{self, TURN_STEP},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, field::Empty};

use crate::{
    burst,
    engine::{Engine, EngineError},
};

pub struct EngineDriver(pub Arc<Engine>);

#[async_trait]
impl Driver for EngineDriver {
    async fn burst(
        &self,
        order: BurstOrder,
        stop: CancellationToken,
        trace: TraceContext,
    ) -> Result<BurstEnd, DriverError> {
        let timer = metrics::guard(&TURN_STEP, &["burst"]);
        let span = tracing::info_span!(
            "turn.burst",
            chat.id = %order.chat,
            activity.attempt = order.attempt,
            otel.status_code = Empty,
        );
        trace.set_parent(&span);
        let ended = burst::run(&self.0, order.chat, &stop, trace).instrument(span.clone()).await;
        timer.done(if ended.is_ok() { "ok" } else { "failed" });
        if ended.is_err() {
            span.record("otel.status_code", "ERROR");
        }
        span.in_scope(|| said(ended))
    }
}

/// Where Postgres is away every open turn says so again and again; one line in this time says enough.
const SAY_EVERY: Duration = Duration::from_secs(1);

/// What crosses to Temporal is the error's own text; its causes are said here.
fn said<T>(result: Result<T, EngineError>) -> Result<T, DriverError> {
    static SAID: Mutex<Option<Instant>> = Mutex::new(None);
    result.map_err(|error| {
        match &error {
            EngineError::Stopped => tracing::debug!(error = %chain(&error), "a burst was handed on"),
            _ => {
                let mut said = SAID.lock();
                if said.is_none_or(|at| at.elapsed() >= SAY_EVERY) {
                    *said = Some(Instant::now());
                    tracing::warn!(error = %chain(&error), "a burst of a chat failed; it is tried again");
                } else {
                    tracing::debug!(error = %chain(&error), "a burst of a chat failed; it is tried again");
                }
            }
        }
        error.into()
    })
}
