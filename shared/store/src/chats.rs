//! Chats: made, listed, renamed, archived, configured.

use chrono::{DateTime, Utc};
use reliant_types::{ChatId, DaemonId, Failure, UserId, boxed, limits, pb};
use uuid::Uuid;

use crate::{
    ChatPage, Committed, NewChat, Result, Store, StoreError,
    chat_tx::{ChatTx, Key},
    checks,
    rows::{ChatRow, declarations, mode_text},
};

const UNTITLED: &str = "New chat";
const REQUEST_INDEX: &str = "chats_request";

impl Store {
    /// The same client request id of the same user is one chat, which later requests get as it is by then.
    #[boxed]
    pub async fn create_chat(&self, new: &NewChat) -> Result<Committed<pb::Chat>> {
        let title = if new.title.trim().is_empty() { UNTITLED } else { new.title.as_str() };
        checks::name("title", title, limits::TITLE_MAX_CHARS)?;
        checks::no_nul("root_id", &new.root_id)?;
        checks::name("model", &new.model, 200)?;
        let request = Some(new.client_request_id.as_str()).filter(|id| !id.is_empty());
        if let Some(id) = request {
            checks::name("client_request_id", id, limits::CLIENT_REQUEST_ID_MAX_CHARS)?;
        }
        self.run("create_chat", async || {
            if let Some(chat) = self.chat_of_request(new.user, request).await? {
                return Ok(Committed::nothing(new.user, chat));
            }
            match self.create_chat_once(new, title, request).await {
                // Somebody asked at the same time: what is stored is the answer.
                Err(StoreError::Duplicate { constraint }) if constraint == REQUEST_INDEX => {
                    let chat = self.chat_of_request(new.user, request).await?;
                    let chat = chat.ok_or(StoreError::Corrupt("a chat that was there"))?;
                    Ok(Committed::nothing(new.user, chat))
                }
                made => made,
            }
        })
        .await
    }

    async fn chat_of_request(&self, user: UserId, request: Option<&str>) -> Result<Option<pb::Chat>> {
        let Some(request) = request else { return Ok(None) };
        let row = sqlx::query_as!(
            ChatRow,
            r#"SELECT id, user_id, project_id, worktree_id, daemon_id, root_id, title, model, mode, last_seq, last_ordinal,
                      archived_at, created_at, updated_at, now() AS "now!"
               FROM chats WHERE user_id = $1 AND client_request_id = $2"#,
            user.0,
            request,
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.as_ref().map(ChatRow::to_pb))
    }

    async fn create_chat_once(&self, new: &NewChat, title: &str, request: Option<&str>) -> Result<Committed<pb::Chat>> {
        let mode = if new.mode == pb::ChatMode::Unspecified { pb::ChatMode::Ask } else { new.mode };
        let mut tx = self.begin().await?;
        let daemons = sqlx::query!(
            "SELECT id, declarations FROM daemons WHERE user_id = $1 AND revoked_at IS NULL AND ($2::uuid IS NULL OR id = $2)
             LIMIT 2",
            new.user.0,
            new.daemon.map(|daemon| daemon.0),
        )
        .fetch_all(&mut *tx)
        .await?;
        let daemon = match (new.daemon, daemons.as_slice()) {
            (Some(_), []) => return Err(StoreError::not_found("daemon")),
            (_, [daemon]) => Some(daemon),
            _ => None,
        };
        if let Some(daemon) = daemon {
            check_root(&daemon.declarations, &new.root_id)?;
        }
        if let Some(project) = new.project {
            let found = sqlx::query_scalar!(
                "SELECT id FROM projects WHERE id = $1 AND user_id = $2 AND archived_at IS NULL",
                project.0,
                new.user.0
            )
            .fetch_optional(&mut *tx)
            .await?;
            found.ok_or(StoreError::not_found("project"))?;
        }
        let chat = sqlx::query_as!(
            ChatRow,
            r#"INSERT INTO chats (id, user_id, project_id, daemon_id, root_id, title, model, mode, client_request_id)
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
               RETURNING id, user_id, project_id, worktree_id, daemon_id, root_id, title, model, mode, last_seq, last_ordinal,
                         archived_at, created_at, updated_at, clock_timestamp() AS "now!""#,
            ChatId::new().0,
            new.user.0,
            new.project.map(|project| project.0),
            daemon.map(|daemon| daemon.id),
            if daemon.is_some() { new.root_id.as_str() } else { "" },
            title,
            new.model,
            mode_text(mode),
            request,
        )
        .fetch_one(&mut *tx)
        .await
        .map_err(|error| match error.into() {
            StoreError::Duplicate { constraint } if constraint != REQUEST_INDEX => StoreError::not_found("user"),
            error => error,
        })?;
        let mut tx = ChatTx::with(tx, chat);
        tx.chat_changed();
        let chat = pb::Chat { last_seq: tx.chat.last_seq + 1, ..tx.chat.to_pb() };
        tx.commit(chat).await
    }

