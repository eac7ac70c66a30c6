//! Results on their way: each is offered over the newest stream until the cloud acknowledges it. The outbox holds ids;
//! the journal holds the results.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use reliant_telemetry::{TraceContext, chain, hop, names};
use reliant_types::{ToolCallId, pb};
use tokio::{sync::Notify, time::Instant};

use crate::journal::Journal;

/// Offers that wait for their acknowledgement at one time.
const WINDOW: usize = 64;
/// An offer that was not answered is made again after this time, then after twice that, and so on.
const AGAIN_MIN: Duration = Duration::from_secs(3);
const AGAIN_MAX: Duration = Duration::from_secs(30);

#[derive(Debug)]
struct Offer {
    /// As it was made; the journal's copy is read for later offers.
    fresh: Option<pb::ToolResult>,
    trace: pb::TraceContext,
    /// The stream it went over, when it is to be made again, and how long it waited.
    made: Option<(u64, Instant, Duration)>,
}

/// A result that is to be offered now.
struct Due {
    call: ToolCallId,
    trace: pb::TraceContext,
    /// The copy at hand, if there is one.
    fresh: Option<pb::ToolResult>,
    /// It was offered before.
    again: bool,
}

#[derive(Debug, Default)]
pub struct Outbox {
    offers: Mutex<BTreeMap<ToolCallId, Offer>>,
    notify: Notify,
}

impl Outbox {
    /// `fresh`: the result, where the caller has it at hand.
    pub fn add(&self, call: ToolCallId, traceparent: &str, fresh: Option<pb::ToolResult>) {
        let trace = pb::TraceContext { traceparent: traceparent.to_owned(), tracestate: String::new() };
        self.offers.lock().insert(call, Offer { fresh, trace, made: None });
        self.notify.notify_one();
    }

    pub fn remove(&self, call: ToolCallId) {
        self.offers.lock().remove(&call);
        // There is room in the window.
        self.notify.notify_one();
    }

    pub fn len(&self) -> usize {
        self.offers.lock().len()
    }

    /// What is to be offered over a stream now, and when to look again.
    fn due(&self, stream: u64, now: Instant) -> (Vec<Due>, Option<Instant>) {
        let mut offers = self.offers.lock();
        let waits = |o: &Offer| matches!(o.made, Some((s, again, _)) if s == stream && again > now);
        let mut room = WINDOW.saturating_sub(offers.values().filter(|o| waits(o)).count());
        let mut due = Vec::new();
        let mut next: Option<Instant> = None;
        for (call, offer) in offers.iter_mut() {
            if !waits(offer) && room > 0 {
                room -= 1;
                let patience = match offer.made {
                    Some((s, _, patience)) if s == stream => (patience * 2).min(AGAIN_MAX),
                    _ => AGAIN_MIN,
                };
                let again = offer.made.replace((stream, now + patience, patience)).is_some();
                due.push(Due { call: *call, trace: offer.trace.clone(), fresh: offer.fresh.take(), again });
            }
            if let Some((_, again, _)) = offer.made {
                next = Some(next.map_or(again, |n| n.min(again)));
            }
        }
        (due, next)
    }

    /// An offer that is made again has a span of its own, linked to the one before it and below the same dispatch.
    fn offered_again(&self, call: ToolCallId, before: pb::TraceContext, journal: &Journal) -> pb::TraceContext {
        let Some(entry) = journal.get(call) else { return before };
        let parent = TraceContext::from_traceparent(&entry.header.traceparent);
        if parent.is_empty() {
            return before;
        }
        let span = tracing::info_span!(names::span::TOOL_RESULT, otel.kind = "producer", tool.call_id = %call);
        TraceContext::from(before).link(&span);
        let trace: pb::TraceContext = hop(&parent, span).into();
        if let Some(offer) = self.offers.lock().get_mut(&call) {
            offer.trace = trace.clone();
        }
        trace
    }

    /// The next results for a stream, waiting until there are some.
    pub async fn next(&self, stream: u64, journal: &Arc<Journal>) -> Vec<(pb::ToolResult, pb::TraceContext)> {
        loop {
            let (due, next) = self.due(stream, Instant::now());
            let mut results = Vec::with_capacity(due.len());
            for Due { call, trace, fresh, again } in due {
                let trace = if again { self.offered_again(call, trace, journal) } else { trace };
                match (fresh, journal.get(call)) {
                    // A newer dispatch may have taken the call over meanwhile.
                    (Some(mut fresh), Some(entry)) => {
                        fresh.generation = entry.header.generation;
                        results.push((fresh, trace));
                    }
                    _ => match journal.result(call) {
                        Ok(Some(result)) => results.push((result, trace)),
                        Ok(None) => self.remove(call),
                        Err(error) => tracing::error!(error = %chain(&error), "a result cannot be read"),
                    },
                }
            }
            if !results.is_empty() {
                return results;
            }
            let wait = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.notify.notified() => {}
                () = wait => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_is_made_again_over_a_new_stream_or_after_a_while() {
        let outbox = Outbox::default();
        let now = Instant::now();
        let (a, b) = (ToolCallId::new(), ToolCallId::new());
        outbox.add(a, "", Some(pb::ToolResult::default()));
        outbox.add(b, "", None);
        let ids = |stream, at| outbox.due(stream, at).0.into_iter().map(|due| due.call).collect::<Vec<_>>();
        assert_eq!(ids(1, now), [a, b]);
        assert!(ids(1, now + Duration::from_secs(1)).is_empty());
        assert_eq!(ids(1, now + AGAIN_MIN), [a, b]);
        assert!(ids(1, now + AGAIN_MIN * 2).is_empty(), "it waits twice as long");
        assert_eq!(ids(2, now + AGAIN_MIN * 2), [a, b]);
        outbox.remove(a);
        assert_eq!(ids(3, now), [b]);
    }

    #[test]
    fn the_window_is_bounded() {
        let outbox = Outbox::default();
        for _ in 0..WINDOW * 2 {
            outbox.add(ToolCallId::new(), "", None);
        }
        let now = Instant::now();
        assert_eq!(outbox.due(1, now).0.len(), WINDOW);
        assert!(outbox.due(1, now).0.is_empty());
    }
}
