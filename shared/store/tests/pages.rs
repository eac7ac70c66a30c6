//! Whatever is stored, an answer fits what a gRPC client of any language decodes without a setting.
#![allow(clippy::unwrap_used)]

mod support;

use prost::Message as _;
use reliant_store::*;
use reliant_types::*;
use sqlx::AssertSqlSafe;
use support::*;

/// Inserts `count` ended turns with a message of the person and an answer of `bytes` each, as if they had been.
async fn long_chat(world: &World, count: i32, bytes: i32) {
    let sql = format!(
        "WITH t AS (
             INSERT INTO turns (id, chat_id, user_id, message_id, ordinal, status, iteration, model, mode, deadline_left_ms, ended_at)
             SELECT gen_random_uuid(), '{chat}', '{user}', gen_random_uuid(), n, 'succeeded', 1, 'm', 'auto', 0, now()
             FROM generate_series(1, {count}) n RETURNING id, ordinal
         ), c AS (UPDATE chats SET last_ordinal = {count} * 2), m AS (
             INSERT INTO messages (id, chat_id, turn_id, ordinal, turn_ordinal, role, iteration, bytes)
             SELECT gen_random_uuid(), '{chat}', t.id, t.ordinal * 2 - 1 + r, t.ordinal,
                    CASE r WHEN 0 THEN 'user' ELSE 'assistant' END, CASE r WHEN 0 THEN NULL ELSE 0 END,
                    CASE r WHEN 0 THEN 5 ELSE {bytes} END
             FROM t, generate_series(0, 1) r RETURNING id, role
         )
         INSERT INTO content_blocks (message_id, position, kind, data)
         SELECT id, 0, 'text', text_block(CASE role WHEN 'user' THEN 5 ELSE {bytes} END) FROM m",
        chat = world.chat,
        user = world.user,
    );
    // The encoded block: field 2 (text) of ContentBlock, field 1 (text) of TextBlock; lengths as varints.
    let helper = "SET check_function_bodies = off;
         CREATE FUNCTION varint(n int) RETURNS bytea LANGUAGE sql AS $$
             SELECT CASE WHEN n < 128 THEN set_byte('\\x00', 0, n)
                         ELSE set_byte('\\x00', 0, n % 128 + 128) || varint(n / 128) END $$;
         CREATE FUNCTION text_block(n int) RETURNS bytea LANGUAGE sql AS $$
             SELECT '\\x12'::bytea || varint(length(inner_)) || inner_
             FROM (SELECT '\\x0a'::bytea || varint(n) || convert_to(repeat('x', n), 'UTF8') AS inner_) i $$";
    sqlx::raw_sql(helper).execute(&world.db.raw).await.unwrap();
    sqlx::query(AssertSqlSafe(sql)).execute(&world.db.raw).await.unwrap();
}

#[track_caller]
fn fits(answer: &impl prost::Message) {
    let bytes = answer.encoded_len();
    assert!(bytes < limits::GRPC_MESSAGE_MAX_BYTES, "{bytes} bytes");
}

#[tokio::test]
async fn a_chat_of_two_thousand_turns_has_a_small_snapshot_and_is_read_by_page() {
    let world = World::new().await;
    long_chat(&world, 2000, 3000).await;
    let snapshot = world.store().snapshot(world.user, world.chat).await.unwrap();
    assert_eq!(snapshot.messages.len() as i64, limits::SNAPSHOT_MESSAGES_MAX);
    assert_eq!(snapshot.messages.last().unwrap().ordinal, 4000);
    assert!(snapshot.encoded_len() < 400_000, "{}", snapshot.encoded_len());
    let (mut before, mut seen) = (0, 0);
    loop {
        let (messages, more) = world.store().list_messages(world.user, world.chat, 500, before).await.unwrap();
        seen += messages.len();
        before = messages[0].ordinal;
        if !more {
            break;
        }
        assert_eq!(messages.len(), 500);
    }
    assert_eq!((seen, before), (4000, 1));
}

#[tokio::test]
async fn pages_and_snapshots_are_cut_by_bytes() {
    let world = World::new().await;
    let each = limits::MODEL_TEXT_MAX_BYTES as i32 - 100;
    long_chat(&world, 12, each).await;
    let snapshot = world.store().snapshot(world.user, world.chat).await.unwrap();
    fits(&snapshot);
    assert_eq!(snapshot.messages.len(), 1, "the newest is there whatever its size");
    let (mut before, mut seen) = (0, Vec::new());
    loop {
        let (messages, has_more) = world.store().list_messages(world.user, world.chat, 500, before).await.unwrap();
        before = messages[0].ordinal;
        seen.splice(0..0, messages.iter().map(|message| message.ordinal));
        fits(&pb::ListMessagesResponse { messages, has_more });
        if !has_more {
            break;
        }
    }
    assert_eq!(seen, (1..=24).collect::<Vec<_>>());
    // What a model reads is bounded too, and begins with a person's message.
    let turn = world.turn("next").await;
    let attempt = world.claim(turn, 0).await;
    let History { messages, cut } = world.history(&attempt).await;
    let bytes: usize = messages.iter().map(|message| message.encoded_len()).sum();
    assert!(cut && bytes < limits::HISTORY_MAX_BYTES + 10_000, "{bytes}");
    assert_eq!(messages[0].role(), pb::Role::User);
    assert_eq!(text(messages.last().unwrap()), "text of next");
}

