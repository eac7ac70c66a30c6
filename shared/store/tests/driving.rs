//! Turns from their message to their end.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use reliant_store::*;
use reliant_types::*;
use support::*;

#[tokio::test]
async fn a_plain_turn_runs_to_its_end() {
    let world = World::new().await;
    let turn = world.turn("a").await;
    assert_eq!(world.step().await, Step::CallModel { turn, iteration: 0 });
    let attempt = world.claim(turn, 0).await;
    assert_eq!((attempt.fence, attempt.restarted, attempt.root_id.as_str()), (1, false, ""));
    assert_eq!(attempt.traceparent, TRACE);
    let (declared, offered) = world.store().declarations(world.daemon).await.unwrap();
    assert_eq!((attempt.daemon.as_ref().unwrap().declared, offered.tools[0].name.as_str()), (declared, "shell"));
    assert_eq!(world.read(&attempt).await, ["text of a"]);
    let committed = world.store().commit_message(answer(&attempt, "hello\0", vec![])).await.unwrap();
    assert_eq!(committed.value, CommitOutcome::Committed { turn_ended: true });
    assert_eq!(world.step().await, Step::Idle);
    let (row, _) = world.store().get_turn(world.user, turn).await.unwrap();
    assert_eq!((row.status(), row.usage.unwrap().output_tokens), (pb::TurnStatus::Succeeded, 5));
    let log = world.log().await;
    let expected =
        ["chat", "message USER", "turn QUEUED", "turn RUNNING", "started 1", "message ASSISTANT", "turn SUCCEEDED"];
    assert_eq!(kinds(&log), expected);
    let claim = world.store().claim_attempt(turn, 0, world.worker, &Default::default()).await.unwrap();
    assert_eq!((claim.value, claim.events.len()), (Claim::AlreadyCommitted, 0));
}

#[tokio::test]
async fn a_tool_turn_goes_its_way() {
    let world = World::new().await;
    let (turn, calls) = world.asked(vec![looking(0, "shell"), looking(1, "glob")]).await;
    assert_eq!(world.step().await, Step::Dispatch { turn, calls: calls.clone() });
    let mut generations = Vec::new();
    for call in &calls {
        generations.push(world.dispatch(*call).await);
    }
    assert!(matches!(world.step().await, Step::Wait { for_ms: Some(_), .. }));
    let started = pb::DispatchReply { outcome: pb::DispatchOutcome::Started as i32, ..Default::default() };
    let running = world.store().dispatch_replied(calls[0], generations[0], &started).await.unwrap();
    assert_eq!(kinds(&running.events), ["call RUNNING"]);
    // Results come in any order; the round's message has them in the calls' order.
    assert_eq!(world.ack(&world.result(calls[1], 1, "two")).await, pb::AckOutcome::Committed);
    assert!(matches!(world.step().await, Step::Wait { .. }));
    let last = world.store().commit_result(world.daemon, &world.result(calls[0], 1, "one\0\n")).await.unwrap();
    assert_eq!(kinds(&last.events), ["call SUCCEEDED", "message TOOL"]);
    assert!(last.wake.is_some());
    assert_eq!(world.step().await, Step::CallModel { turn, iteration: 1 });
    let attempt = world.claim(turn, 1).await;
    let history = world.read(&attempt).await;
    assert_eq!(history[1..], ["on it[shell][glob]", "<one\u{fffd}\n><two>"]);
    let committed = world.store().commit_message(answer(&attempt, "done", vec![])).await.unwrap();
    assert_eq!(committed.value, CommitOutcome::Committed { turn_ended: true });
    let call = &world.calls(turn).await[0];
    assert_eq!((call.exit_code, call.generation, call.is_error), (Some(0), 1, false));
    assert!(call.started_at.is_some() && call.ended_at.is_some());
    let (row, _) = world.store().get_turn(world.user, turn).await.unwrap();
    assert_eq!(row.usage.unwrap().input_tokens, 20, "the usage of both rounds");
    world.log().await;
}

