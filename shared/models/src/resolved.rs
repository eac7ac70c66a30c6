//! A model with its limits and prices, as a request will use it.

use reliant_types::pb;

use crate::{ModelConfig, ProviderConfig, ProviderKind};

/// A model as a request will use it.
#[derive(Debug, Clone, PartialEq)]
pub struct ResolvedModel {
    /// "provider/name".
    pub id: String,
    pub provider: String,
    /// As the provider knows it.
    pub name: String,
    pub kind: ProviderKind,
    /// Tokens.
    pub context_window: u32,
    /// Tokens; 0: not limited by us.
    pub max_output_tokens: u32,
    /// Known by name, not only passed on.
    pub(crate) listed: bool,
    prices: Prices,
    pub(crate) thinking_tokens: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Prices {
    input: f64,
    output: f64,
    cache_read: f64,
    cache_write: f64,
}

impl ResolvedModel {
    /// Of a provider's model; `listed` is what the configuration says of it, if it does.
    pub(crate) fn new(id: &str, name: &str, provider: &ProviderConfig, listed: Option<&ModelConfig>) -> Self {
        let input = listed.map_or(0.0, |model| model.input_price);
        Self {
            id: id.to_owned(),
            provider: provider.name.clone(),
            name: name.to_owned(),
            kind: provider.kind,
            context_window: listed.map_or(provider.default_context_window, |model| model.context_window),
            max_output_tokens: listed.map_or(0, |model| model.max_output_tokens),
            listed: listed.is_some(),
            prices: Prices {
                input,
                output: listed.map_or(0.0, |model| model.output_price),
                cache_read: listed.and_then(|model| model.cache_read_price).unwrap_or(input * 0.1),
                cache_write: listed.and_then(|model| model.cache_write_price).unwrap_or(input * 1.25),
            },
            thinking_tokens: listed.map_or(0, |model| model.thinking_tokens),
        }
    }

    /// As clients see it.
    pub(crate) fn shown(self, default: &str) -> pb::Model {
        pb::Model {
            default: self.id == default,
            context_window: self.context_window as i32,
            max_output_tokens: self.max_output_tokens as i32,
            input_price: self.prices.input,
            output_price: self.prices.output,
            id: self.id,
            provider: self.provider,
        }
    }

    /// Tokens of the answer that a request asks for, where the caller wants `wanted` (0: no wish). Never more than a
    /// quarter of the window, or an answer's room would push its own question out.
    pub fn output_tokens(&self, wanted: u32) -> u32 {
        let own = self.max_output_tokens.min(self.context_window / 4);
        match (wanted, self.max_output_tokens) {
            (0, _) => own,
            (wanted, 0) => wanted,
            (wanted, limit) => wanted.min(limit),
        }
    }

    /// Tokens that are left for the prompt.
    pub fn prompt_tokens(&self, wanted_output: u32) -> u32 {
        let reserved = match self.output_tokens(wanted_output) {
            0 => (self.context_window / 8).min(8192),
            output => output,
        };
        self.context_window.saturating_sub(reserved)
    }

    /// By the configured prices, which are dollars per million tokens: so millionths of a dollar per token.
    pub fn cost_microusd(&self, usage: &pb::Usage) -> i64 {
        let fresh = (usage.input_tokens - usage.cache_read_tokens - usage.cache_write_tokens).max(0);
        let cost = fresh as f64 * self.prices.input
            + usage.cache_read_tokens as f64 * self.prices.cache_read
            + usage.cache_write_tokens as f64 * self.prices.cache_write
            + usage.output_tokens as f64 * self.prices.output;
        cost.round() as i64
    }

    /// For metric labels: names that people make up are one.
    pub(crate) fn label(&self) -> &str {
        if self.listed { &self.name } else { "other" }
    }
}
