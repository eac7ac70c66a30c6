//! The newest traces, within limits of number and of bytes. A trace that spans still come for is the newest; the one that
//! was quiet longest goes first, and whole.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use reliant_telemetry::names::attr;
use serde::Serialize;

use crate::model::{Log, Span};

/// What is kept. A span of ours takes about 1 KiB; a stranger's may take a hundred times that.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Of all spans and log lines.
    pub bytes: usize,
    /// Of one trace: what is past it is dropped, so that no trace takes the place of all others.
    pub trace_bytes: usize,
    pub traces: usize,
    pub spans: usize,
    /// Of one trace.
    pub trace_spans: usize,
    /// Of one trace.
    pub trace_logs: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 128 * 1024 * 1024,
            trace_bytes: 16 * 1024 * 1024,
            traces: 5_000,
            spans: 100_000,
            trace_spans: 5_000,
            trace_logs: 500,
        }
    }
}

/// Shared by clones.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    limits: Limits,
    traces: HashMap<String, Trace>,
    /// By when they were last added to.
    order: BTreeMap<u64, String>,
    clock: u64,
    status: Status,
}

#[derive(Debug)]
struct Trace {
    spans: Vec<Span>,
    ids: HashSet<String>,
    logs: Vec<Log>,
    /// Of its spans and log lines.
    bytes: usize,
    touched: u64,
    at: Instant,
}

/// What the store holds and what it let go.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Status {
    pub traces: usize,
    pub spans: usize,
    /// Of spans and log lines, about.
    pub bytes: usize,
    /// Traces that made room for newer ones.
    pub evicted: u64,
    /// Spans and log lines past a trace's limit, or malformed.
    pub dropped: u64,
    /// Spans that came twice.
    pub repeated: u64,
}

/// One line of the list.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    pub trace_id: String,
    pub name: String,
    pub start_us: u64,
    pub duration_us: u64,
    pub spans: usize,
    pub error: bool,
    pub services: BTreeSet<String>,
    /// Values of `chat.id`.
    pub chats: BTreeSet<String>,
    /// Whether a turn was accepted in it.
    pub turn: bool,
    pub orphans: usize,
}

impl Store {
    pub fn new(limits: Limits) -> Self {
        let inner =
            Inner { limits, traces: HashMap::new(), order: BTreeMap::new(), clock: 0, status: Status::default() };
        Self { inner: Arc::new(Mutex::new(inner)) }
    }

    pub(crate) fn add_spans(&self, spans: impl Iterator<Item = Option<Span>>) {
        let mut inner = self.inner.lock();
        for span in spans {
            match span {
                Some(span) => inner.add_span(span),
                None => inner.status.dropped += 1,
            }
        }
        inner.make_room();
    }

    pub(crate) fn add_logs(&self, logs: impl Iterator<Item = (String, Log)>) {
        let mut inner = self.inner.lock();
        for (trace, log) in logs {
            inner.add_log(&trace, log);
        }
        inner.make_room();
    }

    /// The spans of a trace, in the order of their beginning.
    pub fn spans(&self, trace: &str) -> Vec<Span> {
        let mut spans = self.inner.lock().traces.get(trace).map_or_else(Vec::new, |trace| trace.spans.clone());
        spans.sort_by_key(|span| (span.start_ns, span.end_ns));
        spans
    }

    pub fn logs(&self, trace: &str) -> Vec<Log> {
        let mut logs = self.inner.lock().traces.get(trace).map_or_else(Vec::new, |trace| trace.logs.clone());
        logs.sort_by_key(|log| log.time_ns);
        logs
    }

    /// How long nothing has come for a trace. `None`: it is not here.
    pub fn quiet_for(&self, trace: &str) -> Option<Duration> {
        self.inner.lock().traces.get(trace).map(|trace| trace.at.elapsed())
    }

    /// The only trace whose id begins so.
    pub fn find(&self, prefix: &str) -> Option<String> {
        let inner = self.inner.lock();
        if inner.traces.contains_key(prefix) {
            return Some(prefix.to_owned());
        }
        let mut found = inner.traces.keys().filter(|id| !prefix.is_empty() && id.starts_with(prefix));
        let first = found.next()?.clone();
        found.next().is_none().then_some(first)
    }

    /// The newest first. With `search`, those whose trace id or chat id begins with it; with `turns`, turns alone.
    pub fn list(&self, search: &str, turns: bool, limit: usize) -> Vec<Summary> {
        let inner = self.inner.lock();
        let traces = inner.order.values().rev().filter_map(|id| Some(summary(id, inner.traces.get(id)?)));
        traces
            .filter(|summary| !turns || summary.turn)
            .filter(|summary| {
                summary.trace_id.starts_with(search) || summary.chats.iter().any(|chat| chat.starts_with(search))
            })
            .take(limit)
            .collect()
    }

