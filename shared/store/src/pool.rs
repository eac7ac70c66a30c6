//! The pool, and how work on it is begun, timed and tried again.

use reliant_types::{
    boxed,
    url::{is_secret_key, without_passwords},
};
use std::{future::Future, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use parking_lot::Mutex;
use reliant_telemetry::{chain, metrics};
use serde::{Deserialize, Serialize};
use sqlx::{
    Connection, PgPool, Postgres, Transaction,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tracing::Instrument;

use crate::{Result, StoreError, TurnsConfig, error::sqlstate, openings::Openings, places::Places};

static MIGRATOR: sqlx::migrate::Migrator = sqlx::migrate!("../../migrations");

/// One statement; longer means that something is stuck.
const STATEMENT_TIMEOUT: &str = "15s";
/// Below [`WORK_LIMIT`], so that a lock's owner is blamed and not the network.
const LOCK_TIMEOUT: &str = "6s";
/// The statements of a transaction follow each other at once. One that stands still belongs to a process that is frozen
/// or cut off, and holds rows that others wait for: it is undone before they have waited for as long as they would.
const IDLE_IN_TRANSACTION_TIMEOUT: &str = "4s";
/// A piece of work that takes longer has lost its connection without being told: a half-open connection takes whatever
/// is sent and never answers. What it did is unknown, as with a connection that broke.
const WORK_LIMIT: Duration = Duration::from_secs(8);
/// A connection idle for longer is asked for a sign of life before it is used.
const PING_AFTER_IDLE: Duration = Duration::from_secs(1);
/// A sign of life that takes longer is none.
const PING_LIMIT: Duration = Duration::from_secs(2);
/// Tries of one transaction that met a conflict.
const CONFLICT_TRIES: u32 = 3;

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// postgres://user:password@host:port/database
    #[serde(serialize_with = "redacted")]
    pub url: String,
    /// Connections of this process.
    pub max_connections: u32,
    /// A request that waits longer for a connection is answered with UNAVAILABLE.
    #[serde(with = "humantime_serde")]
    pub acquire_timeout: Duration,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { url: String::new(), max_connections: 16, acquire_timeout: Duration::from_secs(5) }
    }
}

fn redacted<S: serde::Serializer>(url: &str, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&without_passwords(url))
}

impl std::fmt::Debug for StoreConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreConfig")
            .field("url", &without_passwords(&self.url))
            .field("max_connections", &self.max_connections)
            .field("acquire_timeout", &self.acquire_timeout)
            .finish()
    }
}

/// The driver warns of a query key that it does not know, and prints the value with it. Of keys that name a secret it knows
/// `password` alone; the others are taken out here.
fn without_unknown_secrets(url: &str) -> String {
    let Some((before, query)) = url.split_once('?') else { return url.to_owned() };
    let known = |pair: &&str| {
        let key = pair.split_once('=').map_or(*pair, |(key, _)| key);
        let known = key == "password" || !is_secret_key(key);
        if !known {
            tracing::warn!(setting = key, "the Postgres URL has a setting that is not supported and has no effect");
        }
        known
    };
    let pairs: Vec<&str> = query.split('&').filter(known).collect();
    format!("{before}?{}", pairs.join("&"))
}

pub(crate) type Tx = Transaction<'static, Postgres>;

/// Clones share one pool.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) pool: PgPool,
    pub(crate) places: Arc<Places>,
    openings: Openings,
}

impl Store {
    /// Connects once, so that a wrong address is known at the start.
    #[boxed]
    pub async fn connect(config: &StoreConfig) -> Result<Self> {
        let options: PgConnectOptions = without_unknown_secrets(&config.url).parse()?;
        let options = options
            .application_name("reliant")
            .options([
                ("statement_timeout", STATEMENT_TIMEOUT),
                ("lock_timeout", LOCK_TIMEOUT),
                ("idle_in_transaction_session_timeout", IDLE_IN_TRANSACTION_TIMEOUT),
                ("jit", "off"),
            ])
            .statement_cache_capacity(256);
        let pool = PgPoolOptions::new()
            .max_connections(config.max_connections.max(1))
            .acquire_timeout(config.acquire_timeout)
            .test_before_acquire(false)
            .before_acquire(|connection, meta| {
                Box::pin(async move {
                    if meta.idle_for > PING_AFTER_IDLE {
                        ping(connection).await?;
                    }
                    Ok(true)
                })
            })
            // The pool asks for a sign of life itself when it gets a connection back, but waits for it without end, and
            // the connection's place in the pool with it. One that goes silent just between the two costs its place
            // until the kernel gives it up.
            .after_release(|connection, _| {
                Box::pin(async move {
                    ping(connection).await?;
                    Ok(true)
                })
            })
            .connect_with(options)
            .await?;
        Ok(Self { pool, places: Arc::new(Places::new(TurnsConfig::default())), openings: Openings::new() })
    }

