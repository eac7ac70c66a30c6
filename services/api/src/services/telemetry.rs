//! Spans of web pages, which have no way to the collector of their own. They are believed about themselves alone: they join
//! the trace of a turn of the caller's, under names that are ours, and nothing is decided by them.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use reliant_middleware::Principal;
use reliant_rpc::telemetry_service_server::TelemetryService;
use reliant_telemetry::{
    TraceContext,
    metrics::PAGE_FIRST_TEXT,
    page::{self, PageSpan, PageSpanKind},
};
use reliant_types::{Failure, TurnId, limits, pb};

use crate::app::{self, App, refused, service};

/// A page's clock within this of ours stands; one that is further off is put right by the difference.
const CLOCK_OFF: Duration = Duration::from_secs(2);

pub struct Telemetry(pub Arc<App>);

service!(TelemetryService for Telemetry {
    report_page_spans(ReportPageSpansRequest) -> ReportPageSpansResponse = report;
});

impl Telemetry {
    async fn report(
        &self,
        caller: Principal,
        request: pb::ReportPageSpansRequest,
    ) -> Result<pb::ReportPageSpansResponse, Failure> {
        let id = app::id::<TurnId>("turn_id", &request.turn_id)?;
        if request.spans.len() > limits::PAGE_SPANS_MAX {
            let message =
                format!("spans has {} entries; it takes at most {}", request.spans.len(), limits::PAGE_SPANS_MAX);
            return Err(Failure::field("spans", message));
        }
        // Another's turn is "not found": nobody writes into a trace that is not theirs.
        let (turn, ..) = self.0.deps.store.get_turn_page(caller.user, id, 1, "").await.map_err(refused)?;
        let clock = Clock::new(request.now_unix_us, SystemTime::now());
        let mut spans = Vec::with_capacity(request.spans.len());
        for (index, told) in request.spans.iter().enumerate() {
            let span = span(&turn, told, &clock).ok_or_else(|| {
                let field = format!("spans[{index}]");
                let message = format!("{field} needs a kind, ids of 16 hex digits, and at most an hour's duration");
                Failure::field(field, message)
            })?;
            if span.kind == PageSpanKind::FirstText {
                PAGE_FIRST_TEXT.observe(span.end.duration_since(span.start).unwrap_or_default().as_secs_f64());
            }
            spans.push(span);
        }
        page::export(spans);
        Ok(pb::ReportPageSpansResponse {})
    }
}

fn span(turn: &pb::Turn, told: &pb::PageSpan, clock: &Clock) -> Option<PageSpan> {
    let kind = match told.kind() {
        pb::PageSpanKind::Send => PageSpanKind::Send,
        pb::PageSpanKind::Call => PageSpanKind::Call,
        pb::PageSpanKind::FirstText => PageSpanKind::FirstText,
        pb::PageSpanKind::Unspecified => return None,
    };
    let context = |span: &str| TraceContext::from_traceparent(&format!("00-{}-{span}-01", turn.trace_id));
    let own = context(&told.span_id);
    let is_root = told.parent_span_id.is_empty();
    if own.is_empty() || (!is_root && context(&told.parent_span_id).is_empty()) {
        return None;
    }
    let took = Duration::from_micros(told.duration_us.try_into().ok()?);
    let start = clock.ours(told.start_unix_us)?;
    (took <= limits::PAGE_SPAN_MAX).then(|| PageSpan {
        kind,
        context: own,
        parent: told.parent_span_id.clone(),
        start,
        end: start + took,
        failed: told.failed,
        chat: turn.chat_id.clone(),
        turn: turn.id.clone(),
    })
}

/// From a page's clock to ours.
struct Clock {
    /// What is to be added to the page's times.
    off_us: i64,
    now_us: i64,
}

impl Clock {
    fn new(page_us: i64, now: SystemTime) -> Self {
        let now_us = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as i64;
        let off_us = now_us.saturating_sub(page_us);
        let stands = off_us.unsigned_abs() <= CLOCK_OFF.as_micros() as u64;
        Self { off_us: if stands { 0 } else { off_us }, now_us }
    }

    /// `None`: longer ago than a page could have begun to wait, or in the future.
    fn ours(&self, page_us: i64) -> Option<SystemTime> {
        let us = page_us.checked_add(self.off_us)?;
        let age = self.now_us.checked_sub(us)?;
        let slack = CLOCK_OFF.as_micros() as i64;
        (-slack..=limits::PAGE_SPAN_MAX.as_micros() as i64).contains(&age).then_some(())?;
        Some(UNIX_EPOCH + Duration::from_micros(us.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000_000_000;

    fn clock(page_us: i64) -> Clock {
        Clock::new(page_us, UNIX_EPOCH + Duration::from_micros(NOW as u64))
    }

    fn told() -> pb::PageSpan {
        pb::PageSpan {
            kind: pb::PageSpanKind::Send as i32,
            span_id: "00f067aa0ba902b7".into(),
            parent_span_id: String::new(),
            start_unix_us: NOW - 1_000_000,
            duration_us: 400_000,
            failed: false,
        }
    }

    fn turn() -> pb::Turn {
        pb::Turn { id: "t".into(), trace_id: "4bf92f3577b34da6a3ce929d0e0e4736".into(), ..Default::default() }
    }

    #[test]
    fn what_a_page_tells_is_taken_within_bounds() {
        let good = span(&turn(), &told(), &clock(NOW)).expect("well formed");
        assert_eq!(good.context.span_id().as_deref(), Some("00f067aa0ba902b7"));
        assert_eq!(good.end.duration_since(good.start).ok(), Some(Duration::from_millis(400)));
        for bad in [
            pb::PageSpan { kind: 0, ..told() },
            pb::PageSpan { kind: 99, ..told() },
            pb::PageSpan { span_id: "0000000000000000".into(), ..told() },
            pb::PageSpan { span_id: "00F067AA0BA902B7".into(), ..told() },
            pb::PageSpan { parent_span_id: "x".into(), ..told() },
            pb::PageSpan { duration_us: -1, ..told() },
            pb::PageSpan { duration_us: i64::MAX, ..told() },
            pb::PageSpan { start_unix_us: i64::MIN, ..told() },
            pb::PageSpan { start_unix_us: i64::MAX, ..told() },
            pb::PageSpan { start_unix_us: NOW + 60_000_000, ..told() },
            pb::PageSpan { start_unix_us: 0, ..told() },
        ] {
            assert!(span(&turn(), &bad, &clock(NOW)).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn a_clock_that_is_far_off_is_put_right_and_a_good_one_stands() {
        let at = |page_now: i64| {
            let told = pb::PageSpan { start_unix_us: page_now - 1_000_000, ..told() };
            let span = span(&turn(), &told, &clock(page_now)).expect("well formed");
            NOW - span.start.duration_since(UNIX_EPOCH).expect("after 1970").as_micros() as i64
        };
        assert_eq!(at(NOW), 1_000_000);
        assert_eq!(at(NOW - 1_500_000), 2_500_000, "a second may as well be the way here");
        assert_eq!(at(NOW + 7_200_000_000), 1_000_000);
        assert_eq!(at(NOW - 7_200_000_000), 1_000_000);
        clock(i64::MIN);
        clock(i64::MAX);
    }
}
