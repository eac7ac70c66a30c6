//! One update stream: a bounded queue that the feeds fill and the socket empties, a heartbeat, and what to do when it was
//! too slow. It is the response's body that runs this code; there is no task and no timer between a feed and the socket.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::Stream;
use parking_lot::Mutex;
use reliant_telemetry::{metrics, sampled};
use reliant_types::{
    ChatId, Code, Failure, limits,
    pb::{self, subscribe_response::Update},
};
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{
    table::{Command, Lease},
    wire::encode,
};

/// What a viewer follows: the key of its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Topic {
    Chat(ChatId),
    User,
}

/// Encoded updates, shared with the other viewers.
#[derive(Debug, Clone)]
pub enum Item {
    One(Bytes),
    Many(Arc<[Bytes]>),
}

impl From<Vec<Bytes>> for Item {
    fn from(updates: Vec<Bytes>) -> Self {
        match <[Bytes; 1]>::try_from(updates) {
            Ok([update]) => Item::One(update),
            Err(updates) => Item::Many(updates.into()),
        }
    }
}

pub enum Offer {
    Taken,
    Full,
    Gone,
}

#[derive(Debug, Default)]
struct Shared {
    lagging: Mutex<Vec<Topic>>,
    dropped: AtomicI64,
    failure: Mutex<Option<Failure>>,
    /// Something of the above is set.
    changed: Notify,
}

/// A feed's handle to a viewer.
#[derive(Clone)]
pub struct Viewer {
    pub id: u64,
    queue: mpsc::Sender<Item>,
    shared: Arc<Shared>,
}

impl Viewer {
    pub fn offer(&self, item: Item) -> Offer {
        match self.queue.try_send(item) {
            Ok(()) => Offer::Taken,
            Err(mpsc::error::TrySendError::Full(_)) => Offer::Full,
            Err(mpsc::error::TrySendError::Closed(_)) => Offer::Gone,
        }
    }

    pub fn is_gone(&self) -> bool {
        self.queue.is_closed()
    }

    /// The queue was full; the viewer asks to go on once it is empty.
    pub fn lag(&self, topic: Topic, deltas: i64) {
        self.shared.lagging.lock().push(topic);
        self.dropped(deltas);
        self.shared.changed.notify_one();
    }

    pub fn dropped(&self, deltas: i64) {
        self.shared.dropped.fetch_add(deltas, Ordering::Relaxed);
        metrics::VIEWER_DROPS.inc_by(deltas.unsigned_abs());
    }

    pub fn fail(&self, failure: Failure) {
        *self.shared.failure.lock() = Some(failure);
        self.shared.changed.notify_one();
    }
}

/// The viewer's own side.
pub struct ViewerStream {
    id: u64,
    queue: mpsc::Receiver<Item>,
    /// The rest of the item at hand.
    batch: Option<(Arc<[Bytes]>, usize)>,
    shared: Arc<Shared>,
    /// Lagged topics that are to be asked for, once the viewer was told.
    resume: Vec<Topic>,
    leases: HashMap<Topic, Lease>,
    heartbeat: Interval,
    drain: std::pin::Pin<Box<tokio_util::sync::WaitForCancellationFutureOwned>>,
    draining: bool,
    /// Keeps the queue open where no feed holds it.
    _viewer: Viewer,
    /// Settles the counts when the stream is dropped.
    _open: Box<dyn Send>,
}

/// A viewer and its stream, not yet in any feed.
pub fn viewer(id: u64, queue: usize, drain: CancellationToken, open: Box<dyn Send>) -> (Viewer, ViewerStream) {
    let (sender, receiver) = sampled::channel("viewer", queue);
    let shared = Arc::<Shared>::default();
    let viewer = Viewer { id, queue: sender, shared: shared.clone() };
    let mut heartbeat = interval_at(Instant::now() + limits::HEARTBEAT_INTERVAL, limits::HEARTBEAT_INTERVAL);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let stream = ViewerStream {
        id,
        queue: receiver,
        batch: None,
        shared,
        resume: Vec::new(),
        leases: HashMap::new(),
        heartbeat,
        drain: Box::pin(drain.cancelled_owned()),
        draining: false,
        _viewer: viewer.clone(),
        _open: open,
    };
    (viewer, stream)
}

impl ViewerStream {
    pub fn follow(&mut self, topic: Topic, lease: Lease) {
        self.leases.insert(topic, lease);
    }

