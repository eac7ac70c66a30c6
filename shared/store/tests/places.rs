//! Places: who is held, who is let through, and that nobody is held for ever.

#![allow(clippy::unwrap_used)]

mod support;

use std::{collections::HashMap, time::Duration};

use rand::{RngExt, SeedableRng};
use reliant_store::*;
use reliant_types::*;
use support::*;

/// Of what users do at random, unless PROPTEST_RNG_SEED says another one.
const SEED: u64 = 5;

/// A database with one worker of so many slots, four fifths of which are room.
async fn with_slots(slots: i64) -> World {
    let world = World::new().await;
    beat(world.store(), world.worker, slots).await;
    world
}

async fn beat(store: &Store, id: InstanceId, slots: i64) {
    let beat = Heartbeat {
        id,
        role: "worker",
        version: "1".into(),
        address: String::new(),
        load: serde_json::json!({ "model_slots": slots }),
        draining: false,
    };
    store.heartbeat_instance(&beat).await.unwrap();
    store.refresh_places().await.unwrap();
}

async fn chat(world: &World, user: UserId) -> ChatId {
    world.store().create_chat(&new_chat(user, None)).await.unwrap().value.id.parse().unwrap()
}

/// A message in a new chat; whether it woke anybody.
async fn send(world: &World, user: UserId) -> (ChatId, TurnId, bool) {
    let chat = chat(world, user).await;
    let sent = world.store().send_message(&message(user, chat, "a")).await.unwrap();
    assert_eq!(sent.value.turn.status(), pb::TurnStatus::Queued);
    (chat, sent.value.turn.id.parse().unwrap(), sent.wake.is_some())
}

async fn step(world: &World, chat: ChatId) -> Step {
    world.store().next_step(chat, Look::Within(InstanceId::new())).await.unwrap().value
}

/// Its model answers: without calls, or with one.
async fn answered(world: &World, turn: TurnId, iteration: i32, calls: Vec<NewCall>) {
    let attempt = world.claim(turn, iteration).await;
    let _ = world.store().commit_message(answer(&attempt, "x", calls)).await.unwrap();
}

async fn placed(world: &World) -> Vec<Wake> {
    world.store().place_held(None, 100).await.unwrap().wakes
}

async fn held(world: &World) -> i64 {
    world.store().refresh_places().await.unwrap()
}

#[tokio::test]
async fn beyond_the_room_turns_are_held_and_another_users_first_is_not() {
    let world = with_slots(5).await;
    let mut ada = Vec::new();
    for n in 0..10 {
        let (chat, turn, woken) = send(&world, world.user).await;
        assert_eq!(woken, n < 4, "turn {n}");
        ada.push((chat, turn));
    }
    assert_eq!(held(&world).await, 6);
    // A stray wake of a held chat does nothing, however often.
    for _ in 0..3 {
        assert_eq!(step(&world, ada[5].0).await, Step::Wait { turn: ada[5].1, for_ms: None });
    }
    assert_eq!(step(&world, ada[0].0).await, Step::CallModel { turn: ada[0].1, iteration: 0 });
    // The relays pass over what is held.
    world
        .db
        .execute("UPDATE chats SET woken_at = now() - interval '1 hour', relayed_at = now() - interval '1 hour'")
        .await;
    let unseen = world.store().unseen_chats(Duration::ZERO, 100).await.unwrap();
    assert_eq!(unseen.len(), 3, "what has a place, and was not looked at");
    let stale = world.store().stale_open_turns(100).await.unwrap();
    assert_eq!(stale.len(), 4, "what has a place");
    assert_eq!(placed(&world).await, [], "nothing is free");

    let eve = world.store().ensure_user("eve", "Eve", "member").await.unwrap().id;
    assert!(send(&world, eve).await.2, "the reserve is for a user's first turn");
    let (second, _, woken) = send(&world, eve).await;
    assert!(!woken, "and for no other");
    assert_eq!(placed(&world).await, [], "nothing is free");
    answered(&world, ada[0].1, 0, Vec::new()).await;
    assert_eq!(placed(&world).await, [], "the reserve fills up before anything else");
    answered(&world, ada[1].1, 0, Vec::new()).await;
    let wakes = placed(&world).await;
    assert_eq!(wakes.iter().map(|wake| wake.chat).collect::<Vec<_>>(), [second], "who has least comes first");
    assert_eq!(wakes[0].traceparent, TRACE);
    answered(&world, ada[2].1, 0, Vec::new()).await;
    let wakes = placed(&world).await;
    assert_eq!(wakes.iter().map(|wake| wake.chat).collect::<Vec<_>>(), [ada[4].0], "then the oldest");
    assert_eq!(step(&world, ada[4].0).await, Step::CallModel { turn: ada[4].1, iteration: 0 });
}

