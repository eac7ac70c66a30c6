//! What this worker has read of chats, so that a round reads only what has come since the one before. Nothing is decided by
//! it: Postgres says with each claim how far the chat has come, and what is not here is read.

use parking_lot::Mutex;
use reliant_store::Transcript;
use reliant_types::ChatId;

use crate::kept::Kept;

/// Memory of all together, about.
const KEPT_MAX_BYTES: usize = 64 * 1024 * 1024;

pub struct Transcripts(Mutex<Kept<ChatId, Transcript>>);

impl Default for Transcripts {
    fn default() -> Self {
        Self(Mutex::new(Kept::new(KEPT_MAX_BYTES)))
    }
}

impl Transcripts {
    /// Whoever takes it puts it back; a second one who asks meanwhile reads for itself.
    pub fn take(&self, chat: ChatId) -> Option<Transcript> {
        self.0.lock().take(&chat)
    }

    pub fn put(&self, chat: ChatId, transcript: Transcript) {
        let bytes = transcript.bytes();
        self.0.lock().put(chat, transcript, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_takes_a_transcript_has_it_alone_and_the_quietest_go_first() {
        let kept = Transcripts::default();
        let chats: Vec<ChatId> = (0..5).map(|_| ChatId::new()).collect();
        let quarter = || Transcript::of_bytes(KEPT_MAX_BYTES / 4);
        for chat in &chats[..4] {
            kept.put(*chat, quarter());
        }
        let first = kept.take(chats[0]).unwrap();
        assert!(kept.take(chats[0]).is_none());
        kept.put(chats[0], first);
        kept.put(chats[4], quarter());
        assert!(kept.take(chats[1]).is_none(), "it was quiet for longest");
        assert!(kept.take(chats[0]).is_some() && kept.take(chats[4]).is_some());
        // What is larger than all that is kept is not kept, and leaves room for others.
        kept.put(chats[1], Transcript::of_bytes(2 * KEPT_MAX_BYTES));
        assert!(kept.take(chats[1]).is_none());
        kept.put(chats[2], quarter());
        assert!(kept.take(chats[2]).is_some());
    }
}