    /// The updates, for as long as the client listens and the replica serves.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, Status>> + Send + 'static {
        futures::stream::unfold(Some(self), |this| async move {
            let mut this = this?;
            match this.next().await {
                Ok(update) => Some((Ok(update), Some(this))),
                // After an error a stream is over; what it held is given back now.
                Err(failure) => Some((Err(reliant_rpc::status(&failure)), None)),
            }
        })
    }

    async fn next(&mut self) -> Result<Bytes, Failure> {
        loop {
            if let Some((batch, next)) = &mut self.batch {
                if let Some(update) = batch.get(*next) {
                    *next += 1;
                    return Ok(update.clone());
                }
                self.batch = None;
            }
            for topic in std::mem::take(&mut self.resume) {
                if let Some(lease) = self.leases.get(&topic) {
                    lease.send(Command::Resume { viewer: self.id }).await?;
                }
            }
            tokio::select! {
                biased;
                () = &mut self.drain, if !self.draining => {
                    self.draining = true;
                    return Err(draining());
                }
                item = self.queue.recv() => match item {
                    Some(Item::One(update)) => return Ok(update),
                    Some(Item::Many(batch)) => self.batch = Some((batch, 0)),
                    None => return Err(super::table::ended()),
                },
                // After the queue, so that what is asked for anew finds room.
                () = self.shared.changed.notified() => {
                    if let Some(failure) = self.shared.failure.lock().take() {
                        return Err(failure);
                    }
                    self.resume = std::mem::take(&mut *self.shared.lagging.lock());
                    let dropped = self.shared.dropped.swap(0, Ordering::Relaxed);
                    if !self.resume.is_empty() {
                        return Ok(encode(Update::Lagged(pb::Lagged { dropped })));
                    }
                }
                _ = self.heartbeat.tick() => {
                    metrics::VIEWER_UPDATES.with_label_values(&["heartbeat"]).inc();
                    return Ok(encode(Update::Heartbeat(pb::Heartbeat {
                        time: Some(reliant_types::timestamp(chrono::Utc::now())),
                    })));
                }
            }
        }
    }
}

pub fn draining() -> Failure {
    Failure::new(Code::Draining, "this server is being restarted; subscribe again")
        .retry_after(Duration::from_millis(100))
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;
    use prost::Message as _;

    use super::*;

    fn text(n: u8) -> Item {
        Item::One(Bytes::copy_from_slice(&[n]))
    }

    #[tokio::test(start_paused = true)]
    async fn a_viewer_that_has_nothing_gets_heartbeats() {
        let (_viewer, stream) = viewer(1, 4, CancellationToken::new(), Box::new(()));
        let mut stream = Box::pin(stream.into_stream());
        let start = Instant::now();
        for _ in 0..3 {
            let update = pb::SubscribeResponse::decode(stream.next().await.unwrap().unwrap()).unwrap();
            assert!(matches!(update.update, Some(Update::Heartbeat(_))));
        }
        assert_eq!(start.elapsed(), limits::HEARTBEAT_INTERVAL * 3);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_queued_comes_before_the_word_that_it_lagged() {
        let (viewer, stream) = viewer(1, 2, CancellationToken::new(), Box::new(()));
        let mut stream = Box::pin(stream.into_stream());
        assert!(matches!(viewer.offer(text(1)), Offer::Taken));
        assert!(matches!(viewer.offer(Item::from(vec![Bytes::from("2"), Bytes::from("3")])), Offer::Taken));
        assert!(matches!(viewer.offer(text(4)), Offer::Full));
        viewer.lag(Topic::User, 7);
        for expected in [&[1u8][..], b"2", b"3"] {
            assert_eq!(stream.next().await.unwrap().unwrap(), expected);
        }
        let update = pb::SubscribeResponse::decode(stream.next().await.unwrap().unwrap()).unwrap();
        assert_eq!(update.update, Some(Update::Lagged(pb::Lagged { dropped: 7 })));
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_and_a_failed_feed_end_the_stream_with_a_reason() {
        let drain = CancellationToken::new();
        let (first, stream) = viewer(1, 2, drain.clone(), Box::new(()));
        let mut stream = Box::pin(stream.into_stream());
        first.fail(super::super::table::ended());
        assert_eq!(stream.next().await.unwrap().unwrap_err().code(), tonic::Code::Unavailable);
        assert!(stream.next().await.is_none() && first.is_gone());

        let (_viewer, stream) = viewer(2, 2, drain.clone(), Box::new(()));
        drain.cancel();
        let status = Box::pin(stream.into_stream()).next().await.unwrap().unwrap_err();
        assert_eq!(reliant_rpc::failure(&status).code, Code::Draining);
    }
}
