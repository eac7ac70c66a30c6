//! The tunnel against a gateway of ours: greetings, dispatches, results until acknowledged, drains, refusals.

use std::{net::SocketAddr, pin::Pin, time::Duration};

use futures::Stream;
use pb::{connect_request::Frame as Up, connect_response::Frame as Down};
use reliant_rpc::tunnel_service_server::{TunnelService, TunnelServiceServer};
use reliant_types::{ToolCallId, pb};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::{Built, DaemonConfig, DaemonError, RootConfig, build, status};

/// A stream that a daemon opened.
struct Line {
    hello: pb::Hello,
    from: Streaming<pb::ConnectRequest>,
    to: mpsc::Sender<Result<pb::ConnectResponse, Status>>,
}

impl Line {
    async fn send(&self, request_id: u64, frame: Down) {
        self.to.send(Ok(pb::ConnectResponse { trace: None, request_id, frame: Some(frame) })).await.unwrap();
    }

    /// The next frame that is neither a declaration nor live output.
    async fn next(&mut self) -> Option<(u64, Up)> {
        loop {
            let message =
                tokio::time::timeout(Duration::from_secs(10), self.from.message()).await.expect("a frame").ok()??;
            match message.frame.unwrap() {
                Up::Declarations(_) | Up::Output(_) => {}
                frame => return Some((message.request_id, frame)),
            }
        }
    }

    async fn result(&mut self) -> pb::ToolResult {
        match self.next().await {
            Some((_, Up::Result(result))) => result,
            other => panic!("{other:?}"),
        }
    }

    async fn ack(&self, result: &pb::ToolResult) {
        let ack = pb::ResultAck {
            call_id: result.call_id.clone(),
            generation: result.generation,
            outcome: pb::AckOutcome::Committed as i32,
            acknowledged_at_ms: 0,
        };
        self.send(0, Down::ResultAck(ack)).await;
    }

    async fn dispatch(&mut self, call: ToolCallId, command: &str) -> pb::DispatchOutcome {
        let dispatch = pb::Dispatch {
            call_id: call.to_string(),
            generation: 1,
            incarnation: self.hello.incarnation.clone(),
            root_id: self.hello.roots[0].id.clone(),
            tool: "shell".into(),
            input_json: serde_json::json!({"command": command}).to_string(),
            ..Default::default()
        };
        self.send(7, Down::Dispatch(dispatch)).await;
        match self.next().await {
            Some((7, Up::DispatchReply(reply))) => reply.outcome(),
            other => panic!("{other:?}"),
        }
    }
}

struct Gateway(mpsc::Sender<Line>);

#[tonic::async_trait]
impl TunnelService for Gateway {
    type ConnectStream = Pin<Box<dyn Stream<Item = Result<pb::ConnectResponse, Status>> + Send>>;

    async fn connect(
        &self,
        request: Request<Streaming<pb::ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        if request.metadata().get("authorization").and_then(|v| v.to_str().ok()) != Some("Bearer rlt_good") {
            return Err(Status::unauthenticated("the token is not known"));
        }
        let mut from = request.into_inner();
        let Some(Up::Hello(hello)) = from.message().await?.and_then(|m| m.frame) else {
            return Err(Status::invalid_argument("hello comes first"));
        };
        let (to, stream) = mpsc::channel(16);
        let instance = if hello.instance == 0 { 5 } else { hello.instance };
        let line = Line { hello, from, to };
        line.send(
            0,
            Down::Welcome(pb::Welcome { daemon_id: "d".into(), instance, gateway_id: "g".into(), lease_epoch: 1 }),
        )
        .await;
        let _ = self.0.send(line).await;
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

struct World {
    address: SocketAddr,
    lines: mpsc::Receiver<Line>,
    dir: tempfile::TempDir,
    _server: tokio::task::JoinHandle<()>,
}

impl World {
    async fn new() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tx, lines) = mpsc::channel(16);
        let server = tonic::transport::Server::builder()
            .add_service(TunnelServiceServer::new(Gateway(tx)))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let server = tokio::spawn(async move { server.await.unwrap() });
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("root")).unwrap();
        Self { address, lines, dir, _server: server }
    }

    async fn build(&self, token: &str) -> Built {
        build(DaemonConfig {
            gateway: format!("http://{}", self.address),
            token: token.into(),
            state_dir: self.dir.path().join("state"),
            roots: vec![RootConfig { name: "r".into(), path: self.dir.path().join("root") }],
            landlock: false,
            drain_seconds: 5,
            ..Default::default()
        })
        .await
        .unwrap()
    }

    async fn line(&mut self) -> Line {
        tokio::time::timeout(Duration::from_secs(20), self.lines.recv()).await.expect("a stream").unwrap()
    }
}