    /// How model calls are shared out between users; every process that accepts or drives turns must say the same.
    pub fn sharing(self, turns: TurnsConfig) -> Self {
        Self { places: Arc::new(Places::new(turns)), ..self }
    }

    /// Brings the schema up to date. Any number of processes may do so at once: an advisory lock orders them, and who
    /// comes second waits for as long as the first takes. The pool's limits of time do not hold here: a change of a large table
    /// may take minutes.
    #[boxed]
    pub async fn migrate(&self) -> Result<()> {
        // What is said last counts.
        let options =
            (*self.pool.connect_options()).clone().options([("statement_timeout", "0"), ("lock_timeout", "0")]);
        let pool = PgPoolOptions::new().max_connections(1).connect_with(options).await?;
        let migrated = MIGRATOR.run(&pool).await.map_err(StoreError::Migrate);
        pool.close().await;
        migrated
    }

    #[boxed]
    pub async fn ping(&self) -> Result<()> {
        self.run("ping", async || {
            sqlx::query!("SELECT 1 AS one").fetch_one(&self.pool).await?;
            Ok(())
        })
        .await
    }

    /// Bumped when a standby is promoted.
    #[boxed]
    pub async fn log_epoch(&self) -> Result<i64> {
        self.run("log_epoch", async || {
            Ok(sqlx::query_scalar!("SELECT log_epoch FROM log_state").fetch_one(&self.pool).await?)
        })
        .await
    }

    #[boxed]
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// Times `work` and tries it again where transactions stood in each other's way; it must be safe to repeat.
    pub(crate) async fn run<T, W, F>(&self, name: &'static str, mut work: W) -> Result<T>
    where
        T: Send,
        W: FnMut() -> F + Send,
        F: Future<Output = Result<T>> + Send,
    {
        let done = Mutex::new(None);
        let try_once = || -> BoxFuture<'_, Result<()>> {
            let work = work();
            Box::pin(async {
                let value = work.await?;
                *done.lock() = Some(value);
                Ok(())
            })
        };
        self.run_tries(name, Box::new(try_once)).await?;
        Ok(done.into_inner().expect("a try that succeeded left its value"))
    }