    pub fn status(&self) -> Status {
        let inner = self.inner.lock();
        Status { traces: inner.traces.len(), ..inner.status }
    }
}

impl Inner {
    fn trace(&mut self, id: &str) -> &mut Trace {
        self.clock += 1;
        let clock = self.clock;
        let trace = self.traces.entry(id.to_owned()).or_insert_with(|| Trace {
            spans: Vec::new(),
            ids: HashSet::new(),
            logs: Vec::new(),
            bytes: 0,
            touched: 0,
            at: Instant::now(),
        });
        self.order.remove(&trace.touched);
        self.order.insert(clock, id.to_owned());
        trace.touched = clock;
        trace.at = Instant::now();
        trace
    }

    fn add_span(&mut self, span: Span) {
        let (limits, bytes) = (self.limits, span.bytes());
        let trace = self.trace(&span.trace_id);
        if trace.spans.len() >= limits.trace_spans || trace.bytes + bytes > limits.trace_bytes {
            self.status.dropped += 1;
        } else if trace.ids.insert(span.span_id.clone()) {
            trace.bytes += bytes;
            trace.spans.push(span);
            self.status.spans += 1;
            self.status.bytes += bytes;
        } else {
            self.status.repeated += 1;
        }
    }

    fn add_log(&mut self, trace: &str, log: Log) {
        let (limits, bytes) = (self.limits, log.bytes());
        let trace = self.trace(trace);
        if trace.logs.len() >= limits.trace_logs || trace.bytes + bytes > limits.trace_bytes {
            self.status.dropped += 1;
        } else {
            trace.bytes += bytes;
            trace.logs.push(log);
            self.status.bytes += bytes;
        }
    }

    fn is_over(&self) -> bool {
        self.traces.len() > self.limits.traces
            || self.status.spans > self.limits.spans
            || self.status.bytes > self.limits.bytes
    }

    fn make_room(&mut self) {
        while self.is_over() {
            let Some((_, oldest)) = self.order.pop_first() else { return };
            if let Some(trace) = self.traces.remove(&oldest) {
                self.status.spans -= trace.spans.len();
                self.status.bytes -= trace.bytes;
                self.status.evicted += 1;
            }
        }
    }
}

