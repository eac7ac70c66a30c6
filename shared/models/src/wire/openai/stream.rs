//! An answer of the chat completions format. Ids, indexes, usage and the final `[DONE]` may be missing; a tool call's
//! index is a name for the call, never a size.

use reliant_types::{limits, pb};
use serde::Deserialize;
use serde_json::Value;

use super::super::{
    ErrorDetail, Events,
    assemble::{Assembler, Prose, ToolBlock},
    finish,
};
use crate::{ModelError, lenient};

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(default)]
    x_groq: Option<Groq>,
    #[serde(default)]
    error: Option<ErrorDetail>,
}

#[derive(Deserialize)]
struct Groq {
    #[serde(default)]
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    index: i64,
    #[serde(default)]
    delta: Option<Delta>,
    #[serde(default, deserialize_with = "lenient::text")]
    finish_reason: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Delta {
    #[serde(deserialize_with = "lenient::text")]
    content: Option<String>,
    /// DeepSeek, vLLM.
    #[serde(deserialize_with = "lenient::text")]
    reasoning_content: Option<String>,
    /// OpenRouter, Groq, Ollama.
    #[serde(deserialize_with = "lenient::text")]
    reasoning: Option<String>,
    /// The model's refusal, said in place of content.
    #[serde(deserialize_with = "lenient::text")]
    refusal: Option<String>,
    tool_calls: Option<Vec<CallDelta>>,
}

#[derive(Deserialize)]
struct CallDelta {
    #[serde(default)]
    index: Option<Value>,
    #[serde(default, deserialize_with = "lenient::text")]
    id: Option<String>,
    #[serde(default)]
    function: Option<FunctionDelta>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct FunctionDelta {
    #[serde(deserialize_with = "lenient::text")]
    name: Option<String>,
    #[serde(deserialize_with = "lenient::json_text")]
    arguments: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Usage {
    #[serde(deserialize_with = "lenient::count")]
    prompt_tokens: i64,
    #[serde(deserialize_with = "lenient::count")]
    completion_tokens: i64,
    prompt_tokens_details: Option<PromptDetails>,
    completion_tokens_details: Option<CompletionDetails>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct PromptDetails {
    #[serde(deserialize_with = "lenient::count")]
    cached_tokens: i64,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct CompletionDetails {
    #[serde(deserialize_with = "lenient::count")]
    reasoning_tokens: i64,
}

impl From<Usage> for pb::Usage {
    fn from(usage: Usage) -> Self {
        pb::Usage {
            input_tokens: usage.prompt_tokens,
            output_tokens: usage.completion_tokens,
            cache_read_tokens: usage.prompt_tokens_details.unwrap_or_default().cached_tokens,
            cache_write_tokens: 0,
            reasoning_tokens: usage.completion_tokens_details.unwrap_or_default().reasoning_tokens,
            cost_microusd: 0,
        }
    }
}

/// A call that grows. Until its name is known it has no block.
struct Slot {
    index: Option<u64>,
    id: String,
    block: Option<ToolBlock>,
    early_input: String,
}

/// See [`crate::wire::Decoder`].
pub struct Decoder {
    key: String,
    blocks: Assembler,
    /// At most [`limits::MESSAGE_TOOL_CALLS_MAX`], in the order of their first piece.
    slots: Vec<Slot>,
    usage: Option<pb::Usage>,
    stop: Option<pb::StopReason>,
    done: bool,
}

impl Decoder {
    pub fn new(key: &str) -> Self {
        Self {
            key: key.to_owned(),
            blocks: Assembler::default(),
            slots: Vec::new(),
            usage: None,
            stop: None,
            done: false,
        }
    }

    pub fn is_done(&self) -> bool {
        self.done
    }

    pub fn event(&mut self, data: &str, out: &mut Events) -> Result<(), ModelError> {
        if self.done {
            return Ok(());
        }
        if data.trim() == "[DONE]" {
            if self.stop.is_none() && self.blocks.is_empty() {
                return Err(ModelError::garbage("the stream ended without a message"));
            }
            self.stop("", out)?;
            self.complete(out);
            return Ok(());
        }
        let chunk: Chunk = serde_json::from_str(data).map_err(|error| {
            ModelError::garbage(format!("a chunk of the stream is not as expected ({:?})", error.classify()))
        })?;
        if let Some(error) = chunk.error {
            return Err(error.in_stream(&self.key));
        }
        if let Some(usage) = chunk.usage.or(chunk.x_groq.and_then(|groq| groq.usage)) {
            self.usage = Some(usage.into());
        }
        for choice in chunk.choices {
            // We ask for one choice; another one is not ours.
            if choice.index != 0 || self.stop.is_some() {
                continue;
            }
            if let Some(delta) = choice.delta {
                self.delta(delta, out)?;
            }
            if let Some(reason) = choice.finish_reason {
                self.stop(&reason, out)?;
            }
        }
        Ok(())
    }

    fn delta(&mut self, delta: Delta, out: &mut Events) -> Result<(), ModelError> {
        if let Some(piece) = delta.reasoning_content.or(delta.reasoning) {
            self.blocks.prose(Prose::Thinking, piece, out)?;
        }
        if let Some(piece) = delta.content {
            self.blocks.prose(Prose::Text, piece, out)?;
        }
        if let Some(piece) = delta.refusal {
            self.blocks.prose(Prose::Text, piece, out)?;
        }
        for call in delta.tool_calls.unwrap_or_default() {
            self.call(call, out)?;
        }
        Ok(())
    }

    fn call(&mut self, call: CallDelta, out: &mut Events) -> Result<(), ModelError> {
        let index = match call.index {
            None | Some(Value::Null) => None,
            Some(index) => match index.as_u64() {
                Some(index) if index < limits::MESSAGE_TOOL_CALLS_MAX as u64 => Some(index),
                _ => return Err(ModelError::garbage("a tool call's index is no small number")),
            },
        };
        let id = call.id.unwrap_or_default();
        let FunctionDelta { name, arguments } = call.function.unwrap_or_default();
        let name = name.unwrap_or_default();
        let at = match self.find(index, &id, &name) {
            Some(at) => at,
            None => {
                if self.slots.len() >= limits::MESSAGE_TOOL_CALLS_MAX {
                    let what = format!("more than {} tool calls", limits::MESSAGE_TOOL_CALLS_MAX);
                    return Err(ModelError::TooLarge { what });
                }
                self.slots.push(Slot { index, id: String::new(), block: None, early_input: String::new() });
                self.slots.len() - 1
            }
        };
        let slot = &mut self.slots[at];
        if slot.id.is_empty() {
            slot.id = id;
        }
        let mut piece = arguments.unwrap_or_default();
        if slot.block.is_none() && !name.is_empty() {
            if slot.id.is_empty() {
                slot.id = format!("call_{:016x}", rand::random::<u64>());
            }
            slot.block = Some(self.blocks.tool(slot.id.clone(), name, out)?);
            piece.insert_str(0, &std::mem::take(&mut slot.early_input));
        }
        match &mut slot.block {
            Some(block) => self.blocks.tool_input(block, piece, out),
            None => {
                slot.early_input.push_str(&piece);
                if slot.early_input.len() > limits::TOOL_INPUT_MAX_BYTES {
                    return Err(ModelError::garbage("a tool call's input came without its name"));
                }
                Ok(())
            }
        }
    }

    /// The call a piece belongs to. Some servers give every call the index 0, or none: a new id together with a name
    /// begins a new call.
    fn find(&self, index: Option<u64>, id: &str, name: &str) -> Option<usize> {
        let at = match index {
            Some(_) => self.slots.iter().rposition(|slot| slot.index == index)?,
            None => {
                if let Some(at) = self.slots.iter().rposition(|slot| !id.is_empty() && slot.id == id) {
                    return Some(at);
                }
                self.slots.len().checked_sub(1)?
            }
        };
        let slot = &self.slots[at];
        let named_again = !name.is_empty() && slot.block.is_some();
        let other_id = !id.is_empty() && slot.id != id;
        let begins = named_again && (other_id || (index.is_none() && id.is_empty()));
        (!begins).then_some(at)
    }

    fn stop(&mut self, reason: &str, out: &mut Events) -> Result<(), ModelError> {
        if self.stop.is_some() {
            return Ok(());
        }
        self.blocks.close(out);
        for slot in &self.slots {
            match &slot.block {
                Some(block) => self.blocks.tool_end(block, out),
                None => return Err(ModelError::garbage("a tool call has no name")),
            }
        }
        self.stop = Some(match reason {
            "length" => pb::StopReason::MaxTokens,
            "content_filter" => pb::StopReason::ContentFilter,
            "error" => return Err(ModelError::Overloaded { status: 500, retry_after: None }),
            // Some servers say "stop" also where tools are called.
            _ if self.blocks.has_tools() => pb::StopReason::ToolUse,
            _ => pb::StopReason::EndTurn,
        });
        Ok(())
    }

    fn complete(&mut self, out: &mut Events) {
        self.done = true;
        finish(self.usage.take(), self.stop.unwrap_or(pb::StopReason::EndTurn), out);
    }

    pub fn end(&mut self, out: &mut Events) -> Result<(), ModelError> {
        if self.done {
            return Ok(());
        }
        if self.stop.is_none() {
            return Err(ModelError::CutStream);
        }
        self.complete(out);
        Ok(())
    }
}
