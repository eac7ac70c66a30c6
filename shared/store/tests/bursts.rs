//! Wakes and bursts: one wake for all that is wanted, a hint while a worker has the chat, and nothing that falls between.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use reliant_store::*;
use reliant_types::*;
use support::*;

async fn beat(world: &World, id: InstanceId) {
    let beat = Heartbeat {
        id,
        role: "worker",
        version: "1".into(),
        address: "127.0.0.1:1".into(),
        load: serde_json::json!({ "model_slots": 10 }),
        draining: false,
    };
    world.store().heartbeat_instance(&beat).await.unwrap();
}

async fn end_turns(world: &World) {
    world.db.execute("UPDATE turns SET status = 'cancelled', ended_at = now() WHERE ended_at IS NULL").await;
}

async fn look(world: &World, look: Look) -> Step {
    world.store().next_step(world.chat, look).await.unwrap().value
}

async fn send(world: &World, id: &str) -> Option<Wake> {
    world.store().send_message(&message(world.user, world.chat, id)).await.unwrap().wake
}

#[tokio::test]
async fn one_wake_is_enough_for_all_that_is_wanted() {
    let world = World::new().await;
    assert!(send(&world, "a").await.is_some());
    assert!(send(&world, "b").await.is_none() && send(&world, "c").await.is_none(), "the first wake is under way");
    look(&world, Look::Within(world.worker)).await;
    assert_eq!(world.db.number("SELECT wanted - seen FROM chats").await, 0, "and it answers for all");
    assert!(send(&world, "d").await.is_some());
}

#[tokio::test]
async fn a_burst_is_hinted_until_its_last_look() {
    let world = World::new().await;
    beat(&world, world.worker).await;
    let turn = world.turn("a").await;
    assert_eq!(look(&world, Look::Last(world.worker)).await, Step::CallModel { turn, iteration: 0 });
    let hinted = send(&world, "b").await.unwrap();
    assert_eq!(hinted.burst, Some(world.worker));
    assert_eq!(send(&world, "c").await.unwrap().burst, Some(world.worker), "each one: it may wait for this");
    let attempt = world.claim(turn, 0).await;
    let _ = world.store().commit_message(answer(&attempt, "done", vec![])).await.unwrap();
    // It goes on with the next ones, and is still hinted.
    assert!(matches!(look(&world, Look::Last(world.worker)).await, Step::CallModel { .. }));
    end_turns(&world).await;
    assert_eq!(look(&world, Look::Within(world.worker)).await, Step::Idle);
    assert_eq!(send(&world, "d").await.unwrap().burst, Some(world.worker), "a look in the middle does not end it");
    end_turns(&world).await;
    assert_eq!(look(&world, Look::Last(world.worker)).await, Step::Idle);
    assert_eq!(send(&world, "e").await.unwrap().burst, None, "from here on it is signalled");
}

#[tokio::test]
async fn a_burst_of_a_worker_that_is_gone_counts_no_longer() {
    let world = World::new().await;
    beat(&world, world.worker).await;
    let turn = world.turn("a").await;
    look(&world, Look::Last(world.worker)).await;
    world.db.execute("UPDATE instances SET seen_at = now() - interval '8 seconds'").await;
    assert_eq!(send(&world, "b").await.unwrap().burst, None);
    // Another worker takes over; what the first one thinks of it, should it come back, does not end that burst.
    let second = InstanceId::new();
    beat(&world, second).await;
    look(&world, Look::Last(second)).await;
    beat(&world, world.worker).await;
    end_turns(&world).await;
    assert_eq!(look(&world, Look::Last(world.worker)).await, Step::Idle);
    assert_eq!(send(&world, "c").await.unwrap().burst, Some(second));
    let _ = turn;
}

#[tokio::test]
async fn open_bursts_note_what_is_wanted_of_their_chats_alone() {
    let world = World::new().await;
    beat(&world, world.worker).await;
    let turn = world.turn("a").await;
    look(&world, Look::Last(world.worker)).await;
    assert!(send(&world, "b").await.is_some());
    let observe = async |worker| world.store().observe_bursts(worker, &[world.chat], &[turn]).await.unwrap();
    assert_eq!(observe(InstanceId::new()).await, Observed::default(), "it is another's burst");
    assert_eq!(observe(world.worker).await, Observed { chats: vec![world.chat], ended: vec![] });
    assert_eq!(observe(world.worker).await, Observed::default(), "once");
    assert_eq!(world.db.number("SELECT wanted - seen FROM chats").await, 0);
    let _ = world.store().request_cancel(world.user, turn).await.unwrap();
    assert_eq!(observe(world.worker).await, Observed { chats: vec![world.chat], ended: vec![turn] });
    // A burst that ended is not answered for.
    end_turns(&world).await;
    look(&world, Look::Last(world.worker)).await;
    assert!(send(&world, "c").await.is_some());
    assert_eq!(observe(world.worker).await.chats, []);
    assert_eq!(world.db.number("SELECT wanted - seen FROM chats").await, 1);
}

