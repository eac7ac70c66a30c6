//! Against a real NATS server: what the unit tests cannot show.

use reliant_bus::{Bus, BusConfig, BusError, PrefixSubject, ResultSubject, ToolSubject, UpdateSubject};
use reliant_telemetry::TraceContext;
use reliant_types::{ChatId, DaemonId, ToolCallId, UserId, limits, pb};
use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(10);

struct Server {
    child: Child,
    port: u16,
}

impl Server {
    fn start(port: Option<u16>) -> Self {
        let port = port.unwrap_or_else(|| {
            let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
            free.local_addr().expect("bound").port()
        });
        let binary = std::env::var("RELIANT_TEST_NATS_SERVER")
            .expect("RELIANT_TEST_NATS_SERVER names the nats-server to test with; `make test` sets it");
        let child = Command::new(&binary)
            .args(["-a", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self { child: child.unwrap_or_else(|error| panic!("{binary} could not be started: {error}")), port }
    }

    async fn bus(&self) -> Bus {
        let config = BusConfig { url: format!("nats://127.0.0.1:{}", self.port), ..Default::default() };
        let bus = Bus::connect(&config).await.expect("an address");
        until(|| bus.is_connected()).await;
        bus
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn until(mut state: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !state() {
        assert!(Instant::now() < deadline, "the state did not come");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn requests_are_answered_and_carry_their_trace() {
    let server = Server::start(None);
    let (asking, answering) = (server.bus().await, server.bus().await);
    let topic = ToolSubject { daemon: DaemonId::new() };
    let mut requests = answering.subscribe(&topic).await.expect("subscribed");
    answering.flush().await;
    let server_side = answering.clone();
    tokio::spawn(async move {
        while let Some(request) = requests.next().await {
            assert!(request.wants_reply());
            let reply = pb::CancelReply { call_id: request.trace.traceparent.clone(), known: true };
            let reply = pb::ToolReply { reply: Some(pb::tool_reply::Reply::Cancel(reply)) };
            request.reply(&server_side, &reply).await.expect("answered");
        }
    });
    let trace = TraceContext::from_parts("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "");
    // The subscription may need a moment to be known to the server.
    let mut first = asking.request_with(&trace, &topic, &pb::ToolRequest::default(), PATIENCE).await;
    while matches!(first, Err(BusError::NoResponders(_))) {
        first = asking.request_with(&trace, &topic, &pb::ToolRequest::default(), PATIENCE).await;
    }
    let reply = first.expect("an answer").reply;
    assert!(matches!(reply, Some(pb::tool_reply::Reply::Cancel(cancel)) if cancel.call_id == trace.traceparent));
}

#[tokio::test]
async fn nobody_and_nobody_in_time_are_told_apart() {
    let server = Server::start(None);
    let bus = server.bus().await;
    let topic = PrefixSubject { producer: DaemonId::new().0 };
    let start = Instant::now();
    let nobody = bus.request(&topic, &pb::PrefixRequest::default(), PATIENCE).await;
    assert!(matches!(nobody, Err(BusError::NoResponders(_))), "{nobody:?}");
    assert!(start.elapsed() < PATIENCE / 2);
    let _silent = bus.subscribe(&topic).await.expect("subscribed");
    let late = bus.request(&topic, &pb::PrefixRequest::default(), Duration::from_millis(50)).await;
    assert!(matches!(late, Err(BusError::Timeout(_))), "{late:?}");
}

#[tokio::test]
async fn a_wildcard_group_gets_each_message_once() {
    let server = Server::start(None);
    let bus = server.bus().await;
    let mut one = bus.subscribe_wildcard::<ResultSubject>(Some("workers")).await.expect("subscribed");
    let mut two = bus.subscribe_wildcard::<ResultSubject>(Some("workers")).await.expect("subscribed");
    for _ in 0..50 {
        let topic = ResultSubject { daemon: DaemonId::new(), call: ToolCallId::new() };
        bus.publish(&topic, &pb::ToolResult { call_id: topic.call.to_string(), ..Default::default() })
            .await
            .expect("sent");
    }
    for _ in 0..50 {
        let received = tokio::select! { r = one.next() => r, r = two.next() => r }.expect("open");
        assert_eq!(received.message.call_id, received.topic.call.to_string());
    }
    let more = tokio::time::timeout(Duration::from_millis(50), async {
        tokio::select! { r = one.next() => r, r = two.next() => r }
    });
    assert!(more.await.is_err());
}

#[tokio::test]
async fn a_slow_receiver_is_bounded_and_keeps_what_it_holds() {
    let server = Server::start(None);
    let (sender, receiver) = (server.bus().await, server.bus().await);
    let topic = UpdateSubject { user: UserId::new(), chat: ChatId::new() };
    let mut slow = receiver.subscribe(&topic).await.expect("subscribed");
    receiver.flush().await;
    let dropped = || reliant_telemetry::metrics::BUS_SLOW_CONSUMER.get();
    let before = dropped();
    for _ in 0..5 * limits::NATS_SUBSCRIPTION_MAX {
        sender.publish_with(&TraceContext::default(), &topic, &pb::ChatUpdate::default()).await.expect("sent");
    }
    sender.flush().await;
    until(|| dropped() > before).await;
    let mut held = 0;
    while let Ok(Some(_)) = tokio::time::timeout(Duration::from_millis(100), slow.next()).await {
        held += 1;
    }
    let max = limits::NATS_SUBSCRIPTION_MAX;
    assert!((max..5 * max).contains(&held), "{held}");
}

#[tokio::test]
async fn a_restart_is_noticed_and_subscriptions_come_back() {
    let mut server = Server::start(None);
    let bus = server.bus().await;
    let topic = ToolSubject { daemon: DaemonId::new() };
    let mut requests = bus.subscribe(&topic).await.expect("subscribed");
    let connections = bus.connections();
    let asker = bus.clone();
    let under_way = tokio::spawn(async move { asker.request(&topic, &pb::ToolRequest::default(), PATIENCE).await });
    requests.next().await.expect("it arrives");
    server.kill();
    let start = Instant::now();
    assert!(matches!(under_way.await.expect("no panic"), Err(BusError::Disconnected)));
    assert!(start.elapsed() < PATIENCE / 2, "a request must not wait for its timeout");
    assert!(bus.disconnected_for().is_some());
    assert!(matches!(bus.publish(&topic, &pb::ToolRequest::default()).await, Err(BusError::Disconnected)));

    let _again = Server::start(Some(server.port));
    until(|| bus.is_connected()).await;
    assert!(bus.connections() > connections);
    bus.publish(&topic, &pb::ToolRequest::default()).await.expect("sent");
    let received = tokio::time::timeout(PATIENCE, requests.next()).await.expect("in time").expect("open");
    assert_eq!(received.topic, topic);
    assert!(matches!(received.reply(&bus, &pb::ToolReply::default()).await, Err(BusError::NoReplySubject(_))));
}