#[tokio::test]
async fn a_zombie_changes_nothing() {
    let world = World::new().await;
    let turn = world.turn("a").await;
    let zombie = world.claim(turn, 0).await;
    let committed = world.store().claim_attempt(turn, 0, InstanceId::new(), &Default::default()).await.unwrap();
    let Claim::Claimed(heir) = &committed.value else { panic!("not claimed") };
    assert_eq!((heir.fence, heir.message, heir.restarted), (2, zombie.message, true));
    assert_eq!(kinds(&committed.events), ["started 2"]);
    let fenced = world.store().commit_message(answer(&zombie, "too late", vec![call(0, "shell")])).await.unwrap();
    assert_eq!((fenced.value, fenced.events.len()), (CommitOutcome::Fenced, 0));
    let failure = Failure::new(Code::ProviderRejected, "no");
    assert!(!world.store().fail_turn(turn, Some(zombie.fence), &failure).await.unwrap().value);
    let _ = world.store().release_attempt(turn, zombie.fence).await.unwrap();
    let _ = world.store().add_notice(turn, zombie.fence, Notice::OfTurn, "shortened").await.unwrap();
    let done = world.store().commit_message(answer(heir, "in time", vec![])).await.unwrap();
    assert_eq!(done.value, CommitOutcome::Committed { turn_ended: true });
    let again = world.store().commit_message(answer(heir, "in time", vec![])).await.unwrap();
    assert_eq!(again.value, CommitOutcome::Fenced);
    assert_eq!(world.messages().await.iter().map(text).collect::<Vec<_>>(), ["text of a", "in time"]);
    assert!(world.calls(turn).await.is_empty());
}

#[tokio::test]
async fn workers_that_end_over_an_attempt_are_counted_and_those_that_merely_had_it_are_not() {
    let world = World::new().await;
    let turn = world.turn("a").await;
    let deaths = async |world: &World| world.claim(turn, 0).await.worker_deaths;
    // Three workers in a row die with it, while nothing speaks against it.
    assert_eq!([deaths(&world).await, deaths(&world).await, deaths(&world).await], [0, 0, 0]);
    let attempt = world.claim(turn, 0).await;
    world.store().set_suspect(turn, attempt.fence, true).await.unwrap();
    world.store().set_suspect(turn, attempt.fence, false).await.unwrap();
    assert_eq!(deaths(&world).await, 0, "it came out of what it did");
    for count in 1..=2 {
        let attempt = world.claim(turn, 0).await;
        world.store().set_suspect(turn, attempt.fence, true).await.unwrap();
        // What a worker that was given up says later is not believed.
        world.store().set_suspect(turn, attempt.fence - 1, false).await.unwrap();
        assert_eq!(deaths(&world).await, count);
    }
    // A round that ends well starts the count anew.
    let attempt = world.claim(turn, 0).await;
    let _ = world.store().commit_message(answer(&attempt, "on it", vec![call(0, "shell")])).await.unwrap();
    let calls = world.calls(turn).await;
    let id = calls[0].id.parse().unwrap();
    world.dispatch(id).await;
    assert_eq!(world.ack(&world.result(id, 1, "ok")).await, pb::AckOutcome::Committed);
    assert_eq!(world.claim(turn, 1).await.worker_deaths, 0);
}

#[tokio::test]
async fn a_message_sent_meanwhile_is_the_next_turn() {
    let world = World::new().await;
    let first = world.turn("a").await;
    let attempt = world.claim(first, 0).await;
    let second = world.turn("b").await;
    assert_eq!(world.turn_status(second).await, pb::TurnStatus::Queued);
    let claim = world.store().claim_attempt(second, 0, world.worker, &Default::default()).await.unwrap();
    assert_eq!(claim.value, Claim::Stale, "an older turn runs");
    let _ = world.store().commit_message(answer(&attempt, "answer a", vec![])).await.unwrap();
    assert_eq!(world.step().await, Step::CallModel { turn: second, iteration: 0 });
    let attempt = world.claim(second, 0).await;
    let history = world.read(&attempt).await;
    assert_eq!(history, ["text of a", "answer a", "text of b"], "in the order of turns, not of their arrival");
}

