//! Personal access tokens and daemons' tokens. A secret is given out once and stored hashed.

use std::time::Duration;

use chrono::{DateTime, Utc};
use reliant_types::{Code, DaemonId, Failure, TokenId, UserId, boxed, limits, pb, timestamp};

use crate::{Result, Store, StoreError, TokenRow, checks, pool::Tx, secret};

impl Store {
    /// The token and its secret.
    #[boxed]
    pub async fn create_token(
        &self,
        user: UserId,
        name: &str,
        scopes: &[String],
        daemon: Option<DaemonId>,
        expires_at: Option<DateTime<Utc>>,
    ) -> Result<(pb::Token, String)> {
        checks::name("name", name, 100)?;
        self.run("create_token", async || {
            let mut tx = self.begin().await?;
            if daemon.is_none() {
                let held = sqlx::query_scalar!(
                    r#"SELECT count(*) AS "held!" FROM api_tokens WHERE user_id = $1 AND daemon_id IS NULL AND revoked_at IS NULL
                         AND (expires_at IS NULL OR expires_at > now())"#,
                    user.0,
                )
                .fetch_one(&mut *tx)
                .await?;
                checks::at_most("tokens", held, limits::USER_TOKENS_MAX, "revoke those that are not used any more")?;
            }
            let created = insert_token(&mut tx, user, name, scopes, daemon, expires_at, None).await?;
            tx.commit().await?;
            Ok(created)
        })
        .await
    }

    /// Says what is wrong with a token that is not good.
    #[boxed]
    pub async fn token_by_secret(&self, secret: &str) -> Result<TokenRow> {
        let hash = secret::hash(secret);
        self.run("token_by_secret", async || {
            let row = sqlx::query!(
                r#"SELECT t.id, t.user_id, t.daemon_id, t.name, t.scopes, t.expires_at,
                          (t.revoked_at IS NOT NULL OR d.revoked_at IS NOT NULL) AS "revoked!",
                          COALESCE(t.expires_at <= now(), false) AS "expired!",
                          COALESCE(t.last_used_at < now() - interval '1 minute', true) AS "stale!"
                   FROM api_tokens t LEFT JOIN daemons d ON d.id = t.daemon_id WHERE t.hash = $1"#,
                &hash,
            )
            .fetch_optional(&self.pool)
            .await?
            .ok_or_else(|| Failure::new(Code::TokenInvalid, "this token is unknown; make a new one"))?;
            if row.revoked {
                return Err(Failure::new(Code::TokenRevoked, "this token was revoked; make a new one").into());
            }
            if row.expired {
                return Err(Failure::new(Code::TokenExpired, "this token has expired; make a new one").into());
            }
            if row.stale {
                sqlx::query!("UPDATE api_tokens SET last_used_at = now() WHERE id = $1", row.id)
                    .execute(&self.pool)
                    .await?;
            }
            Ok(TokenRow {
                id: TokenId(row.id),
                user: UserId(row.user_id),
                daemon: row.daemon_id.map(DaemonId),
                name: row.name,
                scopes: row.scopes,
                expires_at: row.expires_at,
            })
        })
        .await
    }

    /// The user's own tokens, newest first; daemons' tokens belong to their daemons.
    #[boxed]
    pub async fn list_tokens(&self, user: UserId) -> Result<Vec<pb::Token>> {
        self.run("list_tokens", async || {
            let rows = sqlx::query!(
                r#"SELECT id, name, prefix, scopes, created_at, expires_at, last_used_at, revoked_at IS NOT NULL AS "revoked!"
                   FROM api_tokens WHERE user_id = $1 AND daemon_id IS NULL ORDER BY id DESC LIMIT 1000"#,
                user.0,
            )
            .fetch_all(&self.pool)
            .await?;
            let tokens = rows.into_iter().map(|row| pb::Token {
                id: row.id.to_string(),
                name: row.name,
                prefix: row.prefix,
                scopes: row.scopes,
                created_at: Some(timestamp(row.created_at)),
                expires_at: row.expires_at.map(timestamp),
                last_used_at: row.last_used_at.map(timestamp),
                revoked: row.revoked,
            });
            Ok(tokens.collect())
        })
        .await
    }

    /// Goes with what it made. Revoking twice changes nothing.
    #[boxed]
    pub async fn revoke_token(&self, user: UserId, token: TokenId) -> Result<()> {
        self.run("revoke_token", async || {
            let revoked = sqlx::query!(
                "UPDATE api_tokens SET revoked_at = COALESCE(revoked_at, now()) WHERE (id = $1 OR made_by = $1) AND user_id = $2",
                token.0,
                user.0,
            )
            .execute(&self.pool)
            .await?;
            if revoked.rows_affected() == 0 { Err(StoreError::not_found("token")) } else { Ok(()) }
        })
        .await
    }

    /// Tokens revoked no longer ago than this. Both times are the database's: who asks may have a wrong clock.
    #[boxed]
    pub async fn revoked_within(&self, ago: Duration) -> Result<Vec<TokenId>> {
        self.run("revoked_within", async || {
            let rows = sqlx::query_scalar!(
                "SELECT id FROM api_tokens WHERE revoked_at IS NOT NULL AND revoked_at >= now() - $1 * interval '1 second'",
                ago.as_secs_f64(),
            )
            .fetch_all(&self.pool)
            .await?;
            Ok(rows.into_iter().map(TokenId).collect())
        })
        .await
    }
}

pub(crate) async fn insert_token(
    tx: &mut Tx,
    user: UserId,
    name: &str,
    scopes: &[String],
    daemon: Option<DaemonId>,
    expires_at: Option<DateTime<Utc>>,
    made_by: Option<TokenId>,
) -> Result<(pb::Token, String)> {
    let (id, secret) = (TokenId::new(), secret::token());
    let prefix: String = secret.chars().take(secret::SHOWN_CHARS).collect();
    let created_at = sqlx::query_scalar!(
        "INSERT INTO api_tokens (id, user_id, daemon_id, name, hash, prefix, scopes, expires_at, made_by)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) RETURNING created_at",
        id.0,
        user.0,
        daemon.map(|daemon| daemon.0),
        name,
        &secret::hash(&secret),
        prefix,
        scopes,
        expires_at,
        made_by.map(|token| token.0),
    )
    .fetch_one(&mut **tx)
    .await?;
    let token = pb::Token {
        id: id.to_string(),
        name: name.to_owned(),
        prefix,
        scopes: scopes.to_vec(),
        created_at: Some(timestamp(created_at)),
        expires_at: expires_at.map(timestamp),
        last_used_at: None,
        revoked: false,
    };
    Ok((token, secret))
}
