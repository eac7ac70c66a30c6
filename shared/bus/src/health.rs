//! Since when the connection is down. The library's own event queue may overflow under a flood of slow-consumer events, so
//! the state is also looked at on a clock.

use async_nats::connection::State;
use reliant_telemetry::{chain, metrics};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::{Notify, watch};

const LOOK_INTERVAL: Duration = Duration::from_millis(100);
const SLOW_LOG_INTERVAL: Duration = Duration::from_secs(5);

/// `Some`: down since then.
pub(crate) type Down = Option<Instant>;

/// What the event callback may touch; it must return at once.
#[derive(Clone)]
pub(crate) struct Events {
    pub look: Arc<Notify>,
    /// Connections made so far; a reader that sees it grow knows that subscriptions had a gap.
    pub connections: Arc<AtomicU64>,
    slow_logged: Arc<AtomicU64>,
    started: Instant,
}

impl Events {
    pub fn new() -> Self {
        Self { look: Arc::default(), connections: Arc::default(), slow_logged: Arc::default(), started: Instant::now() }
    }

    pub fn on(&self, event: async_nats::Event) {
        use async_nats::Event;
        match event {
            Event::SlowConsumer(_) => {
                metrics::BUS_SLOW_CONSUMER.inc();
                let now = self.started.elapsed().as_millis() as u64 + SLOW_LOG_INTERVAL.as_millis() as u64;
                let last = self.slow_logged.load(Ordering::Relaxed);
                if now.saturating_sub(last) >= SLOW_LOG_INTERVAL.as_millis() as u64
                    && self.slow_logged.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
                {
                    tracing::warn!("a NATS subscription is too slow; messages are dropped and will be read again");
                }
            }
            Event::ServerError(error) => {
                metrics::BUS_SERVER_ERRORS.inc();
                tracing::warn!(error = %chain(&error), "the NATS server refused something");
            }
            Event::Connected => {
                self.connections.fetch_add(1, Ordering::Relaxed);
                self.look.notify_one();
            }
            Event::Disconnected | Event::Closed => self.look.notify_one(),
            Event::LameDuckMode | Event::Draining | Event::ClientError(_) => {}
        }
    }
}

/// Follows the connection until the last `Bus` is gone.
pub(crate) async fn follow(client: async_nats::Client, look: Arc<Notify>, down: watch::Sender<Down>) {
    loop {
        let up = client.connection_state() == State::Connected;
        let changed = down.send_if_modified(|since| match (&since, up) {
            (None, false) => {
                *since = Some(Instant::now());
                true
            }
            (Some(_), true) => {
                *since = None;
                true
            }
            _ => false,
        });
        if changed {
            metrics::BUS_CONNECTED.set(i64::from(up));
            if up {
                tracing::info!("connected to NATS");
            } else {
                metrics::BUS_DISCONNECTS.inc();
                tracing::warn!("the connection to NATS is down");
            }
        }
        tokio::select! {
            () = look.notified() => {}
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
            () = down.closed() => return,
        }
    }
}
