//! What goes in and out of the store where the protobuf messages do not say it.

use std::time::Duration;

use chrono::{DateTime, Utc};
use reliant_types::{
    ChatId, DaemonId, Failure, Incarnation, InstanceId, MessageId, ProjectId, TokenId, ToolCallId, TurnId, UserId, pb,
};

/// What a committed transaction did, and what its caller should tell others. The hints may be lost: the rows are right.
#[derive(Debug, Clone, PartialEq)]
#[must_use = "viewers and the workflow wait for its hints"]
pub struct Committed<T> {
    pub value: T,
    /// Whose data it is: names the subjects of the hints.
    pub user: UserId,
    /// New rows of the chat's log, in order.
    pub events: Vec<pb::ChatEvent>,
    /// New rows of the user's feed, in order.
    pub feed: Vec<pb::FeedEvent>,
    /// The chat has something to do (`wanted` is counted up already).
    pub wake: Option<Wake>,
}

impl<T> Committed<T> {
    pub(crate) fn nothing(user: UserId, value: T) -> Self {
        Self { value, user, events: Vec::new(), feed: Vec::new(), wake: None }
    }

    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Committed<U> {
        let Committed { value, user, events, feed, wake } = self;
        Committed { value: change(value), user, events, feed, wake }
    }
}

/// Signal-with-start of `chat:{chat}`, or a hint to the worker that has a burst of it; it carries no state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wake {
    pub chat: ChatId,
    pub user: UserId,
    /// Of the turn that has something to do; empty where none is known.
    pub traceparent: String,
    /// The worker with an open burst of the chat. It looks before the burst ends, so that no signal is needed.
    pub burst: Option<InstanceId>,
}

/// A chat that was woken and that no worker has looked at since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unseen {
    pub wake: Wake,
    /// How often the relay has woken it for what is wanted, this time included.
    pub attempts: u32,
    /// Since something was wanted.
    pub age: Duration,
}

/// Who looks at a chat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// In the middle of a worker's burst, which goes on.
    Within(InstanceId),
    /// A worker's burst that ends where nothing can be done.
    Last(InstanceId),
}

/// What a worker's open bursts are to know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// Their chats have something new.
    pub chats: Vec<ChatId>,
    /// Of the turns that were asked for: those that have ended.
    pub ended: Vec<TurnId>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserRow {
    pub id: UserId,
    /// The JWT's subject.
    pub subject: String,
    pub name: String,
    /// "member" or "admin".
    pub role: String,
}

/// A token without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    pub id: TokenId,
    pub user: UserId,
    /// Set for a daemon's token.
    pub daemon: Option<DaemonId>,
    pub name: String,
    pub scopes: Vec<String>,
    pub expires_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Clone)]
pub struct NewChat {
    pub user: UserId,
    /// Empty: "New chat".
    pub title: String,
    pub project: Option<ProjectId>,
    /// None: the only daemon of the user if there is exactly one.
    pub daemon: Option<DaemonId>,
    /// Empty: the daemon's first root.
    pub root_id: String,
    pub model: String,
    /// Unspecified: ask.
    pub mode: pb::ChatMode,
    /// Empty: a chat of its own, whatever was asked for before.
    pub client_request_id: String,
}

#[derive(Debug, Clone, Default)]
pub struct ChatPage {
    /// 1 to 200; 0: 50.
    pub size: i32,
    /// Empty: from the start.
    pub token: String,
    pub include_archived: bool,
}

#[derive(Debug, Clone)]
pub struct SendMessage {
    pub user: UserId,
    pub chat: ChatId,
    pub client_message_id: String,
    pub text: String,
    /// Stored with the turn, so that whoever continues it continues the trace.
    pub traceparent: String,
    /// The turn's own working time.
    pub deadline: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Sent {
    pub message: pb::Message,
    pub turn: pb::Turn,
    /// The message had been accepted before.
    pub duplicate: bool,
    /// When the rows' stamps were taken, by this process's clock; none for a duplicate.
    pub stamped: Option<std::time::Instant>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct CancelOutcome {
    pub turn: pb::Turn,
    /// Who writes the model's message just now.
    pub producer: Option<InstanceId>,
    /// Calls that may run: their daemons should hear it at once.
    pub calls: Vec<CancelCall>,
}

/// A cancel for a call that was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CancelCall {
    pub call: ToolCallId,
    pub generation: i64,
    pub daemon: DaemonId,
}

/// A daemon's hello as the gateway has checked it.
#[derive(Debug, Clone)]
pub struct DaemonHello {
    pub daemon: DaemonId,
    pub user: UserId,
    pub gateway: InstanceId,
    pub incarnation: Incarnation,
    /// 0: give me a number.
    pub instance: i64,
    pub hostname: String,
    pub os: String,
    pub version: String,
    pub roots: Vec<pb::Root>,
    pub tools: Vec<pb::ToolDeclaration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// The process's number.
    pub instance: i64,
    /// Counts leases; a renewal names it.
    pub epoch: i64,
    /// The daemon came with another journal than the last time.
    pub journal_replaced: bool,
}

/// What came of a renewal.
#[derive(Debug, Clone, PartialEq)]
pub struct Renewed {
    /// Leases the gateway still has.
    pub held: Vec<DaemonId>,
    /// Of these, daemons that had been given up meanwhile.
    pub back: Vec<Committed<DaemonId>>,
}

/// What the worker does next for a chat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    CallModel {
        turn: TurnId,
        iteration: i32,
    },
    /// Send these calls to their daemon.
    Dispatch {
        turn: TurnId,
        calls: Vec<ToolCallId>,
    },
    /// Nothing until the next wake, or until so many milliseconds have passed.
    Wait {
        turn: TurnId,
        for_ms: Option<u64>,
    },
    /// No turn is open.
    Idle,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Claim {
    /// The round's message is stored: go on.
    AlreadyCommitted,
    /// The turn has ended, or is not at this round.
    Stale,
    Claimed(Box<Attempt>),
}

