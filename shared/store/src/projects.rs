//! Projects: names under which a person keeps chats.

use reliant_types::{Code, Failure, ProjectId, UserId, boxed, limits, pb, timestamp};

use crate::{Result, Store, StoreError, checks};

impl Store {
    #[boxed]
    pub async fn create_project(&self, user: UserId, name: &str) -> Result<pb::Project> {
        checks::name("name", name, 200)?;
        self.run("create_project", async || {
            let held = sqlx::query_scalar!(
                r#"SELECT count(*) AS "held!" FROM projects WHERE user_id = $1 AND archived_at IS NULL"#,
                user.0,
            )
            .fetch_one(&self.pool)
            .await?;
            checks::at_most("projects", held, limits::USER_PROJECTS_MAX, "archive some")?;
            let id = ProjectId::new();
            let created_at = sqlx::query_scalar!(
                "INSERT INTO projects (id, user_id, name) VALUES ($1, $2, $3) RETURNING created_at",
                id.0,
                user.0,
                name,
            )
            .fetch_one(&self.pool)
            .await
            .map_err(|error| match error.into() {
                StoreError::Duplicate { .. } => {
                    Failure::new(Code::AlreadyExists, format!("there is a project '{name}' already")).into()
                }
                error => error,
            })?;
            Ok(pb::Project { id: id.to_string(), name: name.to_owned(), created_at: Some(timestamp(created_at)) })
        })
        .await
    }

    #[boxed]
    pub async fn list_projects(&self, user: UserId) -> Result<Vec<pb::Project>> {
        self.run("list_projects", async || {
            let rows = sqlx::query!(
                "SELECT id, name, created_at FROM projects WHERE user_id = $1 AND archived_at IS NULL ORDER BY name LIMIT 1000",
                user.0,
            )
            .fetch_all(&self.pool)
            .await?;
            let projects = rows.into_iter().map(|row| pb::Project {
                id: row.id.to_string(),
                name: row.name,
                created_at: Some(timestamp(row.created_at)),
            });
            Ok(projects.collect())
        })
        .await
    }
}
