//! Spans that a web page made. A page has no way to the collector; it hands its spans to the api, which sends them on as
//! those of a service of their own. Names and kinds are ours: a page chooses among them.

use std::{borrow::Cow, sync::OnceLock, time::SystemTime};

use opentelemetry::trace::{Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceState};
use opentelemetry_sdk::trace::SpanData;

use crate::{
    TraceContext,
    names::{attr, span},
    pipeline::Pipeline,
};

/// `service.name` of what pages tell.
pub const SERVICE: &str = "reliant-web";

/// What a page can tell of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageSpanKind {
    /// From the person's click until the message was accepted. The root of the turn's trace.
    Send,
    /// The SendMessage call as the page sees it.
    Call,
    /// From the click until the first piece of the answer was painted.
    FirstText,
}

impl PageSpanKind {
    const fn exported(self) -> (&'static str, SpanKind) {
        match self {
            Self::Send => (span::CLIENT_SEND, SpanKind::Internal),
            Self::Call => ("reliant.v1.MessageService/SendMessage", SpanKind::Client),
            Self::FirstText => (span::CLIENT_FIRST_TEXT, SpanKind::Internal),
        }
    }
}

#[derive(Debug, Clone)]
pub struct PageSpan {
    pub kind: PageSpanKind,
    /// The span itself.
    pub context: TraceContext,
    /// 16 hex digits; empty: a root.
    pub parent: String,
    pub start: SystemTime,
    pub end: SystemTime,
    pub failed: bool,
    pub chat: String,
    pub turn: String,
}

static PAGES: OnceLock<Pipeline> = OnceLock::new();

/// Called by `init`, where spans go to a collector.
pub(crate) fn start(pipeline: Pipeline) {
    let _ = PAGES.set(pipeline);
}

pub(crate) fn pipeline() -> Option<&'static Pipeline> {
    PAGES.get()
}

/// Queues the spans for the collector; those that are not sampled, or not well formed, are let go. False: some were.
pub fn export(spans: impl IntoIterator<Item = PageSpan>) -> bool {
    let Some(pipeline) = PAGES.get() else { return false };
    let (spans, all) = linked(spans);
    spans.into_iter().for_each(|span| pipeline.pass_on(span));
    all
}

/// The well-formed ones, and whether all are. A call that was made again links to the one before it.
fn linked(pages: impl IntoIterator<Item = PageSpan>) -> (Vec<SpanData>, bool) {
    let (mut spans, mut all) = (Vec::new(), true);
    let mut before: Option<SpanContext> = None;
    for page in pages {
        let Some(mut span) = data(&page) else {
            all = false;
            continue;
        };
        if page.kind == PageSpanKind::Call
            && let Some(before) = before.replace(span.span_context.clone())
        {
            span.links.links.push(Link::new(before, Vec::new(), 0));
        }
        spans.push(span);
    }
    (spans, all)
}

fn data(page: &PageSpan) -> Option<SpanData> {
    // Not what the page asked for: its trace is sampled as any other from outside.
    let context = page.context.clone().at_edge();
    if !context.is_sampled() {
        return None;
    }
    let (trace, id) = context.ids()?;
    let parent = match page.parent.as_str() {
        "" => SpanId::INVALID,
        parent => SpanId::from_hex(parent).ok().filter(|_| parent.len() == 16)?,
    };
    let (name, kind) = page.kind.exported();
    let mut attributes = vec![
        opentelemetry::KeyValue::new(attr::CHAT_ID, page.chat.clone()),
        opentelemetry::KeyValue::new(attr::TURN_ID, page.turn.clone()),
    ];
    if page.kind == PageSpanKind::Call {
        attributes.push(opentelemetry::KeyValue::new(attr::RPC_SYSTEM, "grpc"));
        attributes.push(opentelemetry::KeyValue::new(attr::RPC_METHOD, name));
        // A page knows whether it got an answer, and no more.
        attributes.push(opentelemetry::KeyValue::new(attr::RPC_STATUS, if page.failed { "UNKNOWN" } else { "OK" }));
    }
    Some(SpanData {
        span_context: SpanContext::new(trace, id, TraceFlags::SAMPLED, false, TraceState::default()),
        parent_span_id: parent,
        parent_span_is_remote: false,
        span_kind: kind,
        name: Cow::Borrowed(name),
        start_time: page.start,
        end_time: page.end.max(page.start),
        attributes,
        dropped_attributes_count: 0,
        events: Default::default(),
        links: Default::default(),
        status: if page.failed { Status::error("") } else { Status::Unset },
        instrumentation_scope: Default::default(),
    })
}
