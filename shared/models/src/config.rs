//! Providers and models as configured. Keys alone in the environment are enough: `OPENAI_API_KEY` or
//! `ANTHROPIC_API_KEY`, with `…_BASE_URL` for a compatible server and `…_MODEL` for its model.

use std::time::Duration;

use reliant_types::{Secret, limits};
use serde::{Deserialize, Serialize};

use crate::{catalog, retry::RetryPolicy};

/// The wire format a provider speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProviderKind {
    /// Chat completions: OpenAI, Ollama, vLLM, OpenRouter, Groq and others.
    #[serde(rename = "openai")]
    OpenAi,
    /// Messages: Anthropic and servers compatible with it.
    #[serde(rename = "anthropic")]
    Anthropic,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProviderConfig {
    /// The part of a model's id before the first '/'.
    pub name: String,
    pub kind: ProviderKind,
    /// For OpenAI's format with its version, as in `https://api.openai.com/v1`; for Anthropic's with or without.
    pub base_url: String,
    /// Empty: none is sent.
    #[serde(default)]
    pub api_key: Secret,
    /// The environment variable that holds the key; used where `api_key` is empty.
    #[serde(default)]
    pub api_key_env: String,
    /// Whether names that are not listed under `models` are passed on to the provider.
    #[serde(default = "yes")]
    pub pass_through: bool,
    /// Tokens, for models that are not listed.
    #[serde(default = "default_window")]
    pub default_context_window: u32,
    /// Whether `traceparent` is sent along; unset: only to this machine.
    #[serde(default)]
    pub send_traceparent: Option<bool>,
    /// Marks the prompt's stable parts for the provider's cache (Anthropic's format; OpenAI caches by itself).
    #[serde(default = "yes")]
    pub prompt_cache: bool,
    /// Tools of one request; those beyond are not offered to the model. Unset: 128 for OpenAI's format, whose servers
    /// refuse a longer list; as many as a daemon declares for Anthropic's, which documents no such limit.
    #[serde(default)]
    pub max_tools: Option<u32>,
}

impl ProviderConfig {
    pub fn new(name: impl Into<String>, kind: ProviderKind, base_url: impl Into<String>, api_key: Secret) -> Self {
        Self {
            name: name.into(),
            kind,
            base_url: base_url.into(),
            api_key,
            api_key_env: String::new(),
            pass_through: true,
            default_context_window: default_window(),
            send_traceparent: None,
            prompt_cache: true,
            max_tools: None,
        }
    }
}

/// One model, with its limits and prices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// "provider/name".
    pub id: String,
    /// Tokens of prompt and answer together.
    pub context_window: u32,
    /// Tokens of the answer; 0: not limited by us.
    #[serde(default)]
    pub max_output_tokens: u32,
    /// Tokens of the prompt, where the provider takes fewer than the window leaves; 0: what the window leaves.
    #[serde(default)]
    pub max_input_tokens: u32,
    /// Tools of one request; unset: its provider's.
    #[serde(default)]
    pub max_tools: Option<u32>,
    /// US dollars per million tokens; 0: not known.
    #[serde(default)]
    pub input_price: f64,
    #[serde(default)]
    pub output_price: f64,
    /// Unset: a tenth of `input_price`.
    #[serde(default)]
    pub cache_read_price: Option<f64>,
    /// Unset: 1.25 times `input_price`.
    #[serde(default)]
    pub cache_write_price: Option<f64>,
    /// Tokens the model may think before it answers (Anthropic's format); 0: it does not think.
    #[serde(default)]
    pub thinking_tokens: u32,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelsConfig {
    pub providers: Vec<ProviderConfig>,
    pub models: Vec<ModelConfig>,
    /// The model of new chats; empty: the first of anthropic, openai, sim that is configured.
    pub default: String,
    /// No byte from the provider for so long: the attempt ends.
    #[serde(with = "humantime_serde")]
    pub stall: Duration,
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    pub retry: RetryPolicy,
}