    /// Newest change first, with the token of the next page.
    #[boxed]
    pub async fn list_chats(&self, user: UserId, page: &ChatPage) -> Result<(Vec<pb::Chat>, String)> {
        let size = checks::page_size(page.size, 50, 200)?;
        let after = page_after(&page.token)?;
        self.run("list_chats", async || {
            let mut rows = sqlx::query_as!(
                ChatRow,
                r#"SELECT id, user_id, project_id, worktree_id, daemon_id, root_id, title, model, mode, last_seq, last_ordinal,
                          archived_at, created_at, updated_at, now() AS "now!"
                   FROM chats
                   WHERE user_id = $1 AND ($2 OR archived_at IS NULL)
                     AND ($3::timestamptz IS NULL OR updated_at < $3 OR (updated_at = $3 AND id > $4))
                   ORDER BY updated_at DESC, id LIMIT $5"#,
                user.0,
                page.include_archived,
                after.map(|after| after.0),
                after.map(|after| after.1),
                size + 1,
            )
            .fetch_all(&self.pool)
            .await?;
            let more = rows.len() as i64 > size;
            rows.truncate(size as usize);
            let next = rows.last().filter(|_| more);
            let token = next.map(|row| format!("{}_{}", row.updated_at.timestamp_micros(), row.id)).unwrap_or_default();
            Ok((rows.iter().map(ChatRow::to_pb).collect(), token))
        })
        .await
    }

    #[boxed]
    pub async fn get_chat(&self, user: UserId, chat: ChatId) -> Result<pb::Chat> {
        self.run("get_chat", async || {
            let row = sqlx::query_as!(
                ChatRow,
                r#"SELECT id, user_id, project_id, worktree_id, daemon_id, root_id, title, model, mode, last_seq, last_ordinal,
                          archived_at, created_at, updated_at, now() AS "now!"
                   FROM chats WHERE id = $1 AND user_id = $2"#,
                chat.0,
                user.0,
            )
            .fetch_optional(&self.pool)
            .await?
            .ok_or(StoreError::not_found("chat"))?;
            Ok(row.to_pb())
        })
        .await
    }

    #[boxed]
    pub async fn rename_chat(&self, user: UserId, chat: ChatId, title: &str) -> Result<Committed<pb::Chat>> {
        checks::name("title", title, limits::TITLE_MAX_CHARS)?;
        self.run("rename_chat", async || self.change_chat(user, chat, |row| title.clone_into(&mut row.title)).await)
            .await
    }

    /// An archived chat keeps its history, finishes what runs, and refuses new messages.
    #[boxed]
    pub async fn archive_chat(&self, user: UserId, chat: ChatId, archived: bool) -> Result<Committed<pb::Chat>> {
        self.run("archive_chat", async || {
            self.change_chat(user, chat, |row| row.archived_at = archived.then(|| row.archived_at.unwrap_or(row.now)))
                .await
        })
        .await
    }

    /// From the next turn on. None leaves a setting as it is.
    #[boxed]
    pub async fn configure_chat(
        &self,
        user: UserId,
        chat: ChatId,
        mode: Option<pb::ChatMode>,
        model: Option<&str>,
    ) -> Result<Committed<pb::Chat>> {
        if let Some(model) = model {
            checks::name("model", model, 200)?;
        }
        self.run("configure_chat", async || {
            self.change_chat(user, chat, |row| {
                if let Some(mode) = mode.filter(|mode| *mode != pb::ChatMode::Unspecified) {
                    mode_text(mode).clone_into(&mut row.mode);
                }
                if let Some(model) = model {
                    model.clone_into(&mut row.model);
                }
            })
            .await
        })
        .await
    }

    async fn change_chat(
        &self,
        user: UserId,
        chat: ChatId,
        change: impl Fn(&mut ChatRow),
    ) -> Result<Committed<pb::Chat>> {
        let mut tx = ChatTx::open_owned(self, user, Key::Chat(chat), "chat").await?;
        let before = tx.chat.to_pb();
        change(&mut tx.chat);
        if tx.chat.to_pb() == before {
            return tx.nothing(before).await;
        }
        tx.touch();
        let row = tx.chat.clone();
        sqlx::query!(
            "UPDATE chats SET title = $2, archived_at = $3, mode = $4, model = $5 WHERE id = $1",
            row.id,
            row.title,
            row.archived_at,
            row.mode,
            row.model,
        )
        .execute(tx.conn())
        .await?;
        if row.to_pb().mode != before.mode {
            // Turns that are under way or wait go on in it: each round of a turn is judged by the turn's own.
            sqlx::query!("UPDATE turns SET mode = $2 WHERE chat_id = $1 AND ended_at IS NULL", row.id, row.mode)
                .execute(tx.conn())
                .await?;
        }
        tx.chat_changed();
        let chat = pb::Chat { last_seq: row.last_seq + 1, ..row.to_pb() };
        tx.commit(chat).await
    }

