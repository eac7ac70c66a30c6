//! What this worker has read of chats, so that a round reads only what has come since the one before. Nothing is decided by
//! it: Postgres says with each claim how far the chat has come, and what is not here is read.

use lru::LruCache;
use parking_lot::Mutex;
use reliant_store::Transcript;
use reliant_types::ChatId;

/// Memory of all together, about; past it, those of the chats that were quiet for longest go.
const KEPT_MAX_BYTES: usize = 64 * 1024 * 1024;

pub struct Transcripts(Mutex<Kept>);

struct Kept {
    chats: LruCache<ChatId, Transcript>,
    bytes: usize,
}

impl Default for Transcripts {
    fn default() -> Self {
        Self(Mutex::new(Kept { chats: LruCache::unbounded(), bytes: 0 }))
    }
}

impl Transcripts {
    /// Whoever takes it puts it back; a second one who asks meanwhile reads for itself.
    pub fn take(&self, chat: ChatId) -> Option<Transcript> {
        let mut kept = self.0.lock();
        let transcript = kept.chats.pop(&chat)?;
        kept.bytes -= transcript.bytes();
        Some(transcript)
    }

    pub fn put(&self, chat: ChatId, transcript: Transcript) {
        let mut kept = self.0.lock();
        kept.bytes += transcript.bytes();
        if let Some((_, before)) = kept.chats.push(chat, transcript) {
            kept.bytes -= before.bytes();
        }
        while kept.bytes > KEPT_MAX_BYTES {
            let Some((_, oldest)) = kept.chats.pop_lru() else { break };
            kept.bytes -= oldest.bytes();
        }
    }
}
