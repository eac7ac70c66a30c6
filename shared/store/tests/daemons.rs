//! Leases, tokens, ownership.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use reliant_store::*;
use reliant_types::*;
use support::*;

#[tokio::test]
async fn a_lease_orders_by_instance() {
    let world = World::new().await;
    let store = world.store();
    assert_eq!(world.lease, Lease { instance: 1, epoch: 1, journal_replaced: false });
    let again =
        |instance, gateway| store.connect_daemon(hello(world.user, world.daemon, gateway, world.journal, instance));
    let other = InstanceId::new();
    // Its own newer stream, on another gateway.
    let lease = again(1, other).await.unwrap();
    assert_eq!((lease.value, lease.feed.len()), (Lease { instance: 1, epoch: 2, journal_replaced: false }, 0));
    let held = store.renew_leases(world.gateway, &[(world.daemon, 1, 1)]).await.unwrap().held;
    assert!(held.is_empty(), "the older stream lost it");
    assert_eq!(store.renew_leases(other, &[(world.daemon, 1, 2)]).await.unwrap().held, [world.daemon]);
    // A new process.
    assert_eq!(again(0, other).await.unwrap().value, Lease { instance: 2, epoch: 3, journal_replaced: false });
    assert!(matches!(again(1, other).await, Err(StoreError::DaemonReplaced)));
    assert_eq!(code(again(1, other).await.unwrap_err()), Code::DaemonReplaced);
    // Only the lease that is held can be given back.
    assert!(!store.release_lease(world.daemon, other, 2).await.unwrap().value);
    let released = store.release_lease(world.daemon, other, 3).await.unwrap();
    assert!(released.value && released.feed.len() == 1);
    assert!(
        store.renew_leases(other, &[(world.daemon, 2, 3)]).await.unwrap().held.is_empty(),
        "given back is given back"
    );
    assert!(!store.list_daemons(world.user, false).await.unwrap()[0].connected);
    let back = again(2, other).await.unwrap();
    assert_eq!((back.value.epoch, back.feed.len()), (4, 1), "epochs only grow");
    assert!(store.list_daemons(world.user, false).await.unwrap()[0].connected);
    // The next process has lost its journal, and the one after it has that new one.
    let journal = Incarnation::new();
    for (instance, journal_replaced) in [(3, true), (4, false)] {
        let lease = store.connect_daemon(hello(world.user, world.daemon, other, journal, 0)).await.unwrap().value;
        assert_eq!((lease.instance, lease.journal_replaced), (instance, journal_replaced));
    }
}

#[tokio::test]
async fn a_lease_that_ran_out_is_told_once() {
    let world = World::new().await;
    assert!(world.store().expired_leases(10).await.unwrap().is_empty());
    world.daemon_goes().await;
    let told = world.store().expired_leases(10).await.unwrap();
    assert_eq!(told.iter().map(|it| (it.value, it.feed.len())).collect::<Vec<_>>(), [(world.daemon, 1)]);
    assert!(world.store().expired_leases(10).await.unwrap().is_empty());
    // A gateway that was only slow renews it: that is told too, once.
    let renew = async || world.store().renew_leases(world.gateway, &[(world.daemon, 1, 1)]).await.unwrap();
    let renewed = renew().await;
    assert_eq!(renewed.held, [world.daemon]);
    assert_eq!(renewed.back.iter().map(|it| (it.value, it.feed.len())).collect::<Vec<_>>(), [(world.daemon, 1)]);
    assert!(renew().await.back.is_empty());
    contiguous(world.store().feed_after(world.user, 0, 100).await.unwrap().0.iter().map(|event| event.seq));
}