impl Default for ModelsConfig {
    fn default() -> Self {
        Self {
            providers: Vec::new(),
            models: Vec::new(),
            default: String::new(),
            stall: limits::MODEL_STALL,
            connect_timeout: Duration::from_secs(10),
            retry: RetryPolicy::default(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelsConfigError {
    #[error("models.providers: '{name}' is not a name; use 1 to 64 letters, digits, '-', '_' or '.'")]
    ProviderName { name: String },
    #[error("models.providers: '{name}' is there twice")]
    ProviderTwice { name: String },
    #[error("models.providers: base_url of '{name}' is not an http or https URL without query and credentials")]
    BaseUrl { name: String },
    #[error("models.providers: the API key of '{name}' has characters that no HTTP header carries (a newline?)")]
    ApiKey { name: String },
    #[error("models.models: '{id}' does not begin with the name of a provider and '/'")]
    ModelProvider { id: String },
    #[error("models.models: '{id}' is there twice")]
    ModelTwice { id: String },
    #[error("models.models: '{id}': {what}")]
    ModelLimits { id: String, what: &'static str },
    #[error("models.default: no provider and model for '{id}'")]
    Default { id: String },
}

impl ModelsConfig {
    /// Adds what the environment says: keys named by `api_key_env`, and the providers `openai` and `anthropic` where a
    /// variable of theirs is set and the configuration does not have them.
    pub fn with_env(mut self, lookup: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| lookup(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
        for provider in &mut self.providers {
            if provider.api_key.is_empty() && !provider.api_key_env.is_empty() {
                provider.api_key = get(&provider.api_key_env).unwrap_or_default().into();
            }
        }
        for builtin in catalog::PROVIDERS {
            let (key, url) = (get(builtin.key_env), get(builtin.base_url_env));
            if (key.is_none() && url.is_none()) || self.providers.iter().any(|known| known.name == builtin.name) {
                continue;
            }
            let own = url.as_deref().is_none_or(|url| url.trim_end_matches('/') == builtin.base_url);
            self.providers.push(ProviderConfig::new(
                builtin.name,
                builtin.kind,
                url.unwrap_or_else(|| builtin.base_url.to_owned()),
                key.unwrap_or_default().into(),
            ));
            // A compatible server has models of its own: listing OpenAI's for Ollama would be a lie.
            let named = get(builtin.model_env).map(|name| format!("{}/{name}", builtin.name));
            let listed = builtin.models.iter().map(|model| model.config(builtin.name));
            for model in listed.filter(|model| own || named.as_ref() == Some(&model.id)) {
                if !self.models.iter().any(|known| known.id == model.id) {
                    self.models.push(model);
                }
            }
            if let Some(id) = named {
                if !self.models.iter().any(|known| known.id == id) {
                    self.models.push(catalog::unlisted(&id));
                }
                if self.default.is_empty() {
                    self.default = id;
                }
            }
        }
        self
    }

    /// Adds the providers `sim` and `sim-anthropic`: one model-sim, on both wire formats. `base_url` is the server's
    /// address with "/v1".
    pub fn with_sim(mut self, base_url: &str) -> Self {
        for (name, kind) in [("sim", ProviderKind::OpenAi), ("sim-anthropic", ProviderKind::Anthropic)] {
            if self.providers.iter().any(|known| known.name == name) {
                continue;
            }
            self.providers.push(ProviderConfig::new(name, kind, base_url, Secret::default()));
            for script in ["default", "think", "echo"] {
                let id = format!("{name}/{script}");
                if !self.models.iter().any(|known| known.id == id) {
                    self.models.push(ModelConfig {
                        context_window: default_window(),
                        max_output_tokens: 8192,
                        ..catalog::unlisted(&id)
                    });
                }
            }
        }
        self
    }

    /// The model of new chats; empty where nothing is configured.
    pub fn default_model(&self) -> String {
        if !self.default.is_empty() {
            return self.default.clone();
        }
        let known = |name: &str| self.providers.iter().any(|provider| provider.name == name);
        for builtin in catalog::PROVIDERS.iter().filter(|builtin| known(builtin.name)) {
            let preferred = format!("{}/{}", builtin.name, builtin.preferred);
            let prefix = format!("{}/", builtin.name);
            if self.models.iter().any(|model| model.id == preferred) {
                return preferred;
            }
            if let Some(model) = self.models.iter().find(|model| model.id.starts_with(&prefix)) {
                return model.id.clone();
            }
        }
        if known("sim") {
            return "sim/default".into();
        }
        self.models.first().map(|model| model.id.clone()).unwrap_or_default()
    }

    /// The provider's name and the name the provider knows, of a model's id.
    pub(crate) fn split(id: &str) -> Option<(&str, &str)> {
        id.split_once('/').filter(|(provider, name)| !provider.is_empty() && !name.is_empty())
    }

    pub fn validate(&self) -> Result<(), ModelsConfigError> {
        let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        for (at, provider) in self.providers.iter().enumerate() {
            let name = provider.name.clone();
            if name.is_empty() || name.len() > 64 || !name.chars().all(named) {
                return Err(ModelsConfigError::ProviderName { name });
            }
            if self.providers[..at].iter().any(|other| other.name == name) {
                return Err(ModelsConfigError::ProviderTwice { name });
            }
        }
        for (at, model) in self.models.iter().enumerate() {
            let id = model.id.clone();
            let provider = Self::split(&id).map(|(provider, _)| provider);
            if !self.providers.iter().any(|known| Some(known.name.as_str()) == provider) {
                return Err(ModelsConfigError::ModelProvider { id });
            }
            if self.models[..at].iter().any(|other| other.id == id) {
                return Err(ModelsConfigError::ModelTwice { id });
            }
            if model.context_window < 1024 || model.context_window > i32::MAX as u32 {
                return Err(ModelsConfigError::ModelLimits { id, what: "context_window is not between 1024 and 2^31" });
            }
            if model.max_output_tokens >= model.context_window {
                return Err(ModelsConfigError::ModelLimits {
                    id,
                    what: "max_output_tokens is not below context_window",
                });
            }
            if model.input_price < 0.0 || model.output_price < 0.0 {
                return Err(ModelsConfigError::ModelLimits { id, what: "a price is negative" });
            }
        }
        if !self.default.is_empty() {
            let provider =
                Self::split(&self.default).and_then(|(name, _)| self.providers.iter().find(|known| known.name == name));
            let listed = self.models.iter().any(|model| model.id == self.default);
            if !provider.is_some_and(|provider| provider.pass_through || listed) {
                return Err(ModelsConfigError::Default { id: self.default.clone() });
            }
        }
        Ok(())
    }
}

fn yes() -> bool {
    true
}

fn default_window() -> u32 {
    128_000
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env<'a>(set: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
        move |name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
    }

    #[test]
    fn a_key_alone_is_enough() {
        let config = ModelsConfig::default().with_env(env(&[("OPENAI_API_KEY", "sk-1\n")])).with_sim("http://x/v1");
        config.validate().unwrap();
        assert_eq!(config.providers[0].api_key.expose(), "sk-1");
        assert!(config.default_model().starts_with("openai/"), "{}", config.default_model());
        let both = ModelsConfig::default().with_env(env(&[("OPENAI_API_KEY", "a"), ("ANTHROPIC_API_KEY", "b")]));
        assert!(both.default_model().starts_with("anthropic/"), "{}", both.default_model());
        assert_eq!(ModelsConfig::default().with_sim("http://x/v1").default_model(), "sim/default");
        assert_eq!(ModelsConfig::default().default_model(), "");
    }

    #[test]
    fn a_compatible_server_lists_only_its_own_model() {
        let set = [("OPENAI_BASE_URL", "http://127.0.0.1:11434/v1"), ("OPENAI_MODEL", "qwen3:8b")];
        let config = ModelsConfig::default().with_env(env(&set));
        config.validate().unwrap();
        assert_eq!(config.default_model(), "openai/qwen3:8b");
        assert_eq!(config.models.len(), 1);
    }

    #[test]
    fn the_file_wins_over_the_environment_and_unknown_keys_are_refused() {
        let text = r#"
            default = "openai/gpt-4.1"
            stall = "5s"
            [[providers]]
            name = "openai"
            kind = "openai"
            base_url = "https://proxy.example/v1"
            api_key_env = "MY_KEY"
        "#;
        let config: ModelsConfig = toml::from_str(text).unwrap();
        let config = config.with_env(env(&[("MY_KEY", "k"), ("OPENAI_API_KEY", "other")]));
        assert_eq!(config.providers.len(), 1);
        assert_eq!(config.providers[0].api_key.expose(), "k");
        assert_eq!(config.stall, Duration::from_secs(5));
        config.validate().unwrap();
        assert!(toml::from_str::<ModelsConfig>("defalt = 'x'").is_err());
        assert!(!toml::to_string(&config).unwrap().contains("\"k\""));
        let default = ModelsConfig { default: "nope/x".into(), ..ModelsConfig::default() };
        assert_eq!(default.validate(), Err(ModelsConfigError::Default { id: "nope/x".into() }));
    }
}
