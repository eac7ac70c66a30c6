//! From an ended span to the collector, so that no kill leaves a span whose parent nobody ever sees.
//!
//! Two rules make that so. A span whose context leaves the process ([`crate::hop`]) has ended and is kept in the
//! [`Spool`] until the collector has it, or goes out at once where there is no spool (what is left then is the time
//! between the end of a hop and its bytes on the socket, a few milliseconds); its parent is the context that came into
//! the process. All others go out with the topmost span of this process above them, when that one has ended: a process
//! that dies takes its half-done work along as a whole.
//!
//! Nothing here waits for the collector. What finds no room is dropped and counted.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use opentelemetry::{Context, trace::SpanId};
use opentelemetry_sdk::{
    Resource,
    error::{OTelSdkError, OTelSdkResult},
    trace::{Span, SpanData, SpanExporter, SpanProcessor},
};
use parking_lot::Mutex;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until, timeout_at},
};

use crate::{metrics::OTLP_LOST, names, sampled, spool::Spool};

/// Spans that wait for the collector.
const QUEUE_MAX: usize = 8192;
const BATCH_MAX: usize = 512;
/// All other spans gather so long.
const DELAY: Duration = Duration::from_millis(500);
/// A span that somebody refers to and that is not in the spool goes at once; those right behind it gather this long.
const PACE: Duration = Duration::from_millis(5);
/// Exports under way at one time: a hop does not wait for the answer to an earlier one.
const EXPORTS_MAX: usize = 4;
/// Ended spans below one open span that wait for it; past that they go without it.
const HELD_MAX: usize = 512;
/// The same for the whole process.
const HELD_ALL_MAX: usize = QUEUE_MAX;

enum Message {
    Span { span: Box<SpanData>, leaves: Leaves },
    Flush(std::sync::mpsc::Sender<()>),
}

/// What keeps a span from being lost with its process.
#[derive(Debug, Clone, Copy)]
enum Leaves {
    /// Nothing, and nothing hangs on it alone.
    InTime,
    /// The spool has it, in this segment.
    Kept(u64),
    AtOnce,
}

/// The processor that the tracer provider calls.
#[derive(Debug)]
pub(crate) struct Pipeline {
    queue: mpsc::Sender<Message>,
    held: Mutex<Held>,
    spool: Option<Arc<Spool>>,
    closed: Arc<AtomicBool>,
}

/// Ended spans by the open span right above them.
#[derive(Debug, Default)]
struct Held {
    below: HashMap<SpanId, Vec<SpanData>>,
    count: usize,
}

impl Pipeline {
    /// Must be called within a tokio runtime.
    pub fn start(exporter: impl SpanExporter + 'static, spool: Option<Spool>) -> Self {
        let (queue, receiver) = sampled::channel("spans", QUEUE_MAX);
        let spool = spool.map(Arc::new);
        tokio::spawn(send(exporter, spool.clone(), receiver));
        Self { queue, held: Mutex::default(), spool, closed: Arc::default() }
    }

    /// For a span that was not made here and that nothing here hangs on.
    pub fn pass_on(&self, span: SpanData) {
        self.enqueue(span, Leaves::AtOnce);
    }

    fn enqueue(&self, span: SpanData, leaves: Leaves) {
        if self.queue.try_send(Message::Span { span: Box::new(span), leaves }).is_err() {
            OTLP_LOST.with_label_values(&["traces"]).inc();
            if let (Some(spool), Leaves::Kept(segment)) = (&self.spool, leaves) {
                spool.done([segment].into_iter());
            }
        }
    }

    fn flush(&self, timeout: Duration) -> OTelSdkResult {
        let (done, flushed) = std::sync::mpsc::channel();
        self.queue.try_send(Message::Flush(done)).map_err(|_| OTelSdkError::Timeout(timeout))?;
        flushed.recv_timeout(timeout).map_err(|_| OTelSdkError::Timeout(timeout))
    }
}

