//! The live feed over real Postgres and NATS, with this test in the place of the worker: its hints and pieces are lost,
//! late and repeated as it likes, and every viewer must still see everything once and in order.

mod support;

use std::time::Instant;

use anyhow::{Context as _, Result};
use futures::StreamExt as _;
use reliant_api::ApiLimits;
use reliant_bus::FeedSubject;
use reliant_client::From;
use reliant_rpc as rpc;
use reliant_types::{ChatId, Code, limits, pb};
use tower::ServiceExt as _;

use support::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_in_lasts_as_long_as_configured() -> Result<()> {
    let bench = Bench::start().await?;
    let person = bench.person("ada").await?;
    let code = bench.store.create_login_code(person.user, PATIENCE).await?;
    let mut identity = rpc::identity_service_client::IdentityServiceClient::new(person.channel.clone());
    let signed_in = identity.exchange_login_code(pb::ExchangeLoginCodeRequest { code }).await?.into_inner();
    let left = signed_in.expires_at.context("no end")?.seconds - reliant_types::unix_us() / 1_000_000;
    assert!((1..=60).contains(&left), "the session ends in {left} s");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn viewers_see_everything_once_though_hints_are_lost_and_doubled() -> Result<()> {
    let bench = Bench::start().await?;
    let ada = bench.person("ada").await?;
    let chat = ada.chat().await?;
    let mut viewers = Vec::new();
    for index in 0..10 {
        viewers.push(ada.view(chat, if index % 2 == 0 { From::Start } else { From::Snapshot }).await?);
    }
    let turn = ada.send(chat, "hello").await?;
    let producer = Producer::start(&bench, &ada, chat, turn).await?;
    for n in 0..400 {
        producer.write(&bench, &format!("piece {n} é; "), [1, 1, 0, 2, 1][n % 5]).await?;
        if n % 100 == 50 {
            // One that comes in the middle gets all there is, and one that resumes too.
            viewers.push(ada.view(chat, From::Snapshot).await?);
            let log_epoch = bench.store.log_epoch().await?;
            viewers.push(ada.view(chat, From::After { seq: 1, log_epoch }).await?);
        }
    }
    // The last piece is lost, and only the length tells.
    producer.write(&bench, "the end", 0).await?;
    producer.lengths(&bench).await?;
    for viewer in &mut viewers {
        viewer.live(producer.written()).await?;
    }
    assert!(producer.refills() < 400, "{} refills for one chat: they are not shared", producer.refills());
    // The commit's hint is lost too: the poll finds it.
    producer.commit(&bench, false).await?;
    let last = last_seq(&bench, chat).await?;
    for viewer in &mut viewers {
        viewer.seq(last).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_viewer_that_does_not_read_catches_up_and_holds_up_nobody() -> Result<()> {
    let bench = Bench::start().await?;
    let ada = bench.person("ada").await?;
    let chat = ada.chat().await?;
    let mut slow = ada.view(chat, From::Start).await?;
    // A connection of its own: the slow one's full window must not be its.
    let other = bench.person("ada").await?;
    let mut quick = other.view(chat, From::Start).await?;
    let turn = ada.send(chat, "hello").await?;
    let producer = Producer::start(&bench, &ada, chat, turn).await?;
    // Small pieces: what a frame costs beside its text fills the socket sooner than a message's text ends.
    let piece = "x".repeat(100);
    for _ in 0..50 {
        for _ in 0..300 {
            producer.write(&bench, &piece, 1).await?;
        }
        quick.live(producer.written()).await?;
    }
    // 15,000 pieces wait for the slow one, far more than its queue and its socket hold.
    slow.live(producer.written()).await?;
    assert!(slow.view.verification().lagged > 0, "it never lagged: {:?}", slow.view.verification());
    assert_eq!(quick.view.verification().lagged, 0);
    producer.write(&bench, "and on", 1).await?;
    slow.live(producer.written()).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn cursors_from_the_future_another_log_or_long_ago_get_a_snapshot() -> Result<()> {
    let bench = Bench::start().await?;
    let ada = bench.person("ada").await?;
    let chat = ada.chat().await?;
    ada.send(chat, "hello").await?;
    let last = last_seq(&bench, chat).await?;
    let epoch = bench.store.log_epoch().await?;
    let first = |chat: ChatId, after_seq, log_epoch| {
        let cursor = pb::ChatCursor { chat_id: chat.to_string(), after_seq, log_epoch };
        let ada = &ada;
        async move {
            let mut stream = ada.subscribe(pb::SubscribeRequest { chats: vec![cursor], feed: None }).await?;
            let update = tokio::time::timeout(PATIENCE, stream.next()).await?.context("ended")??.update;
            anyhow::Ok(update.context("empty")?)
        }
    };
    use pb::subscribe_response::Update;
    for (after, log_epoch) in [(last + 100, epoch), (i64::MAX, 0), (1, epoch + 1), (-1, 0)] {
        let update = first(chat, after, log_epoch).await?;
        assert!(
            matches!(&update, Update::Snapshot(snapshot) if snapshot.seq == last),
            "{after}/{log_epoch}: {update:?}"
        );
    }
    let update = first(chat, 1, epoch).await?;
    assert!(matches!(&update, Update::Event(event) if event.seq == 2), "{update:?}");
    let update = first(chat, last, epoch).await?;
    assert!(matches!(&update, Update::CaughtUp(caught_up) if caught_up.seq == last), "{update:?}");
    // More was missed than is replayed. Nobody has followed this chat here: a replica that follows one fills its gap.
    let chat = ada.chat().await?;
    ada.send(chat, "hello").await?;
    let last = last_seq(&bench, chat).await?;
    for n in 0..=limits::RESUME_EVENTS_MAX {
        let _ = bench.store.rename_chat(ada.user, chat, &format!("title {n}")).await?;
    }
    let newest = last_seq(&bench, chat).await?;
    let counted = unusable("too_old");
    let update = first(chat, last, epoch).await?;
    assert!(matches!(&update, Update::Snapshot(snapshot) if snapshot.seq == newest), "{update:?}");
    assert!(unusable("too_old") > counted);
    let update = first(chat, newest - limits::RESUME_EVENTS_MAX / 2, epoch).await?;
    let next = newest - limits::RESUME_EVENTS_MAX / 2 + 1;
    assert!(matches!(&update, Update::Event(event) if event.seq == next), "{update:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_viewer_whose_cursor_cannot_be_used_begins_anew_and_hears_what_follows() -> Result<()> {
    let bench = Bench::start().await?;
    let ada = bench.person("ada").await?;
    let chat = ada.chat().await?;
    ada.send(chat, "hello").await?;
    let epoch = bench.store.log_epoch().await?;
    for (after, log_epoch, reason) in [(100, epoch, "future"), (100, 0, "future"), (-1, epoch + 1, "other_log")] {
        let what = format!("{after:+} in log {log_epoch}");
        let counted = unusable(reason);
        let last = last_seq(&bench, chat).await?;
        let mut viewer = ada.view(chat, From::After { seq: last + after, log_epoch }).await?;
        viewer.caught_up().await?;
        assert_eq!(viewer.view.chat(chat).and_then(|chat| chat.last_seq), Some(last), "{what}");
        ada.send(chat, &what).await?;
        let newest = last_seq(&bench, chat).await?;
        viewer.seq(newest).await?;
        let known = viewer.view.chat(chat).context("no chat")?;
        assert_eq!(known.last_seq, Some(newest), "{what}");
        assert!(known.messages.values().any(|message| reliant_client::text_of(message) == what), "{what}: not seen");

        let last = feed_seq(&bench, &ada).await?;
        let mut feed = ada.feed(chat, Some((last + after, log_epoch))).await?;
        feed.caught_up().await?;
        feed.feed_seq(last).await?;
        let _ = bench.store.rename_chat(ada.user, chat, &what).await?;
        feed.feed_seq(last + 1).await?;
        // The chat's log has it as well, and its feed finds it apart from the other: the next viewer begins behind it.
        viewer.seq(last_seq(&bench, chat).await?).await?;

        for viewer in [viewer, feed] {
            let seen = viewer.view.verification();
            assert_eq!((seen.resets, seen.rollbacks), (1, 0), "{what}: {seen:?}");
        }
        assert!(unusable(reason) >= counted + 2, "{what}: not counted for the chat and the feed");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_feed_is_seen_once_and_in_order() -> Result<()> {
    let bench = Bench::start().await?;
    let ada = bench.person("ada").await?;
    let chat = ada.chat().await?;
    let rename = async |title: String| anyhow::Ok(bench.store.rename_chat(ada.user, chat, &title).await?.feed);
    // Long ago, for who comes back later: nobody follows, so these are in no replica's memory.
    let (begun, epoch) = (feed_seq(&bench, &ada).await?, bench.store.log_epoch().await?);
    for n in 0..=limits::RESUME_EVENTS_MAX {
        rename(format!("before {n}")).await?;
    }
    let mut steady = ada.feed(chat, None).await?;
    let mut moving = ada.feed(chat, None).await?;
    steady.caught_up().await?;
    moving.caught_up().await?;

    let hear = async |events: Vec<pb::FeedEvent>| {
        bench.bus.publish(&FeedSubject { user: ada.user }, &pb::FeedUpdate { events }).await
    };
    let mut held = Vec::new();
    for n in 0..200 {
        let events = rename(format!("title {n}")).await?;
        assert!(!events.is_empty(), "a rename is told to the feed");
        match n % 5 {
            0 => hear(events).await?,
            // It arrives after its successor.
            1 => held = events,
            2 => {
                hear(events).await?;
                hear(std::mem::take(&mut held)).await?;
            }
            3 => {
                hear(events.clone()).await?;
                hear(events).await?;
            }
            _ => {}
        }
        if n % 50 == 25 {
            // Away for some events, and back where it was.
            let Viewer { view, stream, .. } = moving;
            drop(stream);
            rename(format!("missed {n}")).await?;
            moving = ada.watch(chat, view).await?;
        }
    }
    // The last hint was lost: only the database tells.
    let last = feed_seq(&bench, &ada).await?;
    let mut returned = ada.feed(chat, Some((begun, epoch))).await?;
    for viewer in [&mut steady, &mut moving, &mut returned] {
        viewer.feed_seq(last).await?;
    }
    // Each goes on with what is new.
    hear(rename("at last".into()).await?).await?;
    for viewer in [&mut steady, &mut moving, &mut returned] {
        viewer.feed_seq(last + 1).await?;
        let seen = viewer.view.verification();
        assert_eq!((seen.violations(), seen.resets), (0, 0), "{seen:?}");
    }
    assert_eq!(moving.view.verification().reconnects, 4);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_ones_own_or_too_large_is_refused() -> Result<()> {
    let bench = Bench::start().await?;
    let (ada, bob) = (bench.person("ada").await?, bench.person("bob").await?);
    let chat = ada.chat().await?;
    let own = bob.chat().await?;
    let cursor = |chat: ChatId| pb::ChatCursor { chat_id: chat.to_string(), after_seq: -1, log_epoch: 0 };
    let refused = bob.subscribe(pb::SubscribeRequest { chats: vec![cursor(own), cursor(chat)], feed: None }).await;
    assert_eq!(rpc::failure(&refused.unwrap_err()).code, Code::NotFound);
    assert_eq!(rpc::failure(&bob.send(chat, "hello").await.unwrap_err()).code, Code::NotFound);
    for bytes in [limits::MESSAGE_TEXT_MAX_BYTES + 1, 10 * 1024 * 1024] {
        let status = ada.send(chat, &"x".repeat(bytes)).await.unwrap_err();
        assert_eq!(rpc::failure(&status).code, Code::MessageTooLarge, "{bytes}: {status:?}");
    }
    // One user's streams are bounded, and another's are not touched.
    let feed =
        || pb::SubscribeRequest { chats: Vec::new(), feed: Some(pb::FeedCursor { after_seq: -1, log_epoch: 0 }) };
    let mut open = Vec::new();
    for n in 0..limits::USER_STREAMS_MAX {
        open.push(bob.subscribe(feed()).await.with_context(|| format!("stream {n}"))?);
    }
    let failure = rpc::failure(&bob.subscribe(feed()).await.unwrap_err());
    assert_eq!((failure.code, failure.retry_after.is_some()), (Code::QueueFull, true));
    ada.subscribe(feed()).await?;
    drop(open);
    // A drain ends streams with a word that says: come again.
    let mut stream = ada.subscribe(feed()).await?;
    bench.drain.begin("test");
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        assert!(Instant::now() < deadline);
        match stream.next().await {
            Some(Ok(_)) => {}
            Some(Err(status)) => break status,
            None => anyhow::bail!("ended without a reason"),
        }
    };
    assert_eq!(rpc::failure(&status).code, Code::Draining, "{status:?}");
    Ok(())
}

/// Subscribes with headers alone; how the server ends it.
async fn without_request(person: &Person) -> Result<Code> {
    let never = futures::stream::pending::<Result<http_body::Frame<bytes::Bytes>, tonic::Status>>();
    let request = http::Request::post("http://api/reliant.v1.UpdateService/Subscribe")
        .header("content-type", "application/grpc")
        .header("authorization", format!("Bearer {}", person.token))
        .body(tonic::body::Body::new(http_body_util::StreamBody::new(never)))?;
    let response = tokio::time::timeout(PATIENCE, person.channel.clone().oneshot(request)).await??;
    let status = tonic::Status::from_header_map(response.headers()).context("no status")?;
    Ok(rpc::failure(&status).code)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_whose_request_never_comes_counts_at_once_and_is_ended() -> Result<()> {
    let bench = Bench::with(ApiLimits { user_streams: 1, ..ApiLimits::default() }).await?;
    let ada = bench.person("ada").await?;
    let ended = futures::try_join!(without_request(&ada), without_request(&ada))?;
    let expected = [Code::DeadlineExceeded, Code::QueueFull];
    assert!([ended.into(), [ended.1, ended.0]].contains(&expected), "{ended:?}");
    ada.subscribe(pb::SubscribeRequest { chats: Vec::new(), feed: Some(pb::FeedCursor::default()) }).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn feeds_without_memory_are_read_anew_and_too_many_are_refused() -> Result<()> {
    // One user's half: four feeds that keep nothing.
    let bench = Bench::with(ApiLimits { feed_bytes: 128 * 1024, ..ApiLimits::default() }).await?;
    let ada = bench.person("ada").await?;
    let chat = ada.chat().await?;
    let mut seq = 0;
    let mut viewers = Vec::new();
    for _ in 0..3 {
        ada.send(chat, &"x".repeat(100_000)).await?;
        seq = bench.store.last_seqs(&[chat]).await?[0].1;
        viewers.push(ada.view(chat, From::Snapshot).await?);
        for viewer in &mut viewers {
            viewer.seq(seq).await?;
        }
    }
    // Who comes back with a cursor is read what it missed.
    let mut back = viewers.remove(0);
    ada.send(chat, "more").await?;
    back = ada.watch(chat, back.view).await?;
    let now = bench.store.last_seqs(&[chat]).await?[0].1;
    assert!(now > seq);
    back.seq(now).await?;

    let mut chats = vec![chat];
    for _ in 0..4 {
        chats.push(ada.chat().await?);
    }
    let cursor = |chat: &ChatId| pb::ChatCursor { chat_id: chat.to_string(), after_seq: -1, log_epoch: 0 };
    let request = pb::SubscribeRequest { chats: chats.iter().map(cursor).collect(), feed: None };
    let failure = rpc::failure(&ada.subscribe(request).await.unwrap_err());
    assert_eq!((failure.code, failure.retry_after.is_some()), (Code::QueueFull, true));
    let bob = bench.person("bob").await?;
    let own = bob.chat().await?;
    bob.subscribe(pb::SubscribeRequest { chats: vec![cursor(&own)], feed: None }).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_gets_the_page_and_speaks_grpc_web_over_http_1() -> Result<()> {
    let bench = Bench::start().await?;
    let ada = bench.person("ada").await?;
    let host = bench.url.strip_prefix("http://").context("plain HTTP")?;
    let ask = |head: String, body: &'static [u8]| async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut socket = tokio::net::TcpStream::connect(host).await?;
        let length = body.len();
        let head = format!("{head}host: {host}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
        socket.write_all(head.as_bytes()).await?;
        socket.write_all(body).await?;
        let mut answer = Vec::new();
        tokio::time::timeout(PATIENCE, socket.read_to_end(&mut answer)).await??;
        anyhow::Ok(String::from_utf8_lossy(&answer).to_lowercase())
    };
    let page = ask("GET / HTTP/1.1\r\n".into(), b"").await?;
    assert!(page.starts_with("http/1.1 200") && page.contains("content-security-policy: default-src 'none'"), "{page}");
    assert!(page.contains("<!doctype html>"), "{page}");
    let missing = ask("GET /nope HTTP/1.1\r\n".into(), b"").await?;
    assert!(missing.starts_with("http/1.1 404"), "{missing}");

    let call = format!(
        "POST /reliant.v1.ModelService/ListModels HTTP/1.1\r\ncontent-type: application/grpc-web+proto\r\norigin: {}\r\n",
        bench.url
    );
    let refused = ask(call.clone(), &[0; 5]).await?;
    assert!(refused.starts_with("http/1.1 200") && refused.contains("grpc-status: 16"), "{refused}");
    assert!(refused.contains(&format!("access-control-allow-origin: {}", bench.url)), "{refused}");
    assert!(refused.contains("access-control-expose-headers: grpc-status"), "{refused}");
    let answer = ask(format!("{call}authorization: Bearer {}\r\n", ada.token), &[0; 5]).await?;
    assert!(answer.contains("sim/text") && answer.contains("grpc-status:0"), "{answer}");
    let unknown = call.replace("ListModels", "Nope") + &format!("authorization: Bearer {}\r\n", ada.token);
    let unknown = ask(unknown, &[0; 5]).await?;
    assert!(unknown.contains("grpc-status: 12"), "{unknown}");
    Ok(())
}
