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
            ModelEvent::BlockStart { index, kind } => {
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
                    self.blocks[position].text.push_str(&piece);
                    Change::Grew { position, piece }
                }
                _ => Change::None,
            },
            ModelEvent::Signature { index, piece } => {
                if let Some(position) = self.place(index)
                    && self.blocks[position].signature.len() + piece.len() <= limits::MODEL_TEXT_MAX_BYTES
                {
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

    fn place(&self, index: u32) -> Option<usize> {
        self.numbers.iter().rposition(|number| *number == index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