#[tokio::test]
async fn the_history_of_a_turn_knows_nothing_of_later_ones_and_no_notices() {
    let world = World::new().await;
    let turn = world.turn("a").await;
    world.turn("b").await;
    let attempt = world.claim(turn, 0).await;
    for _ in 0..2 {
        let text = "history was shortened";
        let _ = world.store().add_notice(turn, attempt.fence, Notice::OfTurn, text).await.unwrap();
    }
    let attempt = world.claim(turn, 0).await;
    assert_eq!(world.read(&attempt).await, ["text of a"]);
    assert_eq!(notices(&world).await, ["history was shortened"], "once per turn");
}

async fn notices(world: &World) -> Vec<String> {
    world.messages().await.iter().filter(|message| message.role() == pb::Role::Notice).map(text).collect()
}

#[tokio::test]
async fn a_notice_of_the_chat_is_said_again_only_when_it_changes() {
    let world = World::new().await;
    for said in ["5 tools are not offered", "5 tools are not offered", "6 tools are not offered"] {
        let turn = world.turn(&uuid::Uuid::new_v4().to_string()).await;
        let attempt = world.claim(turn, 0).await;
        for _ in 0..2 {
            let _ = world.store().add_notice(turn, attempt.fence, Notice::OfChat, said).await.unwrap();
        }
        // It does not stand in the way of a turn's own.
        let own = "history was shortened";
        let _ = world.store().add_notice(turn, attempt.fence, Notice::OfTurn, own).await.unwrap();
        let _ = world.store().commit_message(answer(&attempt, "done", vec![])).await.unwrap();
    }
    let of_chat: Vec<_> = notices(&world).await.into_iter().filter(|text| text.contains("tools")).collect();
    assert_eq!(of_chat, ["5 tools are not offered", "6 tools are not offered"]);
    assert_eq!(notices(&world).await.len(), 5);
}

#[tokio::test]
async fn a_long_history_begins_with_a_persons_message() {
    let world = World::new().await;
    // Six hundred turns with an answer each, as if they had been.
    sqlx::query(
        "WITH t AS (
             INSERT INTO turns (id, chat_id, user_id, message_id, ordinal, status, model, mode, deadline_left_ms, ended_at)
             SELECT gen_random_uuid(), $1, $2, gen_random_uuid(), n, 'succeeded', 'm', 'auto', 0, now()
             FROM generate_series(1, 600) n RETURNING id, ordinal
         ), c AS (UPDATE chats SET last_ordinal = 1200)
         INSERT INTO messages (id, chat_id, turn_id, ordinal, turn_ordinal, role, iteration)
         SELECT gen_random_uuid(), $1, t.id, 2 * t.ordinal - r.n, t.ordinal, r.role, 0
         FROM t, (VALUES (1, 'user'), (0, 'assistant')) AS r (n, role)",
    )
    .bind(world.chat.0)
    .bind(world.user.0)
    .execute(&world.db.raw)
    .await
    .unwrap();
    let turn = world.turn("last").await;
    let attempt = world.claim(turn, 0).await;
    let History { messages, cut } = world.history(&attempt).await;
    assert!(
        cut && messages.len() as i64 <= limits::HISTORY_MESSAGES_MAX && messages.len() >= 750,
        "{}",
        messages.len()
    );
    assert_eq!(messages[0].role(), pb::Role::User);
    assert_eq!(text(messages.last().unwrap()), "text of last");
}

