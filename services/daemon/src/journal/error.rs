//! What can be wrong with a journal, each with the way out.

use std::path::PathBuf;

use reliant_types::{Code, Failure};

#[derive(Debug, Clone, thiserror::Error)]
pub enum JournalError {
    #[error(
        "the journal was written by a newer reliant (format {found}, this one knows {known}); start that version, \
         or begin a new journal with `reliant daemon start --reset-journal` (the old file is kept aside)"
    )]
    Newer { found: u32, known: u32 },
    #[error(
        "the journal {path} belongs to user id {owner}, not to {uid}; start the daemon as its owner, or give another state_dir"
    )]
    ForeignOwner { path: PathBuf, owner: u32, uid: u32 },
    #[error(
        "the journal {path} cannot be opened: {reason}; let the user that starts the daemon read and write it, or give \
         another state_dir"
    )]
    Unreadable { path: PathBuf, reason: String },
    #[error(
        "the journal is damaged ({0}); begin a new one with `reliant daemon start --reset-journal` (the old file is \
         kept aside; calls that were sent to it end as outcome unknown)"
    )]
    Corrupt(String),
    #[error("another daemon has the journal open; stop it with `reliant daemon stop`")]
    InUse,
    #[error(
        "the journal is full; results wait to be collected, connect the daemon to its gateway or raise journal_max_bytes"
    )]
    Full,
    #[error("the journal cannot be written: {0}; free some disk space")]
    Io(String),
    #[error("the journal is closed")]
    Closed,
}

impl JournalError {
    pub fn failure(&self) -> Failure {
        let code = match self {
            Self::Full | Self::Io(_) => Code::JournalFull,
            Self::Closed => Code::Draining,
            Self::InUse => Code::AlreadyExists,
            Self::Newer { .. } | Self::ForeignOwner { .. } | Self::Unreadable { .. } | Self::Corrupt(_) => {
                Code::Internal
            }
        };
        Failure::new(code, self.to_string())
    }
}

impl From<std::io::Error> for JournalError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error.to_string())
    }
}

impl From<redb::StorageError> for JournalError {
    fn from(error: redb::StorageError) -> Self {
        match error {
            redb::StorageError::Corrupted(text) => Self::Corrupt(text),
            redb::StorageError::Io(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                Self::Corrupt("the file is cut short".into())
            }
            redb::StorageError::Io(e) if e.kind() == std::io::ErrorKind::InvalidData => Self::Corrupt(e.to_string()),
            other => Self::Io(other.to_string()),
        }
    }
}

impl From<redb::DatabaseError> for JournalError {
    fn from(error: redb::DatabaseError) -> Self {
        match error {
            redb::DatabaseError::DatabaseAlreadyOpen => Self::InUse,
            redb::DatabaseError::UpgradeRequired(version) => Self::Newer { found: u32::from(version), known: 0 },
            redb::DatabaseError::Storage(e) => e.into(),
            other => Self::Corrupt(other.to_string()),
        }
    }
}

macro_rules! from_redb {
    ($($error:ident),*) => {$(
        impl From<redb::$error> for JournalError {
            fn from(error: redb::$error) -> Self {
                match error {
                    redb::$error::Storage(e) => e.into(),
                    other => Self::Corrupt(other.to_string()),
                }
            }
        }
    )*};
}

from_redb!(TransactionError, TableError, CommitError);
