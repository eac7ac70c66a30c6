//! Trace context from the client through the workflow to its activities, in Temporal's headers.
//!
//! A signal's header does not reach the run loop, so a wake carries its `traceparent` in the payload as well; the loop
//! puts the newest one into the context value that the interceptor below copies into each activity's header.

use std::{collections::HashMap, rc::Rc};

use reliant_telemetry::trace::TraceContext;
use temporalio_common::protos::temporal::api::common::v1::Payload;
use temporalio_sdk::{WorkflowContextKey, WorkflowContextView, workflow_interceptors::*};

pub(crate) const TRACEPARENT: &str = "traceparent";

pub(crate) fn payload(traceparent: &str) -> Payload {
    Payload {
        metadata: HashMap::from([("encoding".to_owned(), b"binary/plain".to_vec())]),
        data: traceparent.as_bytes().to_vec(),
        ..Default::default()
    }
}

/// The trace context of an activity's header; empty where there is none.
pub(crate) fn from_headers(headers: &HashMap<String, Payload>) -> TraceContext {
    match headers.get(TRACEPARENT).map(|payload| std::str::from_utf8(&payload.data)) {
        Some(Ok(text)) => TraceContext::from_traceparent(text),
        _ => TraceContext::default(),
    }
}

/// The current `traceparent` within workflow code.
pub(crate) struct Current;

impl WorkflowContextKey for Current {
    type Value = Payload;
}

struct Carry;

impl WorkflowInterceptor for Carry {
    fn execute<'a>(
        &'a self,
        ctx: WorkflowInterceptorContext,
        input: ExecuteWorkflowInput,
        next: WorkflowNext<'a, ExecuteWorkflowInput, WorkflowInterceptorFuture<'a, ExecuteWorkflowResult>>,
    ) -> WorkflowInterceptorFuture<'a, ExecuteWorkflowResult> {
        let parent = input.headers().get(TRACEPARENT).cloned();
        let run = next.run(input);
        match parent {
            Some(parent) => WorkflowInterceptorFuture::new(ctx.with_context_value::<Current, _>(parent, run)),
            None => run,
        }
    }

    fn schedule_activity(
        &self,
        ctx: WorkflowInterceptorContext,
        mut input: ScheduleActivityInput,
        next: WorkflowNext<'static, ScheduleActivityInput, CancellableWorkflowOutboundFuture<ScheduleActivityResult>>,
    ) -> CancellableWorkflowOutboundFuture<ScheduleActivityResult> {
        if let Some(parent) = ctx.context_value::<Current>() {
            input.headers_mut().insert(TRACEPARENT.to_owned(), (*Rc::clone(&parent)).clone());
        }
        next.run(input)
    }

    fn schedule_local_activity(
        &self,
        ctx: WorkflowInterceptorContext,
        mut input: ScheduleLocalActivityInput,
        next: WorkflowNext<
            'static,
            ScheduleLocalActivityInput,
            CancellableWorkflowOutboundFuture<ScheduleActivityResult>,
        >,
    ) -> CancellableWorkflowOutboundFuture<ScheduleActivityResult> {
        if let Some(parent) = ctx.context_value::<Current>() {
            input.headers_mut().insert(TRACEPARENT.to_owned(), (*Rc::clone(&parent)).clone());
        }
        next.run(input)
    }
}

pub(crate) fn interceptor() -> WorkflowInterceptorConstructor {
    WorkflowInterceptorConstructor::new(|_: &WorkflowContextView| Carry)
}
