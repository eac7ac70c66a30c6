//! Daemons and their leases.
//!
//! Invariants: a lease orders by the instance, a number that Postgres gives each daemon process once; a lease's epoch only
//! grows; whether a daemon is here is said by the lease and this database's clock, by nobody else.

use prost::Message as _;
use reliant_types::{
    Code, DaemonId, Failure, InstanceId, TokenId, UserId, boxed, limits,
    pb::{self, feed_event::Kind as FeedKind},
    timestamp,
};
use uuid::Uuid;

use crate::{
    Committed, DaemonHello, Lease, Renewed, Result, Store, StoreError, chat_tx::log_feed, checks, pool::Tx,
    relay::WokenRow, rows::declarations, tokens::insert_token,
};

/// The scope of a daemon's token.
pub const DAEMON_SCOPE: &str = "daemon";

/// Declarations that one listing reads; past that daemons are listed without theirs.
const LIST_READ_MAX_BYTES: i64 = 16 * 1024 * 1024;
/// What is listed of a tool's description.
const DESCRIPTION_LISTED_BYTES: usize = 512;

/// What people see of declarations: one daemon's may be larger than an answer.
fn listed(mut declared: pb::Declarations) -> pb::Declarations {
    for root in &mut declared.roots {
        root.agents_md.clear();
    }
    for tool in &mut declared.tools {
        tool.input_schema_json.clear();
        tool.description.truncate(tool.description.floor_char_boundary(DESCRIPTION_LISTED_BYTES));
    }
    declared
}

impl Store {
    /// As [`Store::register_daemon_by`], on behalf of a person who has signed in.
    #[boxed]
    pub async fn register_daemon(&self, user: UserId, name: &str, replace: bool) -> Result<(DaemonId, String)> {
        self.register_daemon_by(user, name, replace, None).await
    }

    /// A daemon's identity and its token. `replace`: a daemon of that name gets a new token, and its old ones are void.
    /// `made_by`: the token with which it was asked for. The daemon's own ends with it: no token makes what outlives it.
    #[boxed]
    pub async fn register_daemon_by(
        &self,
        user: UserId,
        name: &str,
        replace: bool,
        made_by: Option<TokenId>,
    ) -> Result<(DaemonId, String)> {
        checks::name("name", name, 100)?;
        self.run("register_daemon", async || {
            let mut tx = self.begin().await?;
            let known = sqlx::query_scalar!(
                "SELECT id FROM daemons WHERE user_id = $1 AND name = $2 AND revoked_at IS NULL FOR NO KEY UPDATE",
                user.0,
                name,
            )
            .fetch_optional(&mut *tx)
            .await?;
            let exists = || {
                let text = format!("there is a daemon '{name}' already; replace it, or choose another name");
                StoreError::from(Failure::new(Code::AlreadyExists, text))
            };
            let daemon = match known {
                Some(_) if !replace => return Err(exists()),
                Some(id) => {
                    sqlx::query!(
                        "UPDATE api_tokens SET revoked_at = now() WHERE daemon_id = $1 AND revoked_at IS NULL",
                        id
                    )
                    .execute(&mut *tx)
                    .await?;
                    id
                }
                None => {
                    let held = sqlx::query_scalar!(
                        r#"SELECT count(*) AS "held!" FROM daemons WHERE user_id = $1 AND revoked_at IS NULL"#,
                        user.0,
                    )
                    .fetch_one(&mut *tx)
                    .await?;
                    checks::at_most("daemons", held, limits::USER_DAEMONS_MAX, "revoke those that are gone")?;
                    let id = DaemonId::new().0;
                    sqlx::query!("INSERT INTO daemons (id, user_id, name) VALUES ($1, $2, $3)", id, user.0, name)
                        .execute(&mut *tx)
                        .await
                        .map_err(|error| match StoreError::from(error) {
                            StoreError::Duplicate { constraint } if constraint.ends_with("fkey") => {
                                StoreError::not_found("user")
                            }
                            StoreError::Duplicate { .. } => exists(),
                            error => error,
                        })?;
                    id
                }
            };
            let scopes = [DAEMON_SCOPE.to_owned()];
            let maker = match made_by {
                Some(token) => sqlx::query!(
                    "SELECT expires_at FROM api_tokens WHERE id = $1 AND user_id = $2 AND revoked_at IS NULL FOR SHARE",
                    token.0,
                    user.0,
                )
                .fetch_optional(&mut *tx)
                .await?
                .ok_or_else(|| Failure::new(Code::TokenRevoked, "this token was revoked; make a new one"))?
                .expires_at,
                None => None,
            };
            let (_, secret) =
                insert_token(&mut tx, user, name, &scopes, Some(DaemonId(daemon)), maker, made_by).await?;
            tx.commit().await?;
            Ok((DaemonId(daemon), secret))
        })
        .await
    }