/// Presence may be lost, and a renewal has none: what waits is woken by the transaction that makes the lease good again.
#[tokio::test]
async fn a_lease_that_is_good_again_wakes_what_waited_for_it() {
    let mut world = World::new().await;
    let (turn, _) = world.asked(vec![call(0, "shell")]).await;
    let unseen = async |world: &World| world.db.number("SELECT count(*) FROM chats WHERE wanted > seen").await;
    let waits = async |world: &World| {
        world.daemon_goes().await;
        let _wait = world.step().await;
        assert_eq!(world.turn_status(turn).await, pb::TurnStatus::WaitingDaemon);
        assert_eq!(unseen(world).await, 0);
    };
    waits(&world).await;
    let _renewed = world.store().renew_leases(world.gateway, &[(world.daemon, 1, 1)]).await.unwrap();
    assert_eq!(unseen(&world).await, 1, "renewed");
    assert!(matches!(world.step().await, Step::Dispatch { .. }));
    waits(&world).await;
    world.daemon_comes(world.journal).await;
    assert_eq!(unseen(&world).await, 1, "connected");
}

#[tokio::test]
async fn declarations_belong_to_the_newest_process() {
    let world = World::new().await;
    let root = pb::Root { id: "r2".into(), ..Default::default() };
    let update = |instance| world.store().update_declarations(world.daemon, instance, vec![root.clone()], vec![]);
    assert!(!update(7).await.unwrap().value);
    assert!(update(1).await.unwrap().value);
    assert_eq!(world.store().list_daemons(world.user, false).await.unwrap()[0].roots[0].id, "r2");
    let chosen = world.store().select_daemon(world.user, world.chat, world.daemon, "r2").await.unwrap();
    assert_eq!((chosen.value.root_id.as_str(), chosen.feed.len()), ("r2", 1));
    let wrong = world.store().select_daemon(world.user, world.chat, world.daemon, "r1").await.unwrap_err();
    assert_eq!(code(wrong), Code::InvalidArgument);
}

#[tokio::test]
async fn selecting_a_daemon_wakes_what_waits_for_one() {
    let world = World::new().await;
    let (turn, calls) = world.asked(vec![call(0, "shell")]).await;
    world.daemon_goes().await;
    let _ = world.store().prepare_dispatches(world.chat, &calls, &[]).await.unwrap();
    let (other, _) = world.store().register_daemon(world.user, "desktop", false).await.unwrap();
    let _ = world.store().connect_daemon(hello(world.user, other, world.gateway, Incarnation::new(), 0)).await.unwrap();
    world.seen().await;
    let chosen = world.store().select_daemon(world.user, world.chat, other, "").await.unwrap();
    assert!(chosen.wake.is_some());
    assert_eq!(world.step().await, Step::Dispatch { turn, calls: calls.clone() });
    let order = world.store().prepare_dispatches(world.chat, &calls, &[]).await.unwrap().value.remove(0);
    assert_eq!((order.daemon, order.call.root_id.as_str()), (other, "r1"));
}

#[tokio::test]
async fn tokens_say_what_is_wrong_with_them() {
    let world = World::new().await;
    let store = world.store();
    let scopes = ["api".to_owned()];
    let (token, secret) = store.create_token(world.user, "ci", &scopes, None, None).await.unwrap();
    let row = store.token_by_secret(&secret).await.unwrap();
    assert_eq!((row.user, row.scopes.as_slice(), row.daemon), (world.user, scopes.as_slice(), None));
    assert!(secret.starts_with(&token.prefix) && secret.len() == 47);
    assert_eq!(code(store.token_by_secret("rlt_guess").await.unwrap_err()), Code::TokenInvalid);
    let day = std::time::Duration::from_secs(86_400);
    assert!(store.revoked_within(day).await.unwrap().is_empty());
    let id = token.id.parse().unwrap();
    store.revoke_token(world.user, id).await.unwrap();
    store.revoke_token(world.user, id).await.unwrap();
    assert_eq!(code(store.token_by_secret(&secret).await.unwrap_err()), Code::TokenRevoked);
    assert_eq!(store.revoked_within(day).await.unwrap(), [id]);
    let past = chrono::Utc::now() - DAY;
    let (_, secret) = store.create_token(world.user, "old", &scopes, None, Some(past)).await.unwrap();
    assert_eq!(code(store.token_by_secret(&secret).await.unwrap_err()), Code::TokenExpired);
    assert_eq!(store.list_tokens(world.user).await.unwrap().len(), 2, "daemons' tokens are not among them");
}

