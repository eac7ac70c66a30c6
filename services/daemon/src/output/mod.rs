//! What running calls write: kept for readers, shortened for the model, sent live to viewers. Live pieces may be
//! dropped at any time, they can be refilled from what is kept; nothing here ever makes a tool wait for a viewer.

mod headtail;
mod kept;
mod live;
mod trim;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use reliant_types::{ToolCallId, limits, pb};

pub use headtail::HeadTail;
use kept::Kept;
pub use live::{Gather, LiveHub};

/// One answer to a prefix or output request.
pub const READ_MAX_BYTES: usize = 256 * 1024;
/// One live piece.
pub const PIECE_MAX_BYTES: usize = 32 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    Stdout = 0,
    Stderr = 1,
}

impl Block {
    pub const BOTH: [Block; 2] = [Block::Stdout, Block::Stderr];

    fn kind(self) -> pb::StreamKind {
        match self {
            Block::Stdout => pb::StreamKind::Stdout,
            Block::Stderr => pb::StreamKind::Stderr,
        }
    }
}

/// The output of one call, while it runs and a little longer.
#[derive(Debug)]
pub struct CallOutput {
    pub call: ToolCallId,
    pub chat_id: String,
    pub user_id: String,
    /// The epoch of live pieces; rises when a newer dispatch takes the call over.
    pub generation: AtomicI64,
    pub traceparent: String,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    kept: [Kept; 2],
    /// In the order of arrival, for the model.
    shown: HeadTail,
}

impl CallOutput {
    /// Takes a piece in. Answers its place in the block.
    pub fn append(&self, block: Block, piece: &[u8]) -> u64 {
        let mut inner = self.inner.lock();
        inner.shown.push(piece);
        let room = limits::TOOL_OUTPUT_KEEP_MAX_BYTES.saturating_sub(inner.kept.iter().map(Kept::kept).sum());
        inner.kept[block as usize].append(piece, room)
    }

    pub fn len(&self, block: Block) -> u64 {
        self.inner.lock().kept[block as usize].len()
    }

    pub fn total(&self) -> u64 {
        self.inner.lock().shown.total()
    }

    /// What the model reads, at most `max` bytes.
    pub fn shown(&self, max: usize) -> Vec<u8> {
        self.inner.lock().shown.render(max)
    }

    /// A delta per block from `from` on, as far as it is kept.
    fn prefix(&self, block: i32, from: u64) -> Vec<pb::Delta> {
        let inner = self.inner.lock();
        let mut budget = READ_MAX_BYTES;
        let mut deltas = Vec::new();
        for which in Block::BOTH {
            if block >= 0 && block != which as i32 {
                continue;
            }
            let piece = inner.kept[which as usize].read(from, budget);
            if !piece.is_empty() {
                budget -= piece.len();
                deltas.push(self.delta(which, from, piece));
            }
        }
        deltas
    }

    fn delta(&self, block: Block, offset: u64, piece: Vec<u8>) -> pb::Delta {
        pb::Delta {
            chat_id: self.chat_id.clone(),
            block: Some(self.block_ref(block)),
            epoch: self.generation.load(Ordering::Relaxed),
            offset: offset as i64,
            piece: piece.into(),
            produced_unix_us: reliant_types::unix_us(),
            tool: String::new(),
        }
    }

    fn block_ref(&self, block: Block) -> pb::BlockRef {
        pb::BlockRef { target_id: self.call.to_string(), block: block as i32, kind: block.kind() as i32 }
    }

    /// How long each block that has anything is by now.
    pub fn lengths(&self) -> Vec<pb::BlockLength> {
        Block::BOTH
            .into_iter()
            .filter(|b| self.len(*b) > 0)
            .map(|block| pb::BlockLength {
                chat_id: self.chat_id.clone(),
                block: Some(self.block_ref(block)),
                epoch: self.generation.load(Ordering::Relaxed),
                length: self.len(block) as i64,
            })
            .collect()
    }
}

/// The outputs of the calls that run, or ended within [`limits::PREFIX_HOLD`]; older ones on disk.
#[derive(Debug)]
pub struct Outputs {
    dir: PathBuf,
    max_bytes: u64,
    live: Mutex<HashMap<ToolCallId, Arc<CallOutput>>>,
}

impl Outputs {
    pub fn new(dir: PathBuf, max_bytes: u64) -> Self {
        Self { dir, max_bytes, live: Mutex::default() }
    }

    fn file(&self, call: ToolCallId, block: Block) -> PathBuf {
        file_of(&self.dir, call, block)
    }

    pub fn begin(
        &self,
        call: ToolCallId,
        generation: i64,
        chat_id: &str,
        user_id: &str,
        traceparent: &str,
    ) -> Arc<CallOutput> {
        let kept = Block::BOTH.map(|block| Kept::new(self.file(call, block)));
        let output = Arc::new(CallOutput {
            call,
            chat_id: chat_id.to_owned(),
            user_id: user_id.to_owned(),
            generation: AtomicI64::new(generation),
            traceparent: traceparent.to_owned(),
            inner: Mutex::new(Inner { kept, shown: HeadTail::new(limits::TOOL_RESULT_MAX_BYTES) }),
        });
        self.live.lock().insert(call, output.clone());
        output
    }

