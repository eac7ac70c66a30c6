//! The seam to the workflow: each step within its span, its time measured.

use std::sync::Arc;

use async_trait::async_trait;
use reliant_flows::{DispatchOrder, Driver, DriverError, Heart, ModelOrder, ModelOutcome, Step};
use reliant_telemetry::{
    TraceContext,
    metrics::{self, TURN_STEP},
};
use reliant_types::ChatId;
use tracing::Instrument;

use crate::{dispatch, engine::Engine, model_call};

pub struct EngineDriver(pub Arc<Engine>);

#[async_trait]
impl Driver for EngineDriver {
    async fn next_step(&self, chat: ChatId, trace: TraceContext) -> Result<Step, DriverError> {
        let timer = metrics::guard(&TURN_STEP, &["next_step"]);
        let span = tracing::info_span!("turn.next_step", chat.id = %chat);
        trace.set_parent(&span);
        let step = self.0.next_step(chat).instrument(span).await;
        timer.done(outcome(&step));
        Ok(step?)
    }

    async fn call_model(
        &self,
        order: ModelOrder,
        heart: Heart,
        trace: TraceContext,
    ) -> Result<ModelOutcome, DriverError> {
        let timer = metrics::guard(&TURN_STEP, &["call_model"]);
        let next = model_call::call_model(&self.0, order, &heart, &trace).await;
        timer.done(outcome(&next));
        Ok(ModelOutcome { next: Some(next?) })
    }

    async fn dispatch(&self, order: DispatchOrder, trace: TraceContext) -> Result<Step, DriverError> {
        let timer = metrics::guard(&TURN_STEP, &["dispatch"]);
        let span = tracing::info_span!("turn.dispatch", chat.id = %order.chat, turn.id = %order.turn);
        trace.set_parent(&span);
        let step = dispatch::dispatch(&self.0, order.chat, order.turn, &order.calls).instrument(span).await;
        timer.done(outcome(&step));
        Ok(step?)
    }
}

fn outcome<T, E>(result: &Result<T, E>) -> &'static str {
    if result.is_ok() { "ok" } else { "failed" }
}
