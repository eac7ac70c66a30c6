//! A chat's stored messages as a model reads them. Notices are for people and are never sent. What is missing between
//! calls and results is mended by `reliant_models::fit_history`.

use std::sync::Arc;

use reliant_models::{ChatMessage, ChatRole, CountedPrompt, Part};
use reliant_types::{
    limits,
    pb::{self, content_block::Block},
};

/// `model` is the model that will read it: another provider's thinking is left out, its signature would be refused.
/// With it goes what the provider counted for the prompts of that model's answers.
pub fn to_model(messages: &[Arc<pb::Message>], model: &str) -> (Vec<ChatMessage>, Vec<CountedPrompt>) {
    let mut out = Vec::with_capacity(messages.len());
    let mut counted = Vec::new();
    for message in messages {
        match message.role() {
            pb::Role::User => push(&mut out, ChatRole::User, user_parts(message)),
            pb::Role::Assistant => {
                let tokens = message.usage.as_ref().map_or(0, |usage| usage.input_tokens);
                if tokens > 0 && message.model == model {
                    counted.push(CountedPrompt { messages: out.len(), tokens });
                }
                let same_provider = provider(&message.model) == provider(model);
                push(&mut out, ChatRole::Assistant, assistant_parts(message, same_provider));
            }
            pb::Role::Tool => push(&mut out, ChatRole::Tool, tool_parts(message)),
            pb::Role::Notice | pb::Role::Unspecified => {}
        }
    }
    (out, counted)
}

fn push(out: &mut Vec<ChatMessage>, role: ChatRole, parts: Vec<Part>) {
    if !parts.is_empty() {
        out.push(ChatMessage { role, parts });
    }
}

fn user_parts(message: &pb::Message) -> Vec<Part> {
    let part = |block: &pb::ContentBlock| match &block.block {
        Some(Block::Text(text)) if !text.text.is_empty() => Some(Part::Text(text.text.clone())),
        Some(Block::Image(image)) => {
            Some(Part::Image { media_type: image.media_type.clone(), data: image.data.to_vec() })
        }
        _ => None,
    };
    message.blocks.iter().filter_map(part).collect()
}

fn assistant_parts(message: &pb::Message, same_provider: bool) -> Vec<Part> {
    let mut calls = 0;
    let part = |block: &pb::ContentBlock| match &block.block {
        Some(Block::Text(text)) if !text.text.is_empty() => Some(Part::Text(text.text.clone())),
        Some(Block::Thinking(thinking)) if same_provider => {
            Some(Part::Thinking { text: thinking.text.clone(), signature: thinking.signature.clone() })
        }
        // The call's own id stands in for the provider's: it is unique, and short enough for every provider. Calls past
        // the limit were refused when they were made; a provider would refuse a message that has them.
        Some(Block::ToolUse(call)) => {
            calls += 1;
            (calls <= limits::MESSAGE_TOOL_CALLS_MAX).then(|| Part::ToolUse {
                provider_id: call.tool_call_id.clone(),
                name: call.tool.clone(),
                input_json: call.input_json.clone(),
            })
        }
        _ => None,
    };
    message.blocks.iter().filter_map(part).collect()
}

fn tool_parts(message: &pb::Message) -> Vec<Part> {
    let part = |block: &pb::ContentBlock| match &block.block {
        Some(Block::ToolResult(result)) => Some(Part::ToolResult {
            provider_id: result.tool_call_id.clone(),
            content: result.content.clone(),
            is_error: result.is_error,
        }),
        _ => None,
    };
    message.blocks.iter().filter_map(part).collect()
}

fn provider(model: &str) -> &str {
    model.split('/').next().unwrap_or(model)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: pb::Role, blocks: Vec<Block>) -> Arc<pb::Message> {
        let blocks = blocks.into_iter().map(|block| pb::ContentBlock { position: 0, block: Some(block) }).collect();
        Arc::new(pb::Message { role: role as i32, model: "a/x".into(), blocks, ..Default::default() })
    }

    fn text(text: &str) -> Block {
        Block::Text(pb::TextBlock { text: text.into() })
    }

    fn call(id: &str) -> Block {
        Block::ToolUse(pb::ToolUseBlock { tool_call_id: id.into(), tool: "glob".into(), input_json: "{}".into() })
    }

    fn result(id: &str) -> Block {
        Block::ToolResult(pb::ToolResultBlock { tool_call_id: id.into(), content: "ok".into(), is_error: false })
    }

    #[test]
    fn roles_are_mapped_and_notices_left_out() {
        let mut answer = message(pb::Role::Assistant, vec![text("looking"), call("1")]);
        Arc::make_mut(&mut answer).usage = Some(pb::Usage { input_tokens: 7, ..Default::default() });
        let messages = [
            message(pb::Role::User, vec![text("hi")]),
            answer,
            message(pb::Role::Tool, vec![result("1")]),
            message(pb::Role::Notice, vec![text("shortened")]),
            message(pb::Role::Assistant, vec![]),
            message(pb::Role::User, vec![text("and?")]),
        ];
        let (mapped, counted) = to_model(&messages, "a/x");
        let roles: Vec<_> = mapped.iter().map(|message| message.role).collect();
        assert_eq!(roles, [ChatRole::User, ChatRole::Assistant, ChatRole::Tool, ChatRole::User]);
        assert_eq!(counted, [CountedPrompt { messages: 1, tokens: 7 }]);
        assert_eq!(to_model(&messages, "a/y").1, []);
    }

    #[test]
    fn thinking_goes_back_to_its_own_provider_only() {
        let thinking = Block::Thinking(pb::ThinkingBlock { text: "hm".into(), signature: "s".into() });
        let messages = [message(pb::Role::Assistant, vec![thinking, text("x")])];
        assert_eq!(to_model(&messages, "a/other").0[0].parts.len(), 2);
        assert_eq!(to_model(&messages, "b/x").0[0].parts.len(), 1);
    }
}
