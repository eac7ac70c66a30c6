//! The models that are known without configuration. A list that is too old costs a wrong price, never a refused call:
//! names that are not here are passed on, without a price.
//!
//! Where the numbers come from, as of November 2026. US dollars per million tokens, standard tier.
//! - Claude: windows, answer limits and prices as on each model's overview under
//!   <https://platform.claude.com/docs/en/models>, cache prices as on
//!   <https://platform.claude.com/docs/en/about-claude/pricing>.
//! - gpt-5-nano: all of it, and the family's limit of 272,000 prompt tokens within a window of 400,000, as on its page under
//!   <https://developers.openai.com/api/docs/models>.
//! - The other GPT models: as in public lists of third parties that name OpenAI's pages as their source
//!   (<https://vercel.com/ai-gateway/models>, <https://benchlm.ai/blog/posts/openai-api-pricing>); OpenAI's own pages of these
//!   were not read.
//!
//! Nobody checks any of it against an invoice. An operator who bills by it sets prices and windows under `models.models`,
//! which override these; a model that is not here has no price until somebody sets one.

use crate::config::{ModelConfig, ProviderKind};

pub struct Builtin {
    pub name: &'static str,
    pub kind: ProviderKind,
    pub base_url: &'static str,
    pub key_env: &'static str,
    pub base_url_env: &'static str,
    pub model_env: &'static str,
    /// The model of new chats.
    pub preferred: &'static str,
    pub models: &'static [Known],
}

pub struct Known {
    name: &'static str,
    window: u32,
    output: u32,
    input_price: f64,
    output_price: f64,
    cache_read_price: f64,
    input: u32,
}

/// Window and answer in tokens; prices of the prompt, the answer, and a prompt that is read from the cache.
const fn known(name: &'static str, window: u32, output: u32, prices: (f64, f64, f64)) -> Known {
    Known { name, window, output, input: 0, input_price: prices.0, output_price: prices.1, cache_read_price: prices.2 }
}

impl Known {
    /// The provider takes a shorter prompt than the window leaves.
    const fn input(self, tokens: u32) -> Self {
        Self { input: tokens, ..self }
    }

    pub fn config(&self, provider: &str) -> ModelConfig {
        ModelConfig {
            id: format!("{provider}/{}", self.name),
            context_window: self.window,
            max_output_tokens: self.output,
            max_input_tokens: self.input,
            max_tools: None,
            input_price: self.input_price,
            output_price: self.output_price,
            cache_read_price: Some(self.cache_read_price),
            cache_write_price: None,
            thinking_tokens: 0,
        }
    }
}

/// In the order in which they become the default.
pub const PROVIDERS: &[Builtin] = &[
    Builtin {
        name: "anthropic",
        kind: ProviderKind::Anthropic,
        base_url: "https://api.anthropic.com",
        key_env: "ANTHROPIC_API_KEY",
        base_url_env: "ANTHROPIC_BASE_URL",
        model_env: "ANTHROPIC_MODEL",
        preferred: "claude-sonnet-4-6",
        models: &[
            known("claude-sonnet-4-6", 1_000_000, 128_000, (3.0, 15.0, 0.3)),
            known("claude-opus-4-6", 1_000_000, 128_000, (5.0, 25.0, 0.5)),
            known("claude-haiku-4-5", 200_000, 64_000, (1.0, 5.0, 0.1)),
            known("claude-sonnet-4-5", 200_000, 64_000, (3.0, 15.0, 0.3)),
            known("claude-opus-4-5", 200_000, 64_000, (5.0, 25.0, 0.5)),
        ],
    },
    Builtin {
        name: "openai",
        kind: ProviderKind::OpenAi,
        base_url: "https://api.openai.com/v1",
        key_env: "OPENAI_API_KEY",
        base_url_env: "OPENAI_BASE_URL",
        model_env: "OPENAI_MODEL",
        // Newer models stream only for organizations that were verified; this one answers any key.
        preferred: "gpt-4.1",
        models: &[
            known("gpt-4.1", 1_047_576, 32_768, (2.0, 8.0, 0.5)),
            known("gpt-4.1-mini", 1_047_576, 32_768, (0.4, 1.6, 0.1)),
            known("gpt-4o", 128_000, 16_384, (2.5, 10.0, 1.25)),
            known("gpt-4o-mini", 128_000, 16_384, (0.15, 0.6, 0.075)),
            known("gpt-5.2", 400_000, 128_000, (1.75, 14.0, 0.175)).input(272_000),
            known("gpt-5.1", 400_000, 128_000, (1.25, 10.0, 0.125)).input(272_000),
            known("gpt-5", 400_000, 128_000, (1.25, 10.0, 0.125)).input(272_000),
            known("gpt-5-mini", 400_000, 128_000, (0.25, 2.0, 0.025)).input(272_000),
            known("gpt-5-nano", 400_000, 128_000, (0.05, 0.4, 0.005)).input(272_000),
        ],
    },
];

/// A model nobody described: a common window, no price.
pub fn unlisted(id: &str) -> ModelConfig {
    ModelConfig {
        id: id.to_owned(),
        context_window: 128_000,
        max_output_tokens: 0,
        max_input_tokens: 0,
        max_tools: None,
        input_price: 0.0,
        output_price: 0.0,
        cache_read_price: None,
        cache_write_price: None,
        thinking_tokens: 0,
    }
}
