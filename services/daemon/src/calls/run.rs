//! One call's run: started record, tool, finished record, offer.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Instant};

use futures::FutureExt;
use reliant_telemetry::{
    chain, names,
    trace::{TraceContext, hop},
};
use reliant_types::{Code, Failure, Incarnation, ToolCallId, limits, pb};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::Calls;
use crate::{
    journal::{Ticket, state::Header},
    output::{CallOutput, HeadTail},
    tools::{Job, Outcome, Prepared},
};

/// A call that the journal let start.
pub struct Begun {
    pub id: ToolCallId,
    pub dispatch: pb::Dispatch,
    pub prepared: Prepared,
    pub output: Arc<CallOutput>,
    pub cancel: CancellationToken,
    pub trace: TraceContext,
}

pub async fn run(calls: Arc<Calls>, begun: Begun, ticket: Ticket, started: oneshot::Sender<Result<(), Failure>>) {
    let id = begun.id;
    if let Err(error) = ticket.durable().await {
        // Nothing ran, and nothing will.
        calls.journal.abandon(id);
        calls.running.lock().remove(&id);
        calls.outputs.end(&begun.output, std::time::Duration::ZERO);
        let _ = started.send(Err(error.failure()));
        return;
    }
    let _ = started.send(Ok(()));
    let tool = begun.dispatch.tool.clone();
    let output = begun.output.clone();
    let generation = begun.dispatch.generation;
    let span = tracing::info_span!(
        names::span::TOOL_EXECUTE,
        otel.name = format!("execute_tool {tool}"),
        gen_ai.operation.name = "execute_tool",
        gen_ai.tool.name = %tool,
        gen_ai.tool.call.id = %id,
        tool.call_id = %id,
        tool.generation = generation,
        chat.id = %begun.dispatch.chat_id,
        turn.id = %begun.dispatch.turn_id,
        tool.status = tracing::field::Empty,
        error.type = tracing::field::Empty,
        otel.status_code = tracing::field::Empty,
    );
    let received = begun.trace.clone();
    received.set_parent(&span);
    let began = Instant::now();
    let outcome = execute(&calls, begun).instrument(span.clone()).await;
    let took = began.elapsed();
    let status = outcome.status.as_str_name().trim_start_matches("TOOL_CALL_STATUS_").to_ascii_lowercase();
    span.record("tool.status", status.as_str());
    if outcome.status != pb::ToolCallStatus::Succeeded {
        span.record("error.type", outcome.code.map_or(status.as_str(), |code| code.as_str()));
        span.record("otel.status_code", "ERROR");
    }
    drop(span);
    // The context that the result carries is of a span that has ended.
    let result_span = tracing::info_span!(names::span::TOOL_RESULT, otel.kind = "producer", tool.call_id = %id);
    let trace = hop(&received, result_span);
    let result = result_of(id, &outcome, calls.journal.incarnation(), took.as_micros() as i64);
    finish(&calls, id, result, &trace).await;
    calls.hub.lengths(&output);
    calls.outputs.end(&output, limits::PREFIX_HOLD);
}

async fn execute(calls: &Calls, begun: Begun) -> Outcome {
    let Begun { id, dispatch, prepared, output, cancel, trace } = begun;
    if cancel.is_cancelled() {
        return Outcome::cancelled("cancelled before it started");
    }
    let Some(root) = calls.roots.get(&dispatch.root_id) else {
        return Outcome::failed(Code::Internal, "the root is gone");
    };
    // What a command or a server is told of must not be a span that dies with this process.
    let told = hop(&trace, tracing::info_span!(names::span::TOOL_SEND, otel.kind = "producer", tool.call_id = %id));
    let job = Job {
        call: id,
        timeout: Calls::timeout_of(&dispatch),
        turn_id: dispatch.turn_id,
        iteration: dispatch.iteration,
        index: dispatch.index,
        root,
        cancel,
        output,
        hub: calls.hub.clone(),
        traceparent: told.traceparent,
        running_dir: calls.running_dir.clone(),
    };
    // A fault of one tool must not leave its call without an end.
    match AssertUnwindSafe(calls.toolbox.run(prepared, job)).catch_unwind().await {
        Ok(outcome) => outcome,
        Err(_) => Outcome::failed(
            Code::Internal,
            "the tool failed by a fault of the daemon; it may have done part of its work",
        ),
    }
}

/// The record is on disk when the offer is made. While the disk refuses, the journal keeps trying.
async fn finish(calls: &Calls, id: ToolCallId, result: pb::ToolResult, trace: &TraceContext) {
    let Some(ticket) = calls.journal.finish(id, &result) else {
        tracing::error!(tool.call_id = %id, "a call ended that the journal does not know to run");
        calls.running.lock().remove(&id);
        return;
    };
    let written = ticket.durable().await;
    // Before the offer: its acknowledgement may let a newer generation start.
    calls.running.lock().remove(&id);
    match written {
        Ok(()) => calls.outbox.add(id, &trace.traceparent, Some(result)),
        // Only when the daemon ends first: the next one reports the call as unknown.
        Err(error) => tracing::error!(tool.call_id = %id, error = %chain(&error), "a result could not be written"),
    }
}

fn result_of(id: ToolCallId, outcome: &Outcome, incarnation: Incarnation, run_us: i64) -> pb::ToolResult {
    pb::ToolResult {
        call_id: id.to_string(),
        generation: 0,
        status: outcome.status as i32,
        unknown_cause: outcome.cause as i32,
        content: HeadTail::of(&outcome.content, limits::TOOL_RESULT_MAX_BYTES).into(),
        is_error: outcome.is_error,
        exit_code: outcome.exit_code,
        output_bytes: outcome.output_bytes as i64,
        incarnation: incarnation.to_string(),
        run_us,
        daemon_id: String::new(),
        error_code: outcome.code.map_or_else(String::new, |c| c.as_str().to_owned()),
    }
}

/// The result of a call that an earlier process did not see to its end.
pub fn died_with_daemon(id: ToolCallId, header: &Header, incarnation: Incarnation) -> pb::ToolResult {
    let text = format!(
        "the daemon died while {} ran; what was left of it was killed, and whether it took effect is not known: look \
         before you repeat it",
        header.tool
    );
    result_of(id, &Outcome::process_died(text), incarnation, 0)
}