#[tokio::test]
async fn registering_anew_voids_the_old_token() {
    let world = World::new().await;
    let store = world.store();
    assert_eq!(code(store.register_daemon(world.user, "laptop", false).await.unwrap_err()), Code::AlreadyExists);
    let (same, first) = store.register_daemon(world.user, "laptop", true).await.unwrap();
    assert_eq!(same, world.daemon);
    assert_eq!(store.token_by_secret(&first).await.unwrap().daemon, Some(world.daemon));
    let (_, second) = store.register_daemon(world.user, "laptop", true).await.unwrap();
    assert_eq!(code(store.token_by_secret(&first).await.unwrap_err()), Code::TokenRevoked);
    store.token_by_secret(&second).await.unwrap();
    let revoked = store.revoke_daemon(world.user, world.daemon).await.unwrap();
    assert_eq!(revoked.feed.len(), 1);
    assert_eq!(code(store.token_by_secret(&second).await.unwrap_err()), Code::TokenRevoked);
    let refused = store.connect_daemon(hello(world.user, world.daemon, world.gateway, world.journal, 0)).await;
    assert_eq!(code(refused.unwrap_err()), Code::NotFound);
    assert!(store.renew_leases(world.gateway, &[(world.daemon, 1, 1)]).await.unwrap().held.is_empty());
    let (new, _) = store.register_daemon(world.user, "laptop", false).await.unwrap();
    assert_ne!(new, world.daemon, "the name is free again");
}

#[tokio::test]
async fn a_sign_in_link_works_once() {
    let world = World::new().await;
    let sign_in = world.store().create_login_code(world.user, Duration::from_secs(600)).await.unwrap();
    assert_eq!(world.store().use_login_code(&sign_in).await.unwrap().id, world.user);
    assert_eq!(code(world.store().use_login_code(&sign_in).await.unwrap_err()), Code::TokenInvalid);
    let expired = world.store().create_login_code(world.user, Duration::ZERO).await.unwrap();
    assert_eq!(code(world.store().use_login_code(&expired).await.unwrap_err()), Code::TokenInvalid);
    let again = world.store().ensure_user("ada", "Ada L.", "admin").await.unwrap();
    assert_eq!((again.id, again.role.as_str()), (world.user, "admin"));
    assert_eq!(world.store().user_by_subject("ada").await.unwrap(), world.store().user(world.user).await.unwrap());
}