impl SpanProcessor for Pipeline {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if !span.span_context.is_sampled() || self.closed.load(Ordering::Relaxed) {
            return;
        }
        if names::span::leaves_the_process(&span.name) {
            let kept = self.spool.as_ref().and_then(|spool| spool.keep(&span));
            return self.enqueue(span, kept.map_or(Leaves::AtOnce, Leaves::Kept));
        }
        let is_top = span.parent_span_id == SpanId::INVALID || span.parent_span_is_remote;
        for span in self.held.lock().end(span, is_top) {
            self.enqueue(span, Leaves::InTime);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.flush(DELAY)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        if self.closed.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        for span in self.held.lock().take() {
            self.enqueue(span, Leaves::InTime);
        }
        self.flush(timeout)?;
        if let Some(spool) = &self.spool {
            spool.close();
        }
        Ok(())
    }

    fn set_resource(&mut self, _: &Resource) {}
}

impl Held {
    /// What may go out now that this span has ended.
    fn end(&mut self, span: SpanData, is_top: bool) -> Vec<SpanData> {
        let mut ended = self.below.remove(&span.span_context.span_id()).unwrap_or_default();
        self.count -= ended.len();
        let parent = span.parent_span_id;
        ended.push(span);
        if is_top || self.count + ended.len() > HELD_ALL_MAX {
            return ended;
        }
        let siblings = self.below.entry(parent).or_default();
        if siblings.len() + ended.len() > HELD_MAX {
            return ended;
        }
        self.count += ended.len();
        siblings.append(&mut ended);
        Vec::new()
    }

    fn take(&mut self) -> Vec<SpanData> {
        self.count = 0;
        self.below.drain().flat_map(|(_, spans)| spans).collect()
    }
}

