//! One stream: dialled, greeted, served until it ends. Its receive loop only routes; what is asked is done by tasks, a
//! bounded number of them, and answered over the stream that asked.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use pb::{connect_request::Frame as Up, connect_response::Frame as Down};
use reliant_rpc::tunnel_service_client::TunnelServiceClient;
use reliant_telemetry::{
    names::span,
    sampled,
    trace::{TraceContext, hop},
};
use reliant_types::{Code, limits, pb};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use super::Shared;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Frames that wait for the stream: answers and results.
const CONTROL_QUEUE_MAX: usize = 256;
/// Live frames that wait; past that they are dropped.
const LIVE_QUEUE_MAX: usize = 64;
/// Requests that were read and not taken up.
const REQUESTS_MAX: usize = limits::GATEWAY_PENDING_MAX;
/// Requests that are worked on.
const WORKING_MAX: usize = 512;
/// A stream that is being left may still answer what it was asked.
const RETIRE_TIMEOUT: Duration = Duration::from_secs(2);

/// How a session ended, or why none came about.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("{0}")]
    Address(String),
    #[error("the gateway at {address} cannot be reached: {source}")]
    Unreachable { address: String, source: tonic::transport::Error },
    #[error("the gateway refused: {}", .0.message())]
    Status(Box<tonic::Status>),
    #[error("the gateway did not answer in time")]
    Timeout,
    #[error("the gateway sent something else than its greeting")]
    NoGreeting,
    #[error("the stream ended")]
    Ended,
    #[error("the gateway asks to come back: {0}")]
    GoAway(String),
    #[error("{0}")]
    Stop(String),
}

impl From<tonic::Status> for SessionError {
    fn from(status: tonic::Status) -> Self {
        Self::Status(Box::new(status))
    }
}

/// A greeted stream.
pub struct Session {
    pub number: u64,
    pub welcome: pb::Welcome,
    pub address: String,
    control: mpsc::Sender<pb::ConnectRequest>,
    live: mpsc::Sender<pb::ConnectRequest>,
    inbound: Streaming<pb::ConnectResponse>,
}

/// What a running session tells by itself.
#[derive(Debug)]
pub enum Event {
    /// Open the next stream, then retire this one.
    Drain(String),
}

/// Frames for the stream, answers and results before live pieces.
struct Outbound {
    control: mpsc::Receiver<pb::ConnectRequest>,
    live: mpsc::Receiver<pb::ConnectRequest>,
    /// The stream is over when nobody can send control frames any more.
    done: bool,
}

impl futures::Stream for Outbound {
    type Item = pb::ConnectRequest;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if !self.done {
            match self.control.poll_recv(cx) {
                Poll::Ready(Some(frame)) => return Poll::Ready(Some(frame)),
                Poll::Ready(None) => self.done = true,
                Poll::Pending => {}
            }
        }
        if self.done {
            return Poll::Ready(None);
        }
        match self.live.poll_recv(cx) {
            Poll::Ready(Some(frame)) => Poll::Ready(Some(frame)),
            _ => Poll::Pending,
        }
    }
}

fn frame(trace: &TraceContext, request_id: u64, frame: Up) -> pb::ConnectRequest {
    let trace = (!trace.is_empty()).then(|| trace.clone().into());
    pb::ConnectRequest { trace, request_id, frame: Some(frame) }
}

/// A stream that is dialled: its two queues, and what comes first.
struct Dialled {
    control: mpsc::Sender<pb::ConnectRequest>,
    live: mpsc::Sender<pb::ConnectRequest>,
    inbound: Streaming<pb::ConnectResponse>,
    first: Option<Down>,
}

/// Dials, says hello, waits for the first frame.
async fn dial(shared: &Shared, address: &str) -> Result<Dialled, SessionError> {
    let endpoint = reliant_rpc::endpoint(address)
        .map_err(|e| SessionError::Address(e.to_string()))?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect()).await;
    let channel = connected
        .map_err(|_| SessionError::Timeout)?
        .map_err(|source| SessionError::Unreachable { address: address.to_owned(), source })?;
    let mut client = TunnelServiceClient::new(channel)
        .max_decoding_message_size(limits::GRPC_MESSAGE_MAX_BYTES)
        .max_encoding_message_size(limits::GRPC_MESSAGE_MAX_BYTES);
    let (control, control_rx) = sampled::channel("daemon_control", CONTROL_QUEUE_MAX);
    let (live, live_rx) = sampled::channel("daemon_live", LIVE_QUEUE_MAX);
    control
        .try_send(frame(&TraceContext::default(), 0, Up::Hello(shared.hello())))
        .expect("the queue is new and empty");
    let mut request = tonic::Request::new(Outbound { control: control_rx, live: live_rx, done: false });
    if !reliant_rpc::authorize(&mut request, shared.token.expose()) {
        return Err(tonic::Status::unauthenticated("the token holds characters that no header can carry").into());
    }
    // The call ends here as its caller sees it, at the greeting; the next one links to it. The gateway is told of no context:
    // this span may die with this process, and what the gateway does for a stream would hang on it.
    let called = shared.call(address);
    let greeting = async {
        let mut inbound = client.connect(request).await?.into_inner();
        let first = inbound.message().await?.ok_or(SessionError::Ended)?.frame;
        Ok(Dialled { control, live, inbound, first })
    };
    let greeted: Result<Dialled, SessionError> =
        tokio::time::timeout(GREETING_TIMEOUT, greeting).await.unwrap_or(Err(SessionError::Timeout));
    called.settle(match &greeted {
        Ok(_) => tonic::Code::Ok,
        Err(SessionError::Status(status)) => status.code(),
        Err(SessionError::Timeout) => tonic::Code::DeadlineExceeded,
        Err(_) => tonic::Code::Unavailable,
    });
    greeted
}