    /// Who runs the chat's tools, from the next call on. A call that waits for a daemon goes to the new one.
    #[boxed]
    pub async fn select_daemon(
        &self,
        user: UserId,
        chat: ChatId,
        daemon: DaemonId,
        root_id: &str,
    ) -> Result<Committed<pb::Chat>> {
        checks::no_nul("root_id", root_id)?;
        self.run("select_daemon", async || {
            let mut tx = ChatTx::open_owned(self, user, Key::Chat(chat), "chat").await?;
            let row = sqlx::query!(
                "SELECT d.declarations,
                        (SELECT t.traceparent FROM turns t WHERE t.chat_id = $3 AND t.ended_at IS NULL ORDER BY t.ordinal LIMIT 1)
                            AS open_turn
                 FROM daemons d WHERE d.id = $1 AND d.user_id = $2 AND d.revoked_at IS NULL",
                daemon.0,
                user.0,
                chat.0,
            )
            .fetch_optional(tx.conn())
            .await?
            .ok_or(StoreError::not_found("daemon"))?;
            check_root(&row.declarations, root_id)?;
            if (tx.chat.daemon_id, tx.chat.root_id.as_str()) != (Some(daemon.0), root_id) {
                end_session_approvals(&mut tx).await?;
            }
            (tx.chat.daemon_id, tx.chat.root_id) = (Some(daemon.0), root_id.to_owned());
            sqlx::query!("UPDATE chats SET daemon_id = $2, root_id = $3 WHERE id = $1", chat.0, daemon.0, root_id)
                .execute(tx.conn())
                .await?;
            tx.chat_changed();
            if let Some(traceparent) = row.open_turn {
                tx.want(&traceparent);
            }
            let chat = pb::Chat { last_seq: tx.chat.last_seq + 1, ..tx.chat.to_pb() };
            tx.commit(chat).await
        })
        .await
    }

    /// Whether the chat is the user's.
    #[boxed]
    pub async fn chat_access(&self, user: UserId, chat: ChatId) -> Result<()> {
        self.run("chat_access", async || {
            sqlx::query_scalar!("SELECT id FROM chats WHERE id = $1 AND user_id = $2", chat.0, user.0)
                .fetch_optional(&self.pool)
                .await?
                .map(drop)
                .ok_or(StoreError::not_found("chat"))
        })
        .await
    }
}

/// What a person let through for the rest of the chat was for the machine and the root of then.
async fn end_session_approvals(tx: &mut ChatTx) -> Result<()> {
    sqlx::query!("UPDATE approvals SET scope = 'once' WHERE chat_id = $1 AND scope = 'session'", tx.chat.id)
        .execute(tx.conn())
        .await?;
    Ok(())
}

/// A daemon that never connected has declared nothing: any root may be named for it.
fn check_root(declared: &[u8], root_id: &str) -> Result<(), Failure> {
    let declared = declarations(declared);
    if root_id.is_empty() || declared.roots.is_empty() || declared.roots.iter().any(|root| root.id == root_id) {
        return Ok(());
    }
    Err(Failure::field("root_id", "the daemon offers no such root; ListDaemons shows those it offers"))
}

fn page_after(token: &str) -> Result<Option<(DateTime<Utc>, Uuid)>, Failure> {
    if token.is_empty() {
        return Ok(None);
    }
    let parse = || {
        let (micros, id) = token.split_once('_')?;
        Some((DateTime::from_timestamp_micros(micros.parse().ok()?)?, id.parse().ok()?))
    };
    let parsed = parse().ok_or_else(|| Failure::field("page_token", "this is not a page token of ListChats"))?;
    Ok(Some(parsed))
}

#[cfg(test)]
mod tests {
    use reliant_types::Code;

    use super::*;

    #[test]
    fn page_tokens_round_trip_and_garbage_is_refused() {
        let (at, id) = (DateTime::from_timestamp_micros(1_700_000_000_123_456).unwrap(), Uuid::from_u128(7));
        assert_eq!(page_after(&format!("{}_{id}", at.timestamp_micros())), Ok(Some((at, id))));
        for bad in ["x", "1_", "_", "99999999999999999999_0190163d-8694-739b-aea5-966c26f8ad91", "1_x"] {
            assert_eq!(page_after(bad).unwrap_err().code, Code::InvalidArgument, "{bad}");
        }
    }
}
