//! The one table of error codes. `Code` says what went wrong; its gRPC class and HTTP status follow from it.

use std::{fmt, time::Duration};

/// gRPC's classes, by number as the protocol defines them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Class {
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    Unavailable = 14,
    Internal = 13,
    Unauthenticated = 16,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident, $text:literal, $class:ident, $http:literal;)*) => {
        /// What went wrong. The text form is the `reason` of `google.rpc.ErrorInfo`, domain `reliant`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code {
            $($(#[$doc])* $name,)*
        }

        impl Code {
            /// Every code, in the table's order.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];

            pub const fn as_str(self) -> &'static str {
                match self { $(Code::$name => $text,)* }
            }

            pub const fn class(self) -> Class {
                match self { $(Code::$name => Class::$class,)* }
            }

            pub const fn http_status(self) -> u16 {
                match self { $(Code::$name => $http,)* }
            }

            /// The code of a stored text; `Internal` for a text of a newer version.
            pub fn parse(text: &str) -> Code {
                match text { $($text => Code::$name,)* _ => Code::Internal }
            }
        }
    };
}

codes! {
    InvalidArgument, "INVALID_ARGUMENT", InvalidArgument, 400;
    MessageTooLarge, "MESSAGE_TOO_LARGE", InvalidArgument, 413;
    ModelUnknown, "MODEL_UNKNOWN", InvalidArgument, 400;
    TokenMissing, "TOKEN_MISSING", Unauthenticated, 401;
    TokenInvalid, "TOKEN_INVALID", Unauthenticated, 401;
    TokenExpired, "TOKEN_EXPIRED", Unauthenticated, 401;
    TokenRevoked, "TOKEN_REVOKED", Unauthenticated, 401;
    ScopeMissing, "SCOPE_MISSING", PermissionDenied, 403;
    /// It does not exist, or is another's; which of the two is not said.
    NotFound, "NOT_FOUND", NotFound, 404;
    AlreadyExists, "ALREADY_EXISTS", AlreadyExists, 409;
    ChatArchived, "CHAT_ARCHIVED", FailedPrecondition, 409;
    DaemonNone, "DAEMON_NONE", FailedPrecondition, 409;
    DaemonAway, "DAEMON_AWAY", Unavailable, 503;
    DaemonReplaced, "DAEMON_REPLACED", Aborted, 409;
    ToolUnknown, "TOOL_UNKNOWN", InvalidArgument, 400;
    ToolArgumentsInvalid, "TOOL_ARGUMENTS_INVALID", InvalidArgument, 400;
    ToolNotAllowed, "TOOL_NOT_ALLOWED", PermissionDenied, 403;
    ToolFailed, "TOOL_FAILED", Aborted, 409;
    ToolTimedOut, "TOOL_TIMED_OUT", DeadlineExceeded, 504;
    PathOutsideRoot, "PATH_OUTSIDE_ROOT", PermissionDenied, 403;
    OutcomeUnknown, "OUTCOME_UNKNOWN", Unknown, 500;
    ApprovalDenied, "APPROVAL_DENIED", PermissionDenied, 403;
    JournalFull, "JOURNAL_FULL", ResourceExhausted, 507;
    McpServerFailed, "MCP_SERVER_FAILED", Unavailable, 502;
    McpServerUntrusted, "MCP_SERVER_UNTRUSTED", PermissionDenied, 403;
    QueueFull, "QUEUE_FULL", ResourceExhausted, 429;
    RateLimited, "RATE_LIMITED", ResourceExhausted, 429;
    /// One user has as much of something as one user may.
    LimitReached, "LIMIT_REACHED", ResourceExhausted, 429;
    ProviderRejected, "PROVIDER_REJECTED", FailedPrecondition, 502;
    ProviderUnavailable, "PROVIDER_UNAVAILABLE", Unavailable, 502;
    ProviderGarbage, "PROVIDER_GARBAGE", Unavailable, 502;
    TurnDeadline, "TURN_DEADLINE", DeadlineExceeded, 504;
    TurnRounds, "TURN_ROUNDS", ResourceExhausted, 429;
    Cancelled, "CANCELLED", Cancelled, 499;
    DeadlineExceeded, "DEADLINE_EXCEEDED", DeadlineExceeded, 504;
    /// Postgres, NATS, Temporal or a peer is away; trying again helps.
    Unavailable, "UNAVAILABLE", Unavailable, 503;
    Draining, "DRAINING", Unavailable, 503;
    Internal, "INTERNAL", Internal, 500;
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error as its user meets it: a code, a sentence with the way out, and what a program needs to act.
/// The sentence holds no secret, no prompt and no file content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub code: Code,
    pub message: String,
    /// When trying again makes sense.
    pub retry_after: Option<Duration>,
    /// The request field at fault, for `google.rpc.BadRequest`.
    pub field: Option<String>,
}

impl Failure {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after: None, field: None }
    }

    pub fn field(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: Some(field.into()), ..Self::new(Code::InvalidArgument, message) }
    }

    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// Whether the same request may succeed later.
    pub fn is_retryable(&self) -> bool {
        matches!(self.code.class(), Class::Unavailable | Class::ResourceExhausted | Class::DeadlineExceeded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_codes_are_read_back() {
        for code in Code::ALL {
            assert_eq!(Code::parse(code.as_str()), *code);
        }
        assert_eq!(Code::parse("FROM_THE_FUTURE"), Code::Internal);
    }
}
