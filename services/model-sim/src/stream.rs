//! An answer on its way: each piece leaves when it is due by the clock, as a chunk of its own, and the fault strikes
//! where it was told to.

use std::{io, sync::Arc, sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use futures::{Stream, stream::unfold};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::Span;

use crate::{
    Stats,
    answer::{Answer, Block, Stop, Usage},
    fault::{Fault, FaultKind},
};

/// A stalled stream ends by itself some time, so that a forgotten client costs nothing.
const STALL_MAX: Duration = Duration::from_secs(3600);
const ENDLESS_MAX_BYTES: usize = 64 * 1024 * 1024;
const ENDLESS_CHUNK_BYTES: usize = 16 * 1024;

/// One wire format's way to write a stream.
pub trait Writer: Send {
    fn start(&mut self, usage: Usage, out: &mut String);
    fn open(&mut self, block: &Block, out: &mut String);
    fn piece(&mut self, block: &Block, piece: &str, out: &mut String);
    fn close(&mut self, block: &Block, out: &mut String);
    fn finish(&mut self, stop: Stop, usage: Usage, out: &mut String);
    /// The provider's own error in the middle of a stream.
    fn error(&mut self, out: &mut String);
    fn huge_index(&mut self, out: &mut String);
}

enum Next {
    Piece,
    /// Bytes of an endless line so far.
    Endless(usize),
    Break,
    End,
}

struct Running {
    writer: Box<dyn Writer>,
    answer: Answer,
    usage: Usage,
    begun: Instant,
    /// The piece that is next: block, and place in it.
    block: usize,
    piece: usize,
    pieces: usize,
    sent_bytes: usize,
    next: Next,
    _open: OpenStream,
    _span: Span,
}

/// Counts the stream for as long as it lives.
struct OpenStream(Arc<Stats>);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.open_streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The body of a streamed answer. `begun` is when the request came.
pub fn body(
    writer: Box<dyn Writer>,
    answer: Answer,
    usage: Usage,
    begun: Instant,
    stats: Arc<Stats>,
    span: Span,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    stats.open_streams.fetch_add(1, Ordering::Relaxed);
    let running = Running {
        writer,
        answer,
        usage,
        begun,
        block: 0,
        piece: 0,
        pieces: 0,
        sent_bytes: 0,
        next: Next::Piece,
        _open: OpenStream(stats),
        _span: span,
    };
    unfold(running, |mut running| async move {
        // Gives the connection the chance to send what it has: pieces are chunks of their own also without a pace.
        if running.sent_bytes > 0 {
            tokio::task::yield_now().await;
        }
        let chunk = running.chunk().await?;
        Some((chunk, running))
    })
}

impl Running {
    async fn chunk(&mut self) -> Option<io::Result<Bytes>> {
        match self.next {
            Next::End => return None,
            Next::Break => {
                self.next = Next::End;
                return Some(Err(io::Error::other("the scripted cut")));
            }
            Next::Endless(sent) if sent >= ENDLESS_MAX_BYTES => return None,
            Next::Endless(sent) => {
                self.next = Next::Endless(sent + ENDLESS_CHUNK_BYTES);
                let head = if sent == 0 { "data: " } else { "" };
                return Some(Ok(Bytes::from(format!("{head}{}", "x".repeat(ENDLESS_CHUNK_BYTES)))));
            }
            Next::Piece => {}
        }
        let mut out = String::new();
        let mut raw = Vec::new();
        let due = |fault: &Fault| self.pieces >= fault.after || fault.kind == FaultKind::Empty || self.is_last();
        if let Some(fault) = self.answer.fault.clone().filter(due) {
            match fault.kind {
                FaultKind::Stall => {
                    sleep(STALL_MAX).await;
                    return None;
                }
                FaultKind::Empty => return None,
                FaultKind::EndlessLine => {
                    self.next = Next::Endless(0);
                    return Box::pin(self.chunk()).await;
                }
                FaultKind::Cut if fault.at.is_none() => {
                    self.next = Next::Break;
                    return Box::pin(self.chunk()).await;
                }
                FaultKind::Malformed => out.push_str("data: {\"choices\":[{\"delta\":{\"content\":\"tor\n\n"),
                FaultKind::InvalidUtf8 => raw = b"data: {\"x\":\"\xff\xfe\"}\n\n".to_vec(),
                FaultKind::HugeIndex => self.writer.huge_index(&mut out),
                FaultKind::ErrorEvent => self.writer.error(&mut out),
                _ => {}
            }
            if !matches!(fault.kind, FaultKind::Cut) {
                self.answer.fault = None;
            }
        }
        self.write(&mut out).await;
        raw.extend_from_slice(out.as_bytes());
        if let Some(Fault { kind: FaultKind::Cut, at: Some(at), .. }) = self.answer.fault
            && self.sent_bytes + raw.len() >= at
        {
            raw.truncate(at - self.sent_bytes);
            self.next = Next::Break;
        }
        self.sent_bytes += raw.len();
        Some(Ok(Bytes::from(raw)))
    }

    fn is_last(&self) -> bool {
        self.block >= self.answer.blocks.len()
    }

    /// The next piece with what belongs before and after it; the end, when no piece is left.
    async fn write(&mut self, out: &mut String) {
        let Self { writer, answer, .. } = self;
        let due = self.begun + answer.pace.due(self.pieces);
        // The timer rounds up to a millisecond, also a time that has passed.
        if due > Instant::now() {
            sleep_until(due).await;
        }
        if self.pieces == 0 && self.block == 0 {
            writer.start(self.usage, out);
        }
        let Some(block) = answer.blocks.get(self.block) else {
            writer.finish(answer.stop(), self.usage, out);
            self.next = Next::End;
            return;
        };
        if self.piece == 0 {
            writer.open(block, out);
        }
        let all = block.pieces();
        if let Some(piece) = all.get(self.piece) {
            if answer.pace.stamp && matches!(block, Block::Text(_)) {
                writer.piece(block, &format!("{};{piece}", reliant_types::unix_us()), out);
            } else {
                writer.piece(block, piece, out);
            }
            self.piece += 1;
            self.pieces += 1;
        }
        if self.piece >= all.len() {
            writer.close(block, out);
            self.block += 1;
            self.piece = 0;
        }
    }
}
