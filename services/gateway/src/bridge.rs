//! From a daemon's stream to NATS: results until they are acknowledged, live output while there is room. Each works beside
//! the stream's loop and within a bound. A daemon that sends results faster than its allowance is slowed down, and loses none.

use futures::FutureExt;
use parking_lot::Mutex;
use prost::Message;
use reliant_bus::{Bus, ResultSubject, UpdateSubject};
use reliant_runtime::{Backoff, Drain, TaskKind};
use reliant_telemetry::{TraceContext, chain, hop, metrics, sampled};
use reliant_types::{
    ChatId, DaemonId, ToolCallId, UserId, limits,
    pb::{self, connect_response::Frame},
};
use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::{
    allowance::Allowance,
    hub::{Hub, Seat},
    writer::Writer,
};

/// Results of one daemon that are on their way to a worker.
const RESULTS_MAX: usize = 64;
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// Results of one daemon that workers are asked about: lasting, and at once after a pause.
const RESULTS_PER_SECOND: usize = 500;
const RESULTS_BURST: usize = 1000;
/// A result that nobody waits for costs as many more: of ended calls there are few, of made-up ones there is no end.
const DISCARDED_SURCHARGE: usize = 9;
/// What a frame of live output costs beside its bytes.
const LIVE_FRAME_BYTES: usize = 1024;
/// What fits into one answer over NATS, with room for its frame.
const REPLY_MAX_BYTES: usize = limits::NATS_PAYLOAD_MAX_BYTES - 64 * 1024;

/// Carries results to the workers.
pub(crate) struct Results {
    hub: Arc<Hub>,
    daemon: DaemonId,
    writer: Writer,
    drain: Drain,
    /// Cancelled when the stream is gone; the daemon offers its results over the next one.
    gone: CancellationToken,
    places: Arc<Semaphore>,
    on_way: Arc<Mutex<HashSet<(ToolCallId, i64)>>>,
    allowance: Arc<Mutex<Allowance>>,
}

fn result_allowance() -> Allowance {
    Allowance::new(RESULTS_PER_SECOND, RESULTS_BURST, Instant::now())
}

fn surcharge(outcome: pb::AckOutcome) -> usize {
    if outcome == pb::AckOutcome::Committed { 0 } else { DISCARDED_SURCHARGE }
}

impl Results {
    pub fn new(hub: Arc<Hub>, daemon: DaemonId, writer: Writer, drain: Drain, gone: CancellationToken) -> Self {
        Self {
            hub,
            daemon,
            writer,
            drain,
            gone,
            places: sampled::places("tunnel_results", RESULTS_MAX),
            on_way: Arc::default(),
            allowance: Arc::new(Mutex::new(result_allowance())),
        }
    }

    /// Takes a result on its way. Without room it is dropped: the daemon repeats it until it is acknowledged.
    pub fn take(&self, trace: TraceContext, result: pb::ToolResult) {
        let Ok(call) = result.call_id.parse::<ToolCallId>() else {
            tracing::debug!(daemon.id = %self.daemon, "a result without a valid call id was dropped");
            metrics::DAEMON_FRAMES_REFUSED.with_label_values(&["result"]).inc();
            return;
        };
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            sampled::refused("tunnel_results");
            return;
        };
        let key = (call, result.generation);
        if !self.on_way.lock().insert(key) {
            return;
        }
        let trace = if trace.is_empty() {
            trace
        } else {
            // A person's machine does not decide what is sampled.
            hop(
                &trace.at_edge(),
                tracing::info_span!("tunnel.receive", otel.kind = "consumer", tunnel.frame = "result", tool.call_id = %call),
            )
        };
        let result = stamped(self.daemon, result);
        let topic = ResultSubject { daemon: self.daemon, call };
        let (hub, writer, gone, on_way, allowance) =
            (self.hub.clone(), self.writer.clone(), self.gone.clone(), self.on_way.clone(), self.allowance.clone());
        let wait = allowance.lock().owe(1, Instant::now());
        self.drain.spawn(TaskKind::Work("tool result"), async move {
            if !wait.is_zero() {
                sampled::refused("tunnel_result_rate");
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = gone.cancelled() => {}
                }
            }
            if let Some(ack) = deliver(&hub.bus, &topic, &trace, &result, &gone).await {
                allowance.lock().owe(surcharge(ack.outcome()), Instant::now());
                let _ = writer.send(TraceContext::default(), 0, Frame::ResultAck(ack));
            }
            on_way.lock().remove(&key);
            drop(place);
        });
    }
}

