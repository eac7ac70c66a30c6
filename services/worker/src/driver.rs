//! The seam to the workflow: each step within its span, its time measured.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use parking_lot::Mutex;
use reliant_flows::{DispatchOrder, Driver, DriverError, Heart, ModelOrder, ModelOutcome, Step};
use reliant_telemetry::{
    TraceContext, chain,
    metrics::{self, TURN_STEP},
};
use reliant_types::ChatId;
use tracing::{Instrument, field::Empty};

use crate::{
    dispatch,
    engine::{Engine, EngineError},
    model_call,
};

pub struct EngineDriver(pub Arc<Engine>);

#[async_trait]
impl Driver for EngineDriver {
    async fn next_step(&self, chat: ChatId, trace: TraceContext) -> Result<Step, DriverError> {
        let timer = metrics::guard(&TURN_STEP, &["next_step"]);
        let span = tracing::info_span!("turn.next_step", chat.id = %chat);
        trace.set_parent(&span);
        let step = self.0.next_step(chat).instrument(span.clone()).await;
        timer.done(outcome(&step));
        span.in_scope(|| said("next_step", step))
    }

    async fn call_model(
        &self,
        order: ModelOrder,
        heart: Heart,
        trace: TraceContext,
    ) -> Result<ModelOutcome, DriverError> {
        let timer = metrics::guard(&TURN_STEP, &["call_model"]);
        let span = tracing::info_span!(
            "turn.call_model",
            chat.id = %order.chat,
            turn.id = %order.turn,
            activity.attempt = order.attempt,
            otel.status_code = Empty,
        );
        trace.set_parent(&span);
        let next = model_call::call_model(&self.0, order, &heart, &trace).instrument(span.clone()).await;
        timer.done(outcome(&next));
        if next.is_err() {
            span.record("otel.status_code", "ERROR");
        }
        Ok(ModelOutcome { next: Some(span.in_scope(|| said("call_model", next))?) })
    }

    async fn dispatch(&self, order: DispatchOrder, trace: TraceContext) -> Result<Step, DriverError> {
        let timer = metrics::guard(&TURN_STEP, &["dispatch"]);
        let span = tracing::info_span!("turn.dispatch", chat.id = %order.chat, turn.id = %order.turn);
        trace.set_parent(&span);
        let step = dispatch::dispatch(&self.0, order.chat, order.turn, &order.calls).instrument(span.clone()).await;
        timer.done(outcome(&step));
        span.in_scope(|| said("dispatch", step))
    }
}

/// Where Postgres is away every open turn says so again and again; one line in this time says enough.
const SAY_EVERY: Duration = Duration::from_secs(1);

/// What crosses to Temporal is the error's own text; its causes are said here.
fn said<T>(step: &'static str, result: Result<T, EngineError>) -> Result<T, DriverError> {
    static SAID: Mutex<Option<Instant>> = Mutex::new(None);
    result.map_err(|error| {
        match &error {
            EngineError::Stopped => tracing::debug!(error = %chain(&error), step, "a step was handed on"),
            _ => {
                let mut said = SAID.lock();
                if said.is_none_or(|at| at.elapsed() >= SAY_EVERY) {
                    *said = Some(Instant::now());
                    tracing::warn!(error = %chain(&error), step, "a step of a turn failed; it is tried again");
                } else {
                    tracing::debug!(error = %chain(&error), step, "a step of a turn failed; it is tried again");
                }
            }
        }
        error.into()
    })
}

fn outcome<T, E>(result: &Result<T, E>) -> &'static str {
    if result.is_ok() { "ok" } else { "failed" }
}