/// Rounds `from..to` of a turn, as if they had been: `bytes` is what their results count for.
async fn rounds(world: &World, turn: TurnId, from: i32, to: i32, bytes: i32) {
    sqlx::query(
        "WITH c AS (SELECT last_ordinal FROM chats WHERE id = $1),
              t AS (UPDATE turns SET iteration = $4 WHERE id = $2 RETURNING ordinal),
              g AS (UPDATE chats SET last_ordinal = last_ordinal + 2 * ($4 - $3) WHERE id = $1)
         INSERT INTO messages (id, chat_id, turn_id, ordinal, turn_ordinal, role, iteration, bytes)
         SELECT gen_random_uuid(), $1, $2, c.last_ordinal + 1 + 2 * (s.round - $3) + r.half, t.ordinal, r.role,
                s.round, CASE r.half WHEN 1 THEN $5 ELSE 10 END
         FROM c, t, generate_series($3, $4 - 1) AS s (round), (VALUES (0, 'assistant'), (1, 'tool')) AS r (half, role)",
    )
    .bind(world.chat.0)
    .bind(turn.0)
    .bind(from)
    .bind(to)
    .bind(bytes)
    .execute(&world.db.raw)
    .await
    .unwrap();
}

#[tokio::test]
async fn a_turn_longer_than_what_is_read_keeps_its_message_and_its_newest_rounds() {
    // Cut by its bytes, and by its messages.
    for (count, bytes, least) in [(60, 400_000, 30), (1500, 10, 750)] {
        let world = World::new().await;
        let before = world.turn("before").await;
        let attempt = world.claim(before, 0).await;
        let _ = world.store().commit_message(answer(&attempt, "done", vec![])).await.unwrap();
        let turn = world.turn("long").await;
        let mut begun = 0;
        for (at, from) in (0..count).step_by(count as usize / 6).enumerate() {
            let to = (from + count / 6).min(count);
            rounds(&world, turn, from, to, bytes).await;
            // Others wait behind it, so many that they alone are more than one call reads.
            if at == 4 {
                let large = "x".repeat(limits::MESSAGE_TEXT_MAX_BYTES);
                for n in 0..12 {
                    let new = SendMessage { text: large.clone(), ..message(world.user, world.chat, &n.to_string()) };
                    let _ = world.store().send_message(&new).await.unwrap();
                }
            }
            let attempt = world.claim(turn, to).await;
            let History { messages, cut } = world.history(&attempt).await;
            assert!(text(&messages[0]).ends_with(if cut { "text of long" } else { "text of before" }), "round {to}");
            let own = if cut { 1 } else { 3 };
            for (at, message) in messages[own..].iter().enumerate() {
                let role = if at % 2 == 0 { pb::Role::Assistant } else { pb::Role::Tool };
                assert_eq!((message.role(), message.turn_id.as_str()), (role, turn.to_string().as_str()));
            }
            let rounds = &messages[own..];
            assert_eq!((rounds.len() % 2, rounds.last().unwrap().iteration), (0, to - 1));
            assert!(rounds[0].iteration >= begun, "it never goes back");
            begun = rounds[0].iteration;
            let read = rounds.len() / 2 * bytes as usize;
            assert!(messages.len() as i64 <= limits::HISTORY_MESSAGES_MAX && read <= limits::HISTORY_MAX_BYTES);
            assert!(!cut || messages.len() >= least, "{} messages", messages.len());
        }
        assert!(begun > 0, "it was longer than what is read");
    }
}

#[tokio::test]
async fn a_chat_that_other_workers_went_on_with_is_read_on() {
    let world = World::new().await;
    // So many are queued that they alone are more than one call reads.
    let large = "x".repeat(limits::MESSAGE_TEXT_MAX_BYTES);
    let mut turns = Vec::new();
    for n in 0..6 {
        turns.push(world.turn(&n.to_string()).await);
    }
    for n in 6..16 {
        let new = SendMessage { text: large.clone(), ..message(world.user, world.chat, &n.to_string()) };
        turns.push(world.store().send_message(&new).await.unwrap().value.turn.id.parse().unwrap());
    }
    for (n, turn) in turns.iter().enumerate() {
        // Every third turn is another worker's, of which this one hears only by reading.
        let attempt = if n % 3 == 2 { world.claim_unread(*turn, 0).await } else { world.claim(*turn, 0).await };
        let told = world.store().add_notice(*turn, attempt.fence, Notice::OfTurn, "said to the person").await.unwrap();
        assert_eq!(told.events.len(), 1);
        let history = world.history(&attempt).await;
        assert!(history.messages.iter().all(|message| message.role() != pb::Role::Notice));
        assert_eq!(history.cut, n >= 5 + limits::HISTORY_MAX_BYTES / limits::MESSAGE_TEXT_MAX_BYTES, "turn {n}");
        let _ = world.store().commit_message(answer(&attempt, &format!("answer {n}"), vec![])).await.unwrap();
    }
    let after = world.turn("after").await;
    let attempt = world.claim(after, 0).await;
    let texts = world.read(&attempt).await;
    assert_eq!(texts[texts.len() - 2..], ["answer 15", "text of after"]);
}