/// Repeats until a worker acknowledges or the stream is gone. That is bounded by the stream, and the result is safe in
/// the daemon's journal meanwhile.
async fn deliver(
    bus: &Bus,
    topic: &ResultSubject,
    trace: &TraceContext,
    result: &pb::ToolResult,
    gone: &CancellationToken,
) -> Option<pb::ResultAck> {
    let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MAX);
    let mut before = TraceContext::default();
    while !gone.is_cancelled() {
        let sent = Bus::context_of_request::<ResultSubject>(trace, &before);
        let asked = bus.request_with(&sent, topic, result, limits::NATS_REQUEST_TIMEOUT).await;
        before = sent;
        match asked {
            // The ids are ours to say: an answer must not acknowledge anything else.
            Ok(ack) => {
                return Some(pb::ResultAck {
                    call_id: result.call_id.clone(),
                    generation: result.generation,
                    outcome: ack.outcome,
                    acknowledged_at_ms: ack.acknowledged_at_ms,
                });
            }
            Err(error) => {
                metrics::TOOL_RESULTS.with_label_values(&["undelivered"]).inc();
                tracing::debug!(error = %chain(&error), tool.call_id = %topic.call, "a result was not taken; it is sent again");
            }
        }
        tokio::select! {
            () = backoff.wait() => {}
            () = gone.cancelled() => {}
        }
    }
    None
}

/// The result as workers may believe it: of this daemon, and of a size that NATS carries.
fn stamped(daemon: DaemonId, mut result: pb::ToolResult) -> pb::ToolResult {
    result.daemon_id = daemon.to_string();
    result.content.truncate(limits::TOOL_RESULT_MAX_BYTES);
    result.error_code.truncate(result.error_code.floor_char_boundary(64));
    result
}

/// How much live output a stream may still send, in bytes.
pub(crate) fn live_allowance() -> Allowance {
    let (rate, burst) = (limits::DAEMON_LIVE_MAX_BYTES_PER_SECOND, limits::DAEMON_LIVE_BURST_BYTES);
    Allowance::new(rate, burst, Instant::now())
}

/// Live output goes out at once or not at all; what is dropped is refilled from the daemon.
pub(crate) fn live(bus: &Bus, user: UserId, allowance: &mut Allowance, trace: &TraceContext, output: pb::LiveOutput) {
    if !allowance.take(output.encoded_len() + LIVE_FRAME_BYTES, Instant::now()) {
        sampled::refused("tunnel_output");
        return;
    }
    let Some((topic, update)) = checked(user, output) else {
        tracing::debug!(user.id = %user, "live output for a foreign or unknown chat was dropped");
        metrics::DAEMON_FRAMES_REFUSED.with_label_values(&["output"]).inc();
        return;
    };
    let sent = tokio::task::unconstrained(bus.publish_with(trace, &topic, &update)).now_or_never();
    if !matches!(sent, Some(Ok(()))) {
        sampled::refused("tunnel_output");
    }
}

/// Only pieces of the named chat, only for the daemon's owner.
fn checked(user: UserId, mut output: pb::LiveOutput) -> Option<(UpdateSubject, pb::ChatUpdate)> {
    if output.user_id.parse() != Ok(user) {
        return None;
    }
    let chat: ChatId = output.chat_id.parse().ok()?;
    output.deltas.retain(|delta| delta.chat_id == output.chat_id);
    output.lengths.retain(|length| length.chat_id == output.chat_id);
    let update = pb::ChatUpdate { events: Vec::new(), deltas: output.deltas, lengths: output.lengths };
    (update != pb::ChatUpdate::default()).then_some((UpdateSubject { user, chat }, update))
}

