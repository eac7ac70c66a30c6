//! Calls that were just sent from here and whose results may come back within milliseconds.
//!
//! A result that arrives while its sender still waits is handed to it in place of a wake: one signal, one workflow task
//! and one activity less. It is only a shortcut: the result is committed before it is told of here, and whoever waited
//! asks Postgres what is next. A sender that dies without asking is made good by the relay.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use reliant_types::ToolCallId;
use tokio::sync::Notify;

/// Calls older than this are no longer measured.
const MEASURED_MAX: Duration = Duration::from_secs(3600);
const MEASURED_MAX_CALLS: usize = 20_000;

#[derive(Default)]
pub struct Rounds {
    calls: Mutex<HashMap<ToolCallId, Sent>>,
}

struct Sent {
    at: Instant,
    settled: bool,
    round: Option<Arc<Notify>>,
}

/// What is known here of a call whose result has come.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// Since its dispatch left here, if it did.
    pub round_trip: Option<Duration>,
    /// Its sender waits and goes on by itself: no wake is needed.
    pub awaited: bool,
}

impl Rounds {
    /// Waits of results begin here, before anything is sent. Dropping the round ends them.
    pub fn open(self: &Arc<Self>, calls: &[ToolCallId]) -> Round {
        let notify = Arc::new(Notify::new());
        let mut map = self.calls.lock();
        for call in calls {
            map.insert(*call, Sent { at: Instant::now(), settled: false, round: Some(notify.clone()) });
        }
        Round { rounds: self.clone(), calls: calls.to_vec(), notify }
    }

    /// A dispatch leaves now.
    pub fn sent(&self, call: ToolCallId) {
        let mut map = self.calls.lock();
        if map.len() >= MEASURED_MAX_CALLS {
            map.retain(|_, sent| sent.round.is_some() || sent.at.elapsed() < MEASURED_MAX);
        }
        if let Some(sent) = map.get_mut(&call) {
            sent.at = Instant::now();
        } else if map.len() < MEASURED_MAX_CALLS {
            map.insert(call, Sent { at: Instant::now(), settled: false, round: None });
        }
    }

    /// A result of the call is committed. Call it after the commit and before the wake.
    pub fn settle(&self, call: ToolCallId) -> Settled {
        let mut map = self.calls.lock();
        let Some(sent) = map.get_mut(&call) else { return Settled::default() };
        let round_trip = Some(sent.at.elapsed());
        match &sent.round {
            Some(round) => {
                sent.settled = true;
                round.notify_one();
                Settled { round_trip, awaited: true }
            }
            None => {
                map.remove(&call);
                Settled { round_trip, awaited: false }
            }
        }
    }

    pub fn is_settled(&self, call: ToolCallId) -> bool {
        self.calls.lock().get(&call).is_none_or(|sent| sent.settled)
    }
}

/// How a wait went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// Every call has settled.
    All,
    /// Postgres knows more than is known here.
    Hinted,
    Late,
}

/// A wait for results of some calls.
pub struct Round {
    rounds: Arc<Rounds>,
    calls: Vec<ToolCallId>,
    notify: Arc<Notify>,
}

impl Round {
    /// Returns when every call has settled, at `deadline`, or when a hint comes. Until it is dropped nobody is woken for
    /// the results.
    pub async fn wait(&self, deadline: tokio::time::Instant, hint: &Notify) -> Waited {
        while self.count() < self.calls.len() {
            tokio::select! {
                () = self.notify.notified() => {}
                () = hint.notified() => return Waited::Hinted,
                () = tokio::time::sleep_until(deadline) => return Waited::Late,
            }
        }
        Waited::All
    }

    fn count(&self) -> usize {
        let map = self.rounds.calls.lock();
        self.calls.iter().filter(|call| map.get(call).is_some_and(|sent| sent.settled)).count()
    }
}

impl Drop for Round {
    fn drop(&mut self) {
        let mut map = self.rounds.calls.lock();
        for call in &self.calls {
            match map.get_mut(call) {
                Some(sent) if sent.settled => drop(map.remove(call)),
                Some(sent) => sent.round = None,
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn wait(round: &Round, ms: u64) -> Waited {
        round.wait(tokio::time::Instant::now() + Duration::from_millis(ms), &Notify::new()).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_round_ends_when_all_have_settled() {
        let rounds = Arc::new(Rounds::default());
        let calls = [ToolCallId::new(), ToolCallId::new()];
        let round = rounds.open(&calls);
        assert!(rounds.settle(calls[0]).awaited);
        assert!(rounds.settle(calls[1]).awaited);
        assert_eq!(wait(&round, 1000).await, Waited::All);
        drop(round);
        assert!(rounds.calls.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_result_is_woken_for() {
        let rounds = Arc::new(Rounds::default());
        let call = ToolCallId::new();
        assert_eq!(wait(&rounds.open(&[call]), 5).await, Waited::Late);
        let settled = rounds.settle(call);
        assert!(!settled.awaited && settled.round_trip.is_some());
        assert_eq!(rounds.settle(call), Settled::default());
    }

    #[tokio::test(start_paused = true)]
    async fn a_hint_ends_a_wait_that_can_go_on() {
        let rounds = Arc::new(Rounds::default());
        let calls = [ToolCallId::new(), ToolCallId::new()];
        let (round, hint) = (rounds.open(&calls), Notify::new());
        rounds.settle(calls[1]);
        hint.notify_one();
        let deadline = tokio::time::Instant::now() + Duration::from_millis(5);
        assert_eq!(round.wait(deadline, &hint).await, Waited::Hinted);
        assert_eq!(round.wait(deadline, &hint).await, Waited::Late);
        drop(round);
        assert!(!rounds.settle(calls[0]).awaited);
    }

    #[tokio::test]
    async fn a_dropped_round_awaits_nothing() {
        let rounds = Arc::new(Rounds::default());
        let call = ToolCallId::new();
        drop(rounds.open(&[call]));
        assert!(!rounds.settle(call).awaited);
    }
}
