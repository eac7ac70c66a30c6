//! The activity: a thin shell around the `Driver`. It translates errors and sends heartbeats.

use std::{sync::Arc, time::Duration};

use temporalio_macros::activities;
use temporalio_sdk::{
    ApplicationFailure,
    activities::{ActivityContext, ActivityError},
};
use tokio_util::sync::CancellationToken;

use crate::{
    driver::{BurstEnd, BurstOrder, Driver},
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
    #[activity(name = "burst")]
    pub async fn burst(
        self: Arc<Self>,
        ctx: ActivityContext,
        mut order: BurstOrder,
    ) -> Result<BurstEnd, ActivityError> {
        let trace = trace::from_headers(ctx.headers());
        order.attempt = ctx.info().attempt;
        let stop = CancellationToken::new();
        let mut burst = self.driver.burst(order, stop.clone(), trace);
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                ended = &mut burst => return ended.map_err(|error| ActivityError::from(ApplicationFailure::new(error))),
                () = ctx.cancelled(), if !stop.is_cancelled() => stop.cancel(),
                // In the same task as the burst: one that blocks its thread stops beating and is taken over.
                _ = beat.tick() => ctx.record_heartbeat(()).await?,
            }
        }
    }
}
