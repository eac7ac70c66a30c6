//! Sending tool calls to their daemon.
//!
//! A dispatch's generation is durable before it is sent, so that whatever happens next is known for what it is. No
//! answer means nothing: only the daemon's journal says what ran.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::StreamExt;
use reliant_bus::{BusError, ToolSubject, Topic as _};
use reliant_store::{CancelCall, DispatchOrder};
use reliant_telemetry::{TraceContext, chain, metrics};
use reliant_types::{ChatId, ToolCallId, limits, pb};
use tracing::{Instrument, Span, field::Empty};

use crate::engine::{Engine, EngineError};

/// Dispatches of one round under way at one time.
const PARALLEL: usize = 32;
/// A call that took longer than this is shown as running; a quicker one goes straight to its result.
const RUNNING_AFTER: Duration = Duration::from_millis(20);

/// What became of one dispatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sent {
    /// The daemon has it; its result wakes.
    Taken,
    /// Postgres has changed: ask it.
    Changed,
    /// Nobody knows whether it arrived.
    Unclear,
}

/// The worst of what became of them.
pub async fn send_all(engine: &Arc<Engine>, chat: ChatId, calls: &[ToolCallId]) -> Result<Sent, EngineError> {
    let spans: Vec<Span> = calls.iter().map(|call| leaving(*call)).collect();
    let traces: Vec<TraceContext> = spans.iter().map(TraceContext::of).collect();
    let mut prepared = engine.store.prepare_dispatches(chat, calls, &traces).await?;
    let orders = std::mem::take(&mut prepared.value);
    engine.tell(prepared);
    // What crosses is the context of a span that has ended: a kill cannot orphan what follows.
    let mut traces: HashMap<ToolCallId, TraceContext> = calls.iter().copied().zip(traces).collect();
    for (call, span) in calls.iter().zip(spans) {
        match orders.iter().find(|order| order.call.call_id == call.to_string()) {
            Some(order) => leaves(&span, order),
            None => {
                span.record("tool.status", "not_sent");
            }
        }
    }
    // Some are not to be sent any more, or not yet, or their daemon is away.
    let mut worst = if orders.len() == calls.len() { Sent::Taken } else { Sent::Changed };
    let mut sent = futures::stream::iter(orders)
        .map(|order| {
            let engine = engine.clone();
            let trace = order.call.call_id.parse().ok().and_then(|call| traces.remove(&call)).unwrap_or_default();
            async move { send(&engine, order, trace).await }
        })
        .buffer_unordered(PARALLEL);
    let mut failed = None;
    // All are sent even when one fails: each stands for itself.
    while let Some(outcome) = sent.next().await {
        match outcome {
            Ok(outcome) => worst = worst.max(outcome),
            Err(error) => failed = Some(error),
        }
    }
    failed.map_or(Ok(worst), Err)
}

/// The span with which a call leaves. Its context is stored with the dispatch, so it is there before the dispatch is.
fn leaving(call: ToolCallId) -> Span {
    let span = tracing::info_span!(
        "tool.dispatch",
        otel.kind = "producer",
        messaging.system = "nats",
        messaging.operation.name = "request",
        messaging.operation.type = "send",
        messaging.destination.template = ToolSubject::TEMPLATE,
        tool.call_id = %call,
        tool.generation = Empty,
        tool.status = Empty,
        gen_ai.tool.name = Empty,
        daemon.id = Empty,
    );
    TraceContext::incoming().set_parent(&span);
    span
}

/// A dispatch that is made again stands beside the one before it.
fn leaves(span: &Span, order: &DispatchOrder) {
    span.record("tool.generation", order.call.generation);
    span.record("gen_ai.tool.name", &order.call.tool);
    span.record("daemon.id", tracing::field::display(order.daemon));
    order.replaces.link(span);
}

