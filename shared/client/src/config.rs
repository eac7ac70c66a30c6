//! Where to connect, and who one is.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use reliant_types::{Failure, Secret};

/// Gives a token for each call, for callers whose tokens change.
#[async_trait]
pub trait TokenProvider: Send + Sync + 'static {
    async fn token(&self) -> Result<Secret, Failure>;
}

/// Who one is.
#[derive(Clone, Default)]
pub enum Token {
    /// Only public methods can be called.
    #[default]
    None,
    Fixed(Secret),
    Provider(Arc<dyn TokenProvider>),
}

impl Token {
    pub(crate) async fn get(&self) -> Result<Option<Secret>, Failure> {
        match self {
            Token::None => Ok(None),
            Token::Fixed(token) => Ok(Some(token.clone())),
            Token::Provider(provider) => provider.token().await.map(Some),
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Token::None => "none",
            Token::Fixed(_) => "fixed",
            Token::Provider(_) => "provider",
        })
    }
}

impl From<Secret> for Token {
    fn from(token: Secret) -> Self {
        Token::Fixed(token)
    }
}

impl From<&str> for Token {
    fn from(token: &str) -> Self {
        Token::Fixed(Secret::new(token))
    }
}

impl From<String> for Token {
    fn from(token: String) -> Self {
        Token::Fixed(Secret::new(token))
    }
}

#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// `http://127.0.0.1:7440`, or without the scheme.
    pub endpoint: String,
    pub token: Token,
    /// A call, with its retries, ends within this.
    pub call_deadline: Duration,
    /// One attempt of a call ends within this.
    pub attempt_timeout: Duration,
}

impl ClientConfig {
    pub fn new(endpoint: impl Into<String>, token: impl Into<Token>) -> Self {
        Self {
            endpoint: endpoint.into(),
            token: token.into(),
            call_deadline: Duration::from_secs(30),
            attempt_timeout: Duration::from_secs(10),
        }
    }

    pub fn call_deadline(mut self, deadline: Duration) -> Self {
        self.call_deadline = deadline;
        self
    }
}
