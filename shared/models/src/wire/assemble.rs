//! Blocks as they grow. Numbers them, opens and ends them, and holds the limits: pieces are handed on as they come and
//! only counted here, so that memory and time stay linear in the answer.

use reliant_types::limits;

use super::Events;
use crate::{BlockKind, ModelError, ModelEvent};

/// Blocks of one message. Above the limit for tool calls, with room for text and thinking between them.
const BLOCKS_MAX: u32 = 512;

#[derive(Debug, Default)]
pub struct Assembler {
    next: u32,
    text_bytes: usize,
    tools: usize,
    /// The text or thinking block that grows now.
    current: Option<(u32, Prose)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prose {
    Text,
    Thinking,
}

/// A tool block that is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolBlock {
    pub index: u32,
    bytes: usize,
}

impl Assembler {
    fn number(&mut self) -> Result<u32, ModelError> {
        if self.next >= BLOCKS_MAX {
            return Err(ModelError::TooLarge { what: format!("more than {BLOCKS_MAX} blocks") });
        }
        self.next += 1;
        Ok(self.next - 1)
    }

    fn count(&mut self, bytes: usize) -> Result<(), ModelError> {
        self.text_bytes += bytes;
        if self.text_bytes > limits::MODEL_TEXT_MAX_BYTES {
            return Err(ModelError::TooLarge { what: format!("more than {} bytes", limits::MODEL_TEXT_MAX_BYTES) });
        }
        Ok(())
    }

    /// Opens a block even if it stays empty.
    pub fn open(&mut self, prose: Prose, out: &mut Events) -> Result<u32, ModelError> {
        self.close(out);
        let index = self.number()?;
        let kind = match prose {
            Prose::Text => BlockKind::Text,
            Prose::Thinking => BlockKind::Thinking,
        };
        out.push_back(ModelEvent::BlockStart { index, kind });
        self.current = Some((index, prose));
        Ok(index)
    }

    /// A piece of text or thinking; opens its block, and ends the one of the other kind.
    pub fn prose(&mut self, prose: Prose, piece: String, out: &mut Events) -> Result<(), ModelError> {
        if piece.is_empty() {
            return Ok(());
        }
        self.count(piece.len())?;
        let index = match self.current {
            Some((index, open)) if open == prose => index,
            _ => self.open(prose, out)?,
        };
        out.push_back(match prose {
            Prose::Text => ModelEvent::Text { index, piece },
            Prose::Thinking => ModelEvent::Thinking { index, piece },
        });
        Ok(())
    }

    pub fn signature(&mut self, piece: String, out: &mut Events) -> Result<(), ModelError> {
        self.count(piece.len())?;
        if let Some((index, Prose::Thinking)) = self.current {
            out.push_back(ModelEvent::Signature { index, piece });
        }
        Ok(())
    }

    /// Ends the block of text or thinking, if one is open.
    pub fn close(&mut self, out: &mut Events) {
        if let Some((index, _)) = self.current.take() {
            out.push_back(ModelEvent::BlockEnd { index });
        }
    }

    pub fn tool(&mut self, provider_id: String, name: String, out: &mut Events) -> Result<ToolBlock, ModelError> {
        self.close(out);
        if self.tools >= limits::MESSAGE_TOOL_CALLS_MAX {
            return Err(ModelError::TooLarge {
                what: format!("more than {} tool calls", limits::MESSAGE_TOOL_CALLS_MAX),
            });
        }
        // Both are sent back and stored; no provider has longer ones.
        if name.len() > 256 || provider_id.len() > 256 {
            return Err(ModelError::garbage("a tool call's name or id is longer than 256 bytes"));
        }
        self.tools += 1;
        let index = self.number()?;
        out.push_back(ModelEvent::BlockStart { index, kind: BlockKind::ToolUse { provider_id, name } });
        Ok(ToolBlock { index, bytes: 0 })
    }

    pub fn tool_input(&mut self, tool: &mut ToolBlock, piece: String, out: &mut Events) -> Result<(), ModelError> {
        if piece.is_empty() {
            return Ok(());
        }
        tool.bytes += piece.len();
        if tool.bytes > limits::TOOL_INPUT_MAX_BYTES {
            let what = format!("a tool call's input is longer than {} bytes", limits::TOOL_INPUT_MAX_BYTES);
            return Err(ModelError::TooLarge { what });
        }
        self.count(piece.len())?;
        out.push_back(ModelEvent::ToolInput { index: tool.index, piece });
        Ok(())
    }

    /// A call without input is a call with an empty object.
    pub fn tool_end(&mut self, tool: &ToolBlock, out: &mut Events) {
        if tool.bytes == 0 {
            out.push_back(ModelEvent::ToolInput { index: tool.index, piece: "{}".into() });
        }
        out.push_back(ModelEvent::BlockEnd { index: tool.index });
    }

    /// Whether anything was said at all.
    pub fn is_empty(&self) -> bool {
        self.next == 0
    }

    pub fn has_tools(&self) -> bool {
        self.tools > 0
    }
}
