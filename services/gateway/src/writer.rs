//! The way out to one daemon: a bounded queue in front of its stream. Whoever sends does not wait; what does not fit is
//! dropped by those who can afford it (an answer is asked for again, a result is offered again).

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use futures::Stream;
use reliant_telemetry::{TraceContext, sampled};
use reliant_types::pb::{self, connect_response::Frame};
use tokio::sync::mpsc;
use tonic::Status;

/// Frames that wait for one daemon's connection.
const QUEUE_MAX: usize = 256;

/// The frames on their way to the connection. Boxed: a queue's smallest piece holds 32 of them, also on an idle stream.
pub(crate) struct Outgoing(mpsc::Receiver<Box<pb::ConnectResponse>>);

impl Stream for Outgoing {
    type Item = Result<pb::ConnectResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx).map(|frame| frame.map(|frame| Ok(*frame)))
    }
}

#[derive(Clone)]
pub(crate) struct Writer(mpsc::Sender<Box<pb::ConnectResponse>>);

/// The queue is full or the stream is gone; the frame was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dropped;

impl Writer {
    pub fn new() -> (Self, Outgoing) {
        let (sender, receiver) = sampled::channel("tunnel", QUEUE_MAX);
        (Self(sender), Outgoing(receiver))
    }

    /// `request_id` 0: no answer is awaited.
    pub fn send(&self, trace: TraceContext, request_id: u64, frame: Frame) -> Result<(), Dropped> {
        let trace = (!trace.is_empty()).then(|| trace.into());
        self.0.try_send(Box::new(pb::ConnectResponse { trace, request_id, frame: Some(frame) })).map_err(|error| {
            if matches!(error, mpsc::error::TrySendError::Full(_)) {
                sampled::refused("tunnel");
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