    /// [`Self::run`] without its types, so that it is compiled once.
    async fn run_tries<'a>(
        &'a self,
        name: &'static str,
        mut try_once: Box<dyn FnMut() -> BoxFuture<'a, Result<()>> + Send + 'a>,
    ) -> Result<()> {
        let guard = metrics::guard(&metrics::STORE_DURATION, &[name]);
        self.count_connections();
        let mut tries = 0;
        let result = loop {
            tries += 1;
            let span = span(name);
            let work = async {
                self.openings.spare(&self.pool).await?;
                try_once().await
            };
            let limited = tokio::time::timeout(WORK_LIMIT, work.instrument(span.clone()));
            let result = limited.await.unwrap_or_else(|_| Err(too_long()));
            if let Some(kind) = result.as_ref().err().and_then(fault) {
                span.record("error.type", kind);
                span.record("otel.status_code", "ERROR");
            }
            match result {
                Err(StoreError::Conflict(error)) if tries < CONFLICT_TRIES => {
                    tracing::debug!(error = %chain(&error), name, "transactions conflicted; tried again");
                }
                result => break result,
            }
        };
        guard.done(match &result {
            Ok(_) => "ok",
            Err(StoreError::Unavailable(_) | StoreError::Conflict(_)) => "unavailable",
            Err(StoreError::Internal(error)) => {
                tracing::error!(error = %chain(error), name, "the database refused a statement");
                "failed"
            }
            Err(StoreError::Corrupt(_) | StoreError::Migrate(_)) => "failed",
            Err(_) => "refused",
        });
        self.count_connections();
        result
    }

    fn count_connections(&self) {
        let size = i64::from(self.pool.size());
        let idle = i64::try_from(self.pool.num_idle()).unwrap_or(i64::MAX);
        let max = i64::from(self.pool.options().get_max_connections());
        for (state, count) in [("idle", idle), ("used", (size - idle).max(0)), ("max", max)] {
            metrics::STORE_CONNECTIONS.with_label_values(&[state]).set(count);
        }
    }

    /// A READ COMMITTED transaction. It is begun in a task of its own: a caller that goes away in between must not leave a
    /// connection with an open transaction in the pool.
    pub(crate) async fn begin(&self) -> Result<Tx> {
        self.begin_with("BEGIN").await
    }

    pub(crate) async fn begin_with(&self, statement: &'static str) -> Result<Tx> {
        let _acquiring = metrics::STORE_ACQUIRE.start_timer();
        let pool = self.pool.clone();
        // A connection that died since its last use says so here, before anything happened.
        for _ in 0..=pool.options().get_max_connections() {
            let (pool, openings) = (pool.clone(), self.openings.clone());
            let begin = async move {
                openings.spare(&pool).await?;
                Ok::<_, StoreError>(pool.begin_with(statement).await)
            };
            let begin = async move { tokio::time::timeout(WORK_LIMIT, begin).await };
            match tokio::spawn(begin.in_current_span()).await {
                Ok(Ok(Ok(Err(error)))) if had_died(&error) => {
                    tracing::debug!(error = %chain(&error), "a pooled connection had died")
                }
                Ok(Ok(begun)) => return Ok(begun??),
                Ok(Err(_)) => return Err(too_long()),
                Err(_) => return Err(StoreError::Unavailable(sqlx::Error::WorkerCrashed)),
            }
        }
        Err(StoreError::Unavailable(sqlx::Error::PoolTimedOut))
    }
}

async fn ping(connection: &mut sqlx::PgConnection) -> std::result::Result<(), sqlx::Error> {
    match tokio::time::timeout(PING_LIMIT, connection.ping()).await {
        Ok(answered) => answered,
        Err(_) => Err(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())),
    }
}

fn too_long() -> StoreError {
    StoreError::Unavailable(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()))
}

/// The server went away while the connection lay in the pool: nothing was begun.
fn had_died(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) => true,
        sqlx::Error::Database(error) => error.code().is_some_and(|code| code == sqlstate::ADMIN_SHUTDOWN),
        _ => false,
    }
}

/// What is no answer, in a word; a refusal is one.
fn fault(error: &StoreError) -> Option<&'static str> {
    match error {
        StoreError::Unavailable(_) => Some("unavailable"),
        StoreError::Conflict(_) => Some("conflict"),
        StoreError::Internal(_) => Some("internal"),
        StoreError::Corrupt(_) => Some("corrupt"),
        StoreError::Migrate(_) => Some("migrate"),
        _ => None,
    }
}

/// Only inside a trace: the polls of the background are not traces of their own.
fn span(name: &'static str) -> tracing::Span {
    if tracing::Span::current().is_none() {
        return tracing::Span::none();
    }
    tracing::info_span!(
        // reliant_telemetry::names::span::DB
        "db",
        otel.name = format!("db {name}"),
        otel.kind = "client",
        db.system.name = "postgresql",
        db.operation.name = name,
        error.type = tracing::field::Empty,
        otel.status_code = tracing::field::Empty,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_never_shown() {
        let config = StoreConfig { url: "postgres://ann:se:cr@et@db:5432/x".into(), ..Default::default() };
        assert!(format!("{config:?}").contains("postgres://ann:***@db:5432/x"));
        assert!(serde_json::to_string(&config).unwrap().contains("ann:***@db"));
        assert_eq!(without_passwords("postgres://ann@db/x"), "postgres://ann@db/x");
        assert_eq!(without_passwords(""), "");
    }
}
