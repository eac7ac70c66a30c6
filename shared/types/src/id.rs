//! Typed ids. Each is a UUIDv7, so that rows sort by their birth.

use std::{fmt, str::FromStr};

/// A text that is not an id of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a {kind} id; ids are UUIDs in hyphenated form")]
pub struct IdError {
    kind: &'static str,
    text: String,
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident = $kind:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub uuid::Uuid);

        impl $name {
            /// A new id, later in order than those made before.
            #[expect(clippy::new_without_default, reason = "an id is never a default")]
            pub fn new() -> Self {
                Self(uuid::Uuid::now_v7())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                match uuid::Uuid::try_parse(text) {
                    Ok(id) if text.len() == 36 => Ok(Self(id)),
                    _ => Err(IdError { kind: $kind, text: text.chars().take(64).collect() }),
                }
            }
        }

        impl From<uuid::Uuid> for $name {
            fn from(id: uuid::Uuid) -> Self {
                Self(id)
            }
        }

        impl From<$name> for uuid::Uuid {
            fn from(id: $name) -> Self {
                id.0
            }
        }
    )*};
}

ids! {
    /// A person.
    UserId = "user";
    /// A personal access token or a daemon's token (the row, not the secret).
    TokenId = "token";
    ProjectId = "project";
    WorktreeId = "worktree";
    DaemonId = "daemon";
    ChatId = "chat";
    MessageId = "message";
    TurnId = "turn";
    ToolCallId = "tool call";
    ApprovalId = "approval";
    /// A running process of a role: names producers, leases and instances.
    InstanceId = "instance";
    /// The random id of a daemon's journal.
    Incarnation = "incarnation";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_refuse_other_text() {
        let id = ChatId::new();
        assert_eq!(id.to_string().parse::<ChatId>(), Ok(id));
        for bad in ["", "x", "reliant.v1.>", "0190163d8694739baea5966c26f8ad91"] {
            assert!(bad.parse::<ChatId>().is_err(), "{bad}");
        }
    }
}
