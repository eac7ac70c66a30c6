use reliant_types::{Code, Failure};

/// Why a message did not go, or no answer came.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BusError {
    #[error("bus.url '{0}' is not a NATS address; an example is nats://127.0.0.1:4222")]
    Address(String),
    #[error("the NATS credentials in {path} cannot be used: {reason}")]
    Credentials { path: String, reason: String },
    /// Nobody subscribes: for a daemon's subject, no gateway holds its stream.
    #[error("nobody listens on {0}")]
    NoResponders(&'static str),
    /// Somebody listens and did not answer in time; whether they acted is not known.
    #[error("no answer on {0} in time")]
    Timeout(&'static str),
    /// NATS is away. Of a request that was under way it is not known whether it arrived.
    #[error("the connection to NATS is down")]
    Disconnected,
    /// The outgoing queue is full; nothing was sent.
    #[error("the queue to NATS is full")]
    Busy,
    #[error("a message of {bytes} bytes is more than the {limit} that fit on {template}")]
    TooLarge { template: &'static str, bytes: usize, limit: usize },
    #[error("the answer on {0} could not be decoded")]
    Undecodable(&'static str),
    /// The message asked for no answer.
    #[error("no answer was asked for on {0}")]
    NoReplySubject(&'static str),
    #[error("NATS refused on {template}: {reason}")]
    Refused { template: &'static str, reason: String },
}

impl BusError {
    /// As a metric label.
    pub fn outcome(&self) -> &'static str {
        match self {
            BusError::Address(_) | BusError::Credentials { .. } => "config",
            BusError::NoResponders(_) => "no_responders",
            BusError::Timeout(_) => "timeout",
            BusError::Disconnected => "disconnected",
            BusError::Busy => "busy",
            BusError::TooLarge { .. } => "too_large",
            BusError::Undecodable(_) => "undecodable",
            BusError::NoReplySubject(_) => "no_reply_subject",
            BusError::Refused { .. } => "refused",
        }
    }

    /// The message certainly reached nobody.
    pub fn surely_not_delivered(&self) -> bool {
        matches!(
            self,
            BusError::NoResponders(_)
                | BusError::Busy
                | BusError::TooLarge { .. }
                | BusError::Address(_)
                | BusError::Credentials { .. }
        )
    }
}

impl From<BusError> for Failure {
    fn from(error: BusError) -> Self {
        let code = match error {
            BusError::Address(_) | BusError::Credentials { .. } => Code::InvalidArgument,
            BusError::NoResponders(_) | BusError::Disconnected | BusError::Refused { .. } => Code::Unavailable,
            BusError::Timeout(_) => Code::DeadlineExceeded,
            BusError::Busy => Code::QueueFull,
            BusError::TooLarge { .. } => Code::MessageTooLarge,
            BusError::Undecodable(_) | BusError::NoReplySubject(_) => Code::Internal,
        };
        Failure::new(code, error.to_string())
    }
}