/// A daemon that was told to stop offers what it has once more, and takes nothing on.
pub async fn deliver_rest(shared: &Arc<Shared>) -> Result<(), SessionError> {
    if shared.calls.outbox.len() == 0 {
        return Ok(());
    }
    let (number, address) = shared.next();
    let Dialled { control, mut inbound, .. } = dial(shared, address).await?;
    let offers = tokio::spawn(offer_results(shared.clone(), number, control));
    while shared.calls.outbox.len() > 0 {
        match inbound.message().await? {
            Some(pb::ConnectResponse { frame: Some(Down::ResultAck(ack)), .. }) => shared.calls.acknowledge(&ack),
            Some(_) => {}
            None => break,
        }
    }
    offers.abort();
    Ok(())
}

impl Session {
    /// Dials, says hello, waits for the welcome.
    pub async fn open(shared: &Shared, number: u64, address: &str) -> Result<Self, SessionError> {
        let Dialled { control, live, inbound, first } = dial(shared, address).await?;
        match first {
            Some(Down::Welcome(welcome)) => {
                Ok(Self { number, welcome, address: address.to_owned(), control, live, inbound })
            }
            Some(Down::GoAway(away)) if away.stop => Err(SessionError::Stop(away.reason)),
            Some(Down::GoAway(away)) => Err(SessionError::GoAway(away.reason)),
            _ => Err(SessionError::NoGreeting),
        }
    }

    /// Serves the stream to its end. `retire`: another one took its place.
    pub async fn serve(
        self,
        shared: Arc<Shared>,
        events: mpsc::Sender<Event>,
        retire: CancellationToken,
    ) -> SessionError {
        let Self { number, control, live, mut inbound, .. } = self;
        shared.calls.hub.attach(live.clone());
        let (requests, queue) = sampled::channel("daemon_requests", REQUESTS_MAX);
        let working = Arc::new(AtomicUsize::new(0));
        // Ends with the session, however it ends.
        let over = CancellationToken::new();
        let _over = over.clone().drop_guard();
        tokio::spawn(over.clone().run_until_cancelled_owned(take_up(
            shared.clone(),
            queue,
            control.clone(),
            working.clone(),
        )));
        let offering = retire.clone();
        let offers = offer_results(shared.clone(), number, control.clone());
        tokio::spawn(over.clone().run_until_cancelled_owned(async move {
            offering.run_until_cancelled_owned(offers).await;
        }));
        tokio::spawn(over.clone().run_until_cancelled_owned(declare(shared.clone(), control.clone())));
        let end = receive(&shared, &mut inbound, &requests, &working, &control, &events, &retire).await;
        shared.calls.hub.detach(&live);
        end
    }
}

struct Asked {
    request_id: u64,
    trace: TraceContext,
    frame: Down,
}