    /// By name. A model reads a daemon's schemas; people get what fits one answer.
    #[boxed]
    pub async fn list_daemons(&self, user: UserId, include_revoked: bool) -> Result<Vec<pb::Daemon>> {
        self.run("list_daemons", async || {
            // Counted by their stored sizes before their content is read.
            let rows = sqlx::query!(
                r#"SELECT d.id, d.name, d.hostname, d.os, d.version,
                          CASE WHEN sum(octet_length(d.declarations)) OVER (ORDER BY d.name, d.id) <= $3
                              THEN d.declarations END AS declarations,
                          d.revoked_at IS NOT NULL AS "revoked!",
                          COALESCE(l.expires_at > now(), false) AND d.revoked_at IS NULL AS "connected!",
                          CASE WHEN l.expires_at > now() THEN now() ELSE GREATEST(d.last_seen_at, l.granted_at) END AS last_seen
                   FROM daemons d LEFT JOIN daemon_leases l ON l.daemon_id = d.id
                   WHERE d.user_id = $1 AND ($2 OR d.revoked_at IS NULL) ORDER BY d.name, d.id LIMIT 1000"#,
                user.0,
                include_revoked,
                LIST_READ_MAX_BYTES,
            )
            .fetch_all(&self.pool)
            .await?;
            let mut bytes = 0;
            let daemons = rows.into_iter().map(|row| {
                let mut shortened = row.declarations.is_none();
                let mut declared = listed(declarations(&row.declarations.unwrap_or_default()));
                bytes += declared.encoded_len();
                if bytes > limits::PAGE_MAX_BYTES {
                    (declared, shortened) = (pb::Declarations::default(), true);
                }
                pb::Daemon {
                    id: row.id.to_string(),
                    name: row.name,
                    connected: row.connected,
                    hostname: row.hostname,
                    os: row.os,
                    version: row.version,
                    roots: declared.roots,
                    tools: declared.tools,
                    last_seen_at: row.last_seen.map(timestamp),
                    revoked: row.revoked,
                    shortened,
                }
            });
            Ok(daemons.collect())
        })
        .await
    }

    /// Voids the daemon's tokens and ends its lease. Revoking twice changes nothing.
    #[boxed]
    pub async fn revoke_daemon(&self, user: UserId, daemon: DaemonId) -> Result<Committed<()>> {
        self.run("revoke_daemon", async || {
            let mut tx = self.begin().await?;
            let row = sqlx::query!(
                r#"SELECT d.name, d.revoked_at IS NOT NULL AS "revoked!", COALESCE(l.expires_at > now(), false) AS "connected!"
                   FROM daemons d LEFT JOIN daemon_leases l ON l.daemon_id = d.id
                   WHERE d.id = $1 AND d.user_id = $2 FOR NO KEY UPDATE OF d"#,
                daemon.0,
                user.0,
            )
            .fetch_optional(&mut *tx)
            .await?
            .ok_or(StoreError::not_found("daemon"))?;
            if row.revoked {
                return Ok(Committed::nothing(user, ()));
            }
            sqlx::query!("UPDATE daemons SET revoked_at = now() WHERE id = $1", daemon.0).execute(&mut *tx).await?;
            sqlx::query!("UPDATE api_tokens SET revoked_at = now() WHERE daemon_id = $1 AND revoked_at IS NULL", daemon.0)
                .execute(&mut *tx)
                .await?;
            sqlx::query!(
                "UPDATE daemon_leases SET expires_at = LEAST(expires_at, now()), gateway_id = $2, said_away = true
                 WHERE daemon_id = $1",
                daemon.0,
                Uuid::nil(),
            )
            .execute(&mut *tx)
            .await?;
            let gone = row.connected.then(|| changed(daemon, row.name, false));
            let feed = log_feed(&mut tx, user, gone.into_iter().collect()).await?;
            tx.commit().await?;
            Ok(Committed { feed, ..Committed::nothing(user, ()) })
        })
        .await
    }