/// A model attempt: every write of it names the fence.
#[derive(Debug, Clone, PartialEq)]
pub struct Attempt {
    pub turn: TurnId,
    pub chat: ChatId,
    pub user: UserId,
    /// The epoch of its live text.
    pub fence: i64,
    /// The same for all attempts of one round.
    pub message: MessageId,
    pub iteration: i32,
    /// An earlier attempt of this round did not come to its end.
    pub restarted: bool,
    /// Failures of this round's model that were waited for.
    pub retries: i32,
    /// Workers that ended while an attempt of this round was at work on what others wrote.
    pub worker_deaths: i32,
    pub model: String,
    pub mode: pb::ChatMode,
    pub traceparent: String,
    /// The trace context of the attempt before this one, of this round or of the one before.
    pub replaces: reliant_telemetry::TraceContext,
    /// Where the time went since the round before was stored, or since the turn was accepted.
    pub lead: crate::Lead,
    /// By the database's clock.
    pub claimed_at: DateTime<Utc>,
    /// None: the chat has no daemon.
    pub daemon: Option<AttemptDaemon>,
    /// The root that the chat has chosen; empty: the first that its daemon offers.
    pub root_id: String,
    /// The turn's place in the chat.
    pub ordinal: i32,
    /// Of the chat's newest message at the claim. What the turn's model reads was there by then, and nothing is added to it
    /// while the fence holds; see [`crate::Store::history`].
    pub last_ordinal: i32,
    pub deadline: DateTime<Utc>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct AttemptDaemon {
    pub id: DaemonId,
    /// None: it never connected.
    pub incarnation: Option<Incarnation>,
    pub hostname: String,
    pub os: String,
    /// Grows with each change of what it declares; see [`crate::Store::declarations`].
    pub declared: i64,
}

/// A model's message as it is to be stored.
#[derive(Debug, Clone)]
pub struct NewAssistant {
    pub turn: TurnId,
    pub fence: i64,
    pub message: MessageId,
    pub iteration: i32,
    pub model: String,
    pub blocks: Vec<NewBlock>,
    pub stop_reason: pb::StopReason,
    pub usage: pb::Usage,
    /// None: the turn ends well.
    pub calls: Vec<NewCall>,
}

#[derive(Debug, Clone)]
pub enum NewBlock {
    Text {
        text: String,
    },
    Thinking {
        text: String,
        signature: String,
    },
    /// Stands for `calls[call]`, whose id is born with the commit.
    ToolUse {
        call: usize,
    },
}

#[derive(Debug, Clone)]
pub struct NewCall {
    /// Place among the calls of its message, from 0.
    pub index: i32,
    pub provider_id: String,
    pub tool: String,
    pub input: String,
    pub read_only: bool,
    /// May run again by itself.
    pub repeatable: bool,
    pub needs_approval: bool,
    pub timeout: Duration,
    /// It never runs: an unknown tool, arguments that do not fit.
    pub refused: Option<Failure>,
}

/// How often a notice is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// Once in a turn, even when its numbers change.
    OfTurn,
    /// Once in a chat, until its text changes.
    OfChat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommitOutcome {
    Committed {
        turn_ended: bool,
    },
    /// A newer attempt, or the turn's end, came first; nothing was written.
    Fenced,
}

/// What became of a result that was offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResultFate {
    /// It ended its call.
    Committed,
    /// It had ended its call before.
    Repeated,
    /// The call had ended otherwise; recorded, never applied.
    Late,
    /// Of another daemon's call, of another journal, or of a generation that was never sent.
    Foreign,
    /// There is no such call.
    Unknown,
}

impl ResultFate {
    /// What the daemon is told.
    pub fn ack(self) -> pb::AckOutcome {
        match self {
            ResultFate::Committed | ResultFate::Repeated => pb::AckOutcome::Committed,
            ResultFate::Late | ResultFate::Foreign | ResultFate::Unknown => pb::AckOutcome::Discarded,
        }
    }

    /// As a metric label.
    pub fn label(self) -> &'static str {
        match self {
            ResultFate::Committed => "committed",
            ResultFate::Repeated => "repeated",
            ResultFate::Late => "late",
            ResultFate::Foreign => "foreign",
            ResultFate::Unknown => "unknown",
        }
    }
}

/// A dispatch whose generation is durable: to be sent now.
#[derive(Debug, Clone, PartialEq)]
pub struct DispatchOrder {
    pub call: pb::Dispatch,
    pub daemon: DaemonId,
    pub chat: ChatId,
    pub user: UserId,
    pub turn: TurnId,
    pub traceparent: String,
    /// The span with which the generation before this one left.
    pub replaces: reliant_telemetry::TraceContext,
}

/// A running process of a role, as it says of itself.
#[derive(Debug, Clone)]
pub struct Heartbeat {
    pub id: InstanceId,
    pub role: &'static str,
    pub version: String,
    pub address: String,
    pub load: serde_json::Value,
    pub draining: bool,
}
