//! What a model's answer consists of, whichever provider gave it.

use reliant_types::pb;

/// Blocks are numbered from 0 in the order of the message. Tool blocks may be open side by side; a block gets no piece
/// before its start nor after its end. `Stop` is the last event of every good stream.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelEvent {
    BlockStart {
        index: u32,
        kind: BlockKind,
    },
    Text {
        index: u32,
        piece: String,
    },
    Thinking {
        index: u32,
        piece: String,
    },
    /// Opaque; to be sent back with the thinking block.
    Signature {
        index: u32,
        piece: String,
    },
    /// The pieces of one call together are the JSON text of its input. It need not be valid when the stream stopped at
    /// the token limit, or when the model wrote nonsense.
    ToolInput {
        index: u32,
        piece: String,
    },
    BlockEnd {
        index: u32,
    },
    /// Tokens and cost, once, right before `Stop`; absent where the provider counted nothing. `input_tokens` is all of
    /// the prompt; `cache_read_tokens` and `cache_write_tokens` are parts of it. `reasoning_tokens` is a part of
    /// `output_tokens`.
    Usage(pb::Usage),
    Stop(pb::StopReason),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockKind {
    Text,
    Thinking,
    ToolUse { provider_id: String, name: String },
}