    /// Gives the daemon's stream its lease. An instance replaces its own older streams and all older instances; an older
    /// instance gets [`StoreError::DaemonReplaced`].
    #[boxed]
    pub async fn connect_daemon(&self, hello: DaemonHello) -> Result<Committed<Lease>> {
        for (field, text) in [("hostname", &hello.hostname), ("os", &hello.os), ("version", &hello.version)] {
            checks::no_nul(field, text)?;
        }
        let declared = pb::Declarations { roots: hello.roots.clone(), tools: hello.tools.clone() }.encode_to_vec();
        self.run("connect_daemon", async || {
            let mut tx = self.begin().await?;
            let row = sqlx::query!(
                "SELECT name, instance, incarnation FROM daemons
                 WHERE id = $1 AND user_id = $2 AND revoked_at IS NULL FOR NO KEY UPDATE",
                hello.daemon.0,
                hello.user.0,
            )
            .fetch_optional(&mut *tx)
            .await?
            .ok_or(StoreError::not_found("daemon"))?;
            let instance = match hello.instance {
                0 => row.instance + 1,
                older if older < row.instance => return Err(StoreError::DaemonReplaced),
                own => own,
            };
            sqlx::query!(
                "UPDATE daemons SET incarnation = $2, instance = $3, hostname = $4, os = $5, version = $6,
                                    declarations = CASE WHEN declarations = $7 THEN declarations ELSE $7 END,
                                    declared = declared + (declarations <> $7)::int, last_seen_at = now() WHERE id = $1",
                hello.daemon.0,
                hello.incarnation.0,
                instance,
                hello.hostname,
                hello.os,
                hello.version,
                declared,
            )
            .execute(&mut *tx)
            .await?;
            let lease = sqlx::query!(
                r#"WITH old AS (SELECT said_away OR expires_at <= now() AS away FROM daemon_leases WHERE daemon_id = $1)
                   INSERT INTO daemon_leases AS l (daemon_id, instance, gateway_id, epoch, granted_at, expires_at)
                   VALUES ($1, $2, $3, 1, clock_timestamp(), clock_timestamp() + $4 * interval '1 second')
                   ON CONFLICT (daemon_id) DO UPDATE SET instance = EXCLUDED.instance, gateway_id = EXCLUDED.gateway_id,
                       epoch = l.epoch + 1, granted_at = EXCLUDED.granted_at, expires_at = EXCLUDED.expires_at, said_away = false
                   RETURNING l.epoch, COALESCE((SELECT away FROM old), true) AS "was_away!""#,
                hello.daemon.0,
                instance,
                hello.gateway.0,
                limits::LEASE_DURATION.as_secs_f64(),
            )
            .fetch_one(&mut *tx)
            .await?;
            want_waiting(&mut tx, &[hello.daemon.0]).await?;
            let came = lease.was_away.then(|| changed(hello.daemon, row.name, true));
            let feed = log_feed(&mut tx, hello.user, came.into_iter().collect()).await?;
            tx.commit().await?;
            let journal_replaced = row.incarnation.is_some_and(|before| before != hello.incarnation.0);
            let lease = Lease { instance, epoch: lease.epoch, journal_replaced };
            Ok(Committed { feed, ..Committed::nothing(hello.user, lease) })
        })
        .await
    }

    /// What the daemon declares, and the number of its last change.
    #[boxed]
    pub async fn declarations(&self, daemon: DaemonId) -> Result<(i64, pb::Declarations)> {
        self.run("declarations", async || {
            let row = sqlx::query!("SELECT declared, declarations FROM daemons WHERE id = $1", daemon.0)
                .fetch_optional(&self.pool)
                .await?
                .ok_or(StoreError::not_found("daemon"))?;
            Ok((row.declared, declarations(&row.declarations)))
        })
        .await
    }

    /// Tools or roots changed. False: a newer instance has the daemon.
    #[boxed]
    pub async fn update_declarations(
        &self,
        daemon: DaemonId,
        instance: i64,
        roots: Vec<pb::Root>,
        tools: Vec<pb::ToolDeclaration>,
    ) -> Result<Committed<bool>> {
        let declared = pb::Declarations { roots, tools }.encode_to_vec();
        self.run("update_declarations", async || {
            let row = sqlx::query!(
                r#"UPDATE daemons SET declarations = CASE WHEN instance = $2 AND revoked_at IS NULL THEN $3 ELSE declarations END,
                          declared = declared + (instance = $2 AND revoked_at IS NULL)::int
                   WHERE id = $1 RETURNING user_id, (instance = $2 AND revoked_at IS NULL) AS "current!""#,
                daemon.0,
                instance,
                declared,
            )
            .fetch_optional(&self.pool)
            .await?
            .ok_or(StoreError::not_found("daemon"))?;
            Ok(Committed::nothing(UserId(row.user_id), row.current))
        })
        .await
    }

