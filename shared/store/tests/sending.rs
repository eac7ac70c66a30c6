//! Messages: accepted once, in order, within limits.
#![allow(clippy::unwrap_used)]

mod support;

use reliant_store::*;
use reliant_types::*;
use support::*;

#[tokio::test]
async fn the_same_message_id_is_one_message() {
    let world = World::new().await;
    let first = world.send("a").await;
    let mut other_text = message(world.user, world.chat, "a");
    other_text.text = "something else".into();
    let again = world.store().send_message(&other_text).await.unwrap();
    assert!(again.value.duplicate && again.events.is_empty() && again.wake.is_none());
    assert_eq!((&again.value.message, &again.value.turn.id), (&first.message, &first.turn.id));
    assert_eq!(text(&again.value.message), "text of a");
    assert_eq!(world.messages().await.len(), 1);
    // In another chat it is another message.
    let chat = world.store().create_chat(&new_chat(world.user, None)).await.unwrap().value.id.parse().unwrap();
    assert!(!world.store().send_message(&message(world.user, chat, "a")).await.unwrap().value.duplicate);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_same_message_sent_by_sixteen_at_once_is_one_turn() {
    let world = World::new().await;
    let sends = (0..16).map(|_| async { world.send("a").await });
    let sent = futures::future::join_all(sends).await;
    assert_eq!(sent.iter().filter(|sent| !sent.duplicate).count(), 1);
    assert!(sent.iter().all(|other| other.turn.id == sent[0].turn.id && other.message == sent[0].message));
    assert_eq!(world.db.number("SELECT count(*) FROM turns").await, 1);
    world.log().await;
}

fn asked(user: UserId, request: &str) -> NewChat {
    NewChat { client_request_id: request.into(), ..new_chat(user, None) }
}

#[tokio::test]
async fn the_same_request_for_a_chat_is_one_chat_of_each_user() {
    let world = World::new().await;
    let ask = async |new: NewChat| world.store().create_chat(&new).await.unwrap();
    let first = ask(asked(world.user, "a")).await;
    assert_eq!(kinds(&first.events), ["chat"]);
    let chat = first.value.id.parse().unwrap();
    let renamed = world.store().rename_chat(world.user, chat, "another name").await.unwrap().value;
    // Whatever else it asks for, even if that is not there any more.
    let other = NewChat { model: "m/other".into(), daemon: Some(DaemonId::new()), ..asked(world.user, "a") };
    let again = ask(other).await;
    assert!(again.events.is_empty() && again.feed.is_empty() && again.wake.is_none());
    assert_eq!(again.value, renamed);
    assert_ne!(ask(asked(world.user, "b")).await.value.id, first.value.id);
    let eve = world.store().ensure_user("eve", "Eve", "member").await.unwrap().id;
    assert_ne!(ask(asked(eve, "a")).await.value.id, first.value.id);
    // Without an id each request is another.
    assert_ne!(ask(asked(world.user, "")).await.value.id, ask(asked(world.user, "")).await.value.id);
    for bad in ["a\0b".to_owned(), "x".repeat(limits::CLIENT_REQUEST_ID_MAX_CHARS + 1)] {
        let refused = world.store().create_chat(&asked(world.user, &bad)).await.unwrap_err();
        assert_eq!(code(refused), Code::InvalidArgument);
    }
    let nobody = world.store().create_chat(&asked(UserId::new(), "a")).await.unwrap_err();
    assert_eq!(code(nobody), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_same_request_made_by_sixteen_at_once_is_one_chat() {
    let world = World::new().await;
    let before = world.db.number("SELECT count(*) FROM chats").await;
    let new = asked(world.user, "a");
    let made = futures::future::join_all((0..16).map(|_| world.store().create_chat(&new))).await;
    let made: Vec<_> = made.into_iter().map(Result::unwrap).collect();
    assert_eq!(made.iter().filter(|made| !made.events.is_empty()).count(), 1);
    assert!(made.iter().all(|other| other.value.id == made[0].value.id));
    assert_eq!(world.db.number("SELECT count(*) FROM chats").await, before + 1);
}

#[tokio::test]
async fn what_was_accepted_is_logged_and_to_be_woken() {
    let world = World::new().await;
    let committed = world.store().send_message(&message(world.user, world.chat, "a")).await.unwrap();
    let wake = committed.wake.unwrap();
    assert_eq!((wake.chat, wake.user, wake.traceparent.as_str()), (world.chat, world.user, TRACE));
    assert_eq!(committed.value.turn.trace_id, "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(kinds(&committed.events), ["message USER", "turn QUEUED"]);
    let log = world.log().await;
    assert_eq!(log[1..], committed.events, "hints and log are the same");
    assert_eq!(world.db.number("SELECT wanted - seen FROM chats").await, 1);
    world.step().await;
    assert_eq!(world.db.number("SELECT wanted - seen FROM chats").await, 0);
}

#[tokio::test]
async fn bad_messages_are_refused_with_their_code() {
    let world = World::new().await;
    let refused = async |change: fn(&mut SendMessage)| {
        let mut bad = message(world.user, world.chat, "a");
        change(&mut bad);
        code(world.store().send_message(&bad).await.unwrap_err())
    };
    assert_eq!(refused(|bad| bad.text = "x".repeat(limits::MESSAGE_TEXT_MAX_BYTES + 1)).await, Code::MessageTooLarge);
    assert_eq!(refused(|bad| bad.text = "a\0b".into()).await, Code::InvalidArgument);
    assert_eq!(refused(|bad| bad.text.clear()).await, Code::InvalidArgument);
    assert_eq!(refused(|bad| bad.client_message_id.clear()).await, Code::InvalidArgument);
    assert_eq!(refused(|bad| bad.chat = ChatId::new()).await, Code::NotFound);
    let mut largest = message(world.user, world.chat, "largest");
    largest.text = "x".repeat(limits::MESSAGE_TEXT_MAX_BYTES);
    let _ = world.store().send_message(&largest).await.unwrap();
    let _ = world.store().archive_chat(world.user, world.chat, true).await.unwrap();
    assert_eq!(refused(|_| ()).await, Code::ChatArchived);
    let _ = world.store().archive_chat(world.user, world.chat, false).await.unwrap();
    world.send("b").await;
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let world = World::new().await;
    for number in 0..=limits::CHAT_QUEUED_TURNS_MAX {
        world.send(&number.to_string()).await;
    }
    let error = world.store().send_message(&message(world.user, world.chat, "more")).await.unwrap_err();
    let failure = Failure::from(error);
    assert_eq!(failure.code, Code::QueueFull);
    assert!(failure.retry_after.is_some());
    // What was accepted is still answered, and a place that comes free is used.
    assert!(world.send("0").await.duplicate);
    let turn = world.send("0").await.turn.id.parse().unwrap();
    let _ = world.store().request_cancel(world.user, turn).await.unwrap();
    world.send("more").await;
}

#[tokio::test]
async fn messages_are_read_by_page() {
    let world = World::new().await;
    for number in 0..5 {
        world.send(&number.to_string()).await;
    }
    let (newest, more) = world.store().list_messages(world.user, world.chat, 2, 0).await.unwrap();
    assert_eq!((newest.iter().map(|message| message.ordinal).collect::<Vec<_>>(), more), (vec![4, 5], true));
    let (oldest, more) = world.store().list_messages(world.user, world.chat, 3, 4).await.unwrap();
    assert_eq!((oldest.iter().map(|message| message.ordinal).collect::<Vec<_>>(), more), (vec![1, 2, 3], false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sixteen_writers_leave_a_log_without_a_hole() {
    let world = World::new().await;
    let writers = (0..16).map(|writer| {
        let (store, user, chat) = (world.store().clone(), world.user, world.chat);
        tokio::spawn(async move {
            let mut hints = Vec::new();
            for number in 0..12 {
                let committed = match number % 3 {
                    0 => store
                        .send_message(&message(user, chat, &format!("{writer}-{number}")))
                        .await
                        .map(|it| it.map(drop)),
                    1 => store.rename_chat(user, chat, &format!("{writer} {number}")).await.map(|it| it.map(drop)),
                    _ => {
                        let mode = if number % 2 == 0 { pb::ChatMode::Ask } else { pb::ChatMode::Auto };
                        store
                            .configure_chat(user, chat, Some(mode), Some(&format!("m/{writer}")))
                            .await
                            .map(|it| it.map(drop))
                    }
                };
                hints.extend(committed.unwrap().events);
            }
            hints
        })
    });
    let mut hints: Vec<_> = futures::future::join_all(writers).await.into_iter().flat_map(Result::unwrap).collect();
    hints.sort_by_key(|event| event.seq);
    let log = world.log().await;
    assert_eq!(log[1..], hints, "each event is in the log and in exactly one hint");
    let feed = world.store().feed_after(world.user, 0, 10_000).await.unwrap().0;
    contiguous(feed.iter().map(|event| event.seq));
    assert_eq!(world.store().feed_seqs(&[world.user]).await.unwrap(), [(world.user, feed.len() as i64)]);
    let ordinals: Vec<i64> = world.messages().await.iter().map(|message| i64::from(message.ordinal)).collect();
    contiguous(ordinals.into_iter());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_caller_that_goes_away_leaves_no_open_transaction() {
    let db = Db::with_connections(4).await;
    let user = db.store.ensure_user("ada", "Ada", "member").await.unwrap().id;
    let chat: ChatId = db.store.create_chat(&new_chat(user, None)).await.unwrap().value.id.parse().unwrap();
    for number in 0..200u64 {
        let (store, new) = (db.store.clone(), message(user, chat, &number.to_string()));
        let task = tokio::spawn(async move { store.send_message(&new).await.map(drop) });
        tokio::time::sleep(std::time::Duration::from_micros(number * 37 % 3000)).await;
        task.abort();
        let _ = task.await;
        if number % 10 == 0 {
            db.execute("UPDATE turns SET ended_at = now(), status = 'cancelled'").await;
        }
    }
    let _ = db.store.rename_chat(user, chat, "still here").await.unwrap();
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(5);
    let open = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%'";
    while db.number(open).await > 0 {
        assert!(tokio::time::Instant::now() < deadline, "a connection is in the pool with an open transaction");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let (events, _) = db.store.events_after(chat, 0, 10_000).await.unwrap();
    contiguous(events.iter().map(|event| event.seq));
}