#[tokio::test]
async fn calls_that_never_run_are_answered_at_once() {
    let world = World::new().await;
    let refused =
        NewCall { refused: Some(Failure::new(Code::ToolUnknown, "there is no tool 'fly'")), ..call(0, "fly") };
    let (turn, _) = world.asked(vec![refused]).await;
    assert_eq!(world.call_status(turn).await, pb::ToolCallStatus::Failed);
    assert_eq!(world.step().await, Step::CallModel { turn, iteration: 1 });
    let attempt = world.claim(turn, 1).await;
    assert_eq!(world.read(&attempt).await.last().unwrap(), "<there is no tool 'fly'>");
    assert_eq!(world.calls(turn).await[0].error_code, "TOOL_UNKNOWN");
}

#[tokio::test]
async fn a_failed_turn_says_why_and_the_next_one_goes() {
    let world = World::new().await;
    let turn = world.turn("a").await;
    let next = world.turn("b").await;
    let attempt = world.claim(turn, 0).await;
    let failure = Failure::new(Code::ProviderRejected, "the provider refused the key");
    let failed = world.store().fail_turn(turn, Some(attempt.fence), &failure).await.unwrap();
    assert!(failed.value && failed.wake.is_some());
    let (row, _) = world.store().get_turn(world.user, turn).await.unwrap();
    assert_eq!((row.status(), row.error_code.as_str()), (pb::TurnStatus::Failed, "PROVIDER_REJECTED"));
    assert_eq!(world.step().await, Step::CallModel { turn: next, iteration: 0 });
    assert!(!world.store().fail_turn(turn, None, &failure).await.unwrap().value, "once");
}

#[tokio::test]
async fn a_turn_past_its_deadline_or_its_rounds_fails() {
    let world = World::new().await;
    let turn = world.turn("a").await;
    world.claim(turn, 0).await;
    world.db.execute("UPDATE turns SET deadline_at = now() - interval '1 second'").await;
    assert_eq!(world.step().await, Step::Idle);
    let (row, _) = world.store().get_turn(world.user, turn).await.unwrap();
    assert_eq!((row.status(), row.error_code.as_str()), (pb::TurnStatus::Failed, "TURN_DEADLINE"));

    let turn = world.turn("b").await;
    world.db.execute("UPDATE turns SET iteration = 100 WHERE ended_at IS NULL").await;
    assert_eq!(world.step().await, Step::Idle);
    let (row, _) = world.store().get_turn(world.user, turn).await.unwrap();
    assert_eq!(row.error_code, "TURN_ROUNDS");
    world.log().await;
}

