//! The way out to one daemon: a bounded queue in front of its stream. Whoever sends does not wait; what does not fit is
//! dropped by those who can afford it (an answer is asked for again, a result is offered again).

use reliant_telemetry::{TraceContext, metrics};
use reliant_types::pb::{self, connect_response::Frame};
use tokio::sync::mpsc;
use tonic::Status;

/// Frames that wait for one daemon's connection.
const QUEUE_MAX: usize = 256;

pub(crate) type Outgoing = mpsc::Receiver<Result<pb::ConnectResponse, Status>>;

#[derive(Clone)]
pub(crate) struct Writer(mpsc::Sender<Result<pb::ConnectResponse, Status>>);

/// The queue is full or the stream is gone; the frame was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dropped;

impl Writer {
    pub fn new() -> (Self, Outgoing) {
        let (sender, receiver) = mpsc::channel(QUEUE_MAX);
        (Self(sender), receiver)
    }

    /// `request_id` 0: no answer is awaited.
    pub fn send(&self, trace: TraceContext, request_id: u64, frame: Frame) -> Result<(), Dropped> {
        let trace = (!trace.is_empty()).then(|| trace.into());
        self.0.try_send(Ok(pb::ConnectResponse { trace, request_id, frame: Some(frame) })).map_err(|error| {
            if matches!(error, mpsc::error::TrySendError::Full(_)) {
                metrics::QUEUE_REFUSED.with_label_values(&["tunnel"]).inc();
            }
            Dropped
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_does_not_read_costs_a_bounded_queue() {
        let (writer, outgoing) = Writer::new();
        let frame = || Frame::GoAway(pb::GoAway::default());
        let sent = (0..10_000).filter(|_| writer.send(TraceContext::default(), 0, frame()).is_ok()).count();
        assert_eq!(sent, QUEUE_MAX);
        drop(outgoing);
        assert_eq!(writer.send(TraceContext::default(), 0, frame()), Err(Dropped));
    }
}