async fn send(engine: &Arc<Engine>, order: DispatchOrder, trace: TraceContext) -> Result<Sent, EngineError> {
    let Ok(call) = order.call.call_id.parse::<ToolCallId>() else { return Ok(Sent::Changed) };
    let (daemon, generation) = (order.daemon, order.call.generation);
    engine.rounds.sent(call);
    let request = pb::ToolRequest { request: Some(pb::tool_request::Request::Dispatch(order.call)) };
    let asked = engine.bus.request_with(&trace, &ToolSubject { daemon }, &request, limits::NATS_REQUEST_TIMEOUT).await;
    let count = |outcome: &str| metrics::TOOL_DISPATCH.with_label_values(&[outcome]).inc();
    let reply = match asked {
        Ok(pb::ToolReply { reply: Some(pb::tool_reply::Reply::Dispatch(reply)) }) => reply,
        Ok(_) => {
            count("failed");
            return Ok(Sent::Unclear);
        }
        Err(error) if error.surely_not_delivered() => {
            count("away");
            let committed = engine.store.daemon_away(call, generation).await?;
            engine.tell_with(committed, false);
            return Ok(Sent::Changed);
        }
        Err(error) => {
            count(if matches!(error, BusError::Timeout(_)) { "timeout" } else { "failed" });
            tracing::warn!(error = %chain(&error), tool.call_id = %call, "a dispatch was not answered");
            return Ok(Sent::Unclear);
        }
    };
    match reply.outcome() {
        outcome @ (pb::DispatchOutcome::Started | pb::DispatchOutcome::Attached) => {
            count(if outcome == pb::DispatchOutcome::Started { "started" } else { "attached" });
            let (engine, trace) = (engine.clone(), trace);
            tokio::spawn(async move { mark_running(&engine, call, generation, reply, trace).await });
            Ok(Sent::Taken)
        }
        pb::DispatchOutcome::Finished => {
            count("finished");
            Ok(Sent::Taken)
        }
        outcome @ (pb::DispatchOutcome::Tombstone | pb::DispatchOutcome::Refused) => {
            count(if outcome == pb::DispatchOutcome::Refused { "refused" } else { "tombstone" });
            let committed = engine.store.dispatch_replied(call, generation, &reply).await?;
            engine.tell_with(committed, false);
            Ok(Sent::Changed)
        }
        pb::DispatchOutcome::Unspecified => {
            count("failed");
            Ok(Sent::Unclear)
        }
    }
}

/// Behind the turn's path, and not at all for a call that has its result already.
async fn mark_running(
    engine: &Arc<Engine>,
    call: ToolCallId,
    generation: i64,
    reply: pb::DispatchReply,
    trace: TraceContext,
) {
    tokio::time::sleep(RUNNING_AFTER).await;
    if engine.rounds.is_settled(call) {
        return;
    }
    let span = tracing::info_span!("tool.running", tool.call_id = %call);
    trace.set_parent(&span);
    async {
        match engine.store.dispatch_replied(call, generation, &reply).await {
            Ok(committed) => engine.tell(committed),
            Err(error) => tracing::debug!(error = %chain(&error), "a call was not marked as running"),
        }
    }
    .instrument(span)
    .await;
}

/// Asks the daemon to stop a call of a turn that was cancelled. It is asked again until it answers.
pub async fn cancel(engine: &Arc<Engine>, cancel: CancelCall) {
    let CancelCall { call, generation, daemon } = cancel;
    let message = pb::CancelCall { call_id: call.to_string(), generation };
    let request = pb::ToolRequest { request: Some(pb::tool_request::Request::Cancel(message)) };
    let reply = match engine.bus.request(&ToolSubject { daemon }, &request, limits::NATS_REQUEST_TIMEOUT).await {
        Ok(pb::ToolReply { reply: Some(pb::tool_reply::Reply::Cancel(reply)) }) => reply,
        Ok(_) => return,
        Err(error) => {
            tracing::debug!(error = %chain(&error), tool.call_id = %call, "a cancel was not answered");
            return;
        }
    };
    match engine.store.cancel_replied(call, generation, &reply).await {
        Ok(committed) => engine.tell(committed),
        Err(error) => tracing::debug!(error = %chain(&error), tool.call_id = %call, "a cancel's answer was not stored"),
    }
}
