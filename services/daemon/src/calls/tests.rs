//! Calls over a real journal: dispatched twice, cancelled before and while they run, recovered after a crash.

use std::{sync::Arc, time::Duration};

use reliant_telemetry::trace::TraceContext;
use reliant_types::{Code, ToolCallId, pb};
use serde_json::json;

use super::{Calls, Parts};
use crate::{
    journal::Journal,
    tools::{Toolbox, tests::Fixture},
};

struct Daemon {
    calls: Arc<Calls>,
    fixture: Fixture,
}

impl Daemon {
    async fn new() -> Self {
        let fixture = Fixture::new();
        Self { calls: Self::calls(&fixture).await, fixture }
    }

    async fn calls(fixture: &Fixture) -> Arc<Calls> {
        let state = fixture.dir.path().join("state");
        let toolbox = Toolbox {
            mcp: fixture.toolbox.mcp.clone(),
            files: Arc::default(),
            sandbox: fixture.toolbox.sandbox.clone(),
            bench_tools: true,
        };
        let calls = Calls::new(Parts {
            journal: Arc::new(Journal::open(&state, 1 << 24).unwrap()),
            outputs: fixture.outputs.clone(),
            roots: fixture.roots.clone(),
            toolbox: Arc::new(toolbox),
            max_running: 2,
            running_dir: state.join("running"),
        });
        calls.recover().await.unwrap();
        calls
    }

    /// As after a kill: nothing of the process is left but its files and its children.
    async fn killed(self) -> Self {
        let Self { calls, fixture } = self;
        calls.journal.close();
        drop(calls);
        Self { calls: Self::calls(&fixture).await, fixture }
    }

    fn dispatch(&self, call: ToolCallId, generation: i64, tool: &str, input: serde_json::Value) -> pb::Dispatch {
        pb::Dispatch {
            call_id: call.to_string(),
            generation,
            chat_id: "chat".into(),
            user_id: "user".into(),
            incarnation: self.calls.journal.incarnation().to_string(),
            tool: tool.into(),
            input_json: input.to_string(),
            timeout_ms: 20_000,
            ..Default::default()
        }
    }

    async fn send(&self, dispatch: pb::Dispatch) -> pb::DispatchReply {
        self.calls.dispatch(dispatch, TraceContext::default()).await.expect("an answer")
    }

    async fn shell(&self, call: ToolCallId, generation: i64, command: &str) -> pb::DispatchOutcome {
        self.send(self.dispatch(call, generation, "shell", json!({"command": command}))).await.outcome()
    }

    async fn result(&self) -> pb::ToolResult {
        let next = self.calls.outbox.next(1, &self.calls.journal);
        tokio::time::timeout(Duration::from_secs(10), next).await.expect("a result").remove(0).0
    }

    fn ack(&self, result: &pb::ToolResult, outcome: pb::AckOutcome) {
        self.calls.acknowledge(&pb::ResultAck {
            call_id: result.call_id.clone(),
            generation: result.generation,
            outcome: outcome as i32,
            acknowledged_at_ms: 0,
        });
    }

    async fn cancel(&self, call: ToolCallId, generation: i64) -> bool {
        self.calls.cancel(pb::CancelCall { call_id: call.to_string(), generation }).await.unwrap().known
    }
}

use pb::DispatchOutcome::{Attached, Finished, Refused, Started, Tombstone};

#[tokio::test]
async fn a_call_runs_once_however_often_it_is_dispatched() {
    let daemon = Daemon::new().await;
    let call = ToolCallId::new();
    let script = "echo run >> runs; sleep 0.3; echo done";
    assert_eq!(daemon.shell(call, 1, script).await, Started);
    assert_eq!(daemon.shell(call, 1, script).await, Attached);
    assert_eq!(daemon.shell(call, 2, script).await, Attached);
    assert_eq!(daemon.shell(call, 1, script).await, Tombstone);
    let result = daemon.result().await;
    assert_eq!(
        (result.generation, result.status(), &result.content[..]),
        (2, pb::ToolCallStatus::Succeeded, &b"done\n"[..])
    );
    assert_eq!(daemon.shell(call, 3, script).await, Finished);
    assert_eq!(daemon.result().await.generation, 3);
    // An acknowledgement of an older generation takes nothing back.
    daemon.ack(&result, pb::AckOutcome::Committed);
    assert_eq!(daemon.calls.outbox.len(), 1);
    daemon.ack(&pb::ToolResult { generation: 3, ..result }, pb::AckOutcome::Committed);
    assert_eq!(daemon.calls.outbox.len(), 0);
    assert_eq!(daemon.shell(call, 4, script).await, Tombstone);
    assert_eq!(std::fs::read_to_string(daemon.fixture.path("runs")).unwrap(), "run\n");
}