#[tokio::test]
async fn a_place_whose_wake_was_lost_is_found_by_the_relay() {
    let world = with_slots(1).await;
    let (_, first, _) = send(&world, world.user).await;
    let (second, turn, woken) = send(&world, world.user).await;
    assert!(!woken);
    // It had been looked at as well: nothing else is unseen.
    let _ = step(&world, second).await;
    answered(&world, first, 0, Vec::new()).await;
    assert_eq!(placed(&world).await.len(), 1, "and whoever placed it dies now");
    world.db.execute("UPDATE chats SET woken_at = now() - interval '3 seconds'").await;
    let found = world.store().unseen_chats(Duration::from_secs(2), 10).await.unwrap();
    assert!(found.iter().any(|found| found.wake.chat == second), "{found:?}");
    assert_eq!(step(&world, second).await, Step::CallModel { turn, iteration: 0 });
}

#[tokio::test]
async fn a_held_turn_may_be_cancelled_and_its_chat_archived() {
    let world = with_slots(1).await;
    let (_, first, _) = send(&world, world.user).await;
    let (chat, turn, _) = send(&world, world.user).await;
    let behind = world.store().send_message(&message(world.user, chat, "b")).await.unwrap();
    assert!(behind.wake.is_none(), "a chat that is held is held as a whole");
    let cancelled = world.store().request_cancel(world.user, turn).await.unwrap();
    assert!(cancelled.wake.is_some());
    let behind: TurnId = behind.value.turn.id.parse().unwrap();
    assert_eq!(step(&world, chat).await, Step::Wait { turn: behind, for_ms: None }, "the next one stands in line");
    let _ = world.store().archive_chat(world.user, chat, true).await.unwrap();
    answered(&world, first, 0, Vec::new()).await;
    assert_eq!(placed(&world).await.len(), 1);
    assert_eq!(step(&world, chat).await, Step::CallModel { turn: behind, iteration: 0 });
    answered(&world, behind, 0, Vec::new()).await;

    let (_, running, _) = send(&world, world.user).await;
    let (chat, turn, _) = send(&world, world.user).await;
    assert_eq!(held(&world).await, 1);
    let _ = world.store().request_cancel(world.user, turn).await.unwrap();
    assert_eq!(held(&world).await, 0, "nothing of it is left in the line, before anybody looked at the chat");
    let found = world.store().unseen_chats(Duration::ZERO, 10).await.unwrap();
    assert!(found.iter().any(|found| found.wake.chat == chat), "and a lost wake is found: {found:?}");
    assert_eq!(step(&world, chat).await, Step::Idle);
    answered(&world, running, 0, Vec::new()).await;
}

#[tokio::test]
async fn tools_need_no_place_and_later_rounds_come_before_new_turns() {
    let world = with_slots(1).await;
    let chat = world.chat;
    let (turn, calls) = world.asked(vec![call(0, "shell")]).await;
    // While its tool runs, another has the place.
    let (_, other, woken) = send(&world, world.user).await;
    assert!(woken, "a running tool has no place");
    let (third, _, woken) = send(&world, world.user).await;
    assert!(!woken);
    let generation = world.dispatch(calls[0]).await;
    assert_eq!(world.ack(&world.result(calls[0], generation, "ok")).await, pb::AckOutcome::Committed);
    assert_eq!(step(&world, chat).await, Step::Wait { turn, for_ms: None }, "held between two rounds");
    answered(&world, other, 0, Vec::new()).await;
    let wakes = placed(&world).await;
    assert_eq!(wakes.iter().map(|wake| wake.chat).collect::<Vec<_>>(), [chat], "what was begun is ended first");
    assert_eq!(step(&world, chat).await, Step::CallModel { turn, iteration: 1 });
    let attempt = world.claim(turn, 1).await;
    assert!(attempt.lead.held > Duration::ZERO, "{:?}", attempt.lead);
    let _ = world.store().commit_message(answer(&attempt, "x", Vec::new())).await.unwrap();
    assert_eq!(placed(&world).await.iter().map(|wake| wake.chat).collect::<Vec<_>>(), [third]);
}

#[tokio::test]
async fn one_user_has_no_more_than_a_user_may_and_dead_workers_give_nothing() {
    let mut world = with_slots(100).await;
    let most = TurnsConfig { user_at_work_max: 2, ..Default::default() };
    world.db.store = world.db.store.clone().sharing(most);
    held(&world).await;
    let woken = [send(&world, world.user).await.2, send(&world, world.user).await.2, send(&world, world.user).await.2];
    assert_eq!(woken, [true, true, false]);
    assert_eq!(placed(&world).await, []);
    let eve = world.store().ensure_user("eve", "Eve", "member").await.unwrap().id;
    assert!(send(&world, eve).await.2);
    // Its slots are not counted once it is silent, and another's are.
    world.db.execute("UPDATE instances SET seen_at = now() - interval '1 minute'").await;
    beat(world.store(), InstanceId::new(), 1).await;
    assert!(!send(&world, eve).await.2);
}