#[tokio::test]
async fn the_largest_message_a_model_may_write_fits_everywhere() {
    let world = World::new().await;
    let turn = world.turn("a").await;
    let attempt = world.claim(turn, 0).await;
    let count = limits::MESSAGE_TOOL_CALLS_MAX;
    let input = |bytes: usize| format!(r#"{{"command":"{}"}}"#, "x".repeat(bytes));
    let share = limits::TOOL_INPUT_MAX_BYTES / count - 20;
    let calls =
        (0..count as i32).map(|index| NewCall { input: input(share), read_only: true, ..asking(index, "shell") });
    let text = "t".repeat(limits::MODEL_TEXT_MAX_BYTES - limits::TOOL_INPUT_MAX_BYTES);
    let new = answer(&attempt, &text, calls.collect());
    let committed = world.store().commit_message(new).await.unwrap();
    committed.events.iter().for_each(|event| fits(event));
    // As many turns as may wait stand behind it.
    for n in 0..limits::CHAT_QUEUED_TURNS_MAX {
        world.send(&n.to_string()).await;
    }
    fits(&world.store().snapshot(world.user, world.chat).await.unwrap());
    let (mut before, mut approvals) = (None, Vec::new());
    loop {
        let listed = world.store().list_approvals(world.user, None, false, 100, before).await.unwrap();
        let (page, has_more) = listed;
        before = page.last().map(|approval| approval.id.parse().unwrap());
        approvals.extend(page.iter().map(|approval| approval.id.clone()));
        fits(&pb::ListApprovalsResponse { approvals: page, has_more });
        if !has_more {
            break;
        }
    }
    assert_eq!(approvals.len(), count);
    for id in &approvals {
        let scope = pb::ApprovalScope::Once;
        let _ = world.store().decide_approval(world.user, id.parse().unwrap(), true, scope).await.unwrap();
    }
    let ids: Vec<ToolCallId> = world.all_calls(turn).await.iter().map(|call| call.id.parse().unwrap()).collect();
    let orders = world.store().prepare_dispatches(world.chat, &ids, &[]).await.unwrap().value;
    let result = "r".repeat(limits::TOOL_RESULT_MAX_BYTES);
    let mut last = None;
    for order in &orders {
        let id: ToolCallId = order.call.call_id.parse().unwrap();
        let done = world.result(id, order.call.generation, &result);
        let committed = world.store().commit_result(world.daemon, &done).await.unwrap();
        committed.events.iter().for_each(|event| fits(event));
        last = Some(committed.events);
    }
    assert_eq!(kinds(&last.unwrap()), ["call SUCCEEDED", "message TOOL"]);
    // All of the round's results are there, in full in the calls and by their share in what the model reads.
    fits(&world.store().snapshot(world.user, world.chat).await.unwrap());
    let calls = world.all_calls(turn).await;
    assert!(calls.iter().all(|call| call.result.len() == result.len()));
    let attempt = world.claim(turn, 1).await;
    let results = world.history(&attempt).await.messages.pop().unwrap();
    assert_eq!((results.role(), results.blocks.len()), (pb::Role::Tool, count));
    assert!(results.encoded_len() <= limits::ROUND_RESULTS_MAX_BYTES + count * 100, "{}", results.encoded_len());
}

#[tokio::test]
async fn a_long_log_is_read_in_portions() {
    let world = World::new().await;
    let each = "x".repeat(limits::MODEL_TEXT_MAX_BYTES);
    for n in 0..4 {
        let turn = world.turn(&n.to_string()).await;
        let attempt = world.claim(turn, 0).await;
        let _ = world.store().commit_message(answer(&attempt, &each, vec![])).await.unwrap();
    }
    let (mut after, mut portions) = (0, 0);
    loop {
        let (events, more) = world.store().events_after(world.chat, after, 500).await.unwrap();
        contiguous_from(after, events.iter().map(|event| event.seq));
        let bytes: usize = events.iter().map(prost::Message::encoded_len).sum();
        assert!(bytes <= limits::READ_EVENTS_MAX_BYTES + 1000, "{bytes}");
        after = events.last().unwrap().seq;
        portions += 1;
        if !more {
            break;
        }
    }
    assert!(portions > 1);
    assert_eq!(world.store().last_seqs(&[world.chat]).await.unwrap()[0].1, after);
}

fn contiguous_from(after: i64, seqs: impl Iterator<Item = i64>) {
    for (expected, seq) in (after + 1..).zip(seqs) {
        assert_eq!(seq, expected);
    }
}

#[tokio::test]
async fn daemons_with_thousands_of_tools_are_listed_in_one_answer() {
    let world = World::new().await;
    let tool = |n: usize| pb::ToolDeclaration {
        name: format!("mcp__server__tool_{n}"),
        description: "d".repeat(4096),
        input_schema_json: format!(r#"{{"type":"object","description":"{}"}}"#, "s".repeat(1000)),
        ..Default::default()
    };
    let tools: Vec<_> = (0..limits::DAEMON_TOOLS_MAX).map(tool).collect();
    for n in 0..6 {
        let (daemon, _) = world.store().register_daemon(world.user, &format!("many {n}"), false).await.unwrap();
        let hello =
            DaemonHello { tools: tools.clone(), ..hello(world.user, daemon, world.gateway, Incarnation::new(), 0) };
        let _ = world.store().connect_daemon(hello).await.unwrap();
    }
    let daemons = world.store().list_daemons(world.user, false).await.unwrap();
    assert_eq!(daemons.len(), 7, "every daemon is there");
    assert_eq!(daemons[1].tools.len(), limits::DAEMON_TOOLS_MAX);
    assert!(daemons[1].tools.iter().all(|tool| tool.input_schema_json.is_empty() && !tool.description.is_empty()));
    assert!(daemons[6].shortened && daemons[6].tools.is_empty());
    fits(&pb::ListDaemonsResponse { daemons });
}
