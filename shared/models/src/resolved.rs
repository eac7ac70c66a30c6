//! A model with its limits and prices, as a request will use it.

use reliant_types::{limits, pb};

use crate::{ModelConfig, ProviderConfig, ProviderKind};

/// OpenAI and many servers of its format answer 400 to more: "Invalid 'tools': array too long. Expected an array with
/// maximum length 128"; its reference for chat completions says "a max of 128 functions are supported".
const OPENAI_TOOLS_MAX: usize = 128;

fn max_tools(provider: &ProviderConfig, listed: Option<&ModelConfig>) -> usize {
    match listed.and_then(|model| model.max_tools).or(provider.max_tools) {
        Some(max) => max as usize,
        None => match provider.kind {
            ProviderKind::OpenAi => OPENAI_TOOLS_MAX,
            // No limit on the count is documented; the window bounds what their schemas may cost.
            ProviderKind::Anthropic => limits::DAEMON_TOOLS_MAX,
        },
    }
}

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
    /// Tokens; 0: what the window leaves.
    pub max_input_tokens: u32,
    /// Tools of one request.
    pub max_tools: usize,
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
            max_input_tokens: listed.map_or(0, |model| model.max_input_tokens),
            max_tools: max_tools(provider, listed),
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
        let left = self.context_window.saturating_sub(reserved);
        if self.max_input_tokens == 0 { left } else { left.min(self.max_input_tokens) }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog;

    #[test]
    fn the_number_of_tools_is_the_models_own_or_its_providers_or_its_formats() {
        let mut provider = ProviderConfig::new("p", ProviderKind::OpenAi, "http://x/v1", "".into());
        let mut model = catalog::unlisted("p/m");
        let max = |provider: &ProviderConfig, model: &ModelConfig| {
            ResolvedModel::new("p/m", "m", provider, Some(model)).max_tools
        };
        assert_eq!(max(&provider, &model), 128);
        provider.max_tools = Some(64);
        assert_eq!(max(&provider, &model), 64);
        model.max_tools = Some(200);
        assert_eq!(max(&provider, &model), 200);
        let anthropic = ProviderConfig::new("a", ProviderKind::Anthropic, "http://x", "".into());
        assert_eq!(ResolvedModel::new("a/m", "m", &anthropic, None).max_tools, limits::DAEMON_TOOLS_MAX);
    }

    #[test]
    fn a_prompt_has_what_the_window_leaves_or_less_where_the_provider_says_so() {
        let provider = ProviderConfig::new("p", ProviderKind::OpenAi, "http://x/v1", "".into());
        let mut model = ModelConfig { context_window: 400_000, max_output_tokens: 128_000, ..catalog::unlisted("p/m") };
        let prompt = |model: &ModelConfig| ResolvedModel::new("p/m", "m", &provider, Some(model)).prompt_tokens(0);
        assert_eq!(prompt(&model), 300_000);
        model.max_input_tokens = 272_000;
        assert_eq!(prompt(&model), 272_000);
    }
}
