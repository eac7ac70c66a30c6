//! Where a turn's time went between two commits of its model, from the rows' stamps alone: one clock, the database's.
//!
//! The parts add up to the whole, whatever is missing. Of calls that ran side by side the one that ended last counts; those
//! that ran one behind the other count together.

use std::time::Duration;

use chrono::{DateTime, Utc};

type Time = DateTime<Utc>;

/// The parts of the time before a model round.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lead {
    /// For a place among the user's turns at work.
    pub held: Duration,
    /// Until a worker looked at the chat, or the chat's turn before ended. Without what it was held.
    pub enqueue: Duration,
    /// Until a worker began the round, where nothing else was waited for.
    pub pickup: Duration,
    /// Lost with attempts of the round that failed or died, and in waiting to make another.
    pub retry: Duration,
    /// Until a person decided.
    pub approval_wait: Duration,
    /// Until the tool began: waiting for the daemon, and the way there.
    pub tool_route: Duration,
    /// As the daemon measured it.
    pub tool_run: Duration,
    /// From the tool's end until its result was stored.
    pub tool_return: Duration,
}

/// What is known when a round is claimed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stamps {
    pub accepted: Time,
    pub looked: Option<Time>,
    /// The turn before had ended.
    pub freed: Option<Time>,
    /// Of the call that settled last: when the model had asked for it.
    pub called: Option<Time>,
    pub decided: Option<Time>,
    pub dispatched: Option<Time>,
    pub ran: Option<Time>,
    /// How long others of its round ran ahead of its dispatch.
    pub ran_before: Duration,
    pub settled: Option<Time>,
    /// Of the time before the claim, what passed in waiting for a place.
    pub held: Duration,
    /// By the round's first attempt.
    pub began: Option<Time>,
    pub claimed: Time,
}

impl Lead {
    pub(crate) fn of(stamps: &Stamps) -> Self {
        let Stamps {
            accepted,
            looked,
            freed,
            called,
            decided,
            dispatched,
            ran,
            ran_before,
            settled,
            held,
            began,
            claimed,
        } = *stamps;
        let began = began.unwrap_or(claimed);
        let mut walk = Walk { at: called.unwrap_or(accepted), end: claimed };
        if called.is_none() {
            // Of the looks the newest is known, which may be one after an attempt had failed.
            let enqueue = walk.to(looked.max(freed).map(|until| until.min(began)));
            let pickup = walk.to(Some(began));
            return Self { enqueue, pickup, retry: walk.to(Some(claimed)), ..Self::default() }.held(held);
        }
        let approval_wait = walk.to(decided);
        let waited = walk.to(if dispatched.is_some() { dispatched } else { settled });
        let before = ran_before.min(waited);
        let there_and_back = walk.to(settled);
        let run = match (ran, settled) {
            (Some(ran), Some(settled)) if dispatched.is_some() => between(ran, settled).min(there_and_back),
            _ => Duration::ZERO,
        };
        // Each way has one hop over each link and one synced record in the journal.
        let tool_return = (there_and_back - run) / 2;
        Self {
            approval_wait,
            tool_route: (waited - before) + (there_and_back - run - tool_return),
            tool_run: before + run,
            tool_return,
            pickup: walk.to(Some(began)),
            retry: walk.to(Some(claimed)),
            ..Self::default()
        }
        .held(held)
    }

    /// Takes the wait for a place out of the waits that it was part of.
    fn held(self, held: Duration) -> Self {
        let of_enqueue = held.min(self.enqueue);
        let of_pickup = (held - of_enqueue).min(self.pickup);
        let of_retry = (held - of_enqueue - of_pickup).min(self.retry);
        let (enqueue, pickup, retry) = (self.enqueue - of_enqueue, self.pickup - of_pickup, self.retry - of_retry);
        Self { held: of_enqueue + of_pickup + of_retry, enqueue, pickup, retry, ..self }
    }
}

