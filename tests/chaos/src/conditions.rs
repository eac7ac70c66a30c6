//! What the mesh bears beside its faults: how much of the machine a neighbour takes, and whether servers are spared.
//!
//! Waits of a campaign are charged by it. A second counts in full, and a quarter while a noisy neighbour takes more than half
//! of the cores: then the mesh has less than half of its speed, and some of its timeouts fire for want of CPU.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

/// By this much a wait is divided while a noisy neighbour takes more than half of the cores.
const SLOW_DIVISOR: u32 = 4;
/// A neighbour may take this share of the cores before waits are charged less.
const FULL_RATE_SHARE_MAX: f64 = 0.5;

#[derive(Debug)]
pub struct Conditions {
    clock: Mutex<Clock>,
    calm: watch::Sender<bool>,
}

#[derive(Debug)]
struct Clock {
    /// Charged up to `since`.
    charged: Duration,
    since: Instant,
    divisor: u32,
}

impl Clock {
    fn now(&self) -> Duration {
        self.charged + self.since.elapsed() / self.divisor
    }
}

impl Default for Conditions {
    fn default() -> Self {
        let clock = Clock { charged: Duration::ZERO, since: Instant::now(), divisor: 1 };
        Self { clock: Mutex::new(clock), calm: watch::Sender::new(false) }
    }
}

impl Conditions {
    /// Time since the start as waits are charged for it.
    pub fn charged(&self) -> Duration {
        self.clock.lock().now()
    }

    /// A neighbour takes this share of all cores from now on; 0: there is none.
    pub fn set_cpu_taken(&self, share: f64) {
        let mut clock = self.clock.lock();
        let divisor = if share > FULL_RATE_SHARE_MAX { SLOW_DIVISOR } else { 1 };
        *clock = Clock { charged: clock.now(), since: Instant::now(), divisor };
    }

    /// While it is calm nothing new is done to a server, so that a chat that stands still can be told from one that waits
    /// for a server.
    pub fn set_calm(&self, calm: bool) {
        self.calm.send_replace(calm);
    }

    pub fn is_calm(&self) -> bool {
        *self.calm.borrow()
    }

    /// Returns when servers may be struck.
    pub async fn until_not_calm(&self) {
        // The sender lives as long as `self`.
        let _ = self.calm.subscribe().wait_for(|calm| !calm).await;
    }

    /// A limit for a wait that begins now.
    pub fn patience(self: &Arc<Self>, limit: Duration) -> Patience {
        Patience { conditions: self.clone(), until: self.charged() + limit }
    }
}

/// The limit of one wait, by charged time.
#[derive(Debug, Clone)]
pub struct Patience {
    conditions: Arc<Conditions>,
    until: Duration,
}

impl Patience {
    pub fn is_over(&self) -> bool {
        self.conditions.charged() >= self.until
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn a_wait_is_charged_a_quarter_while_a_neighbour_takes_more_than_half() {
        let conditions = Arc::new(Conditions::default());
        let patience = conditions.patience(20 * SECOND);
        advance(4 * SECOND).await;
        conditions.set_cpu_taken(0.5);
        advance(4 * SECOND).await;
        assert_eq!(conditions.charged(), 8 * SECOND);
        conditions.set_cpu_taken(0.75);
        advance(40 * SECOND).await;
        assert_eq!(conditions.charged(), 18 * SECOND);
        assert!(!patience.is_over());
        conditions.set_cpu_taken(0.0);
        advance(2 * SECOND).await;
        assert_eq!(conditions.charged(), 20 * SECOND);
        assert!(patience.is_over());
    }

    #[tokio::test(start_paused = true)]
    async fn servers_are_spared_while_it_is_calm() {
        let conditions = Arc::new(Conditions::default());
        conditions.until_not_calm().await;
        conditions.set_calm(true);
        let waiting = conditions.clone();
        let waits = tokio::spawn(async move { waiting.until_not_calm().await });
        tokio::time::sleep(SECOND).await;
        assert!(!waits.is_finished());
        conditions.set_calm(false);
        waits.await.expect("it ends");
    }
}
