//! What can go wrong with a provider. The texts hold neither key nor prompt; a provider's own sentence is cut and scrubbed.

use std::time::Duration;

use reliant_types::{Code, Failure};

/// A provider's sentence, at most.
pub(crate) const PROVIDER_MESSAGE_MAX_CHARS: usize = 400;

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ModelError {
    #[error("the model provider limits the rate of requests")]
    RateLimited { retry_after: Option<Duration> },
    #[error("the model provider is overloaded or failing (status {status})")]
    Overloaded { status: u16, retry_after: Option<Duration> },
    /// The provider understood and said no: a wrong key, an unknown model, a request it does not accept.
    #[error("the model provider refused the request (status {status}): {message}")]
    Rejected { status: u16, message: String },
    /// What came is not the wire format.
    #[error("the model provider answered something that cannot be understood: {what}")]
    Garbage { what: String },
    /// The stream ended without the provider's own end.
    #[error("the model's answer was cut off")]
    CutStream,
    #[error("the model provider sent nothing for {} s", .after.as_secs_f32())]
    Stall { after: Duration },
    /// The answer grew past a limit of ours.
    #[error("the model's answer is too large: {what}")]
    TooLarge { what: String },
    #[error("the model provider cannot be reached: {message}")]
    Connect { message: String },
    /// `model` names no provider or no model of the configuration.
    #[error("{message}")]
    Unknown { message: String },
}

impl ModelError {
    pub(crate) fn garbage(what: impl Into<String>) -> Self {
        Self::Garbage { what: what.into() }
    }

    /// Whether the same request may succeed later.
    pub fn retryable(&self) -> bool {
        match self {
            Self::RateLimited { .. }
            | Self::Overloaded { .. }
            | Self::Garbage { .. }
            | Self::CutStream
            | Self::Stall { .. }
            | Self::Connect { .. } => true,
            Self::Rejected { .. } | Self::TooLarge { .. } | Self::Unknown { .. } => false,
        }
    }

    /// What the provider asked for.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after } | Self::Overloaded { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// The `reason` label of retries.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::RateLimited { .. } => "rate_limited",
            Self::Overloaded { .. } => "server_error",
            Self::Rejected { .. } => "rejected",
            Self::Garbage { .. } => "garbage",
            Self::CutStream => "cut",
            Self::Stall { .. } => "stall",
            Self::TooLarge { .. } => "too_large",
            Self::Connect { .. } => "connect",
            Self::Unknown { .. } => "unknown_model",
        }
    }

    pub fn failure(&self) -> Failure {
        let (code, way_out) = match self {
            Self::RateLimited { .. } => {
                (Code::ProviderUnavailable, "wait, or raise the limit of this key with the provider")
            }
            Self::Overloaded { .. } | Self::CutStream | Self::Stall { .. } => {
                (Code::ProviderUnavailable, "send the message again later, or choose another model")
            }
            Self::Connect { .. } => (Code::ProviderUnavailable, "check the provider's base_url and the network"),
            Self::Rejected { status: 401 | 403, .. } => (Code::ProviderRejected, "check the provider's API key"),
            Self::Rejected { status: 404, .. } => (Code::ProviderRejected, "check the model's name"),
            Self::Rejected { .. } => (Code::ProviderRejected, "change the message, or choose another model"),
            Self::Garbage { .. } => (Code::ProviderGarbage, "check the provider's base_url, or choose another model"),
            Self::TooLarge { .. } => (Code::ProviderGarbage, "ask for less at a time, or choose another model"),
            Self::Unknown { message } => {
                return Failure { field: Some("model".into()), ..Failure::new(Code::ModelUnknown, message.clone()) };
            }
        };
        let mut failure = Failure::new(code, format!("{self}; {way_out}"));
        failure.retry_after = self.retry_after();
        failure
    }
}

impl From<ModelError> for Failure {
    fn from(error: ModelError) -> Self {
        error.failure()
    }
}

/// A provider's sentence made fit to be shown: one line, cut, without the key and without anything that looks like one.
pub(crate) fn scrub(text: &str, key: &str) -> String {
    let text = if key.is_empty() { text.to_owned() } else { text.replace(key, "***") };
    let mut clean = String::new();
    for word in text.split_whitespace() {
        if !clean.is_empty() {
            clean.push(' ');
        }
        let bare = word.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
        let secret = ["sk-", "sk_", "gsk_", "key-", "eyJ", "rlt_"].iter().any(|prefix| bare.starts_with(prefix));
        clean.push_str(if secret && bare.len() > 8 { "***" } else { word });
        if clean.len() > PROVIDER_MESSAGE_MAX_CHARS * 4 {
            break;
        }
    }
    match clean.char_indices().nth(PROVIDER_MESSAGE_MAX_CHARS) {
        Some((at, _)) => format!("{}…", &clean[..at]),
        None => clean,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_scrubbed_and_long_texts_cut() {
        let clean = scrub("Incorrect API key provided: sk-abc***xyz9.\nYou (key MYKEY1) can find it", "MYKEY1");
        assert_eq!(clean, "Incorrect API key provided: *** You (key ***) can find it");
        assert_eq!(scrub(&"ä".repeat(5000), "").chars().count(), PROVIDER_MESSAGE_MAX_CHARS + 1);
    }

    #[test]
    fn failures_carry_code_and_delay() {
        let failure = ModelError::RateLimited { retry_after: Some(Duration::from_secs(7)) }.failure();
        assert_eq!((failure.code, failure.retry_after), (Code::ProviderUnavailable, Some(Duration::from_secs(7))));
        assert!(failure.is_retryable());
        assert!(!ModelError::Rejected { status: 400, message: "no".into() }.failure().is_retryable());
        assert_eq!(ModelError::Unknown { message: "m".into() }.failure().code, Code::ModelUnknown);
    }
}