    /// The call ended: what it wrote goes to disk, and stays in memory for refills a little longer.
    pub fn end(self: &Arc<Self>, output: &Arc<CallOutput>, hold: Duration) {
        let outputs = self.clone();
        let output = output.clone();
        tokio::spawn(async move {
            if output.total() > 0 {
                let flushed = output.clone();
                let flush = move || {
                    let mut inner = flushed.inner.lock();
                    for kept in &mut inner.kept {
                        kept.flush();
                    }
                };
                let _ = tokio::task::spawn_blocking(flush).await;
            }
            tokio::time::sleep(hold).await;
            let mut live = outputs.live.lock();
            // A newer run of the same call has its own.
            if live.get(&output.call).is_some_and(|o| Arc::ptr_eq(o, &output)) {
                live.remove(&output.call);
            }
        });
    }

    pub fn get(&self, call: ToolCallId) -> Option<Arc<CallOutput>> {
        self.live.lock().get(&call).cloned()
    }

    /// Refills a viewer. Only the chat's owner gets anything.
    pub fn prefix(&self, request: &pb::PrefixRequest) -> pb::PrefixReply {
        let output = request.target_id.parse().ok().and_then(|call| self.get(call));
        match output {
            Some(output) if output.user_id == request.user_id => {
                pb::PrefixReply { found: true, deltas: output.prefix(request.block, request.from_offset.max(0) as u64) }
            }
            _ => pb::PrefixReply::default(),
        }
    }

    /// A call's whole output as far as it is kept: stdout, then stderr.
    pub fn read(&self, request: &pb::OutputRequest) -> pb::OutputReply {
        let Ok(call) = request.call_id.parse::<ToolCallId>() else { return pb::OutputReply::default() };
        let offset = request.offset.max(0) as u64;
        let length = (request.length.max(0) as usize).min(READ_MAX_BYTES);
        match self.get(call) {
            Some(output) => {
                let inner = output.inner.lock();
                let first = inner.kept[0].kept();
                let total = first + inner.kept[1].kept();
                let mut data = Vec::new();
                if offset < first {
                    data = inner.kept[0].read(offset, length);
                }
                if offset + data.len() as u64 >= first {
                    let from = (offset + data.len() as u64) - first;
                    data.extend(inner.kept[1].read(from, length - data.len()));
                }
                pb::OutputReply { found: true, data: data.into(), total_bytes: total as i64 }
            }
            None => read_files(&self.dir, call, offset, length),
        }
    }

    /// Removes the oldest files past the limits. Blocking.
    pub fn trim(&self) {
        trim::trim(&self.dir, self.max_bytes);
    }
}

fn file_of(dir: &Path, call: ToolCallId, block: Block) -> PathBuf {
    dir.join(format!("{call}.{}", if block == Block::Stdout { "out" } else { "err" }))
}

fn read_files(dir: &Path, call: ToolCallId, offset: u64, length: usize) -> pb::OutputReply {
    use std::os::unix::fs::FileExt;
    let mut reply = pb::OutputReply::default();
    let mut data = Vec::new();
    let mut total = 0;
    for block in Block::BOTH {
        let Ok(file) = std::fs::File::open(file_of(dir, call, block)) else { continue };
        let size = file.metadata().map_or(0, |m| m.len());
        reply.found = true;
        let from = (offset + data.len() as u64).saturating_sub(total);
        let wanted = (length - data.len()).min(size.saturating_sub(from) as usize);
        let reached = offset + data.len() as u64;
        if wanted > 0 && reached >= total {
            let mut piece = vec![0; wanted];
            if file.read_exact_at(&mut piece, from).is_ok() {
                data.append(&mut piece);
            }
        }
        total += size;
    }
    reply.total_bytes = total as i64;
    reply.data = data.into();
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(call: ToolCallId, offset: i64, length: i64) -> pb::OutputRequest {
        pb::OutputRequest { call_id: call.to_string(), offset, length }
    }

    #[tokio::test]
    async fn output_is_read_back_from_memory_and_from_disk_alike() {
        let dir = tempfile::tempdir().unwrap();
        let outputs = Arc::new(Outputs::new(dir.path().to_owned(), 1 << 20));
        let call = ToolCallId::new();
        let output = outputs.begin(call, 3, "chat", "user", "");
        let out: Vec<u8> = (0..200_000u32).map(|i| i as u8).collect();
        assert_eq!(output.append(Block::Stdout, &out), 0);
        assert_eq!(output.append(Block::Stdout, b"more"), 200_000);
        output.append(Block::Stderr, b"oops\xff");
        let whole = [&out[..], b"more", b"oops\xff"].concat();
        let read_all = || {
            let mut got = Vec::new();
            loop {
                let reply = outputs.read(&request(call, got.len() as i64, 70_000));
                assert!(reply.found);
                assert_eq!(reply.total_bytes as usize, whole.len());
                if reply.data.is_empty() {
                    return got;
                }
                got.extend_from_slice(&reply.data);
            }
        };
        assert_eq!(read_all(), whole);

        let prefix = |user: &str, block, from_offset| {
            let target_id = call.to_string();
            outputs.prefix(&pb::PrefixRequest { target_id, block, from_offset, user_id: user.into() })
        };
        assert!(!prefix("another", -1, 0).found);
        let reply = prefix("user", -1, 199_999);
        assert_eq!((reply.deltas.len(), reply.deltas[0].offset, reply.deltas[0].epoch), (1, 199_999, 3));
        assert_eq!(reply.deltas[0].piece.len(), 5);

        outputs.end(&output, Duration::ZERO);
        while outputs.get(call).is_some() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert_eq!(read_all(), whole);
        assert!(!prefix("user", 0, 0).found);
        assert!(!outputs.read(&request(ToolCallId::new(), 0, 10)).found);
    }
}
