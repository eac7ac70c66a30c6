//! A model's answer while it grows: blocks by their place, and the calls among them.
//!
//! A block's place in the live text is its place in the stored message, so that a viewer's refill fits both.

use reliant_models::{BlockKind, ModelEvent};
use reliant_types::{limits, pb};

#[derive(Debug, Default)]
pub struct Answer {
    pub blocks: Vec<Growing>,
    pub usage: Option<pb::Usage>,
    pub stop: Option<pb::StopReason>,
    /// Of all texts, signatures and names.
    pub bytes: usize,
    /// The provider's number of each block, by place.
    numbers: Vec<u32>,
}

#[derive(Debug)]
pub struct Growing {
    pub kind: BlockKind,
    pub text: String,
    pub signature: String,
}

/// What an event adds to the live text.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    Opened { position: usize, kind: pb::StreamKind, tool: String },
    Grew { position: usize, piece: String },
    None,
}

impl Answer {
    pub fn apply(&mut self, event: ModelEvent) -> Change {
        match event {
            ModelEvent::BlockStart { index, mut kind } => {
                if let BlockKind::ToolUse { provider_id, name } = &mut kind {
                    // No tool has such a name: it is refused by what is left of it.
                    name.truncate(name.floor_char_boundary(limits::TOOL_NAME_MAX_BYTES));
                    provider_id.truncate(provider_id.floor_char_boundary(limits::TOOL_NAME_MAX_BYTES));
                    self.bytes += name.len();
                }
                let (stream, tool) = match &kind {
                    BlockKind::Text => (pb::StreamKind::Text, String::new()),
                    BlockKind::Thinking => (pb::StreamKind::Thinking, String::new()),
                    BlockKind::ToolUse { name, .. } => (pb::StreamKind::ToolInput, name.clone()),
                };
                self.numbers.push(index);
                self.blocks.push(Growing { kind, text: String::new(), signature: String::new() });
                Change::Opened { position: self.blocks.len() - 1, kind: stream, tool }
            }
            ModelEvent::Text { index, piece }
            | ModelEvent::Thinking { index, piece }
            | ModelEvent::ToolInput { index, piece } => match self.place(index) {
                Some(position) if !piece.is_empty() => {
                    self.bytes += piece.len();
                    self.blocks[position].text.push_str(&piece);
                    Change::Grew { position, piece }
                }
                _ => Change::None,
            },
            ModelEvent::Signature { index, piece } => {
                self.bytes += piece.len();
                if let Some(position) = self.place(index).filter(|_| !self.is_too_large()) {
                    self.blocks[position].signature.push_str(&piece);
                }
                Change::None
            }
            ModelEvent::Usage(usage) => {
                self.usage = Some(usage);
                Change::None
            }
            ModelEvent::Stop(reason) => {
                self.stop = Some(reason);
                Change::None
            }
            ModelEvent::BlockEnd { .. } => Change::None,
        }
    }

    pub fn is_too_large(&self) -> bool {
        self.bytes > limits::MODEL_TEXT_MAX_BYTES
    }

    fn place(&self, index: u32) -> Option<usize> {
        self.numbers.iter().rposition(|number| *number == index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_and_signatures_count_together_and_names_are_cut() {
        let mut answer = Answer::default();
        let half = "x".repeat(limits::MODEL_TEXT_MAX_BYTES / 2);
        let name = "n".repeat(100_000);
        answer.apply(ModelEvent::BlockStart { index: 0, kind: BlockKind::Thinking });
        answer.apply(ModelEvent::BlockStart { index: 1, kind: BlockKind::ToolUse { provider_id: name.clone(), name } });
        assert!(
            matches!(&answer.blocks[1].kind, BlockKind::ToolUse { name, .. } if name.len() == limits::TOOL_NAME_MAX_BYTES)
        );
        answer.apply(ModelEvent::Thinking { index: 0, piece: half.clone() });
        assert!(!answer.is_too_large());
        answer.apply(ModelEvent::Signature { index: 0, piece: half });
        assert!(answer.is_too_large());
    }

    #[test]
    fn blocks_keep_their_places_while_tools_grow_side_by_side() {
        let mut answer = Answer::default();
        let tool = |name: &str| BlockKind::ToolUse { provider_id: "p".into(), name: name.into() };
        answer.apply(ModelEvent::BlockStart { index: 0, kind: BlockKind::Text });
        answer.apply(ModelEvent::BlockStart { index: 5, kind: tool("a") });
        let opened = answer.apply(ModelEvent::BlockStart { index: 6, kind: tool("b") });
        assert_eq!(opened, Change::Opened { position: 2, kind: pb::StreamKind::ToolInput, tool: "b".into() });
        answer.apply(ModelEvent::ToolInput { index: 6, piece: "{}".into() });
        let grew = answer.apply(ModelEvent::ToolInput { index: 5, piece: "[]".into() });
        assert_eq!(grew, Change::Grew { position: 1, piece: "[]".into() });
        assert_eq!(answer.apply(ModelEvent::Text { index: 9, piece: "x".into() }), Change::None);
        let texts: Vec<_> = answer.blocks.iter().map(|block| block.text.as_str()).collect();
        assert_eq!(texts, ["", "[]", "{}"]);
    }
}
