//! People and their one-time sign-in codes.

use std::time::Duration;

use reliant_types::{Code, Failure, UserId, boxed};

use crate::{Result, Store, StoreError, UserRow, secret};

impl Store {
    /// The user of a JWT subject, made where there is none. Name and role are brought up to date.
    #[boxed]
    pub async fn ensure_user(&self, subject: &str, name: &str, role: &str) -> Result<UserRow> {
        if !matches!(role, "member" | "admin") {
            return Err(Failure::field("role", "a role is 'member' or 'admin'").into());
        }
        self.run("ensure_user", async || {
            let row = sqlx::query!(
                "INSERT INTO users (id, subject, name, role) VALUES ($1, $2, $3, $4)
                 ON CONFLICT (subject) DO UPDATE SET name = EXCLUDED.name, role = EXCLUDED.role
                 RETURNING id, subject, name, role",
                UserId::new().0,
                subject,
                name,
                role,
            )
            .fetch_one(&self.pool)
            .await?;
            Ok(UserRow { id: UserId(row.id), subject: row.subject, name: row.name, role: row.role })
        })
        .await
    }

    #[boxed]
    pub async fn user_by_subject(&self, subject: &str) -> Result<UserRow> {
        self.run("user_by_subject", async || {
            let row = sqlx::query!("SELECT id, subject, name, role FROM users WHERE subject = $1", subject)
                .fetch_optional(&self.pool)
                .await?
                .ok_or(StoreError::not_found("user"))?;
            Ok(UserRow { id: UserId(row.id), subject: row.subject, name: row.name, role: row.role })
        })
        .await
    }

    #[boxed]
    pub async fn user(&self, id: UserId) -> Result<UserRow> {
        self.run("user", async || {
            let row = sqlx::query!("SELECT id, subject, name, role FROM users WHERE id = $1", id.0)
                .fetch_optional(&self.pool)
                .await?
                .ok_or(StoreError::not_found("user"))?;
            Ok(UserRow { id: UserId(row.id), subject: row.subject, name: row.name, role: row.role })
        })
        .await
    }

    /// A code that signs the user in once. Only its hash is stored.
    #[boxed]
    pub async fn create_login_code(&self, user: UserId, ttl: Duration) -> Result<String> {
        let code = secret::random();
        let hash = secret::hash(&code);
        self.run("create_login_code", async || {
            sqlx::query!(
                "INSERT INTO login_codes (hash, user_id, expires_at) VALUES ($1, $2, now() + $3 * interval '1 second')",
                &hash,
                user.0,
                ttl.as_secs_f64(),
            )
            .execute(&self.pool)
            .await
            .map_err(|error| match error.into() {
                StoreError::Duplicate { .. } => StoreError::not_found("user"),
                error => error,
            })?;
            Ok(())
        })
        .await?;
        Ok(code)
    }

    /// Uses the code up.
    #[boxed]
    pub async fn use_login_code(&self, code: &str) -> Result<UserRow> {
        let hash = secret::hash(code);
        self.run("use_login_code", async || {
            let row = sqlx::query!(
                "WITH used AS (
                     UPDATE login_codes SET used_at = now() WHERE hash = $1 AND used_at IS NULL AND expires_at > now()
                     RETURNING user_id
                 )
                 SELECT users.id, subject, name, role FROM users JOIN used ON used.user_id = users.id",
                &hash,
            )
            .fetch_optional(&self.pool)
            .await?
            .ok_or_else(|| {
                Failure::new(Code::TokenInvalid, "this sign-in link was used already or has expired; ask for a new one")
            })?;
            Ok(UserRow { id: UserId(row.id), subject: row.subject, name: row.name, role: row.role })
        })
        .await
    }
}