#[tokio::test]
async fn results_are_offered_over_every_stream_until_they_are_acknowledged() {
    let mut world = World::new().await;
    let stop = CancellationToken::new();
    let daemon = tokio::spawn(world.build("rlt_good").await.run(stop.clone()));
    let mut line = world.line().await;
    assert_eq!((line.hello.instance, line.hello.roots[0].name.as_str()), (0, "r"));
    assert!(line.hello.tools.iter().any(|t| t.name == "shell"));
    let call = ToolCallId::new();
    assert_eq!(line.dispatch(call, "echo hi").await, pb::DispatchOutcome::Started);
    let result = line.result().await;
    assert_eq!((&result.content[..], result.generation), (&b"hi\n"[..], 1));
    drop(line);
    let mut line = world.line().await;
    assert_eq!(line.hello.instance, 5, "a process keeps its number");
    let again = line.result().await;
    assert_eq!(again, result);
    line.ack(&again).await;
    assert_eq!(line.dispatch(call, "echo hi").await, pb::DispatchOutcome::Tombstone);
    let seen = loop {
        let seen = status(&world.dir.path().join("state")).unwrap().unwrap();
        if seen.connected && seen.unacknowledged == 0 {
            break seen;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!((seen.daemon_id.as_str(), seen.roots.len()), ("d", 1));
    assert_eq!(line.dispatch(ToolCallId::new(), "sleep 0.5; echo late").await, pb::DispatchOutcome::Started);
    // Asked to stop: the call ends in its own time, and its result is collected first.
    stop.cancel();
    let late = line.result().await;
    assert_eq!(&late.content[..], b"late\n");
    line.ack(&late).await;
    daemon.await.unwrap().unwrap();
    assert_eq!(status(&world.dir.path().join("state")).unwrap(), None);
}

#[tokio::test]
async fn a_draining_gateway_is_left_after_the_next_stream_stands() {
    let mut world = World::new().await;
    let stop = CancellationToken::new();
    let daemon = tokio::spawn(world.build("rlt_good").await.run(stop.clone()));
    let mut old = world.line().await;
    let call = ToolCallId::new();
    assert_eq!(old.dispatch(call, "sleep 1; echo done").await, pb::DispatchOutcome::Started);
    old.send(0, Down::GoAway(pb::GoAway { reason: "drain".into(), drain: true, stop: false })).await;
    let mut new = world.line().await;
    assert_eq!(new.hello.running_call_ids, [call.to_string()]);
    assert!(old.next().await.is_none(), "the old stream ends");
    assert_eq!(&new.result().await.content[..], b"done\n");
    stop.cancel();
    drop(new);
    daemon.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_daemon_that_is_told_to_stop_delivers_what_it_has_and_says_why() {
    let mut world = World::new().await;
    let daemon = tokio::spawn(world.build("rlt_good").await.run(CancellationToken::new()));
    let mut line = world.line().await;
    assert_eq!(line.dispatch(ToolCallId::new(), "echo begun; sleep 60").await, pb::DispatchOutcome::Started);
    line.send(0, Down::GoAway(pb::GoAway { reason: "a newer daemon took over".into(), drain: false, stop: true }))
        .await;
    drop(line);
    // What ran is ended and recorded, and goes out over one more stream.
    let mut line = world.line().await;
    let result = line.result().await;
    assert_eq!(result.status(), pb::ToolCallStatus::Cancelled);
    line.ack(&result).await;
    match daemon.await.unwrap() {
        Err(DaemonError::Stopped(reason)) => assert_eq!(reason, "a newer daemon took over"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_refused_token_is_said_and_tried_again() {
    let world = World::new().await;
    let stop = CancellationToken::new();
    let daemon = tokio::spawn(world.build("rlt_bad").await.run(stop.clone()));
    let state = world.dir.path().join("state");
    let refused = async {
        loop {
            if let Some(seen) = status(&state).unwrap()
                && seen.last_error.contains("not known")
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), refused).await.unwrap();
    assert!(!daemon.is_finished());
    stop.cancel();
    daemon.await.unwrap().unwrap();
}

#[tokio::test]
async fn live_output_and_refills_go_over_the_stream() {
    let mut world = World::new().await;
    let stop = CancellationToken::new();
    let daemon = tokio::spawn(world.build("rlt_good").await.run(stop.clone()));
    let mut line = world.line().await;
    let call = ToolCallId::new();
    let dispatch = pb::Dispatch {
        call_id: call.to_string(),
        generation: 4,
        chat_id: "c".into(),
        user_id: "u".into(),
        incarnation: line.hello.incarnation.clone(),
        tool: "shell".into(),
        input_json: r#"{"command": "echo one; sleep 0.2; echo two; sleep 1.2; echo three >&2"}"#.into(),
        ..Default::default()
    };
    line.send(1, Down::Dispatch(dispatch)).await;
    let mut blocks = [Vec::new(), Vec::new()];
    let mut lengths = 0;
    loop {
        let message = line.from.message().await.unwrap().unwrap();
        match message.frame.unwrap() {
            Up::Output(live) => {
                assert_eq!((live.user_id.as_str(), live.chat_id.as_str()), ("u", "c"));
                for delta in live.deltas {
                    let block = delta.block.unwrap();
                    assert_eq!((block.target_id, delta.epoch), (call.to_string(), 4));
                    let bytes = &mut blocks[block.block as usize];
                    assert_eq!(bytes.len() as i64, delta.offset);
                    bytes.extend_from_slice(&delta.piece);
                }
                lengths += live.lengths.len();
            }
            Up::Result(_) => break,
            _ => {}
        }
    }
    assert_eq!((&blocks[0][..], &blocks[1][..]), (&b"one\ntwo\n"[..], &b"three\n"[..]));
    assert!(lengths >= 2, "{lengths}");
    let prefix = pb::PrefixRequest { target_id: call.to_string(), block: 0, from_offset: 4, user_id: "u".into() };
    line.send(9, Down::Prefix(prefix)).await;
    match line.next().await {
        Some((9, Up::PrefixReply(reply))) => assert_eq!(&reply.deltas[0].piece[..], b"two\n"),
        other => panic!("{other:?}"),
    }
    line.send(10, Down::Output(pb::OutputRequest { call_id: call.to_string(), offset: 0, length: 100 })).await;
    match line.next().await {
        Some((10, Up::OutputReply(reply))) => assert_eq!(&reply.data[..], b"one\ntwo\nthree\n"),
        other => panic!("{other:?}"),
    }
    stop.cancel();
    drop(line);
    daemon.await.unwrap().unwrap();
}
