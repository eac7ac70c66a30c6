//! The kinds of spawned tasks. A kind says what the task's failure means to the process, and what a drain does to it.

use std::fmt;

use reliant_telemetry::chain;

/// What a spawned task is for. The text names the task in logs and metrics; it is fixed, never built from values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskKind {
    /// Accepts work from outside. Its failure ends the process; it watches the drain's token and stops by itself.
    Listener(&'static str),
    /// One piece of accepted work. Its failure is its own; a drain waits for it, and cancels it at the deadline.
    Work(&'static str),
    /// Looks for work in a loop. Its failure ends the process; a drain cancels it at once.
    Poller(&'static str),
    /// Keeps something alive that running work needs (leases, heartbeats). Its failure ends the process; a drain
    /// cancels it after the work is done.
    Upkeep(&'static str),
    /// Nice to have. Its failure is logged; a drain cancels it at once.
    Helper(&'static str),
}

/// What becomes of a task when a drain begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDrain {
    Finish,
    CancelAtOnce,
    CancelLast,
}

impl TaskKind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Listener(name) | Self::Work(name) | Self::Poller(name) | Self::Upkeep(name) | Self::Helper(name) => {
                name
            }
        }
    }

    /// Whether the process cannot go on when such a task fails or panics.
    pub const fn failure_ends_process(self) -> bool {
        matches!(self, Self::Listener(_) | Self::Poller(_) | Self::Upkeep(_))
    }

    pub const fn on_drain(self) -> OnDrain {
        match self {
            Self::Listener(_) | Self::Work(_) => OnDrain::Finish,
            Self::Poller(_) | Self::Helper(_) => OnDrain::CancelAtOnce,
            Self::Upkeep(_) => OnDrain::CancelLast,
        }
    }
}

impl fmt::Display for TaskKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a task may come back with: nothing, or a result whose error is logged where the task ends.
pub trait TaskOutput: Send + 'static {
    fn into_error(self) -> Option<String>;
}

impl TaskOutput for () {
    fn into_error(self) -> Option<String> {
        None
    }
}

impl<E: std::error::Error + Send + 'static> TaskOutput for Result<(), E> {
    fn into_error(self) -> Option<String> {
        self.err().map(|error| chain(&error).to_string())
    }
}