fn summary(id: &str, trace: &Trace) -> Summary {
    let spans = &trace.spans;
    let start = spans.iter().map(|span| span.start_ns).min().unwrap_or_default();
    let end = spans.iter().map(|span| span.end_ns).max().unwrap_or_default();
    let root = spans.iter().find(|span| span.parent_id.is_empty());
    let first = root.or_else(|| spans.iter().min_by_key(|span| span.start_ns));
    let is_orphan = |span: &&Span| !span.parent_id.is_empty() && !trace.ids.contains(&span.parent_id);
    Summary {
        trace_id: id.to_owned(),
        name: first.map(|span| span.name.clone()).unwrap_or_default(),
        start_us: start / 1000,
        duration_us: (end - start) / 1000,
        spans: spans.len(),
        error: spans.iter().any(|span| span.error),
        services: spans.iter().map(|span| span.service.clone()).collect(),
        chats: spans.iter().map(|span| span.text(attr::CHAT_ID).to_owned()).filter(|id| !id.is_empty()).collect(),
        turn: spans.iter().any(|span| span.name == reliant_telemetry::names::span::TURN_ACCEPT),
        orphans: spans.iter().filter(is_orphan).count(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ATTRIBUTES_MAX, TEXT_MAX_BYTES};

    fn span(trace: usize, span: usize, parent: &str) -> Option<Span> {
        Some(Span {
            trace_id: format!("{trace:032x}"),
            span_id: format!("{span:016x}"),
            parent_id: parent.into(),
            name: "turn.accept".into(),
            kind: "internal",
            start_ns: 1_000 * span as u64,
            end_ns: 2_000 * span as u64,
            error: false,
            attributes: BTreeMap::from([("chat.id".into(), format!("chat-{trace}").into())]),
            links: vec![],
            service: "reliant-api".into(),
            instance: "1".into(),
        })
    }

    #[test]
    fn it_is_bounded_and_the_quietest_trace_goes_first() {
        let store = Store::new(Limits { traces: 3, spans: 10, trace_spans: 5, trace_logs: 1, ..Limits::default() });
        for trace in 1..=3 {
            store.add_spans(std::iter::once(span(trace, 1, "")));
        }
        store.add_spans([span(1, 2, ""), span(4, 1, "")].into_iter());
        let left: Vec<_> = store.list("", true, 9).into_iter().map(|summary| summary.chats).collect();
        assert_eq!(left.concat_names(), "chat-4 chat-1 chat-3");
        store.add_spans((1..100).map(|n| span(5, n, "")));
        let status = store.status();
        assert!(status.spans <= 10 && status.dropped == 94, "{status:?}");
        assert_eq!(store.spans(&format!("{:032x}", 5)).len(), 5);
        store.add_spans([None, span(5, 1, "")].into_iter());
        assert_eq!(store.status().dropped, 96, "one is malformed, one is over its trace's limit");
    }

    /// As fat as the receiver takes one.
    fn fat(trace: usize, id: usize) -> Option<Span> {
        let attribute = |key: usize| (format!("key.{key}"), "x".repeat(TEXT_MAX_BYTES).into());
        Some(Span { attributes: (0..ATTRIBUTES_MAX).map(attribute).collect(), ..span(trace, id, "")? })
    }

    fn line(trace: usize) -> (String, Log) {
        let log = Log {
            span_id: format!("{trace:016x}"),
            time_ns: 1,
            level: "INFO".into(),
            service: "reliant-api".into(),
            message: "x".repeat(TEXT_MAX_BYTES),
            attributes: BTreeMap::new(),
        };
        (format!("{trace:032x}"), log)
    }

    /// What is said to be held is what is held.
    #[track_caller]
    fn adds_up(store: &Store) -> Status {
        let inner = store.inner.lock();
        let spans = inner.traces.values().flat_map(|trace| &trace.spans).map(Span::bytes);
        let logs = inner.traces.values().flat_map(|trace| &trace.logs).map(Log::bytes);
        assert_eq!(inner.status.bytes, spans.chain(logs).sum::<usize>());
        inner.status
    }

    const MIB: usize = 1024 * 1024;

    #[test]
    fn fat_spans_are_bounded_by_their_bytes() {
        let store = Store::new(Limits { bytes: 2 * MIB, trace_bytes: MIB, ..Limits::default() });
        for trace in 1..=100 {
            store.add_spans(std::iter::once(fat(trace, 1)));
            assert!(adds_up(&store).bytes <= 2 * MIB, "after {trace} spans: {:?}", store.status());
        }
        let status = store.status();
        assert!(status.spans >= 10 && status.evicted as usize + status.spans == 100, "{status:?}");
        let left = |trace: usize| store.spans(&format!("{trace:032x}")).len();
        assert_eq!((left(1), left(100)), (0, 1), "the oldest goes, the newest stays");
        // One trace without an end takes its own share, and leaves others theirs.
        store.add_spans((0..1_000).map(|id| fat(101, id)));
        let status = adds_up(&store);
        assert!(left(101) >= 5 && left(100) == 1 && status.bytes <= 2 * MIB, "{status:?}");
        assert_eq!(status.dropped as usize, 1_000 - left(101));
    }

    #[test]
    fn log_lines_alone_are_bounded_by_their_bytes() {
        let store = Store::new(Limits { bytes: 2 * MIB, trace_bytes: MIB, ..Limits::default() });
        for trace in 1..=4_000 {
            store.add_logs(std::iter::once(line(trace)));
        }
        let status = adds_up(&store);
        assert!(status.bytes <= 2 * MIB && status.bytes > MIB && status.evicted > 2_000, "{status:?}");
        assert_eq!((store.logs(&line(1).0).len(), store.logs(&line(4_000).0).len()), (0, 1));
        store.add_logs((0..1_000).map(|_| line(4_001)));
        let status = adds_up(&store);
        assert!(status.bytes <= 2 * MIB && status.dropped >= 500, "{status:?}");
        assert_eq!(store.logs(&line(4_000).0).len(), 1);
    }

    #[test]
    fn lists_say_what_is_missing_and_find_by_chat_and_by_trace() {
        let store = Store::new(Limits::default());
        store.add_spans([span(7, 1, ""), span(7, 2, "00000000000000aa"), span(7, 1, "")].into_iter());
        let found = store.list("chat-7", false, 9);
        assert_eq!((found.len(), found[0].orphans, found[0].spans), (1, 1, 2));
        assert_eq!(store.status().repeated, 1);
        assert_eq!(store.list(&found[0].trace_id[..32], true, 9).len(), 1);
        assert!(store.list("chat-8", true, 9).is_empty());
        assert_eq!(store.find(&found[0].trace_id), Some(found[0].trace_id.clone()));
        assert_eq!(store.find("ff"), None);
    }

    trait Names {
        fn concat_names(&self) -> String;
    }

    impl Names for Vec<BTreeSet<String>> {
        fn concat_names(&self) -> String {
            self.iter().flatten().map(String::as_str).collect::<Vec<_>>().join(" ")
        }
    }
}
