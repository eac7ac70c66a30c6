//! The store as a source of tokens.

use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use reliant_store::Store;
use reliant_types::{Code, Failure, TokenId, UserId};

use crate::identity::{TokenInfo, TokenSource};

#[async_trait]
impl TokenSource for Store {
    async fn user_by_subject(&self, subject: &str) -> Result<Option<UserId>, Failure> {
        match Store::user_by_subject(self, subject).await.map_err(Failure::from) {
            Ok(user) => Ok(Some(user.id)),
            Err(failure) if failure.code == Code::NotFound => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    async fn token_by_secret(&self, secret: &str) -> Result<TokenInfo, Failure> {
        let row = Store::token_by_secret(self, secret).await.map_err(Failure::from)?;
        Ok(TokenInfo {
            id: row.id,
            user: row.user,
            daemon: row.daemon,
            scopes: row.scopes,
            expires_at: row.expires_at.map(SystemTime::from),
        })
    }

    async fn revoked_within(&self, ago: Duration) -> Result<Vec<TokenId>, Failure> {
        Store::revoked_within(self, ago).await.map_err(Failure::from)
    }
}