/// Whatever comes while bursts begin, go on and end: it is seen by the burst, or its sender signals.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_falls_between_a_last_look_and_a_wake() {
    let world = World::new().await;
    beat(&world, world.worker).await;
    let signals = tokio::sync::Semaphore::new(0);
    let sender = async {
        for round in 0..150 {
            if let Some(wake) = send(&world, &format!("m{round}")).await
                && wake.burst.is_none()
            {
                signals.add_permits(1);
            }
            tokio::time::sleep(Duration::from_millis(round % 4)).await;
            end_turns(&world).await;
        }
    };
    let sent = std::sync::atomic::AtomicBool::new(false);
    let worker = async {
        // The signals that were sent are answered, and then nothing is left.
        loop {
            let signal = tokio::time::timeout(Duration::from_millis(20), signals.acquire()).await;
            match signal {
                Ok(permit) => permit.unwrap().forget(),
                Err(_) if sent.load(std::sync::atomic::Ordering::Relaxed) => break,
                Err(_) => continue,
            }
            while !matches!(look(&world, Look::Last(world.worker)).await, Step::Idle | Step::Wait { .. }) {}
        }
    };
    tokio::join!(
        async {
            sender.await;
            sent.store(true, std::sync::atomic::Ordering::Relaxed);
        },
        worker
    );
    assert_eq!(world.db.number("SELECT wanted - seen FROM chats").await, 0);
}

#[tokio::test]
async fn the_relay_waits_longer_each_time_and_knows_since_when() {
    let world = World::new().await;
    send(&world, "a").await;
    world.db.execute("UPDATE chats SET wanted_at = now() - interval '1 minute'").await;
    assert_eq!(world.store().count_unseen(Duration::from_secs(10)).await.unwrap(), 1);
    let find = async |waited: &'static str| {
        world.db.execute(waited).await;
        world.store().unseen_chats(Duration::from_secs(2), 10).await.unwrap()
    };
    let three = "UPDATE chats SET woken_at = now() - interval '3.5 seconds'";
    for attempts in 1..=3 {
        let found = find(three).await;
        assert_eq!(found.iter().map(|found| found.attempts).collect::<Vec<_>>(), [attempts]);
        assert!(found[0].age >= Duration::from_secs(60));
    }
    assert!(find(three).await.is_empty(), "from the fourth time on it takes longer");
    assert_eq!(find("UPDATE chats SET woken_at = now() - interval '7 seconds'").await[0].attempts, 4);
    assert!(world.store().is_unseen(world.chat).await.unwrap());
    look(&world, Look::Within(world.worker)).await;
    assert!(!world.store().is_unseen(world.chat).await.unwrap());
    assert_eq!(world.store().count_unseen(Duration::ZERO).await.unwrap(), 0);
    send(&world, "b").await;
    let found = find(three).await;
    assert_eq!((found[0].attempts, found[0].age < Duration::from_secs(30)), (1, true), "it begins anew");
}

#[tokio::test]
async fn a_turn_whose_worker_and_run_are_gone_is_found() {
    let world = World::new().await;
    beat(&world, world.worker).await;
    let turn = world.turn("a").await;
    look(&world, Look::Last(world.worker)).await;
    world.claim(turn, 0).await;
    assert_eq!(world.store().orphaned_turns(10).await.unwrap(), []);
    world.db.execute("UPDATE instances SET seen_at = now() - interval '8 seconds'").await;
    let found = world.store().orphaned_turns(10).await.unwrap();
    assert_eq!(found.iter().map(|wake| wake.chat).collect::<Vec<_>>(), [world.chat]);
    assert_eq!(world.store().orphaned_turns(10).await.unwrap(), [], "it is wanted now: the relay sees to it");
    assert!(world.store().is_unseen(world.chat).await.unwrap());
}

#[tokio::test]
async fn a_person_is_told_once_why_a_turn_stands() {
    let world = World::new().await;
    let turn = world.turn("a").await;
    let shown = async || world.store().get_turn(world.user, turn).await.unwrap().0.waiting_for;
    let tell = async || world.store().tell_standing(&[world.chat], Duration::from_secs(10)).await.unwrap().len();
    assert_eq!(tell().await, 0, "it was accepted just now");
    assert_eq!(shown().await, "");
    world.db.execute("UPDATE chats SET wanted_at = now() - interval '11 seconds'").await;
    assert_eq!(tell().await, 1);
    assert!(shown().await.contains("no worker is up"), "{}", shown().await);
    let events = world.db.number("SELECT count(*) FROM events").await;
    assert_eq!(tell().await, 0);
    assert_eq!(world.db.number("SELECT count(*) FROM events").await, events, "once");
    // A worker takes it up: it moves, and viewers hear of it.
    world.claim(turn, 0).await;
    assert_eq!(shown().await, "");
    world.log().await;
    // Where there are workers, it is not for want of one.
    beat(&world, world.worker).await;
    let next = world.store().create_chat(&new_chat(world.user, None)).await.unwrap().value.id.parse().unwrap();
    let sent = world.store().send_message(&message(world.user, next, "b")).await.unwrap();
    world.db.execute("UPDATE chats SET wanted_at = now() - interval '11 seconds'").await;
    assert_eq!(world.store().tell_standing(&[next], Duration::from_secs(10)).await.unwrap().len(), 1);
    let turn: TurnId = sent.value.turn.id.parse().unwrap();
    let told = world.store().get_turn(world.user, turn).await.unwrap().0.waiting_for;
    assert!(told.contains("no worker has taken it up yet"), "{told}");
}
