//! Lists, snapshots, and what the relay finds.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use reliant_store::*;
use reliant_types::*;
use support::*;

#[tokio::test]
async fn a_snapshot_is_the_sum_of_the_log() {
    let world = World::new().await;
    let (turn, calls) = world.asked(vec![call(0, "shell"), asking(1, "shell")]).await;
    world.dispatch(calls[0]).await;
    let queued = world.turn("later").await;
    let snapshot = world.store().snapshot(world.user, world.chat).await.unwrap();
    let log = world.log().await;
    assert_eq!((snapshot.seq, snapshot.log_epoch), (log.len() as i64, 1));
    assert_eq!(snapshot.messages, world.messages().await);
    let turns: Vec<_> = snapshot.turns.iter().map(|turn| turn.id.clone()).collect();
    assert_eq!(turns, [turn.to_string(), queued.to_string()]);
    assert_eq!(snapshot.tool_calls.len(), 2);
    assert_eq!(snapshot.tool_calls[0].producer, world.daemon.to_string(), "who holds the live output");
    assert_eq!(snapshot.tool_calls[1].producer, "");
    assert_eq!(snapshot.approvals.len(), 1);
    assert!(snapshot.started.is_empty());
    let (after, _) = world.store().events_after(world.chat, log.len() as i64 - 2, 100).await.unwrap();
    assert_eq!(after, log[log.len() - 2..]);
}

#[tokio::test]
async fn a_snapshot_names_the_attempt_under_way() {
    let world = World::new().await;
    let turn = world.turn("a").await;
    let attempt = world.claim(turn, 0).await;
    let started = world.store().snapshot(world.user, world.chat).await.unwrap().started;
    assert_eq!((started[0].message_id.clone(), started[0].epoch), (attempt.message.to_string(), attempt.fence));
    assert_eq!(started[0].producer, world.worker.to_string());
    let released = world.store().release_attempt(turn, attempt.fence).await.unwrap();
    assert!(released.wake.is_some());
    assert!(world.store().snapshot(world.user, world.chat).await.unwrap().started.is_empty());
    assert!(world.claim(turn, 0).await.restarted);
}

#[tokio::test]
async fn chats_are_listed_by_page_with_the_newest_change_first() {
    let world = World::new().await;
    let mut chats = vec![world.chat.to_string()];
    for _ in 0..4 {
        chats.push(world.store().create_chat(&new_chat(world.user, None)).await.unwrap().value.id);
    }
    world.send("a").await;
    chats.rotate_left(1);
    chats.reverse();
    let mut listed = Vec::new();
    let mut page = ChatPage { size: 2, ..Default::default() };
    loop {
        let (found, next) = world.store().list_chats(world.user, &page).await.unwrap();
        listed.extend(found.into_iter().map(|chat| chat.id));
        if next.is_empty() {
            break;
        }
        page.token = next;
    }
    assert_eq!(listed, chats);
    let oldest = chats.last().unwrap().parse().unwrap();
    let archived = world.store().archive_chat(world.user, oldest, true).await.unwrap();
    assert!(archived.value.archived && archived.feed.len() == 1 && archived.events.len() == 1);
    assert!(world.store().archive_chat(world.user, oldest, true).await.unwrap().events.is_empty());
    let all = ChatPage { include_archived: true, ..Default::default() };
    assert_eq!(world.store().list_chats(world.user, &all).await.unwrap().0.len(), 5);
    assert_eq!(world.store().list_chats(world.user, &ChatPage::default()).await.unwrap().0.len(), 4);
    let garbage = ChatPage { token: "x".into(), ..Default::default() };
    assert_eq!(code(world.store().list_chats(world.user, &garbage).await.unwrap_err()), Code::InvalidArgument);
}

#[tokio::test]
async fn a_changed_chat_knows_its_own_place_in_the_log() {
    let world = World::new().await;
    let renamed = world.store().rename_chat(world.user, world.chat, "new name").await.unwrap();
    assert_eq!(renamed.value.last_seq, renamed.events[0].seq);
    assert_eq!(renamed.value, world.store().get_chat(world.user, world.chat).await.unwrap());
    assert_eq!(code(world.store().rename_chat(world.user, world.chat, " ").await.unwrap_err()), Code::InvalidArgument);
    let changed =
        world.store().configure_chat(world.user, world.chat, Some(pb::ChatMode::Plan), Some("a/b")).await.unwrap();
    assert_eq!((changed.value.mode(), changed.value.model.as_str()), (pb::ChatMode::Plan, "a/b"));
}