#[tokio::test]
async fn a_model_that_cannot_answer_is_asked_later_and_the_clock_runs() {
    let world = World::new().await;
    let turn = world.turn("a").await;
    let said = Failure::new(Code::ProviderUnavailable, "overloaded (status 529)");
    let attempt = world.claim(turn, 0).await;
    let later = world.store().retry_later(turn, attempt.fence, Duration::from_secs(60), &said).await.unwrap();
    assert!(later.value);
    let again = world.store().retry_later(turn, attempt.fence - 1, Duration::from_secs(1), &said).await.unwrap();
    assert!(!again.value, "an older attempt says nothing");
    let shown = world.store().get_turn(world.user, turn).await.unwrap().0;
    assert_eq!((shown.status(), shown.waiting_for.as_str()), (pb::TurnStatus::Running, "overloaded (status 529)"));
    let Step::Wait { for_ms: Some(ms), .. } = world.step().await else { panic!("it is waited") };
    assert!((50_000..=60_000).contains(&ms), "{ms}");
    assert!(world.store().due_retries(Duration::ZERO, 10).await.unwrap().is_empty());

    // Due: the relay wakes it, once.
    world.db.execute("UPDATE turns SET retry_at = now() - interval '1 second'").await;
    assert_eq!(world.store().due_retries(Duration::ZERO, 10).await.unwrap().len(), 1);
    assert!(world.store().due_retries(Duration::ZERO, 10).await.unwrap().is_empty(), "it is wanted already");
    assert!(matches!(world.step().await, Step::CallModel { .. }));
    let attempt = world.claim(turn, 0).await;
    assert_eq!((attempt.retries, attempt.restarted), (1, true));
    let shown = world.store().get_turn(world.user, turn).await.unwrap().0;
    assert_eq!((shown.waiting_for.as_str(), shown.retry_at), ("", None), "it is asked now");

    // The deadline ends it, and names what was said last.
    let _ = world.store().retry_later(turn, attempt.fence, Duration::from_secs(60), &said).await.unwrap();
    world.db.execute("UPDATE turns SET deadline_at = now() + interval '5 seconds'").await;
    let Step::Wait { for_ms: Some(ms), .. } = world.step().await else { panic!("it is waited") };
    assert!(ms <= 5000, "no longer than the turn may take: {ms}");
    world.db.execute("UPDATE turns SET deadline_at = now() - interval '1 second'").await;
    assert_eq!(world.step().await, Step::Idle);
    let failed = world.store().get_turn(world.user, turn).await.unwrap().0;
    assert_eq!((failed.status(), failed.error_code.as_str()), (pb::TurnStatus::Failed, "PROVIDER_UNAVAILABLE"));
    assert!(failed.error_message.contains("overloaded (status 529)"), "{failed:?}");
    assert!(failed.waiting_for.is_empty() && failed.retry_at.is_none());
    world.log().await;
}

#[tokio::test]
async fn the_clock_stands_while_somebody_is_awaited() {
    let world = World::new().await;
    let (turn, _) = world.asked(vec![asking(0, "shell")]).await;
    world.db.execute("UPDATE turns SET deadline_at = now() + interval '100 seconds'").await;
    assert!(matches!(world.step().await, Step::Wait { for_ms: None, .. }));
    assert_eq!(world.turn_status(turn).await, pb::TurnStatus::WaitingApproval);
    let left = world.db.number("SELECT deadline_left_ms FROM turns WHERE deadline_at IS NULL").await;
    assert!((95_000..=100_000).contains(&left), "{left}");
    // Waiting again does not wind it up or down.
    world.step().await;
    assert_eq!(world.db.number("SELECT deadline_left_ms FROM turns").await, left);
    let _ = world
        .store()
        .decide_approval(world.user, world.approvals().await[0], true, pb::ApprovalScope::Once)
        .await
        .unwrap();
    assert!(matches!(world.step().await, Step::Dispatch { .. }));
    assert_eq!(world.turn_status(turn).await, pb::TurnStatus::Running);
    let runs = world.db.number("SELECT (extract(epoch FROM deadline_at - now()) * 1000)::bigint FROM turns").await;
    assert!((left - 5_000..=left).contains(&runs), "{runs} of {left}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_workers_at_one_chat_commit_each_round_once() {
    let world = World::new().await;
    let turn = world.turn("a").await;
    let workers = (0..8).map(|_| async {
        let claim = world.store().claim_attempt(turn, 0, InstanceId::new(), &Default::default()).await.unwrap();
        match claim.value {
            Claim::Claimed(attempt) => world.store().commit_message(answer(&attempt, "x", vec![])).await.unwrap().value,
            _ => CommitOutcome::Fenced,
        }
    });
    let outcomes = futures::future::join_all(workers).await;
    let committed = outcomes.iter().filter(|outcome| matches!(outcome, CommitOutcome::Committed { .. })).count();
    assert_eq!(committed, 1);
    assert_eq!(world.messages().await.len(), 2);
    world.log().await;
}
