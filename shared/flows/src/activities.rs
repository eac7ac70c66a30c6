//! The activities: thin shells around the `Driver`. They translate errors and send heartbeats.

use std::{sync::Arc, time::Duration};

use reliant_types::ChatId;
use temporalio_macros::activities;
use temporalio_sdk::{
    ApplicationFailure,
    activities::{ActivityContext, ActivityError},
};
use tokio_util::sync::CancellationToken;

use crate::{
    driver::{DispatchOrder, Driver, DriverError, Heart, ModelOrder, ModelOutcome, Step},
    trace,
};

/// Heartbeats leave this often; the SDK thins them to one a second.
const BEAT: Duration = Duration::from_millis(800);

#[derive(Clone)]
pub struct Activities {
    pub driver: Arc<dyn Driver>,
}

#[activities]
impl Activities {
    #[activity(name = "next_step")]
    pub async fn next_step(self: Arc<Self>, ctx: ActivityContext, chat: ChatId) -> Result<Step, ActivityError> {
        let trace = trace::from_headers(ctx.headers());
        self.driver.next_step(chat, trace).await.map_err(retry)
    }

    #[activity(name = "dispatch")]
    pub async fn dispatch(self: Arc<Self>, ctx: ActivityContext, order: DispatchOrder) -> Result<Step, ActivityError> {
        let trace = trace::from_headers(ctx.headers());
        self.driver.dispatch(order, trace).await.map_err(retry)
    }

    #[activity(name = "call_model")]
    pub async fn call_model(
        self: Arc<Self>,
        ctx: ActivityContext,
        mut order: ModelOrder,
    ) -> Result<ModelOutcome, ActivityError> {
        let trace = trace::from_headers(ctx.headers());
        order.attempt = ctx.info().attempt;
        let stop = CancellationToken::new();
        let heart = Heart { stop: stop.clone() };
        let mut call = self.driver.call_model(order, heart, trace);
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                outcome = &mut call => return outcome.map_err(retry),
                () = ctx.cancelled(), if !stop.is_cancelled() => stop.cancel(),
                // In the same task as the call: a call that blocks its thread stops beating and is taken over.
                _ = beat.tick() => ctx.record_heartbeat(()).await?,
            }
        }
    }
}

fn retry(error: DriverError) -> ActivityError {
    ActivityError::from(ApplicationFailure::new(error))
}
