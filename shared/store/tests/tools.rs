//! Tool calls: sent, settled once, approved, cancelled.
#![allow(clippy::unwrap_used)]

mod support;

use reliant_store::*;
use reliant_types::{pb::ToolCallStatus as Status, *};
use support::*;

#[tokio::test]
async fn a_result_twice_is_committed_once() {
    let world = World::new().await;
    let (turn, call, generation) = world.dispatched().await;
    let result = world.result(call, generation, "ok");
    assert_eq!(world.ack(&result).await, pb::AckOutcome::Committed);
    let before = world.log().await.len();
    let again = world.store().commit_result(world.daemon, &result).await.unwrap();
    assert_eq!((again.value, again.events.len(), again.wake), (ResultFate::Repeated, 0, None));
    assert_eq!(world.log().await.len(), before);
    // Another outcome afterwards is recorded and not applied.
    let other = pb::ToolResult { status: Status::Failed as i32, ..world.result(call, generation, "no") };
    assert_eq!(world.ack(&other).await, pb::AckOutcome::Discarded);
    assert_eq!((world.call_status(turn).await, world.calls(turn).await[0].result.as_str()), (Status::Succeeded, "ok"));
    let late = "SELECT count(*) FROM tool_calls WHERE late_result = 'failed: no'";
    assert_eq!(world.db.number(late).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_result_offered_by_eight_gateways_at_once_is_committed_once() {
    let world = World::new().await;
    let (_, call, generation) = world.dispatched().await;
    let result = world.result(call, generation, "ok");
    let offers = (0..8).map(|_| world.store().commit_result(world.daemon, &result));
    let acks: Vec<_> = futures::future::join_all(offers).await.into_iter().map(Result::unwrap).collect();
    assert!(acks.iter().all(|ack| ack.value.ack() == pb::AckOutcome::Committed));
    assert_eq!(acks.iter().filter(|ack| ack.wake.is_some()).count(), 1);
    let messages = world.messages().await;
    assert_eq!(messages.iter().filter(|message| message.role() == pb::Role::Tool).count(), 1);
    world.log().await;
}

#[tokio::test]
async fn a_result_from_elsewhere_is_discarded() {
    let world = World::new().await;
    let (turn, call, generation) = world.dispatched().await;
    let good = world.result(call, generation, "ok");
    let (other, _) = world.store().register_daemon(world.user, "desktop", false).await.unwrap();
    let ack = world.store().commit_result(other, &good).await.unwrap();
    assert_eq!(ack.value, ResultFate::Foreign, "another daemon's");
    let future = world.result(call, generation + 1, "ok");
    assert_eq!(world.ack(&future).await, pb::AckOutcome::Discarded, "a generation that was never sent");
    let journal = pb::ToolResult { incarnation: Incarnation::new().to_string(), ..good.clone() };
    assert_eq!(world.ack(&journal).await, pb::AckOutcome::Discarded, "another journal's");
    let unknown = world.result(ToolCallId::new(), 1, "ok");
    assert_eq!(world.ack(&unknown).await, pb::AckOutcome::Discarded, "a call that never was");
    let not_ended = pb::ToolResult { status: Status::Running as i32, ..good.clone() };
    assert_eq!(code(world.store().commit_result(world.daemon, &not_ended).await.unwrap_err()), Code::InvalidArgument);
    assert_eq!(world.call_status(turn).await, Status::Dispatched, "nothing of it was applied");
    assert_eq!(world.ack(&good).await, pb::AckOutcome::Committed);
}

#[tokio::test]
async fn a_call_that_was_not_sent_takes_no_result() {
    let world = World::new().await;
    let (turn, calls) = world.asked(vec![call(0, "shell")]).await;
    assert_eq!(world.ack(&world.result(calls[0], 0, "invented")).await, pb::AckOutcome::Discarded);
    assert_eq!(world.call_status(turn).await, Status::Pending);
}

#[tokio::test]
async fn a_result_of_an_earlier_generation_is_the_same_run() {
    let world = World::new().await;
    let (turn, call, first) = world.dispatched().await;
    world.db.execute("UPDATE tool_calls SET dispatched_at = now() - interval '1 minute'").await;
    assert_eq!(world.step().await, Step::Dispatch { turn, calls: vec![call] });
    assert_eq!(world.dispatch(call).await, first + 1);
    assert_eq!(world.ack(&world.result(call, first, "ok")).await, pb::AckOutcome::Committed);
    assert_eq!(world.call_status(turn).await, Status::Succeeded);
}

#[tokio::test]
async fn refused_and_buried_dispatches_settle() {
    let world = World::new().await;
    let reply = |outcome: pb::DispatchOutcome| pb::DispatchReply {
        outcome: outcome as i32,
        error_code: "PATH_OUTSIDE_ROOT".into(),
        message: "this daemon offers no such root".into(),
        ..Default::default()
    };
    let (turn, call, generation) = world.dispatched().await;
    let stale =
        world.store().dispatch_replied(call, generation + 1, &reply(pb::DispatchOutcome::Refused)).await.unwrap();
    assert!(stale.events.is_empty(), "another generation's answer");
    let refused = world.store().dispatch_replied(call, generation, &reply(pb::DispatchOutcome::Refused)).await.unwrap();
    assert_eq!(kinds(&refused.events), ["call FAILED", "message TOOL"]);
    let row = &world.calls(turn).await[0];
    assert_eq!(
        (row.error_code.as_str(), row.result.as_str()),
        ("PATH_OUTSIDE_ROOT", "this daemon offers no such root")
    );
    let _ = world.store().request_cancel(world.user, turn).await.unwrap();

    let (turn, call, generation) = world.dispatched().await;
    let _ = world.store().dispatch_replied(call, generation, &reply(pb::DispatchOutcome::Tombstone)).await.unwrap();
    assert_eq!(world.call_status(turn).await, Status::OutcomeUnknown, "nobody asked for a cancel");
}

fn no_room(code: &str) -> pb::DispatchReply {
    pb::DispatchReply {
        outcome: pb::DispatchOutcome::Refused as i32,
        error_code: code.into(),
        message: "256 calls run on this daemon".into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_call_that_finds_no_room_is_sent_again_and_says_what_it_waits_for() {
    let world = World::new().await;
    let (turn, calls) = world.asked(vec![call(0, "shell")]).await;
    let mut last = 0;
    for code in ["QUEUE_FULL", "JOURNAL_FULL"] {
        let generation = world.dispatch(calls[0]).await;
        assert!(generation > last, "a daemon may have seen the last one");
        last = generation;
        let refused = world.store().dispatch_replied(calls[0], generation, &no_room(code)).await.unwrap();
        assert_eq!(kinds(&refused.events), ["call PENDING"]);
        let row = &world.calls(turn).await[0];
        assert_eq!((row.waiting_for.as_str(), row.error_code.as_str()), ("256 calls run on this daemon", ""));
        assert!(world.store().prepare_dispatches(world.chat, &calls, &[]).await.unwrap().value.is_empty(), "not yet");
        let step = world.step().await;
        assert!(matches!(step, Step::Wait { for_ms: Some(1..=1500), .. }), "{step:?}");
        assert_eq!(world.turn_status(turn).await, pb::TurnStatus::Running, "its clock runs");
        world.db.execute("UPDATE tool_calls SET not_before = now()").await;
        assert_eq!(world.step().await, Step::Dispatch { turn, calls: calls.clone() });
    }
    let generation = world.dispatch(calls[0]).await;
    assert_eq!(world.calls(turn).await[0].waiting_for, "", "it was sent");
    assert_eq!(world.ack(&world.result(calls[0], generation, "ok")).await, pb::AckOutcome::Committed);
    assert_eq!(world.call_status(turn).await, Status::Succeeded);
    world.log().await;
}

#[tokio::test]
async fn a_running_call_whose_repetition_finds_no_room_runs_on() {
    let world = World::new().await;
    let (turn, call, first) = world.dispatched().await;
    world.db.execute("UPDATE tool_calls SET dispatched_at = now() - interval '1 minute'").await;
    let second = world.dispatch(call).await;
    let _ = world.store().dispatch_replied(call, second, &no_room("QUEUE_FULL")).await.unwrap();
    assert_eq!(world.call_status(turn).await, Status::Dispatched, "only this repetition did nothing");
    assert!(matches!(world.step().await, Step::Wait { for_ms: Some(_), .. }));
    assert_eq!(world.ack(&world.result(call, first, "ok")).await, pb::AckOutcome::Committed);
}

#[tokio::test]
async fn a_turn_that_waits_for_room_ends_at_its_deadline() {
    let world = World::new().await;
    let (turn, call, generation) = world.dispatched().await;
    let _ = world.store().dispatch_replied(call, generation, &no_room("QUEUE_FULL")).await.unwrap();
    world.db.execute("UPDATE turns SET deadline_at = now() - interval '1 second'").await;
    assert_eq!(world.step().await, Step::Idle);
    let (row, calls) = world.store().get_turn(world.user, turn).await.unwrap();
    assert_eq!((row.status(), row.error_code.as_str()), (pb::TurnStatus::Failed, "TURN_DEADLINE"));
    assert_eq!(calls[0].status(), Status::Cancelled, "it never ran");
}

#[tokio::test]
async fn nobody_listening_sends_the_call_back_to_waiting() {
    let mut world = World::new().await;
    let (turn, call, generation) = world.dispatched().await;
    let away = world.store().daemon_away(call, generation).await.unwrap();
    assert_eq!(kinds(&away.events), ["call WAITING_DAEMON"]);
    assert!(matches!(world.step().await, Step::Wait { .. }), "the lease is not believed any more");
    assert_eq!(world.turn_status(turn).await, pb::TurnStatus::WaitingDaemon);
    world.daemon_comes(world.journal).await;
    let woken = world.store().daemon_back(world.daemon).await.unwrap();
    assert_eq!(woken.iter().map(|it| it.wake.as_ref().unwrap().chat).collect::<Vec<_>>(), [world.chat]);
    assert_eq!(world.step().await, Step::Dispatch { turn, calls: vec![call] });
    assert_eq!(world.dispatch(call).await, generation + 1);
}

#[tokio::test]
async fn a_call_waits_for_an_away_daemon() {
    let mut world = World::new().await;
    let (turn, calls) = world.asked(vec![call(0, "shell")]).await;
    world.daemon_goes().await;
    let none = world.store().prepare_dispatches(world.chat, &calls, &[]).await.unwrap();
    assert!(none.value.is_empty());
    assert_eq!(kinds(&none.events), ["call WAITING_DAEMON"]);
    assert!(matches!(world.step().await, Step::Wait { for_ms: None, .. }));
    world.daemon_comes(Incarnation::new()).await;
    assert_eq!(world.step().await, Step::Dispatch { turn, calls: calls.clone() }, "never sent: any journal will do");
    world.dispatch(calls[0]).await;
}

#[tokio::test]
async fn a_call_that_nobody_tried_to_send_is_found_when_its_daemon_comes() {
    let mut world = World::new().await;
    let (turn, calls) = world.asked(vec![call(0, "shell")]).await;
    world.daemon_goes().await;
    assert!(matches!(world.step().await, Step::Wait { .. }));
    assert_eq!(world.turn_status(turn).await, pb::TurnStatus::WaitingDaemon);
    assert_eq!(world.call_status(turn).await, Status::WaitingDaemon);
    world.daemon_comes(world.journal).await;
    let woken = world.store().daemon_back(world.daemon).await.unwrap();
    assert_eq!(woken.iter().map(|it| it.wake.as_ref().unwrap().chat).collect::<Vec<_>>(), [world.chat]);
    assert_eq!(world.step().await, Step::Dispatch { turn, calls });
    assert!(world.store().daemon_back(DaemonId::new()).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_lost_journal_makes_sent_calls_unknown_or_repeats_them() {
    let mut world = World::new().await;
    let repeatable = NewCall { repeatable: true, read_only: true, ..call(1, "glob") };
    let (turn, calls) = world.asked(vec![looking(0, "grep"), repeatable]).await;
    for call in &calls {
        world.dispatch(*call).await;
    }
    world.journal = Incarnation::new();
    world.daemon_comes(world.journal).await;
    assert_eq!(world.step().await, Step::Dispatch { turn, calls: vec![calls[1]] });
    let rows = world.calls(turn).await;
    assert_eq!((rows[0].status(), rows[0].unknown_cause()), (Status::OutcomeUnknown, pb::UnknownCause::JournalLost));
    let generation = world.dispatch(calls[1]).await;
    assert_eq!(generation, 2, "generations only grow");
    assert_eq!(world.ack(&world.result(calls[1], generation, "files")).await, pb::AckOutcome::Committed);
    let attempt = world.claim(turn, 1).await;
    let results = world.read(&attempt).await.pop().unwrap();
    assert!(results.starts_with("<Outcome unknown: the call was sent, and the daemon's journal was lost"), "{results}");
    assert!(results.ends_with("<files>"), "{results}");
}

#[tokio::test]
async fn a_daemon_that_stays_away_leaves_an_unknown_outcome_and_a_late_result() {
    let world = World::new().await;
    let (turn, call, generation) = world.dispatched().await;
    world.daemon_goes().await;
    let Step::Wait { for_ms: Some(wait), .. } = world.step().await else { panic!("not waiting") };
    assert!(wait > 3_600_000, "{wait}");
    assert_eq!(world.turn_status(turn).await, pb::TurnStatus::WaitingDaemon);
    world.db.execute("UPDATE tool_calls SET dispatched_at = now() - interval '3 hours'").await;
    assert_eq!(world.step().await, Step::CallModel { turn, iteration: 1 });
    let row = &world.calls(turn).await[0];
    assert_eq!((row.status(), row.unknown_cause()), (Status::OutcomeUnknown, pb::UnknownCause::DaemonAway));
    assert_eq!(world.ack(&world.result(call, generation, "ok")).await, pb::AckOutcome::Discarded);
    assert_eq!(world.db.number("SELECT count(*) FROM tool_calls WHERE late_result = 'succeeded: ok'").await, 1);
}

#[tokio::test]
async fn an_unknown_outcome_has_a_cause_from_the_list_and_nothing_else_has_one() {
    let world = World::new().await;
    let (turn, calls) = world.asked(vec![looking(0, "grep"), looking(1, "grep")]).await;
    let generations = [world.dispatch(calls[0]).await, world.dispatch(calls[1]).await];
    let (has_cause, known) = ("tool_calls_unknown_has_cause", "tool_calls_unknown_cause_known");
    for (sql, constraint) in [
        ("UPDATE tool_calls SET status = 'outcome_unknown'", has_cause),
        ("UPDATE tool_calls SET unknown_cause = 'daemon_away'", has_cause),
        ("UPDATE tool_calls SET status = 'outcome_unknown', unknown_cause = 'bad luck'", known),
    ] {
        assert_eq!(world.db.refused(sql).await, constraint, "{sql}");
    }
    // A daemon that names no cause, or one for an outcome that is known, is put right.
    let ended = |at: usize, status: Status, cause: pb::UnknownCause| pb::ToolResult {
        status: status as i32,
        unknown_cause: cause as i32,
        ..world.result(calls[at], generations[at], "half")
    };
    for result in [
        ended(0, Status::OutcomeUnknown, pb::UnknownCause::Unspecified),
        ended(1, Status::Succeeded, pb::UnknownCause::JournalLost),
    ] {
        assert_eq!(world.ack(&result).await, pb::AckOutcome::Committed);
    }
    let rows = world.calls(turn).await;
    assert_eq!((rows[0].status(), rows[0].unknown_cause()), (Status::OutcomeUnknown, pb::UnknownCause::ProcessDied));
    assert_eq!((rows[1].status(), rows[1].unknown_cause()), (Status::Succeeded, pb::UnknownCause::Unspecified));
}

#[tokio::test]
async fn without_a_daemon_a_call_fails_with_a_sentence() {
    let world = World::new().await;
    let (turn, _) = world.asked(vec![call(0, "shell")]).await;
    let _ = world.store().revoke_daemon(world.user, world.daemon).await.unwrap();
    assert_eq!(world.step().await, Step::CallModel { turn, iteration: 1 });
    assert_eq!(world.calls(turn).await[0].error_code, "DAEMON_NONE");
}

#[tokio::test]
async fn the_first_decision_stands() {
    let world = World::new().await;
    let (turn, _) = world.asked(vec![asking(0, "shell")]).await;
    let approval = world.approvals().await[0];
    let decide = |approve| world.store().decide_approval(world.user, approval, approve, pb::ApprovalScope::Once);
    let denied = decide(false).await.unwrap();
    assert_eq!(denied.value.status(), pb::ApprovalStatus::Denied);
    assert_eq!(kinds(&denied.events), ["approval DENIED", "call FAILED", "message TOOL"]);
    assert!(denied.wake.is_some() && denied.feed.len() == 1);
    let again = decide(true).await.unwrap();
    assert_eq!((again.value.status(), again.events.len()), (pb::ApprovalStatus::Denied, 0));
    assert_eq!(world.step().await, Step::CallModel { turn, iteration: 1 });
    let call = &world.calls(turn).await[0];
    assert!(
        call.error_code == "APPROVAL_DENIED" && call.is_error && call.result.starts_with("The user denied this call.")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_browsers_that_decide_at_once_get_one_outcome() {
    let world = World::new().await;
    world.asked(vec![asking(0, "shell")]).await;
    let approval = world.approvals().await[0];
    let decisions = (0..8)
        .map(|number| world.store().decide_approval(world.user, approval, number % 2 == 0, pb::ApprovalScope::Once));
    let decided: Vec<_> = futures::future::join_all(decisions).await.into_iter().map(Result::unwrap).collect();
    assert!(decided.iter().all(|it| it.value == decided[0].value));
    assert_eq!(decided.iter().filter(|it| !it.events.is_empty()).count(), 1);
}

#[tokio::test]
async fn approving_for_the_session_lets_the_tool_through() {
    let world = World::new().await;
    let (turn, calls) = world.asked(vec![asking(0, "shell"), asking(1, "write_file"), asking(2, "shell")]).await;
    assert!(matches!(world.step().await, Step::Wait { for_ms: None, .. }));
    assert!(
        world.store().prepare_dispatches(world.chat, &calls, &[]).await.unwrap().value.is_empty(),
        "not without the approval"
    );
    let approvals = world.approvals().await;
    assert_eq!(approvals.len(), 3);
    let decided =
        world.store().decide_approval(world.user, approvals[0], true, pb::ApprovalScope::Session).await.unwrap();
    assert_eq!(kinds(&decided.events), ["approval APPROVED", "approval APPROVED", "call PENDING", "call PENDING"]);
    assert_eq!(world.step().await, Step::Dispatch { turn, calls: vec![calls[0]] });
    assert!(world.store().prepare_dispatches(world.chat, &calls[2..], &[]).await.unwrap().value.is_empty(), "not yet");
    let _ = world.store().request_cancel(world.user, turn).await.unwrap();
    // A later call of that tool does not ask.
    let (turn, _) = world.asked(vec![asking(0, "shell"), asking(1, "write_file")]).await;
    let statuses: Vec<_> = world.calls(turn).await.iter().map(pb::ToolCall::status).collect();
    assert_eq!(statuses, [Status::Pending, Status::WaitingApproval]);
}

#[tokio::test]
async fn a_cancelled_turn_ends_at_once_and_its_calls_settle_behind_it() {
    let world = World::new().await;
    let (turn, calls) = world.asked(vec![call(0, "shell"), call(1, "shell"), asking(2, "shell")]).await;
    let generation = world.dispatch(calls[0]).await;
    let next = world.turn("next").await;
    let approval = world.approvals().await[0];
    world.seen().await;
    let cancelled = world.store().request_cancel(world.user, turn).await.unwrap();
    assert!(cancelled.wake.is_some());
    assert_eq!(cancelled.value.turn.status(), pb::TurnStatus::Cancelled);
    assert_eq!(cancelled.value.calls, [CancelCall { call: calls[0], generation, daemon: world.daemon }]);
    let expected = ["turn CANCELLED", "approval CANCELLED", "call CANCELLED", "call CANCELLED", "message TOOL"];
    assert_eq!(kinds(&cancelled.events), expected);
    // A decision after the cancel changes nothing.
    let decided = world.store().decide_approval(world.user, approval, true, pb::ApprovalScope::Once).await.unwrap();
    assert_eq!(decided.value.status(), pb::ApprovalStatus::Cancelled);
    assert!(world.store().prepare_dispatches(world.chat, &calls, &[]).await.unwrap().value.is_empty());
    // The next turn goes, with a history in which each call has a result.
    assert_eq!(world.step().await, Step::CallModel { turn: next, iteration: 0 });
    let attempt = world.claim(next, 0).await;
    let last = world.read(&attempt).await;
    assert!(last[2].starts_with("<The turn ended while this call ran."), "{last:?}");
    // The daemon reports; the call settles, the turn stays as it is.
    let stopped = pb::ToolResult { status: Status::Cancelled as i32, ..world.result(calls[0], generation, "half") };
    assert_eq!(world.ack(&stopped).await, pb::AckOutcome::Committed);
    assert_eq!(world.call_status(turn).await, Status::Cancelled);
    assert_eq!(world.turn_status(turn).await, pb::TurnStatus::Cancelled);
    let messages = world.messages().await;
    assert_eq!(messages.iter().filter(|message| message.role() == pb::Role::Tool).count(), 1);
    // Again changes nothing.
    let again = world.store().request_cancel(world.user, turn).await.unwrap();
    assert!(again.events.is_empty() && again.wake.is_none() && again.value.calls.is_empty());
    world.log().await;
}

#[tokio::test]
async fn a_cancel_is_sent_until_it_is_answered() {
    let world = World::new().await;
    let (turn, call, generation) = world.dispatched().await;
    let _ = world.store().request_cancel(world.user, turn).await.unwrap();
    assert!(world.store().cancels_to_resend(10).await.unwrap().is_empty(), "the caller sends the first one");
    world.db.execute("UPDATE tool_calls SET cancel_sent_at = now() - interval '1 minute'").await;
    let again = [CancelCall { call, generation, daemon: world.daemon }];
    assert_eq!(world.store().cancels_to_resend(10).await.unwrap(), again);
    assert!(world.store().cancels_to_resend(10).await.unwrap().is_empty());
    let known = pb::CancelReply { call_id: call.to_string(), known: true };
    let running = world.store().cancel_replied(call, generation, &known).await.unwrap();
    assert!(running.events.is_empty(), "its result will come");
    let unknown = pb::CancelReply { known: false, ..known };
    let buried = world.store().cancel_replied(call, generation, &unknown).await.unwrap();
    assert_eq!(kinds(&buried.events), ["call CANCELLED"]);
    assert!(world.store().cancels_to_resend(10).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_cancel_during_the_model_call_names_who_writes() {
    let world = World::new().await;
    let turn = world.turn("a").await;
    let attempt = world.claim(turn, 0).await;
    let cancelled = world.store().request_cancel(world.user, turn).await.unwrap();
    assert_eq!(cancelled.value.producer, Some(world.worker));
    let fenced = world.store().commit_message(answer(&attempt, "too late", vec![])).await.unwrap();
    assert_eq!(fenced.value, CommitOutcome::Fenced);
    assert_eq!(
        world.store().claim_attempt(turn, 0, world.worker, &Default::default()).await.unwrap().value,
        Claim::Stale
    );
    assert!(world.store().snapshot(world.user, world.chat).await.unwrap().started.is_empty());
}

#[tokio::test]
async fn a_call_behind_its_turn_is_given_up_like_any_other() {
    let mut world = World::new().await;
    let (turn, _, _) = world.dispatched().await;
    let _ = world.store().request_cancel(world.user, turn).await.unwrap();
    world.db.execute("UPDATE chats SET relayed_at = now() - interval '1 hour'").await;
    let stale = world.store().stale_open_turns(10).await.unwrap();
    assert_eq!(stale.iter().map(|wake| wake.chat).collect::<Vec<_>>(), [world.chat]);
    world.daemon_comes(Incarnation::new()).await;
    assert_eq!(world.step().await, Step::Idle);
    assert_eq!(world.calls(turn).await[0].unknown_cause(), pb::UnknownCause::JournalLost);
}

#[tokio::test]
async fn approvals_for_a_chat_end_with_its_machine_and_a_new_mode_governs_open_turns() {
    let world = World::new().await;
    let (turn, calls) = world.asked(vec![asking(0, "shell")]).await;
    let approvals = world.approvals().await;
    let _ = world.store().decide_approval(world.user, approvals[0], true, pb::ApprovalScope::Session).await.unwrap();
    world.dispatch(calls[0]).await;
    assert_eq!(world.ack(&world.result(calls[0], 1, "")).await, pb::AckOutcome::Committed);
    let statuses = async |turn| world.calls(turn).await.last().unwrap().status();
    let attempt = world.claim(turn, 1).await;
    let _ = world.store().commit_message(answer(&attempt, "more", vec![asking(0, "shell")])).await.unwrap();
    assert_eq!(statuses(turn).await, Status::Pending, "let through for the chat");
    let _ = world.store().request_cancel(world.user, turn).await.unwrap();

    let queued = world.turn("queued in ask").await;
    let _ = world.store().configure_chat(world.user, world.chat, Some(pb::ChatMode::Plan), None).await.unwrap();
    let attempt = world.claim(queued, 0).await;
    assert_eq!(attempt.mode, pb::ChatMode::Plan);
    let (other, _) = world.store().register_daemon(world.user, "another", false).await.unwrap();
    let _ = world.store().select_daemon(world.user, world.chat, other, "").await.unwrap();
    let _ = world.store().commit_message(answer(&attempt, "and there", vec![asking(0, "shell")])).await.unwrap();
    assert_eq!(statuses(queued).await, Status::WaitingApproval, "it was let through on another machine");
}