    /// One renewal for all of a gateway's daemons (id, instance, lease epoch). A lease that had run out meanwhile, and that
    /// nobody else took, is good again: then its daemon has come back, and is said to have.
    #[boxed]
    pub async fn renew_leases(&self, gateway: InstanceId, leases: &[(DaemonId, i64, i64)]) -> Result<Renewed> {
        let daemons: Vec<Uuid> = leases.iter().map(|lease| lease.0.0).collect();
        let instances: Vec<i64> = leases.iter().map(|lease| lease.1).collect();
        let epochs: Vec<i64> = leases.iter().map(|lease| lease.2).collect();
        self.run("renew_leases", async || {
            let mut tx = self.begin().await?;
            let held = sqlx::query!(
                r#"WITH old AS (SELECT daemon_id, said_away OR expires_at <= clock_timestamp() AS away
                               FROM daemon_leases WHERE daemon_id = ANY($2) ORDER BY daemon_id FOR NO KEY UPDATE)
                   UPDATE daemon_leases l SET expires_at = clock_timestamp() + $5 * interval '1 second', said_away = false
                   FROM UNNEST($2::uuid[], $3::bigint[], $4::bigint[]) AS u (daemon_id, instance, epoch)
                   JOIN old ON old.daemon_id = u.daemon_id
                   WHERE l.daemon_id = u.daemon_id AND l.gateway_id = $1 AND l.instance = u.instance AND l.epoch = u.epoch
                   RETURNING l.daemon_id, old.away AS "away!""#,
                gateway.0,
                &daemons,
                &instances,
                &epochs,
                limits::LEASE_DURATION.as_secs_f64(),
            )
            .fetch_all(&mut *tx)
            .await?;
            let back: Vec<Uuid> = held.iter().filter(|row| row.away).map(|row| row.daemon_id).collect();
            let mut feeds = Vec::new();
            if !back.is_empty() {
                want_waiting(&mut tx, &back).await?;
                let owners = sqlx::query!("SELECT id, user_id, name FROM daemons WHERE id = ANY($1) ORDER BY user_id, id", &back)
                    .fetch_all(&mut *tx)
                    .await?;
                for row in owners {
                    let (user, daemon) = (UserId(row.user_id), DaemonId(row.id));
                    let feed = log_feed(&mut tx, user, vec![changed(daemon, row.name, true)]).await?;
                    feeds.push(Committed { feed, ..Committed::nothing(user, daemon) });
                }
            }
            tx.commit().await?;
            Ok(Renewed { held: held.into_iter().map(|row| DaemonId(row.daemon_id)).collect(), back: feeds })
        })
        .await
    }

    /// Gives a lease back. False: another stream has the daemon by now.
    #[boxed]
    pub async fn release_lease(&self, daemon: DaemonId, gateway: InstanceId, epoch: i64) -> Result<Committed<bool>> {
        self.run("release_lease", async || {
            let mut tx = self.begin().await?;
            let owner = sqlx::query!("SELECT user_id, name FROM daemons WHERE id = $1", daemon.0)
                .fetch_optional(&mut *tx)
                .await?
                .ok_or(StoreError::not_found("daemon"))?;
            let user = UserId(owner.user_id);
            let said = sqlx::query_scalar!(
                "WITH old AS (SELECT said_away FROM daemon_leases WHERE daemon_id = $1)
                 UPDATE daemon_leases SET expires_at = LEAST(expires_at, now()), gateway_id = $4, said_away = true
                 WHERE daemon_id = $1 AND gateway_id = $2 AND epoch = $3 RETURNING (SELECT said_away FROM old)",
                daemon.0,
                gateway.0,
                epoch,
                Uuid::nil(),
            )
            .fetch_optional(&mut *tx)
            .await?;
            let Some(said) = said else { return Ok(Committed::nothing(user, false)) };
            let gone = (said != Some(true)).then(|| changed(daemon, owner.name, false));
            let feed = log_feed(&mut tx, user, gone.into_iter().collect()).await?;
            tx.commit().await?;
            Ok(Committed { feed, ..Committed::nothing(user, true) })
        })
        .await
    }

    /// Tells the feeds of daemons whose lease ran out without being given back (their gateway died).
    #[boxed]
    pub async fn expired_leases(&self, limit: i64) -> Result<Vec<Committed<DaemonId>>> {
        self.run("expired_leases", async || {
            let expired = sqlx::query!(
                "SELECT l.daemon_id, d.user_id, d.name FROM daemon_leases l JOIN daemons d ON d.id = l.daemon_id
                 WHERE NOT l.said_away AND l.expires_at <= now() ORDER BY l.expires_at LIMIT $1",
                limit,
            )
            .fetch_all(&self.pool)
            .await?;
            let mut told = Vec::new();
            for row in expired {
                let mut tx = self.begin().await?;
                let mine = sqlx::query!(
                    "UPDATE daemon_leases SET said_away = true WHERE daemon_id = $1 AND NOT said_away AND expires_at <= now()",
                    row.daemon_id,
                )
                .execute(&mut *tx)
                .await?;
                if mine.rows_affected() == 0 {
                    continue;
                }
                let (user, daemon) = (UserId(row.user_id), DaemonId(row.daemon_id));
                let feed = log_feed(&mut tx, user, vec![changed(daemon, row.name, false)]).await?;
                tx.commit().await?;
                told.push(Committed { feed, ..Committed::nothing(user, daemon) });
            }
            Ok(told)
        })
        .await
    }

    /// The daemon is connected again: its chats with open calls have something to do.
    #[boxed]
    pub async fn daemon_back(&self, daemon: DaemonId) -> Result<Vec<Committed<()>>> {
        self.run("daemon_back", async || {
            let rows = sqlx::query_as!(
                WokenRow,
                r#"WITH waiting AS (
                       SELECT id FROM chats
                       WHERE id IN (SELECT chat_id FROM tool_calls WHERE daemon_id = $1 AND ended_at IS NULL
                                    UNION ALL
                                    -- A call that was never sent goes to the chat's daemon, whatever it was told before.
                                    SELECT k.chat_id FROM tool_calls k JOIN chats o ON o.id = k.chat_id
                                    WHERE k.ended_at IS NULL AND k.sent = 0 AND o.daemon_id = $1)
                       ORDER BY id FOR NO KEY UPDATE
                   )
                   UPDATE chats c SET wanted = wanted + 1,
                          wanted_at = CASE WHEN wanted > seen THEN wanted_at ELSE now() END,
                          woken_at = CASE WHEN wanted > seen THEN woken_at ELSE now() END,
                          wake_attempts = CASE WHEN wanted > seen THEN wake_attempts ELSE 0 END
                   FROM waiting WHERE c.id = waiting.id
                   RETURNING c.id, c.user_id, COALESCE((SELECT t.traceparent FROM turns t
                       WHERE t.chat_id = c.id AND t.ended_at IS NULL ORDER BY t.ordinal LIMIT 1), '') AS "traceparent!""#,
                daemon.0,
            )
            .fetch_all(&self.pool)
            .await?;
            let woken = rows.into_iter().map(|row| {
                let user = UserId(row.user_id);
                Committed { wake: Some(row.into()), ..Committed::nothing(user, ()) }
            });
            Ok(woken.collect())
        })
        .await
    }
}