#[tokio::test]
async fn the_relay_finds_what_nobody_has_seen_once() {
    let world = World::new().await;
    world.send("a").await;
    assert!(world.store().unseen_chats(Duration::from_secs(2), 10).await.unwrap().is_empty(), "too young");
    let found = world.store().unseen_chats(Duration::ZERO, 10).await.unwrap();
    let wake = Wake { chat: world.chat, user: world.user, traceparent: TRACE.into(), burst: None };
    assert_eq!(found.iter().map(|found| (&found.wake, found.attempts)).collect::<Vec<_>>(), [(&wake, 1)]);
    assert!(world.store().unseen_chats(Duration::from_secs(2), 10).await.unwrap().is_empty(), "another worker has it");
    world.step().await;
    assert!(world.store().unseen_chats(Duration::ZERO, 10).await.unwrap().is_empty());
}

#[tokio::test]
async fn one_users_many_chats_do_not_delay_anothers_first() {
    let world = World::new().await;
    for _ in 0..20 {
        let chat = world.store().create_chat(&new_chat(world.user, None)).await.unwrap().value.id.parse().unwrap();
        let _ = world.store().send_message(&message(world.user, chat, "a")).await.unwrap();
    }
    let eve = world.store().ensure_user("eve", "Eve", "member").await.unwrap().id;
    let chat = world.store().create_chat(&new_chat(eve, None)).await.unwrap().value.id.parse().unwrap();
    let _ = world.store().send_message(&message(eve, chat, "a")).await.unwrap();
    let found = world.store().unseen_chats(Duration::ZERO, 2).await.unwrap();
    assert_eq!(found.iter().filter(|found| found.wake.user == eve).count(), 1);
}

#[tokio::test]
async fn open_turns_are_looked_at_now_and_then() {
    let world = World::new().await;
    world.asked(vec![asking(0, "shell")]).await;
    world.step().await;
    let stale = async || world.store().stale_open_turns(10).await.unwrap().len();
    assert_eq!(stale().await, 0, "looked at just now");
    world.db.execute("UPDATE chats SET relayed_at = now() - interval '1 minute'").await;
    assert_eq!(stale().await, 0, "who waits for a person is looked at rarely");
    world.db.execute("UPDATE chats SET relayed_at = now() - interval '10 minutes'").await;
    assert_eq!(stale().await, 1);
    assert_eq!(stale().await, 0);
}

#[tokio::test]
async fn the_schema_is_made_once_by_many() {
    let world = World::new().await;
    let runs = (0..4).map(|_| world.store().migrate());
    assert!(futures::future::join_all(runs).await.iter().all(Result::is_ok));
    assert_eq!(world.store().log_epoch().await.unwrap(), 1);
    world.store().ping().await.unwrap();
}

#[tokio::test]
async fn a_server_that_restarted_is_used_again() {
    let world = World::new().await;
    futures::future::join_all((0..8).map(|_| world.store().ping())).await;
    world
        .db
        .execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'reliant' AND datname = current_database()")
        .await;
    // A transaction finds a living connection by itself, however many had died.
    world.send("a").await;
    assert_eq!(
        code(Store::connect(&StoreConfig { url: "nonsense".into(), ..Default::default() }).await.unwrap_err()),
        Code::Internal
    );
}

/// Always ready, and slow enough that a round of [`BUSY`] of them takes ten milliseconds.
async fn busy() {
    loop {
        let until = Instant::now() + Duration::from_micros(50);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        tokio::task::yield_now().await;
    }
}

const BUSY: usize = 200;