#[tokio::test]
async fn what_cannot_start_is_refused_and_may_come_again() {
    let daemon = Daemon::new().await;
    let call = ToolCallId::new();
    let good = daemon.dispatch(call, 1, "noop", json!({}));
    for (change, code) in [
        (pb::Dispatch { incarnation: ToolCallId::new().to_string(), ..good.clone() }, Code::DaemonReplaced),
        (pb::Dispatch { tool: "fly".into(), ..good.clone() }, Code::ToolUnknown),
        (pb::Dispatch { root_id: "../etc".into(), ..good.clone() }, Code::PathOutsideRoot),
        (pb::Dispatch { input_json: "{".into(), ..good.clone() }, Code::ToolArgumentsInvalid),
        (pb::Dispatch { call_id: "x".into(), ..good.clone() }, Code::InvalidArgument),
        (pb::Dispatch { generation: 0, ..good.clone() }, Code::InvalidArgument),
    ] {
        let reply = daemon.send(change).await;
        assert_eq!((reply.outcome(), reply.error_code.as_str()), (Refused, code.as_str()), "{}", reply.message);
        assert!(!reply.message.is_empty());
    }
    let (a, b) = (ToolCallId::new(), ToolCallId::new());
    assert_eq!((daemon.shell(a, 1, "sleep 5").await, daemon.shell(b, 1, "sleep 5").await), (Started, Started));
    assert_eq!(daemon.send(good.clone()).await.error_code, Code::QueueFull.as_str());
    daemon.cancel(a, 1).await;
    daemon.result().await;
    assert_eq!(daemon.send(good).await.outcome(), Started);
    daemon.calls.drain(Duration::ZERO).await;
    // From here on, what is new is left to the daemon that comes next.
    let late = daemon.dispatch(ToolCallId::new(), 1, "noop", json!({}));
    assert!(daemon.calls.dispatch(late, TraceContext::default()).await.is_none());
    assert_eq!(daemon.shell(a, 1, "sleep 5").await, Finished);
}

#[tokio::test]
async fn a_cancel_is_final_whether_it_comes_before_or_while() {
    let daemon = Daemon::new().await;
    let (unseen, running) = (ToolCallId::new(), ToolCallId::new());
    assert!(!daemon.cancel(unseen, 2).await);
    assert_eq!(daemon.shell(unseen, 1, "touch ran").await, Tombstone);
    assert_eq!(daemon.shell(unseen, 2, "touch ran").await, Tombstone);
    assert_eq!(daemon.shell(running, 1, "sleep 1; touch ran").await, Started);
    assert!(daemon.cancel(running, 1).await);
    let result = daemon.result().await;
    assert_eq!((result.status(), result.error_code.as_str()), (pb::ToolCallStatus::Cancelled, "CANCELLED"));
    // After a crash all the same.
    let daemon = daemon.killed().await;
    assert_eq!(daemon.shell(unseen, 2, "touch ran").await, Tombstone);
    assert_eq!(daemon.shell(running, 1, "touch ran").await, Finished);
    assert!(!daemon.fixture.path("ran").exists());
}

#[tokio::test]
async fn after_a_crash_leftovers_die_and_the_outcome_is_unknown() {
    let daemon = Daemon::new().await;
    let (done, running) = (ToolCallId::new(), ToolCallId::new());
    assert_eq!(daemon.shell(done, 1, "echo done").await, Started);
    daemon.result().await;
    assert_eq!(
        daemon.shell(running, 1, "touch begun; (setsid sleep 2; touch ran) & sleep 2; touch ran").await,
        Started
    );
    while !daemon.fixture.path("begun").exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // The journal is closed under the running call: what it does from here on is never recorded.
    let daemon = daemon.killed().await;
    let mut results = Vec::new();
    while results.len() < 2 {
        let next = daemon.calls.outbox.next(1, &daemon.calls.journal).await;
        results.extend(next.into_iter().map(|(result, _)| result));
    }
    results.sort_by_key(|r| r.status);
    assert_eq!((results[0].call_id.clone(), &results[0].content[..]), (done.to_string(), &b"done\n"[..]));
    assert_eq!(results[1].call_id, running.to_string());
    assert_eq!(results[1].status(), pb::ToolCallStatus::OutcomeUnknown);
    assert_eq!(results[1].unknown_cause(), pb::UnknownCause::ProcessDied);
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(!daemon.fixture.path("ran").exists(), "a leftover lived on");
    assert_eq!(daemon.shell(running, 2, "touch ran").await, Finished);
}

#[tokio::test]
async fn the_empty_tool_leaves_nothing_behind() {
    let daemon = Daemon::new().await;
    let began = std::time::Instant::now();
    const CALLS: u32 = 50;
    for _ in 0..CALLS {
        assert_eq!(daemon.send(daemon.dispatch(ToolCallId::new(), 1, "noop", json!({}))).await.outcome(), Started);
        let result = daemon.result().await;
        assert_eq!(&result.content[..], b"ok");
        daemon.ack(&result, pb::AckOutcome::Committed);
    }
    // For the curious; it is mostly the disk's two syncs.
    eprintln!("{:?} a call", began.elapsed() / CALLS);
    assert!(daemon.calls.running_ids().is_empty());
    assert_eq!((daemon.calls.outbox.len(), daemon.calls.journal.finished().len()), (0, 0));
}
