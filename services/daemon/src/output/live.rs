//! Live pieces on their way to viewers. The first goes at once, later ones are gathered for at most
//! [`limits::DELTA_GATHER`]; where the stream is slow or away they are dropped.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::RwLock;
use reliant_telemetry::sampled;
use reliant_types::{limits, pb};
use tokio::sync::mpsc::{self, error::TrySendError};

use super::{Block, CallOutput, PIECE_MAX_BYTES};

/// Live bytes of one call in a second; the rest is for those who ask for it.
const LIVE_BYTES_PER_SECOND: f64 = 2.0 * 1024.0 * 1024.0;
const LIVE_BURST_BYTES: f64 = 512.0 * 1024.0;

/// The stream of the moment, for live frames alone.
#[derive(Debug, Default)]
pub struct LiveHub(RwLock<Option<mpsc::Sender<pb::ConnectRequest>>>);

impl LiveHub {
    pub fn attach(&self, stream: mpsc::Sender<pb::ConnectRequest>) {
        *self.0.write() = Some(stream);
    }

    /// Unless a newer stream took its place.
    pub fn detach(&self, stream: &mpsc::Sender<pb::ConnectRequest>) {
        let mut slot = self.0.write();
        if slot.as_ref().is_some_and(|s| s.same_channel(stream)) {
            *slot = None;
        }
    }

    /// False: dropped.
    fn offer(&self, output: &CallOutput, deltas: Vec<pb::Delta>, lengths: Vec<pb::BlockLength>) -> bool {
        let Some(stream) = self.0.read().clone() else { return false };
        let live = pb::LiveOutput { deltas, lengths, user_id: output.user_id.clone(), chat_id: output.chat_id.clone() };
        let trace = Some(pb::TraceContext { traceparent: output.traceparent.clone(), tracestate: String::new() });
        let frame = Some(pb::connect_request::Frame::Output(live));
        let sent = stream.try_send(pb::ConnectRequest { trace, request_id: 0, frame });
        if let Err(TrySendError::Full(_)) = &sent {
            sampled::refused("daemon_live");
        }
        sent.is_ok()
    }

    pub fn lengths(&self, output: &CallOutput) {
        let lengths = output.lengths();
        if !lengths.is_empty() {
            self.offer(output, Vec::new(), lengths);
        }
    }
}

/// What one call has written and not sent yet.
#[derive(Debug)]
pub struct Gather {
    hub: Arc<LiveHub>,
    output: Arc<CallOutput>,
    pending: [Pending; 2],
    last_sent: Option<Instant>,
    allowance: f64,
    refilled: Instant,
}

#[derive(Debug, Default)]
struct Pending {
    offset: u64,
    bytes: Vec<u8>,
}

impl Gather {
    pub fn new(hub: Arc<LiveHub>, output: Arc<CallOutput>) -> Self {
        let pending = [Pending::default(), Pending::default()];
        Self { hub, output, pending, last_sent: None, allowance: LIVE_BURST_BYTES, refilled: Instant::now() }
    }

    /// Keeps a piece, and sends what is due.
    pub fn push(&mut self, block: Block, piece: &[u8]) {
        let offset = self.output.append(block, piece);
        let pending = &mut self.pending[block as usize];
        if pending.bytes.is_empty() {
            pending.offset = offset;
        }
        pending.bytes.extend_from_slice(piece);
        let due = self.last_sent.is_none_or(|at| at.elapsed() >= limits::DELTA_GATHER);
        if due || self.pending[block as usize].bytes.len() >= PIECE_MAX_BYTES {
            self.flush();
        }
    }

    /// When what is gathered must leave.
    pub fn due_in(&self) -> Option<Duration> {
        let waits = self.pending.iter().any(|p| !p.bytes.is_empty());
        waits.then(|| self.last_sent.map_or(Duration::ZERO, |at| limits::DELTA_GATHER.saturating_sub(at.elapsed())))
    }

    pub fn flush(&mut self) {
        let now = Instant::now();
        self.allowance = (self.allowance + now.duration_since(self.refilled).as_secs_f64() * LIVE_BYTES_PER_SECOND)
            .min(LIVE_BURST_BYTES);
        self.refilled = now;
        for block in Block::BOTH {
            let pending = std::mem::take(&mut self.pending[block as usize]);
            let mut offset = pending.offset;
            for piece in pending.bytes.chunks(PIECE_MAX_BYTES) {
                if self.allowance >= piece.len() as f64 {
                    self.allowance -= piece.len() as f64;
                    let delta = self.output.delta(block, offset, piece.to_vec());
                    self.hub.offer(&self.output, vec![delta], Vec::new());
                }
                offset += piece.len() as u64;
            }
        }
        self.last_sent = Some(now);
    }

    pub fn lengths(&self) {
        self.hub.lengths(&self.output);
    }

    pub fn output(&self) -> &Arc<CallOutput> {
        &self.output
    }
}

#[cfg(test)]
mod tests {
    use reliant_types::ToolCallId;

    use super::*;
    use crate::output::Outputs;

    fn delta(frame: pb::ConnectRequest) -> pb::Delta {
        match frame.frame {
            Some(pb::connect_request::Frame::Output(mut live)) => live.deltas.remove(0),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_first_piece_goes_at_once_and_a_slow_stream_loses_pieces_only() {
        let dir = tempfile::tempdir().unwrap();
        let outputs = Outputs::new(dir.path().to_owned(), 1 << 20);
        let output = outputs.begin(ToolCallId::new(), 1, "chat", "user", "");
        let hub = Arc::new(LiveHub::default());
        let (tx, mut rx) = mpsc::channel(2);
        hub.attach(tx);
        let mut gather = Gather::new(hub, output.clone());
        gather.push(Block::Stdout, b"first");
        let first = delta(rx.try_recv().unwrap());
        assert_eq!((first.offset, &first.piece[..]), (0, &b"first"[..]));
        gather.push(Block::Stdout, b"second");
        assert!(gather.due_in().is_some_and(|d| d <= limits::DELTA_GATHER));
        gather.flush();
        assert_eq!(delta(rx.try_recv().unwrap()).offset, 5);
        for _ in 0..100 {
            gather.push(Block::Stderr, &[0; 40_000]);
        }
        assert_eq!(output.len(Block::Stderr), 4_000_000);
        assert!(rx.try_recv().is_ok() && rx.try_recv().is_ok() && rx.try_recv().is_err());
    }
}
