//! Trace context from the client through the workflow to its activities, in Temporal's headers.
//!
//! A signal's header does not reach the run loop, so a wake carries its `traceparent` in the payload as well; the loop
//! puts the newest one into the context value that the interceptor below copies into each activity's header.

use std::{collections::HashMap, rc::Rc, sync::Arc};

use reliant_telemetry::trace::TraceContext;
use temporalio_common::protos::temporal::api::common::v1::Payload;
use temporalio_sdk::{WorkflowContextKey, WorkflowContextView, workflow_interceptors::*};

use crate::watchdog::Running;

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

struct Carry {
    running: Running,
    workflow: Arc<str>,
}

impl WorkflowInterceptor for Carry {
    fn execute<'a>(
        &'a self,
        ctx: WorkflowInterceptorContext,
        input: ExecuteWorkflowInput,
        next: WorkflowNext<'a, ExecuteWorkflowInput, WorkflowInterceptorFuture<'a, ExecuteWorkflowResult>>,
    ) -> WorkflowInterceptorFuture<'a, ExecuteWorkflowResult> {
        let parent = input.headers().get(TRACEPARENT).cloned();
        let run = next.run(input);
        let run = match parent {
            Some(parent) => WorkflowInterceptorFuture::new(ctx.with_context_value::<Current, _>(parent, run)),
            None => run,
        };
        let mut run = Box::pin(run);
        WorkflowInterceptorFuture::new(std::future::poll_fn(move |task| {
            self.running.enter(&self.workflow);
            let polled = run.as_mut().poll(task);
            self.running.leave();
            polled
        }))
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
}

/// `running` is told whose code runs.
pub(crate) fn interceptor(running: Running) -> WorkflowInterceptorConstructor {
    WorkflowInterceptorConstructor::new(move |view: &WorkflowContextView| Carry {
        running: running.clone(),
        workflow: view.workflow_id().into(),
    })
}