#[tokio::test]
async fn places_are_given_once_by_many_and_to_more_users_than_one_look_considers() {
    let world = with_slots(1).await;
    let (_, first, _) = send(&world, world.user).await;
    for _ in 0..20 {
        assert!(!send(&world, world.user).await.2);
    }
    answered(&world, first, 0, Vec::new()).await;
    beat(world.store(), InstanceId::new(), 9).await;
    let looks = (0..8).map(|_| world.store().place_held(None, 100));
    let all = futures::future::join_all(looks).await.into_iter().map(|placed| placed.unwrap().wakes.len());
    assert_eq!(all.sum::<usize>(), 8, "four fifths of ten slots, each once");
}

/// Random users send, cancel and are answered, while several look for places. Whatever the order: places are never
/// passed, whoever has none gets one at once, and at the end nothing is left.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_held_for_ever() {
    let seed = std::env::var("PROPTEST_RNG_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(SEED);
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let world = with_slots(5).await;
    let room = 4;
    let mut users = vec![world.user];
    for n in 0..4 {
        users.push(world.store().ensure_user(&format!("u{n}"), "U", "member").await.unwrap().id);
    }
    // Chats that were told to look: what a workflow would do next.
    let mut awake: Vec<ChatId> = Vec::new();
    let mut at_work: HashMap<TurnId, UserId> = HashMap::new();
    let mut owner: HashMap<ChatId, UserId> = HashMap::new();
    let mut open: Vec<(TurnId, UserId)> = Vec::new();
    let mut pick = |most: usize| rng.random_range(0..most.max(1));
    for round in 0..600 {
        let sends = round < 300;
        match pick(10) {
            0..4 if sends => {
                // One of them sends most.
                let user = users[pick(12).saturating_sub(7)];
                let (chat, turn, woken) = send(&world, user).await;
                owner.insert(chat, user);
                open.push((turn, user));
                if woken {
                    awake.push(chat);
                }
            }
            4 if !open.is_empty() && sends => {
                let (turn, user) = open[pick(open.len())];
                let _ = world.store().request_cancel(user, turn).await.unwrap();
                at_work.remove(&turn);
                open.retain(|(of, _)| *of != turn);
            }
            4..7 if !at_work.is_empty() => {
                let turn = *at_work.keys().nth(pick(at_work.len())).unwrap();
                answered(&world, turn, 0, Vec::new()).await;
                at_work.remove(&turn);
                open.retain(|(of, _)| *of != turn);
            }
            _ => {
                let (one, two) = tokio::join!(world.store().place_held(None, 10), world.store().place_held(None, 10));
                awake.extend(one.unwrap().wakes.into_iter().chain(two.unwrap().wakes).map(|wake| wake.chat));
            }
        }
        for chat in std::mem::take(&mut awake) {
            if let Step::CallModel { turn, .. } = step(&world, chat).await {
                at_work.insert(turn, owner[&chat]);
            }
        }
        let mut counts: HashMap<UserId, usize> = HashMap::new();
        at_work.values().for_each(|user| *counts.entry(*user).or_default() += 1);
        let firsts = counts.len();
        assert!(at_work.len() <= room + firsts, "{counts:?}");
        assert!(counts.values().all(|count| *count <= room), "{counts:?}");
    }
    for _ in 0..1000 {
        for turn in std::mem::take(&mut at_work).into_keys() {
            answered(&world, turn, 0, Vec::new()).await;
            open.retain(|(of, _)| *of != turn);
        }
        if open.is_empty() {
            break;
        }
        for wake in placed(&world).await {
            if let Step::CallModel { turn, .. } = step(&world, wake.chat).await {
                at_work.insert(turn, wake.user);
            }
        }
    }
    assert_eq!(open, [], "all turns came to their end");
    assert_eq!(world.db.number("SELECT count(*) FROM turns WHERE ended_at IS NULL").await, 0);
}

#[tokio::test]
async fn a_user_with_the_most_open_turns_is_told_when_to_come_back() {
    let world = with_slots(1).await;
    let (_, first, _) = send(&world, world.user).await;
    let more = limits::USER_OPEN_TURNS_MAX - 1;
    sqlx::query(
        "INSERT INTO turns (id, chat_id, user_id, message_id, ordinal, status, model, mode, deadline_left_ms)
         SELECT gen_random_uuid(), $1, $2, gen_random_uuid(), n, 'queued', 'm', 'ask', 1 FROM generate_series(1, $3) n",
    )
    .bind(world.chat.0)
    .bind(world.user.0)
    .bind(more as i32)
    .execute(&world.db.raw)
    .await
    .unwrap();
    let chat = chat(&world, world.user).await;
    let refused = world.store().send_message(&message(world.user, chat, "a")).await.unwrap_err();
    let failure = Failure::from(refused);
    assert_eq!(failure.code, Code::QueueFull, "{failure:?}");
    assert!(failure.retry_after.is_some_and(|delay| delay >= Duration::from_secs(1)), "{failure:?}");
    answered(&world, first, 0, Vec::new()).await;
    assert!(world.store().send_message(&message(world.user, chat, "a")).await.is_ok(), "there is room again");
}
