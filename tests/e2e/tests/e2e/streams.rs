//! One client opens more update streams than a user may: it is told so, and nobody else notices.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use futures::StreamExt as _;
use reliant_devstack::resident_kib;
use reliant_harness::{Rig, RigOptions, eventually};
use reliant_rpc::update_service_client::UpdateServiceClient;
use reliant_types::{Code, Failure, limits, pb};
use tonic::{Streaming, transport::Channel};

use crate::{
    overload::metric,
    scripts::{MODEL, PATIENCE, session},
};

const STREAMS: usize = 10_000;
const CONNECTIONS: usize = 20;
/// Subscriptions on their way at one time, on each of two ways.
const AT_ONCE: usize = 200;
/// What an api replica may grow by while it refuses them.
const GROWTH_MAX_KIB: u64 = 192 * 1024;
/// Another user's turn meanwhile.
const TURN_MAX: Duration = Duration::from_secs(8);

async fn open(channel: Channel, token: &str) -> Result<Streaming<pb::SubscribeResponse>, Failure> {
    let feed = pb::FeedCursor { after_seq: -1, log_epoch: 0 };
    let mut request = tonic::Request::new(pb::SubscribeRequest { chats: Vec::new(), feed: Some(feed) });
    assert!(reliant_rpc::authorize(&mut request, token));
    let opened = UpdateServiceClient::new(channel).subscribe(request).await;
    opened.map(tonic::Response::into_inner).map_err(|status| reliant_rpc::failure(&status))
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_streams_of_one_client_are_refused_and_nobody_else_notices() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let (ada, eve) = (rig.person("ada").await?, rig.person("eve").await?);
    let mut chat = session(&eve, MODEL, pb::ChatMode::Ask).await?;
    assert!(chat.send_and_wait("hello", PATIENCE).await?.succeeded());
    let api = &rig.mesh.apis[0];
    let before = resident_kib(api.pid());
    let (peak, over) = (AtomicU64::new(before), AtomicBool::new(false));

    // Half over one connection, half over many.
    let one = reliant_rpc::channel(&rig.mesh.api_url(0)).await?;
    let mut channels = Vec::new();
    for _ in 0..CONNECTIONS {
        channels.push(reliant_rpc::channel(&rig.mesh.api_url(0)).await?);
    }
    let opening = async {
        let opens = |on: fn(usize) -> Option<usize>| {
            let (one, channels, token) = (&one, &channels, &ada.token);
            futures::stream::iter(0..STREAMS / 2)
                .map(move |n| open(on(n).map_or(one, |of| &channels[of]).clone(), token))
                .buffer_unordered(AT_ONCE)
                .collect::<Vec<_>>()
        };
        let (mut all, more) = tokio::join!(opens(|_| None), opens(|n| Some(n % CONNECTIONS)));
        over.store(true, Ordering::Relaxed);
        all.extend(more);
        all
    };
    let watching = async {
        while !over.load(Ordering::Relaxed) {
            peak.fetch_max(resident_kib(api.pid()), Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let others = async {
        let mut slowest = Duration::ZERO;
        while !over.load(Ordering::Relaxed) {
            // On the stream that eve has, and on a new one.
            let mut new = session(&eve, MODEL, pb::ChatMode::Ask).await?;
            for chat in [&mut chat, &mut new] {
                let report = chat.send_and_wait("and now?", PATIENCE).await?;
                assert!(report.succeeded(), "{:?}", report.turn);
                assert!(report.verification.is_clean(), "{:?}", report.verification);
                slowest = slowest.max(report.ended_at - report.sent_at);
            }
        }
        anyhow::Ok(slowest)
    };
    let begun = Instant::now();
    let (all, (), slowest) = tokio::join!(opening, watching, others);
    let (took, slowest) = (begun.elapsed(), slowest?);

    let mut refused: BTreeMap<String, usize> = BTreeMap::new();
    let mut unserved: BTreeMap<String, usize> = BTreeMap::new();
    let mut held = Vec::new();
    for opened in all {
        match opened {
            Ok(stream) => held.push(stream),
            Err(failure) => {
                // A burst on two cores may leave a few waiting too long for the database; they are told to come again.
                let known = matches!(failure.code, Code::QueueFull | Code::RateLimited | Code::Unavailable);
                assert!(known, "{failure:?}");
                assert!(failure.retry_after.is_some(), "no word of when to come back: {failure:?}");
                assert!(failure.message.split(' ').count() >= 4, "no sentence: {failure:?}");
                if failure.code == Code::Unavailable {
                    *unserved.entry(failure.message.clone()).or_default() += 1;
                }
                *refused.entry(failure.code.to_string()).or_default() += 1;
            }
        }
    }
    let grown = peak.load(Ordering::Relaxed).saturating_sub(before);
    eprintln!(
        "{} streams in {took:?}: {} held, refused {refused:?}; the api grew by at most {grown} KiB; another's slowest turn took {slowest:?}; not served: {unserved:?}",
        STREAMS,
        held.len(),
    );
    assert_eq!(held.len(), limits::USER_STREAMS_MAX, "{refused:?}");
    assert!(unserved.values().sum::<usize>() < STREAMS / 100, "{unserved:?}");
    assert!(grown < GROWTH_MAX_KIB, "the api grew by {grown} KiB");
    assert!(slowest < TURN_MAX, "another user's turn took {slowest:?}");
    let admin = api.addresses().admin.context("an api has an admin listener")?;
    let counted = metric(admin, "reliant_queue_refused_total{queue=\"user_streams\"}").await?;
    assert_eq!(counted as usize, refused.get(Code::QueueFull.as_str()).copied().unwrap_or_default(), "{refused:?}");
    assert!(counted > 0.0, "{refused:?}");
    // What is held is served.
    for stream in held.iter_mut().take(3) {
        assert!(tokio::time::timeout(PATIENCE, stream.message()).await??.is_some());
    }

    drop((held, one, channels));
    eventually("places to be free again", PATIENCE, || async {
        let channel = reliant_rpc::channel(&rig.mesh.api_url(0)).await?;
        Ok(open(channel, &ada.token).await.is_ok().then_some(()))
    })
    .await?;
    eventually("only eve's streams to be left", PATIENCE, || async {
        Ok((metric(admin, "reliant_viewers").await? < 10.0).then_some(()))
    })
    .await
}