fn between(from: Time, to: Time) -> Duration {
    to.signed_duration_since(from).to_std().unwrap_or_default()
}

/// Goes on in time only, and never past the end.
struct Walk {
    at: Time,
    end: Time,
}

impl Walk {
    fn to(&mut self, next: Option<Time>) -> Duration {
        let next = next.unwrap_or(self.at).clamp(self.at.min(self.end), self.end);
        let time = between(self.at, next);
        self.at = self.at.max(next);
        time
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(ms: i64) -> Time {
        DateTime::from_timestamp_millis(1_700_000_000_000 + ms).expect("a time")
    }

    fn stamps() -> Stamps {
        Stamps {
            accepted: at(0),
            looked: None,
            freed: None,
            called: None,
            decided: None,
            dispatched: None,
            ran: None,
            ran_before: Duration::ZERO,
            settled: None,
            held: Duration::ZERO,
            began: None,
            claimed: at(100),
        }
    }

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_first_round_waits_for_the_wake_and_for_a_worker() {
        let lead = Lead::of(&Stamps { looked: Some(at(30)), ..stamps() });
        assert_eq!((lead.enqueue, lead.pickup), (ms(30), ms(70)));
        let queued = Lead::of(&Stamps { looked: Some(at(30)), freed: Some(at(90)), ..stamps() });
        assert_eq!((queued.enqueue, queued.pickup), (ms(90), ms(10)));
        let held = Lead::of(&Stamps { looked: Some(at(30)), held: ms(25), ..stamps() });
        assert_eq!((held.held, held.enqueue, held.pickup), (ms(25), ms(5), ms(70)));
        let again = Lead::of(&Stamps { looked: Some(at(30)), began: Some(at(40)), ..stamps() });
        assert_eq!((again.enqueue, again.pickup, again.retry), (ms(30), ms(10), ms(60)));
        let looked_again = Lead::of(&Stamps { looked: Some(at(90)), began: Some(at(40)), ..stamps() });
        assert_eq!((looked_again.enqueue, looked_again.pickup, looked_again.retry), (ms(40), ms(0), ms(60)));
    }

    #[test]
    fn a_later_round_waits_for_its_last_call() {
        let called = Stamps {
            called: Some(at(10)),
            decided: Some(at(20)),
            dispatched: Some(at(22)),
            ran: Some(at(28)),
            settled: Some(at(90)),
            ..stamps()
        };
        let lead = Lead::of(&called);
        assert_eq!((lead.approval_wait, lead.tool_run, lead.pickup), (ms(10), ms(62), ms(10)));
        assert_eq!((lead.tool_route, lead.tool_return), (ms(5), ms(3)));
        let behind = Lead::of(&Stamps { dispatched: Some(at(60)), ran: Some(at(62)), ran_before: ms(35), ..called });
        assert_eq!((behind.tool_run, behind.tool_route, behind.tool_return), (ms(35 + 28), ms(5 + 1), ms(1)));
        let denied = Lead::of(&Stamps { dispatched: None, ran: None, settled: Some(at(20)), ..called });
        assert_eq!((denied.approval_wait, denied.tool_run, denied.pickup), (ms(10), ms(0), ms(80)));
    }

    proptest! {
        #[test]
        fn the_parts_add_up(all in proptest::array::uniform8(proptest::option::of(-50i64..200)), held in 0u64..150, before in 0u64..150) {
            let [looked, freed, called, decided, dispatched, ran, settled, began] = all.map(|ms| ms.map(at));
            let held = ms(held);
            let stamps = Stamps { looked, freed, called, decided, dispatched, ran, settled, held, began, ran_before: ms(before), ..stamps() };
            let Lead { held, enqueue, pickup, retry, approval_wait, tool_route, tool_run, tool_return } = Lead::of(&stamps);
            let whole = between(called.unwrap_or(stamps.accepted), stamps.claimed);
            prop_assert_eq!(held + enqueue + pickup + retry + approval_wait + tool_route + tool_run + tool_return, whole);
        }
    }
}
