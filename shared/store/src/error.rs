//! What can go wrong here. Database errors stop in this crate: they are told apart by SQLSTATE and never reach a user
//! with their text.

use std::time::Duration;

use reliant_types::{Code, Failure};

/// SQLSTATE codes that mean something to the store.
pub(crate) mod sqlstate {
    pub const UNIQUE_VIOLATION: &str = "23505";
    pub const FOREIGN_KEY_VIOLATION: &str = "23503";
    pub const SERIALIZATION_FAILURE: &str = "40001";
    pub const DEADLOCK_DETECTED: &str = "40P01";
    pub const LOCK_NOT_AVAILABLE: &str = "55P03";
    pub const IDLE_IN_TRANSACTION: &str = "25P03";
    pub const QUERY_CANCELED: &str = "57014";
    pub const ADMIN_SHUTDOWN: &str = "57P01";
    pub const NO_SUCH_DATABASE: &str = "3D000";
    /// Class: invalid authorization.
    pub const LOGIN_CLASS: &str = "28";
    /// Classes: connection exception, insufficient resources, operator intervention, system error.
    pub const AWAY_CLASSES: [&str; 4] = ["08", "53", "57", "58"];
}

const RETRY_AFTER: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It does not exist, or is another's; which of the two is not said.
    #[error("there is no such {entity}")]
    NotFound { entity: &'static str },
    /// A newer process of the same daemon holds or held the lease.
    #[error("a newer instance of this daemon took over")]
    DaemonReplaced,
    /// The caller's mistake, or a rule of the platform, with the way out.
    #[error(transparent)]
    Failure(#[from] Failure),
    /// Postgres is away, overloaded or slow; trying again helps.
    #[error("the database does not answer")]
    Unavailable(#[source] sqlx::Error),
    /// It answers, and does not let us in.
    #[error("Postgres refuses the user, the password or the database that store.url names")]
    Refused(#[source] sqlx::Error),
    /// Transactions stood in each other's way more often than they were tried again.
    #[error("the database had conflicting changes")]
    Conflict(#[source] sqlx::Error),
    /// A second row where there may be one; mapped by the function that knows what it means.
    #[error("it exists already ({constraint})")]
    Duplicate { constraint: String },
    #[error("the schema could not be brought up to date")]
    Migrate(#[source] sqlx::migrate::MigrateError),
    /// A stored row that this version cannot read.
    #[error("a stored row cannot be read: {0}")]
    Corrupt(&'static str),
    /// A mistake of ours.
    #[error("the database refused a statement")]
    Internal(#[source] sqlx::Error),
}

impl StoreError {
    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            StoreError::Unavailable(_) | StoreError::Conflict(_) => true,
            StoreError::Failure(failure) => failure.is_retryable(),
            _ => false,
        }
    }

    pub(crate) fn not_found(entity: &'static str) -> Self {
        StoreError::NotFound { entity }
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        if let sqlx::Error::Database(database) = &error {
            let Some(code) = database.code() else { return StoreError::Internal(error) };
            return match code.as_ref() {
                sqlstate::SERIALIZATION_FAILURE | sqlstate::DEADLOCK_DETECTED => StoreError::Conflict(error),
                sqlstate::LOCK_NOT_AVAILABLE | sqlstate::QUERY_CANCELED | sqlstate::IDLE_IN_TRANSACTION => {
                    StoreError::Unavailable(error)
                }
                sqlstate::UNIQUE_VIOLATION | sqlstate::FOREIGN_KEY_VIOLATION => {
                    StoreError::Duplicate { constraint: database.constraint().unwrap_or_default().to_owned() }
                }
                sqlstate::NO_SUCH_DATABASE => StoreError::Refused(error),
                code if code.starts_with(sqlstate::LOGIN_CLASS) => StoreError::Refused(error),
                code if sqlstate::AWAY_CLASSES.iter().any(|class| code.starts_with(class)) => {
                    StoreError::Unavailable(error)
                }
                _ => StoreError::Internal(error),
            };
        }
        match error {
            sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed
            | sqlx::Error::BeginFailed
            | sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::Protocol(_) => StoreError::Unavailable(error),
            _ => StoreError::Internal(error),
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound { entity } => {
                Failure::new(Code::NotFound, format!("there is no such {entity}, or it is not yours"))
            }
            StoreError::DaemonReplaced => Failure::new(
                Code::DaemonReplaced,
                "a newer process of this daemon took over; this one stops. Give each machine a daemon of its own",
            ),
            StoreError::Failure(failure) => failure,
            StoreError::Unavailable(_) | StoreError::Refused(_) => {
                Failure::new(Code::Unavailable, "the database does not answer; try again").retry_after(RETRY_AFTER)
            }
            StoreError::Conflict(_) => {
                Failure::new(Code::Unavailable, "the database is busy; try again").retry_after(RETRY_AFTER)
            }
            StoreError::Duplicate { .. } => Failure::new(Code::AlreadyExists, "it exists already"),
            StoreError::Migrate(_) | StoreError::Corrupt(_) | StoreError::Internal(_) => {
                Failure::new(Code::Internal, "the request could not be stored; the server's log has the cause")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_pool_is_a_retryable_unavailable() {
        let error = StoreError::from(sqlx::Error::PoolTimedOut);
        assert!(error.is_retryable());
        let failure = Failure::from(error);
        assert_eq!((failure.code, failure.retry_after), (Code::Unavailable, Some(RETRY_AFTER)));
    }

    #[test]
    fn ownership_and_absence_read_the_same() {
        let failure = Failure::from(StoreError::not_found("chat"));
        assert_eq!(
            (failure.code, failure.message.as_str()),
            (Code::NotFound, "there is no such chat, or it is not yours")
        );
    }
}