/// As many pieces as one answer carries; the asker sees what is missing by the offsets and asks again.
pub(crate) fn fitting(mut reply: pb::PrefixReply) -> pb::PrefixReply {
    let mut bytes = 0;
    let kept = reply
        .deltas
        .iter()
        .take_while(|delta| {
            bytes += delta.encoded_len() + 8;
            bytes <= REPLY_MAX_BYTES
        })
        .count();
    reply.deltas.truncate(kept);
    reply
}

/// Gives the lease back and says that the daemon is away, unless another stream has it by now.
pub(crate) async fn release(hub: &Hub, seat: &Seat) {
    match hub.store.release_lease(seat.daemon, hub.gateway, seat.epoch).await {
        Ok(committed) => {
            if committed.value {
                hub.announce(seat, false).await;
            }
            hub.publish_feed(seat.user, committed.feed).await;
        }
        // It runs out by itself.
        Err(error) => tracing::debug!(error = %chain(&error), daemon.id = %seat.daemon, "a lease was not given back"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_stamped_and_bounded() {
        let daemon = DaemonId::new();
        let result = pb::ToolResult {
            daemon_id: DaemonId::new().to_string(),
            content: vec![b'x'; 4 * 1024 * 1024].into(),
            error_code: "\u{e9}".repeat(1000),
            ..Default::default()
        };
        let result = stamped(daemon, result);
        assert_eq!(result.daemon_id, daemon.to_string());
        assert_eq!(result.content.len(), limits::TOOL_RESULT_MAX_BYTES);
        assert!(result.error_code.len() <= 64);
    }

    #[test]
    fn live_output_stays_with_its_owner_and_chat() {
        let (owner, chat) = (UserId::new(), ChatId::new());
        let delta = |chat: ChatId| pb::Delta { chat_id: chat.to_string(), piece: "x".into(), ..Default::default() };
        let output = pb::LiveOutput {
            deltas: vec![delta(chat), delta(ChatId::new())],
            lengths: vec![],
            user_id: owner.to_string(),
            chat_id: chat.to_string(),
        };
        let (topic, update) = checked(owner, output.clone()).expect("the owner's own");
        assert_eq!(topic, UpdateSubject { user: owner, chat });
        assert_eq!(update.deltas, [delta(chat)]);
        assert!(checked(UserId::new(), output.clone()).is_none());
        assert!(checked(owner, pb::LiveOutput { chat_id: "*".into(), ..output.clone() }).is_none());
        assert!(checked(owner, pb::LiveOutput { deltas: vec![], ..output }).is_none());
    }

    #[test]
    fn live_output_is_carried_at_a_pace_also_in_small_frames() {
        let mut allowance = live_allowance();
        let now = Instant::now();
        let taken = (0..1_000_000).take_while(|_| allowance.take(LIVE_FRAME_BYTES, now)).count();
        assert!(taken <= limits::DAEMON_LIVE_BURST_BYTES / LIVE_FRAME_BYTES + 100, "{taken} empty frames at once");
    }

    #[tokio::test(start_paused = true)]
    async fn results_that_nobody_waits_for_slow_their_daemon_down() {
        let (mut good, mut bad) = (result_allowance(), result_allowance());
        let now = Instant::now();
        let paced = |allowance: &mut Allowance, outcome| {
            (0..1000).map(|_| allowance.owe(1, now) + allowance.owe(surcharge(outcome), now)).max().unwrap()
        };
        assert_eq!(paced(&mut good, pb::AckOutcome::Committed), Duration::ZERO);
        assert!(paced(&mut bad, pb::AckOutcome::Discarded) > Duration::from_secs(10));
    }

    #[test]
    fn a_long_prefix_is_cut_between_pieces() {
        let piece = pb::Delta { piece: vec![b'x'; 100_000].into(), ..Default::default() };
        let reply = fitting(pb::PrefixReply { found: true, deltas: vec![piece.clone(); 30] });
        assert!(reply.found && reply.deltas.len() > 5);
        assert!(reply.encoded_len() <= REPLY_MAX_BYTES);
        let short = pb::PrefixReply { found: true, deltas: vec![piece; 2] };
        assert_eq!(fitting(short.clone()), short);
    }
}