#[tokio::test]
async fn nothing_of_another_is_there() {
    let world = World::new().await;
    let (turn, _) = world.asked(vec![asking(0, "shell")]).await;
    let approval = world.approvals().await[0];
    let (token, _) = world.store().create_token(world.user, "ci", &["api".to_owned()], None, None).await.unwrap();
    let project = world.store().create_project(world.user, "p").await.unwrap();
    let (store, chat, daemon) = (world.store(), world.chat, world.daemon);
    let eve = store.ensure_user("eve", "Eve", "member").await.unwrap().id;
    let (eves_daemon, _) = store.register_daemon(eve, "laptop", false).await.unwrap();
    let before = world.log().await;

    let mut refused = Vec::new();
    macro_rules! refuse { ($($call:expr),* $(,)?) => { $(refused.push((stringify!($call), code($call.await.map(drop).unwrap_err())));)* }; }
    refuse!(
        store.get_chat(eve, chat),
        store.rename_chat(eve, chat, "mine"),
        store.archive_chat(eve, chat, true),
        store.configure_chat(eve, chat, Some(pb::ChatMode::Auto), None),
        store.select_daemon(eve, chat, eves_daemon, ""),
        store.select_daemon(world.user, chat, eves_daemon, ""),
        store.send_message(&message(eve, chat, "x")),
        store.list_messages(eve, chat, 0, 0),
        store.get_turn(eve, turn),
        store.request_cancel(eve, turn),
        store.decide_approval(eve, approval, true, pb::ApprovalScope::Session),
        store.list_approvals(eve, Some(chat), true, 0, None),
        store.revoke_daemon(eve, daemon),
        store.connect_daemon(hello(eve, daemon, world.gateway, world.journal, 0)),
        store.revoke_token(eve, token.id.parse().unwrap()),
        store.chat_access(eve, chat),
        store.snapshot(eve, chat),
        store.create_chat(&new_chat(eve, Some(daemon))),
        store.create_chat(&NewChat { project: Some(project.id.parse().unwrap()), ..new_chat(eve, None) }),
    );
    for (call, code) in refused {
        assert_eq!(code, Code::NotFound, "{call}");
    }
    assert!(store.list_chats(eve, &ChatPage::default()).await.unwrap().0.is_empty());
    assert!(store.list_approvals(eve, None, true, 0, None).await.unwrap().0.is_empty());
    assert!(store.list_tokens(eve).await.unwrap().is_empty());
    assert!(store.list_projects(eve).await.unwrap().is_empty());
    assert_eq!(store.list_daemons(eve, true).await.unwrap().len(), 1);
    assert!(store.feed_after(eve, 0, 10).await.unwrap().0.is_empty());
    assert_eq!(world.log().await, before, "nothing was changed");
}

#[tokio::test]
async fn projects_have_names_of_their_own() {
    let world = World::new().await;
    let project = world.store().create_project(world.user, "reliant").await.unwrap();
    assert_eq!(code(world.store().create_project(world.user, "reliant").await.unwrap_err()), Code::AlreadyExists);
    assert_eq!(world.store().list_projects(world.user).await.unwrap(), [project]);
    let beat = Heartbeat {
        id: world.worker,
        role: "worker",
        version: "0.1.0".into(),
        address: String::new(),
        load: serde_json::json!({}),
        draining: false,
    };
    world.store().heartbeat_instance(&beat).await.unwrap();
    world.store().heartbeat_instance(&Heartbeat { draining: true, ..beat }).await.unwrap();
    assert_eq!(world.db.number("SELECT count(*) FROM instances WHERE drain_state = 'draining'").await, 1);
}

#[tokio::test]
async fn declarations_have_a_new_number_when_they_change_and_only_then() {
    let mut world = World::new().await;
    let (number, declared) = world.store().declarations(world.daemon).await.unwrap();
    world.daemon_comes(world.journal).await;
    assert_eq!(world.store().declarations(world.daemon).await.unwrap(), (number, declared.clone()));
    let instance = world.db.number("SELECT instance FROM daemons").await;
    let more =
        [declared.tools.clone(), vec![pb::ToolDeclaration { name: "more".into(), ..Default::default() }]].concat();
    let changed =
        world.store().update_declarations(world.daemon, instance, declared.roots, more.clone()).await.unwrap();
    assert!(changed.value);
    let (after, now) = world.store().declarations(world.daemon).await.unwrap();
    assert!(after > number && now.tools == more);
}

#[tokio::test]
async fn no_token_makes_what_outlives_it() {
    let world = World::new().await;
    let (store, scopes) = (world.store(), ["api".to_owned()]);
    let ends = chrono::Utc::now() + DAY;
    let (token, _) = store.create_token(world.user, "ci", &scopes, None, Some(ends)).await.unwrap();
    let id: TokenId = token.id.parse().unwrap();
    let (_, secret) = store.register_daemon_by(world.user, "by a token", false, Some(id)).await.unwrap();
    let made = store.token_by_secret(&secret).await.unwrap();
    assert!(made.expires_at.is_some_and(|at| at <= ends));
    let (_, own) = store.register_daemon(world.user, "by its person", false).await.unwrap();
    store.revoke_token(world.user, id).await.unwrap();
    assert_eq!(code(store.token_by_secret(&secret).await.unwrap_err()), Code::TokenRevoked);
    let revoked = store.revoked_within(std::time::Duration::from_secs(60)).await.unwrap();
    assert_eq!(revoked.len(), 2, "who holds the daemon's stream learns of it too");
    assert!(store.token_by_secret(&own).await.is_ok());
    let again = store.register_daemon_by(world.user, "too late", false, Some(id)).await;
    assert_eq!(code(again.unwrap_err()), Code::TokenRevoked);
}