async fn receive(
    shared: &Shared,
    inbound: &mut Streaming<pb::ConnectResponse>,
    requests: &mpsc::Sender<Asked>,
    working: &AtomicUsize,
    control: &mpsc::Sender<pb::ConnectRequest>,
    events: &mpsc::Sender<Event>,
    retire: &CancellationToken,
) -> SessionError {
    let mut leave_at = None;
    loop {
        let idle = working.load(Ordering::Acquire) == 0;
        let leave = async {
            match leave_at {
                // What was asked over this stream is answered over it, within reason.
                Some(_) if idle => tokio::time::sleep(Duration::from_millis(100)).await,
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let message = tokio::select! {
            message = inbound.message() => message,
            () = retire.cancelled(), if leave_at.is_none() => {
                leave_at = Some(tokio::time::Instant::now() + RETIRE_TIMEOUT);
                continue;
            }
            () = leave => return SessionError::Ended,
        };
        let message = match message {
            Ok(Some(message)) => message,
            Ok(None) => return SessionError::Ended,
            Err(status) => return status.into(),
        };
        let trace = message.trace.map(TraceContext::from).unwrap_or_default();
        let request_id = message.request_id;
        match message.frame {
            Some(Down::GoAway(away)) if away.stop => return SessionError::Stop(away.reason),
            Some(Down::GoAway(away)) if away.drain => {
                let _ = events.try_send(Event::Drain(away.reason));
            }
            Some(Down::GoAway(away)) => return SessionError::GoAway(away.reason),
            // Decided in memory; the disk hears of it later.
            Some(Down::ResultAck(ack)) => shared.calls.acknowledge(&ack),
            Some(asked @ (Down::Dispatch(_) | Down::Cancel(_) | Down::Prefix(_) | Down::Output(_))) => {
                working.fetch_add(1, Ordering::AcqRel);
                if let Err(refused) = requests.try_send(Asked { request_id, trace, frame: asked }) {
                    working.fetch_sub(1, Ordering::AcqRel);
                    sampled::refused("daemon_requests");
                    refuse(shared, refused.into_inner(), control);
                }
            }
            Some(Down::Welcome(_)) | None => {}
        }
    }
}

/// More is asked than is taken up. A dispatch is refused; the rest is asked again by whoever needs it.
fn refuse(shared: &Shared, asked: Asked, control: &mpsc::Sender<pb::ConnectRequest>) {
    if let Down::Dispatch(dispatch) = asked.frame {
        let reply = pb::DispatchReply {
            call_id: dispatch.call_id,
            generation: dispatch.generation,
            outcome: pb::DispatchOutcome::Refused as i32,
            error_code: Code::QueueFull.as_str().into(),
            message: "this daemon is asked for more than it can take up; nothing was started".into(),
            incarnation: shared.calls.journal.incarnation().to_string(),
        };
        let _ = control.try_send(frame(&asked.trace, asked.request_id, Up::DispatchReply(reply)));
    }
}

/// Takes requests up in their order; what they wait for, they wait for side by side.
async fn take_up(
    shared: Arc<Shared>,
    mut queue: mpsc::Receiver<Asked>,
    control: mpsc::Sender<pb::ConnectRequest>,
    working: Arc<AtomicUsize>,
) {
    let permits = sampled::places("daemon_working", WORKING_MAX);
    while let Some(Asked { request_id, trace, frame: asked }) = queue.recv().await {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let calls = shared.calls.clone();
        let answer: futures::future::BoxFuture<'static, Option<Up>> = match asked {
            Down::Dispatch(dispatch) => {
                let received = tracing::info_span!(
                    span::TUNNEL_RECEIVE,
                    otel.kind = "consumer",
                    tunnel.frame = "dispatch",
                    tool.call_id = %dispatch.call_id,
                );
                // A dispatch that comes again stands beside the first one.
                calls.first_trace(&dispatch.call_id).link(&received);
                let context = hop(&trace, received);
                let reply = calls.dispatch(dispatch, context);
                Box::pin(async move { reply.await.map(Up::DispatchReply) })
            }
            Down::Cancel(cancel) => {
                taken(&trace, "cancel");
                let reply = calls.cancel(cancel);
                Box::pin(async move { reply.await.map(Up::CancelReply) })
            }
            Down::Prefix(prefix) => {
                taken(&trace, "prefix");
                Box::pin(async move {
                    let read = tokio::task::spawn_blocking(move || calls.outputs.prefix(&prefix)).await;
                    read.ok().map(Up::PrefixReply)
                })
            }
            Down::Output(output) => {
                taken(&trace, "output");
                Box::pin(async move {
                    let read = tokio::task::spawn_blocking(move || calls.outputs.read(&output)).await;
                    read.ok().map(Up::OutputReply)
                })
            }
            Down::Welcome(_) | Down::ResultAck(_) | Down::GoAway(_) => continue,
        };
        let control = control.clone();
        let working = working.clone();
        tokio::spawn(async move {
            if let Some(up) = answer.await {
                let _ = control.send(frame(&trace, request_id, up)).await;
            }
            working.fetch_sub(1, Ordering::AcqRel);
            drop(permit);
        });
    }
}

/// A request other than a dispatch was taken up.
fn taken(trace: &TraceContext, frame: &'static str) {
    if !trace.is_empty() {
        hop(trace, tracing::info_span!(span::TUNNEL_RECEIVE, otel.kind = "consumer", tunnel.frame = frame));
    }
}

/// Offers what is not acknowledged, over the newest stream alone.
async fn offer_results(shared: Arc<Shared>, number: u64, control: mpsc::Sender<pb::ConnectRequest>) {
    loop {
        for (result, trace) in shared.calls.outbox.next(number, &shared.calls.journal).await {
            let up = pb::ConnectRequest { trace: Some(trace), request_id: 0, frame: Some(Up::Result(result)) };
            if control.send(up).await.is_err() {
                return;
            }
        }
    }
}

/// Tells when tools or roots change.
async fn declare(shared: Arc<Shared>, control: mpsc::Sender<pb::ConnectRequest>) {
    let mut declared = shared.declared.subscribe();
    // What the hello said may be older than what is known by now.
    declared.mark_changed();
    let mut said = shared.hello_said.lock().clone();
    while declared.changed().await.is_ok() {
        let now = declared.borrow_and_update().clone();
        if now == said {
            continue;
        }
        let up = Up::Declarations(pb::Declarations { roots: now.roots.clone(), tools: now.tools.clone() });
        if control.send(frame(&TraceContext::default(), 0, up)).await.is_err() {
            return;
        }
        said = now;
    }
}
