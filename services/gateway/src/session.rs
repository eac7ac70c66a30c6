//! One daemon's stream. Its loop only routes: frames to those who wait for them, requests to frames. It never waits for
//! Postgres, NATS or the daemon, so that nothing slow holds up the line.

use futures::{FutureExt, StreamExt};
use reliant_bus::{BusError, PrefixSubject, Received, ToolSubject};
use reliant_runtime::{Drain, TaskKind};
use reliant_telemetry::{TraceContext, chain, hop, metrics, sampled};
use reliant_types::pb::{self, connect_request, connect_response::Frame, tool_reply::Reply, tool_request::Request};
use std::{sync::Arc, time::Duration};
use tokio::{sync::OwnedSemaphorePermit, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use crate::{
    allowance::Allowance,
    bridge::{self, Results},
    declare::{Declarer, Fingerprint},
    hub::{End, Hub, Seat},
    pending::{Asker, Kind, Pending},
    requests::{Line, Requests},
    streams::Open,
    writer::Writer,
};

const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// A stream that holds no lease may deliver its results for so long.
const RESULTS_ONLY: Duration = Duration::from_secs(30);

pub(crate) struct Session {
    pub hub: Arc<Hub>,
    pub seat: Arc<Seat>,
    pub inbound: Streaming<pb::ConnectRequest>,
    pub writer: Writer,
    pub drain: Drain,
    pub place: Place,
    /// What its hello declared; the lease's row has it.
    pub declared: Fingerprint,
}

/// The place among the gateway's streams, and among the daemon's.
pub(crate) struct Place {
    pub _of_gateway: OwnedSemaphorePermit,
    pub _of_daemon: Open,
}

/// What the loop keeps.
struct Routes {
    hub: Arc<Hub>,
    seat: Arc<Seat>,
    writer: Writer,
    drain: Drain,
    pending: Pending,
    results: Results,
    declarer: Declarer,
    live: Allowance,
}

impl Session {
    fn split(self) -> (Routes, Streaming<pb::ConnectRequest>, Place, CancellationToken) {
        let gone = CancellationToken::new();
        let Session { hub, seat, inbound, writer, drain, place, declared } = self;
        let results = Results::new(hub.clone(), seat.daemon, writer.clone(), drain.clone(), gone.clone());
        let declarer = Declarer::new(hub.clone(), seat.clone(), drain.clone(), gone.clone(), declared);
        let live = bridge::live_allowance();
        let routes = Routes { hub, seat, writer, drain, pending: Pending::new(), results, declarer, live };
        (routes, inbound, place, gone)
    }

    /// Serves the daemon until its stream ends, and gives back what it held.
    pub async fn run(self, line: Arc<Line<Requests>>) {
        let (mut routes, mut inbound, _place, gone) = self.split();
        let counted = metrics::in_flight(&metrics::DAEMONS_CONNECTED);
        let end = match line.take(&routes.seat).await {
            Ok(mut requests) => {
                routes.hub.announce(&routes.seat, true).await;
                routes.serve(&mut inbound, &mut requests).await
            }
            Err(end) => end,
        };
        gone.cancel();
        drop(counted);
        routes.farewell(end);
        // Nobody is to find this stream any more before the lease is free.
        drop(line);
        let Routes { hub, seat, writer, .. } = routes;
        drop(writer);
        hub.leave(&seat);
        tracing::info!(daemon.id = %seat.daemon, daemon.instance = seat.instance, reason = end.label(), "a daemon left");
        if end.keeps_lease() {
            bridge::release(&hub, &seat).await;
        }
    }

    /// Serves a process that a newer one has overtaken: it may deliver its results, and is told to stop.
    pub async fn run_results_only(self) {
        let (routes, mut inbound, _place, gone) = self.split();
        routes.farewell(End::Outdated);
        let deadline = tokio::time::sleep(RESULTS_ONLY);
        tokio::pin!(deadline);
        loop {
            let frame = tokio::select! {
                frame = inbound.next() => frame,
                () = &mut deadline => break,
                () = routes.drain.draining() => break,
            };
            let Some(Ok(frame)) = frame else { break };
            let trace = trace_of(&frame);
            if let Some(connect_request::Frame::Result(result)) = frame.frame {
                routes.results.take(trace, result);
            }
        }
        gone.cancel();
    }
}

impl Routes {
    async fn serve(&mut self, inbound: &mut Streaming<pb::ConnectRequest>, requests: &mut Requests) -> End {
        let seat = self.seat.clone();
        let ended = seat.ended();
        let drain = self.drain.clone();
        let draining = drain.token();
        tokio::pin!(ended);
        let mut told = false;
        let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                frame = inbound.next() => match frame {
                    Some(Ok(frame)) => self.on_frame(frame),
                    Some(Err(status)) => {
                        tracing::debug!(daemon.id = %seat.daemon, code = ?status.code(), "a daemon's stream broke");
                        if !unreadable(&status) {
                            return End::Closed;
                        }
                        metrics::DAEMON_FRAMES_REFUSED.with_label_values(&["unreadable"]).inc();
                        return End::Unreadable;
                    }
                    None => return End::Closed,
                },
                request = requests.tool.next() => match request {
                    Some(request) => self.on_tool(request),
                    None => return End::BusAway,
                },
                request = requests.prefix.next() => match request {
                    Some(request) => self.on_prefix(request),
                    None => return End::BusAway,
                },
                end = &mut ended => return end,
                () = draining.cancelled(), if !told => {
                    told = true;
                    let away = pb::GoAway { reason: "this gateway stops".into(), drain: true, stop: false };
                    if self.writer.send(TraceContext::default(), 0, Frame::GoAway(away)).is_err() {
                        return End::Drained;
                    }
                }
                _ = sweep.tick(), if !self.pending.is_empty() => self.pending.forget_old(),
            }
        }
    }

    fn farewell(&self, end: End) {
        metrics::DAEMON_STREAM_ENDS.with_label_values(&[end.label()]).inc();
        if let Some(away) = end.go_away() {
            // Dropped where the daemon does not read; the end of the stream says enough then.
            let _ = self.writer.send(TraceContext::default(), 0, Frame::GoAway(away));
        }
    }

    fn on_tool(&mut self, mut request: Received<ToolSubject>) {
        let _working = request.span().entered();
        let (kind, frame) = match std::mem::take(&mut request.message).request {
            Some(Request::Dispatch(dispatch)) => {
                if dispatch.user_id != self.seat.user.to_string() {
                    tracing::warn!(daemon.id = %self.seat.daemon, "a dispatch for another user's chat was not forwarded");
                    return;
                }
                // Only the journal that a call is meant for may say that it never got it.
                if dispatch.incarnation != self.seat.incarnation.to_string() {
                    tracing::info!(daemon.id = %self.seat.daemon, tool.call_id = %dispatch.call_id, "a dispatch for another journal was not forwarded");
                    return;
                }
                let kind = Kind::Dispatch { call_id: dispatch.call_id.clone(), generation: dispatch.generation };
                (kind, Frame::Dispatch(dispatch))
            }
            Some(Request::Cancel(cancel)) => (Kind::Cancel { call_id: cancel.call_id.clone() }, Frame::Cancel(cancel)),
            Some(Request::Output(output)) => (Kind::Output, Frame::Output(output)),
            // Of a newer version; the one who asked runs into its timeout.
            None => return,
        };
        let trace = sent(&request.trace, &kind);
        let asker = request.wants_reply().then_some(Asker::Tool(request));
        self.forward(trace, kind, asker, frame);
    }

    fn on_prefix(&mut self, mut request: Received<PrefixSubject>) {
        let _working = request.span().entered();
        let prefix = std::mem::take(&mut request.message);
        if prefix.user_id != self.seat.user.to_string() {
            tracing::warn!(daemon.id = %self.seat.daemon, "a refill for another user was not forwarded");
            return;
        }
        let trace = sent(&request.trace, &Kind::Prefix);
        let asker = request.wants_reply().then_some(Asker::Prefix(request));
        self.forward(trace, Kind::Prefix, asker, Frame::Prefix(prefix));
    }

    /// Without room the request is dropped: only the daemon may answer it, and the one who asked asks again.
    fn forward(&mut self, trace: TraceContext, kind: Kind, asker: Option<Asker>, frame: Frame) {
        let Some(asker) = asker else {
            let _ = self.writer.send(trace, 0, frame);
            return;
        };
        if self.pending.is_full() {
            sampled::refused("tunnel_pending");
            return;
        }
        let id = self.pending.add(kind, asker);
        if self.writer.send(trace, id, frame).is_err() {
            self.pending.withdraw(id);
        }
    }

    fn on_frame(&mut self, request: pb::ConnectRequest) {
        use connect_request::Frame;
        let (id, trace) = (request.request_id, trace_of(&request));
        match request.frame {
            Some(Frame::DispatchReply(reply)) => {
                let fits = |kind: &Kind| match kind {
                    Kind::Dispatch { call_id, generation } => {
                        (call_id, generation) == (&reply.call_id, &reply.generation)
                    }
                    _ => false,
                };
                self.answer_tool(id, fits, || Reply::Dispatch(reply.clone()));
            }
            Some(Frame::CancelReply(reply)) => {
                let fits = |kind: &Kind| matches!(kind, Kind::Cancel { call_id } if *call_id == reply.call_id);
                self.answer_tool(id, fits, || Reply::Cancel(reply.clone()));
            }
            Some(Frame::OutputReply(reply)) => {
                self.answer_tool(id, |kind| *kind == Kind::Output, || Reply::Output(reply.clone()));
            }
            Some(Frame::PrefixReply(reply)) => self.answer_prefix(id, reply),
            Some(Frame::Result(result)) => self.results.take(trace, result),
            Some(Frame::Output(output)) => {
                bridge::live(&self.hub.bus, self.seat.user, &mut self.live, &trace, output);
            }
            Some(Frame::Declarations(declarations)) => self.declarer.take(declarations),
            Some(Frame::Hello(_)) => refused_frame("hello"),
            // Of a newer version.
            None => refused_frame("empty"),
        }
    }

    fn answer_tool(&mut self, id: u64, fits: impl FnOnce(&Kind) -> bool, reply: impl FnOnce() -> Reply) {
        let Some(entry) = self.pending.answer(id, fits) else {
            tracing::debug!(daemon.id = %self.seat.daemon, "an answer fits no request; it was late or wrong");
            return refused_frame("answer");
        };
        entry.timer.done("answered");
        if let Asker::Tool(asker) = entry.asker {
            let reply = pb::ToolReply { reply: Some(reply()) };
            self.reply(asker, reply);
        }
    }

    fn answer_prefix(&mut self, id: u64, reply: pb::PrefixReply) {
        let Some(entry) = self.pending.answer(id, |kind| *kind == Kind::Prefix) else { return refused_frame("answer") };
        entry.timer.done("answered");
        if let Asker::Prefix(asker) = entry.asker {
            self.reply(asker, bridge::fitting(reply));
        }
    }

    /// Answers at once where the queue to NATS has room, which is the rule; else beside the loop.
    fn reply<T: reliant_bus::RequestTopic>(&self, asker: Received<T>, reply: T::Reply)
    where
        T::Reply: Sync,
        T::Message: Sync,
    {
        let at_once = tokio::task::unconstrained(asker.reply(&self.hub.bus, &reply)).now_or_never();
        match at_once {
            Some(result) => log_unanswered(result),
            None => {
                let bus = self.hub.bus.clone();
                self.drain.spawn(TaskKind::Work("tunnel reply"), async move {
                    log_unanswered(asker.reply(&bus, &reply).await);
                });
            }
        }
    }
}

fn refused_frame(reason: &str) {
    metrics::DAEMON_FRAMES_REFUSED.with_label_values(&[reason]).inc();
}

/// Whether the stream broke over what it carried. A connection that broke has its cause as the source.
fn unreadable(status: &tonic::Status) -> bool {
    let of_content =
        matches!(status.code(), tonic::Code::OutOfRange | tonic::Code::Internal | tonic::Code::Unimplemented);
    of_content && std::error::Error::source(status).is_none()
}

fn log_unanswered(result: Result<(), BusError>) {
    if let Err(error) = result {
        tracing::debug!(error = %chain(&error), "a daemon's answer did not reach the one who asked");
    }
}

/// The context that a frame to the daemon carries: of a short span below the asker's.
fn sent(parent: &TraceContext, kind: &Kind) -> TraceContext {
    if parent.is_empty() {
        return TraceContext::default();
    }
    hop(parent, tracing::info_span!("tunnel.send", otel.kind = "producer", tunnel.frame = kind.label()))
}

fn trace_of(frame: &pb::ConnectRequest) -> TraceContext {
    frame.trace.clone().map(TraceContext::from).unwrap_or_default()
}
