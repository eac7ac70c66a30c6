//! Dispatches of a round's calls: which, in what order, and whose refusal is believed.
#![allow(clippy::unwrap_used)]

mod support;

use reliant_store::*;
use reliant_telemetry::TraceContext;
use reliant_types::{pb::ToolCallStatus as Status, *};
use support::*;

#[tokio::test]
async fn a_call_is_not_sent_ahead_of_those_before_it_whoever_asks() {
    let world = World::new().await;
    let round = vec![looking(0, "grep"), looking(1, "grep"), call(2, "shell"), looking(3, "grep"), asking(4, "shell")];
    let (turn, calls) = world.asked(round).await;
    let sent = async || -> Vec<usize> {
        let orders = world.store().prepare_dispatches(world.chat, &calls, &[]).await.unwrap().value;
        let place = |id: &str| calls.iter().position(|call| call.to_string() == id).unwrap();
        orders.iter().filter(|order| order.call.generation == 1).map(|order| place(&order.call.call_id)).collect()
    };
    assert_eq!(world.step().await, Step::Dispatch { turn, calls: calls[..2].to_vec() });
    assert_eq!(sent().await, [0, 1]);
    assert_eq!(world.ack(&world.result(calls[0], 1, "")).await, pb::AckOutcome::Committed);
    assert_eq!(sent().await, [0usize; 0], "one before it is open");
    assert_eq!(world.ack(&world.result(calls[1], 2, "")).await, pb::AckOutcome::Committed);
    assert_eq!(sent().await, [2]);
    assert_eq!(world.ack(&world.result(calls[2], 1, "")).await, pb::AckOutcome::Committed);
    // Whoever is asked first: the last one's approval comes while one before it runs.
    assert_eq!(sent().await, [3]);
    let approvals = world.approvals().await;
    let _ = world.store().decide_approval(world.user, approvals[0], true, pb::ApprovalScope::Once).await.unwrap();
    assert_eq!(sent().await, [0usize; 0]);
    assert_eq!(world.ack(&world.result(calls[3], 2, "")).await, pb::AckOutcome::Committed);
    assert_eq!(world.step().await, Step::Dispatch { turn, calls: vec![calls[4]] });
    assert_eq!(sent().await, [4]);
}

#[tokio::test]
async fn a_refusal_by_another_journal_is_believed_only_of_what_may_run_twice() {
    let world = World::new().await;
    let repeatable = NewCall { repeatable: true, ..looking(1, "glob") };
    let (turn, calls) = world.asked(vec![looking(0, "grep"), repeatable]).await;
    for (call, expected) in calls.iter().zip([Status::OutcomeUnknown, Status::Pending]) {
        let generation = world.dispatch(*call).await;
        let reply = pb::DispatchReply {
            outcome: pb::DispatchOutcome::Refused as i32,
            incarnation: Incarnation::new().to_string(),
            ..Default::default()
        };
        let _ = world.store().dispatch_replied(*call, generation, &reply).await.unwrap();
        let row = world.calls(turn).await.into_iter().find(|row| row.id == call.to_string()).unwrap();
        assert_eq!(row.status(), expected);
    }
}

#[tokio::test]
async fn all_calls_of_a_round_are_sent_by_one_transaction() {
    let world = World::new().await;
    let (turn, calls) = world.asked((0..8).map(|index| looking(index, "grep")).collect()).await;
    let mut shuffled = calls.clone();
    shuffled.reverse();
    let trace = |n: usize| TraceContext::from_traceparent(&format!("00-{:032x}-{:016x}-01", 7, n + 1));
    let traces: Vec<_> = (0..8).rev().map(trace).collect();
    let prepared = world.store().prepare_dispatches(world.chat, &shuffled, &traces).await.unwrap();
    assert!(prepared.value.iter().all(|order| order.replaces.is_empty()));
    let sent: Vec<ToolCallId> = prepared.value.iter().map(|order| order.call.call_id.parse().unwrap()).collect();
    assert_eq!(sent, calls, "in the order of the message");
    assert_eq!(kinds(&prepared.events), vec!["call DISPATCHED"; 8]);
    let times = "SELECT count(DISTINCT created_at) FROM events WHERE kind = 'tool_call_changed' AND seq > (
                 SELECT max(seq) - 8 FROM events)";
    assert_eq!(world.db.number(times).await, 1);
    // Those that may not be sent do not hold up the others.
    let ended = world.result(calls[3], 1, "ok");
    assert_eq!(world.ack(&ended).await, pb::AckOutcome::Committed);
    let again = world.store().prepare_dispatches(world.chat, &calls, &[]).await.unwrap().value;
    assert_eq!(again.len(), 7);
    assert!(again.iter().all(|order| order.call.generation == 2 && order.turn == turn));
    let replaced: Vec<_> = again.iter().map(|order| order.replaces.clone()).collect();
    assert_eq!(replaced, [0, 1, 2, 4, 5, 6, 7].map(trace), "each stands beside its own first dispatch");
    world.log().await;
}