#[tokio::test]
async fn a_user_has_a_bounded_number_of_daemons_and_the_way_out_is_said() {
    let world = World::new().await;
    let user = world.user;
    let fill = "INSERT INTO daemons (id, user_id, name) SELECT gen_random_uuid(), user_id, 'd' || n
                FROM (SELECT user_id FROM daemons LIMIT 1) u, generate_series(1, 2000) n";
    world.db.execute(fill).await;
    let refused = world.store().register_daemon(user, "one more", false).await.unwrap_err();
    assert!(refused.to_string().contains("revoke"), "{refused}");
    assert_eq!(code(refused), Code::LimitReached);
    world.db.execute("UPDATE daemons SET revoked_at = now() WHERE name LIKE 'd%'").await;
    assert!(world.store().register_daemon(user, "one more", false).await.is_ok());
}

#[tokio::test]
async fn a_listing_reads_a_bounded_amount_of_declarations() {
    let world = World::new().await;
    // Seven daemons that declare 4 MB each.
    let fill = "INSERT INTO daemons (id, user_id, name, declarations)
                SELECT gen_random_uuid(), user_id, 'd' || n, convert_to(string_agg(md5(random()::text), ''), 'UTF8')
                FROM (SELECT user_id FROM daemons LIMIT 1) u, generate_series(1, 7) n, generate_series(1, 125000) m GROUP BY user_id, n";
    world.db.execute(fill).await;
    let daemons = world.store().list_daemons(world.user, false).await.unwrap();
    assert_eq!(daemons.len(), 8, "all are listed");
    assert_eq!(
        daemons.iter().filter(|daemon| daemon.shortened).count(),
        4,
        "all past 16 MiB without what they declare"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn daemons_that_come_and_calls_that_miss_them_do_not_lock_each_other_out() {
    let world = World::new().await;
    let (_, calls) = world.asked(vec![call(0, "shell")]).await;
    let (store, user, daemon, gateway, journal) =
        (world.store().clone(), world.user, world.daemon, world.gateway, world.journal);
    let comes = tokio::spawn(async move {
        for _ in 0..200 {
            let _ = store.connect_daemon(hello(user, daemon, gateway, journal, 0)).await.unwrap();
        }
    });
    while !comes.is_finished() {
        let orders = world.store().prepare_dispatches(world.chat, &calls, &[]).await.unwrap().value;
        for order in orders {
            let _ = world.store().daemon_away(calls[0], order.call.generation).await.unwrap();
        }
    }
    comes.await.unwrap();
    // What a connection has counted is told when it ends, or a little later.
    tokio::time::sleep(std::time::Duration::from_millis(1200)).await;
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(world.db.number(deadlocks).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn migrations_wait_for_longer_than_a_statement_may() {
    let world = World::new().await;
    let (raw, store) = (world.db.raw.clone(), world.store().clone());
    let held = tokio::spawn(async move {
        // The longest that other statements wait for a lock is 6 s.
        let hold = "DO $$ BEGIN LOCK TABLE _sqlx_migrations IN ACCESS EXCLUSIVE MODE; PERFORM pg_sleep(7); END $$";
        sqlx::query(hold).execute(&raw).await.unwrap();
    });
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    store.migrate().await.unwrap();
    held.await.unwrap();
}
