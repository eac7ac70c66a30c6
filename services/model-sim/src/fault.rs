//! Scripted faults: what breaks, where in the answer, and how many times before it heals.

use std::{collections::HashMap, hash::Hash};

use parking_lot::Mutex;

use crate::ask::{Refusal, hash};

/// Conversations whose faults are counted; past that counting begins anew.
const COUNTS_MAX: usize = 100_000;

#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    pub kind: FaultKind,
    /// Pieces that leave before it strikes.
    pub after: usize,
    /// For `cut`: bytes of the body that leave.
    pub at: Option<usize>,
    /// Seconds, for statuses.
    pub retry_after: f64,
    /// Requests of one conversation that it strikes.
    pub times: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    Status(u16),
    /// The connection breaks.
    Cut,
    /// The stream stays open and silent.
    Stall,
    /// Not even the response's head comes.
    StallHead,
    /// A chunk that is no JSON.
    Malformed,
    InvalidUtf8,
    HugeIndex,
    EndlessLine,
    /// A web page with status 200.
    Html,
    /// The provider's own error event within the stream.
    ErrorEvent,
    /// A stream without any event.
    Empty,
}

impl FaultKind {
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        Ok(match text {
            "cut" => Self::Cut,
            "stall" => Self::Stall,
            "stall_head" => Self::StallHead,
            "malformed" => Self::Malformed,
            "invalid_utf8" => Self::InvalidUtf8,
            "huge_index" => Self::HugeIndex,
            "endless_line" => Self::EndlessLine,
            "html" => Self::Html,
            "error_event" => Self::ErrorEvent,
            "empty" => Self::Empty,
            text => match text.parse() {
                Ok(status @ 400..=599) => Self::Status(status),
                _ => {
                    return Err(Refusal::invalid(format!(
                        "there is no fault '{text}'; there are 400 to 599, cut, stall, stall_head, malformed, invalid_utf8, \
                         huge_index, endless_line, html, error_event, empty"
                    )));
                }
            },
        })
    }
}

impl Fault {
    /// The error an answer with a fault status has.
    pub fn refusal(&self, status: u16) -> Refusal {
        let (kind, message) = match status {
            401 => ("authentication_error", "Incorrect API key provided (simulated)"),
            429 => ("rate_limit_error", "Rate limit reached (simulated)"),
            400..=499 => ("invalid_request_error", "The request is refused (simulated)"),
            529 => ("overloaded_error", "Overloaded (simulated)"),
            _ => ("api_error", "Internal server error (simulated)"),
        };
        let retry_after = matches!(status, 429 | 500..).then_some(self.retry_after);
        Refusal { status, kind, message: message.into(), retry_after }
    }
}

/// How often each conversation was struck.
#[derive(Default)]
pub struct Faults {
    counts: Mutex<HashMap<u64, u64>>,
}

impl Faults {
    /// Whether this request is to be struck; counts it if so.
    pub fn strikes(&self, fault: &Fault, key: &impl Hash) -> bool {
        let mut counts = self.counts.lock();
        if counts.len() >= COUNTS_MAX {
            counts.clear();
        }
        let count = counts.entry(hash(key)).or_insert(0);
        if *count >= fault.times {
            return false;
        }
        *count += 1;
        true
    }
}