#[tokio::test]
async fn a_busy_process_opens_new_connections_in_time() {
    const OPEN: &str =
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'reliant' AND datname = current_database()";
    let world = World::new().await;
    let before = world.db.number(OPEN).await;
    // Opened by a task among these, a connection would take eight hundred rounds, longer than anybody waits for it.
    let busy: Vec<_> = (0..BUSY).map(|_| tokio::spawn(busy())).collect();
    let store = world.store();
    let pings = futures::future::join_all((0..16).map(|_| store.ping()));
    let names = ["a", "b", "c", "d"];
    let daemons = futures::future::join_all(names.map(|name| store.register_daemon(world.user, name, false)));
    let (pings, daemons) = tokio::join!(pings, daemons);
    busy.iter().for_each(tokio::task::JoinHandle::abort);
    pings.into_iter().for_each(|ping| ping.unwrap());
    daemons.into_iter().for_each(|daemon| drop(daemon.unwrap()));
    let after = world.db.number(OPEN).await;
    assert!(after > before, "{before} connections were enough: nothing was opened");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_happens_to_one_user_everywhere_at_once_is_one_feed_without_a_hole() {
    let world = World::new().await;
    let mut tasks = Vec::new();
    for number in 0..8 {
        let (store, user) = (world.store().clone(), world.user);
        tasks.push(tokio::spawn(async move {
            let (daemon, _) = store.register_daemon(user, &format!("d{number}"), false).await.unwrap();
            let chat = store.create_chat(&new_chat(user, Some(daemon))).await.unwrap().value.id.parse().unwrap();
            let (gateway, journal) = (InstanceId::new(), Incarnation::new());
            for round in 0..10 {
                let lease = store.connect_daemon(hello(user, daemon, gateway, journal, 0)).await.unwrap().value;
                let _ = store.rename_chat(user, chat, &format!("{number} {round}")).await.unwrap();
                assert!(store.release_lease(daemon, gateway, lease.epoch).await.unwrap().value);
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let feed = world.store().feed_after(world.user, 0, 10_000).await.unwrap().0;
    contiguous(feed.iter().map(|event| event.seq));
    assert_eq!(feed.len(), 2 + 8 * 31);
}

#[tokio::test]
async fn the_log_is_what_was_published_and_holds_no_content_a_second_time() {
    const BYTES: usize = 20_000;
    let world = World::new().await;
    let turn = world.turn("a").await;
    let attempt = world.claim(turn, 0).await;
    let input = format!(r#"{{"text":"{}"}}"#, "i".repeat(BYTES));
    let new = NewCall { input: input.clone(), ..asking(0, "write_file") };
    let told = NewCall { refused: Some(Failure::new(Code::ToolUnknown, "there is none")), ..call(1, "rm") };
    let mut published = world.store().commit_message(answer(&attempt, "on it", vec![new, told])).await.unwrap().events;
    let approvals = world.approvals().await;
    let decided = world.store().decide_approval(world.user, approvals[0], true, pb::ApprovalScope::Once).await.unwrap();
    published.extend(decided.events);
    let calls = world.calls(turn).await;
    let id = calls[0].id.parse().unwrap();
    published.extend(world.store().prepare_dispatches(world.chat, &[id], &[]).await.unwrap().events);
    let result = world.result(id, 1, &"r".repeat(BYTES));
    published.extend(world.store().commit_result(world.daemon, &result).await.unwrap().events);
    let kinds = kinds(&published);
    assert!(kinds.contains(&"call SUCCEEDED".to_owned()) && kinds.contains(&"message TOOL".to_owned()), "{kinds:?}");
    let log = world.log().await;
    assert!(!log.iter().any(|event| event.chat_id.is_empty()));
    for event in &published {
        assert_eq!(log[usize::try_from(event.seq).unwrap() - 1], *event);
    }
    let stored = world.db.number("SELECT sum(octet_length(payload))::bigint FROM events").await;
    assert!(stored < BYTES as i64, "{} events take {stored} bytes", log.len());
    let (feed, _) = world.store().feed_after(world.user, 0, 100).await.unwrap();
    let asked = feed.iter().filter_map(|event| match &event.kind {
        Some(pb::feed_event::Kind::ApprovalChanged(approval)) => Some(approval.input_json.as_str()),
        _ => None,
    });
    assert_eq!(asked.collect::<Vec<_>>(), [input.as_str(); 2]);
    let stored = world.db.number("SELECT sum(octet_length(payload))::bigint FROM user_events").await;
    assert!(stored < BYTES as i64, "{} events of the feed take {stored} bytes", feed.len());
    // What is read counts by what it holds, not by what is stored of it.
    let (some, more) = world.store().events_after(world.chat, 0, 3).await.unwrap();
    assert_eq!((some.len(), more), (3, true));
}

#[tokio::test]
async fn a_feed_is_read_by_its_bytes_and_says_that_there_is_more() {
    let world = World::new().await;
    // Ten events of a megabyte each: a field that this version does not know, 1,000,000 bytes long.
    world
        .db
        .execute(
            "INSERT INTO user_events (user_id, seq, kind, payload)
             SELECT u.id, u.feed_seq + n, 'test', decode('a206c0843d', 'hex') || convert_to(repeat('x', 1000000), 'UTF8')
             FROM users u, generate_series(1, 10) n",
        )
        .await;
    world.db.execute("UPDATE users SET feed_seq = feed_seq + 10").await;
    let last = world.store().feed_seqs(&[world.user]).await.unwrap()[0].1;
    let (mut after, mut reads) = (last - 10, Vec::new());
    loop {
        let (events, more) = world.store().feed_after(world.user, after, 500).await.unwrap();
        contiguous(events.iter().map(|event| event.seq - after));
        after += events.len() as i64;
        reads.push(events.len());
        if !more {
            break;
        }
        assert!(reads.len() <= 10, "{reads:?}");
    }
    assert_eq!(after, last);
    assert!(reads.iter().all(|events| events * 1_000_000 <= limits::READ_EVENTS_MAX_BYTES), "{reads:?}");
}
