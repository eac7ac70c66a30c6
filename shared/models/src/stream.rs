//! One answer as it comes. Between the socket and the event there is one parse and no wait; memory is bounded by the
//! parser's and the assembler's limits.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tracing::Span;

use crate::{
    ModelError, ModelEvent, ResolvedModel,
    metrics::Call,
    sse::{SseError, SseParser},
    wire::Decoder,
};

type Body = Pin<Box<dyn Stream<Item = Result<Bytes, reqwest::Error>> + Send>>;

/// After the last event the connection's own end is awaited so long, for it to be used again.
const DRAIN_MAX: Duration = Duration::from_secs(1);

/// Ends after `Stop` or after an error, whichever comes; see [`ModelEvent`].
pub struct ModelStream {
    body: Option<Body>,
    parser: SseParser,
    decoder: Decoder,
    pending: VecDeque<ModelEvent>,
    /// Comes after what is pending.
    failed: Option<ModelError>,
    finished: bool,
    peeked: Option<ModelEvent>,
    stall: Duration,
    last_byte: Instant,
    timer: Pin<Box<Sleep>>,
    model: ResolvedModel,
    call: Call,
}

impl From<SseError> for ModelError {
    fn from(error: SseError) -> Self {
        ModelError::garbage(error.to_string())
    }
}

impl ModelStream {
    pub(crate) fn new(
        body: impl Stream<Item = Result<Bytes, reqwest::Error>> + Send + 'static,
        decoder: Decoder,
        stall: Duration,
        model: ResolvedModel,
        call: Call,
    ) -> Self {
        let now = Instant::now();
        Self {
            body: Some(Box::pin(body)),
            parser: SseParser::default(),
            decoder,
            pending: VecDeque::new(),
            failed: None,
            finished: false,
            peeked: None,
            stall,
            last_byte: now,
            timer: Box::pin(sleep_until(now + stall)),
            model,
            call,
        }
    }

    /// Waits for the first event and keeps it.
    pub(crate) async fn first(&mut self) -> Result<(), ModelError> {
        match self.next().await {
            Some(Ok(event)) => {
                self.peeked = Some(event);
                Ok(())
            }
            Some(Err(error)) => Err(error),
            None => Err(ModelError::CutStream),
        }
    }

    /// The span `chat` of this call.
    pub fn span(&self) -> &Span {
        &self.call.span
    }

    /// The model that answers.
    pub fn model(&self) -> &ResolvedModel {
        &self.model
    }

    fn feed(&mut self, chunk: &[u8]) {
        let Self { parser, decoder, pending, .. } = self;
        if let Err(error) = parser.feed(chunk, |_, data| decoder.event(data, pending)) {
            self.failed = Some(error);
        } else if self.decoder.is_done() {
            self.finished = true;
        }
    }

    fn end(&mut self) {
        self.body = None;
        match self.decoder.end(&mut self.pending) {
            Ok(()) => self.finished = true,
            Err(error) => self.failed = Some(error),
        }
    }
}

impl Stream for ModelStream {
    type Item = Result<ModelEvent, ModelError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(event) = this.peeked.take() {
                return Poll::Ready(Some(Ok(event)));
            }
            if let Some(mut event) = this.pending.pop_front() {
                if let ModelEvent::Usage(usage) = &mut event {
                    usage.cost_microusd = this.model.cost_microusd(usage);
                }
                this.call.event(&event);
                return Poll::Ready(Some(Ok(event)));
            }
            if let Some(error) = this.failed.take() {
                this.finished = true;
                this.body = None;
                this.call.error(&error);
                return Poll::Ready(Some(Err(error)));
            }
            if this.finished {
                return Poll::Ready(None);
            }
            let Some(body) = &mut this.body else { return Poll::Ready(None) };
            match body.as_mut().poll_next(cx) {
                Poll::Ready(Some(Ok(chunk))) => {
                    this.last_byte = Instant::now();
                    this.feed(&chunk);
                }
                // A connection that broke is an answer that was cut, unless all of it was here.
                Poll::Ready(Some(Err(_)) | None) => this.end(),
                Poll::Pending => {
                    if this.timer.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                    // The timer is moved only when it fires, not with every chunk.
                    let due = this.last_byte + this.stall;
                    if due <= Instant::now() {
                        this.failed = Some(ModelError::Stall { after: this.stall });
                    } else {
                        this.timer.as_mut().reset(due);
                    }
                }
            }
        }
    }
}

impl Drop for ModelStream {
    fn drop(&mut self) {
        // Only a body that was read to its end gives its connection back; a handshake costs more than this wait.
        if self.finished
            && let Some(mut body) = self.body.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(timeout(DRAIN_MAX, async move { while let Some(Ok(_)) = body.next().await {} }));
        }
    }
}