/// The daemons are here (again): their chats with open calls have something to do. Part of the transaction that says so,
/// as the presence that hurries it along may be lost.
async fn want_waiting(tx: &mut Tx, daemons: &[Uuid]) -> Result<()> {
    sqlx::query!(
        "WITH waiting AS (
             SELECT id FROM chats
             WHERE id IN (SELECT chat_id FROM tool_calls WHERE daemon_id = ANY($1) AND ended_at IS NULL
                          UNION ALL
                          SELECT k.chat_id FROM tool_calls k JOIN chats o ON o.id = k.chat_id
                          WHERE k.ended_at IS NULL AND k.sent = 0 AND o.daemon_id = ANY($1))
             ORDER BY id FOR NO KEY UPDATE
         )
         UPDATE chats c SET wanted = wanted + 1,
                          wanted_at = CASE WHEN wanted > seen THEN wanted_at ELSE now() END,
                          woken_at = CASE WHEN wanted > seen THEN woken_at ELSE now() END,
                          wake_attempts = CASE WHEN wanted > seen THEN wake_attempts ELSE 0 END
                   FROM waiting WHERE c.id = waiting.id",
        daemons,
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

fn changed(daemon: DaemonId, name: String, connected: bool) -> FeedKind {
    FeedKind::DaemonChanged(pb::DaemonChanged { daemon_id: daemon.to_string(), name, connected })
}