/// Sends what comes, until all senders are gone.
async fn send(exporter: impl SpanExporter + 'static, spool: Option<Arc<Spool>>, mut queue: mpsc::Receiver<Message>) {
    let exporter = Arc::new(exporter);
    let mut under_way = JoinSet::new();
    let mut batch: Vec<SpanData> = Vec::new();
    // The segments of those in the batch that the spool keeps.
    let mut kept: Vec<u64> = Vec::new();
    let mut messages = Vec::new();
    let mut flushed: Vec<std::sync::mpsc::Sender<()>> = Vec::new();
    // When the batch goes; none while it is empty.
    let mut due: Option<Instant> = None;
    let mut not_before = Instant::now();
    loop {
        let received = match due {
            Some(due) => timeout_at(due, queue.recv_many(&mut messages, BATCH_MAX)).await,
            None => Ok(queue.recv_many(&mut messages, BATCH_MAX).await),
        };
        let over = received == Ok(0);
        for message in messages.drain(..) {
            match message {
                Message::Span { span, leaves } => {
                    batch.push(*span);
                    let latest = match leaves {
                        Leaves::InTime => Instant::now() + DELAY,
                        Leaves::Kept(segment) => {
                            kept.push(segment);
                            Instant::now() + DELAY
                        }
                        Leaves::AtOnce => Instant::now(),
                    };
                    due = Some(due.map_or(latest, |due| due.min(latest)));
                }
                Message::Flush(done) => {
                    flushed.push(done);
                    due = Some(Instant::now());
                }
            }
        }
        let is_due = due.is_some_and(|due| due <= Instant::now());
        if batch.len() >= BATCH_MAX || (is_due && Instant::now() >= not_before) || over || !flushed.is_empty() {
            not_before = Instant::now() + PACE;
            due = None;
            while under_way.len() >= EXPORTS_MAX {
                under_way.join_next().await;
            }
            if !batch.is_empty() {
                let (exporter, batch, kept) = (exporter.clone(), std::mem::take(&mut batch), std::mem::take(&mut kept));
                let spool = spool.clone();
                if let Some(spool) = &spool {
                    spool.turn_the_page();
                }
                under_way.spawn(async move {
                    // What the collector does not take is lost, and counted by the exporter.
                    let _ = exporter.export(batch).await;
                    if let Some(spool) = spool {
                        spool.done(kept.into_iter());
                    }
                });
            }
            while under_way.try_join_next().is_some() {}
            if over || !flushed.is_empty() {
                while under_way.join_next().await.is_some() {}
            }
            for done in flushed.drain(..) {
                let _ = done.send(());
            }
        } else if is_due {
            sleep_until(not_before).await;
        }
        if over {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::{SpanContext, SpanKind, Status, TraceFlags, TraceId, TraceState};
    use std::time::SystemTime;

    fn span(id: u64, parent: u64, name: &'static str, remote: bool) -> SpanData {
        let context =
            SpanContext::new(TraceId::from(1u128), SpanId::from(id), TraceFlags::SAMPLED, false, TraceState::default());
        SpanData {
            span_context: context,
            parent_span_id: SpanId::from(parent),
            parent_span_is_remote: remote,
            span_kind: SpanKind::Internal,
            name: name.into(),
            start_time: SystemTime::now(),
            end_time: SystemTime::now(),
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events: Default::default(),
            links: Default::default(),
            status: Status::Unset,
            instrumentation_scope: Default::default(),
        }
    }

    #[derive(Debug, Clone, Default)]
    struct Seen(Arc<Mutex<Vec<Vec<u64>>>>);

    impl SpanExporter for Seen {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            let ids = batch.iter().map(|span| u64::from_be_bytes(span.span_context.span_id().to_bytes()));
            self.0.lock().push(ids.collect());
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn children_go_with_the_topmost_span_and_hops_at_once() {
        let seen = Seen::default();
        let pipeline = Pipeline::start(seen.clone(), None);
        let begun = Instant::now();
        let wait_for = async |batches: usize| {
            while seen.0.lock().len() < batches {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        // Below 3, which is below 2, whose parent is in another process.
        pipeline.on_end(span(4, 3, "chat", false));
        pipeline.on_end(span(3, 2, "turn.round", false));
        pipeline.on_end(span(9, 1, names::span::TOOL_DISPATCH, true));
        wait_for(1).await;
        assert!(begun.elapsed() < Duration::from_millis(5), "a hop does not wait");
        assert_eq!(*seen.0.lock(), [vec![9]]);
        tokio::time::sleep(DELAY * 4).await;
        assert_eq!(seen.0.lock().len(), 1, "nothing goes before its parent");
        pipeline.on_end(span(2, 1, "turn.round", true));
        wait_for(2).await;
        assert_eq!(seen.0.lock()[1], [4, 3, 2]);
    }

    #[test]
    fn what_is_held_is_bounded() {
        let mut held = Held::default();
        let mut out = 0;
        for id in 0..HELD_MAX as u64 * 2 {
            out += held.end(span(id + 10, 1, "chat", false), false).len();
        }
        assert_eq!((held.count, out), (HELD_MAX, HELD_MAX));
        for parent in 2..100 {
            for id in 0..HELD_MAX as u64 {
                held.end(span(parent * 10_000 + id, parent, "chat", false), false);
            }
        }
        assert!(held.count <= HELD_ALL_MAX);
        assert_eq!(held.take().len(), HELD_ALL_MAX);
    }

    fn resident_bytes() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    #[tokio::test]
    async fn a_collector_that_hangs_costs_counted_spans_and_no_time() {
        const SPANS: u64 = 1_000_000;
        #[derive(Debug)]
        struct Hangs;
        impl SpanExporter for Hangs {
            async fn export(&self, _: Vec<SpanData>) -> OTelSdkResult {
                std::future::pending().await
            }
        }
        let before = OTLP_LOST.with_label_values(&["traces"]).get();
        let pipeline = Pipeline::start(Hangs, None);
        let memory = resident_bytes();
        for id in 0..SPANS {
            pipeline.on_end(span(id + 1, 0, "turn.round", false));
        }
        let lost = OTLP_LOST.with_label_values(&["traces"]).get() - before;
        let waiting = (QUEUE_MAX + (EXPORTS_MAX + 2) * BATCH_MAX) as u64;
        assert!(lost >= SPANS - waiting, "{lost}");
        // A span has some 300 bytes: all of them would be ten times this.
        let grown = resident_bytes().saturating_sub(memory);
        assert!(grown < 32 * 1024 * 1024, "{grown} bytes");
        assert!(pipeline.shutdown_with_timeout(Duration::from_millis(50)).is_err());
    }
}
