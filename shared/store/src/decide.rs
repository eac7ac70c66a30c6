//! What a chat needs now: a pure function over rows. It reads no clock and does no I/O, so that whoever asks, and
//! however often, gets the same answer for the same rows.
//!
//! Invariants: a model is called only when no call of the turn is open, and only with a place; a call that awaits an
//! approval is never sent; the calls of a message take effect in their order: one that may change something is sent
//! behind all before it and ahead of all after it; a sent call ends only by what its journal says, or as unknown; the
//! answer is always progress, or a wait with a reason.

use reliant_types::{Code, ToolCallId, TurnId, limits, pb};

/// The rows that matter. Times are Unix milliseconds of the database's clock.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub now_ms: i64,
    /// The chat's oldest turn that has not ended.
    pub turn: Option<Turn>,
    /// All calls of the chat that have not ended; those of other turns settle behind their turn.
    pub calls: Vec<Call>,
    pub rounds_max: i32,
    /// The chat's owner may have one more model call at work.
    pub place_free: bool,
}

#[derive(Debug, Clone)]
pub struct Turn {
    pub id: TurnId,
    /// Model rounds that are stored.
    pub iteration: i32,
    /// None: the clock stands.
    pub deadline_ms: Option<i64>,
    /// Its model could not answer: not to be asked before then.
    pub not_before_ms: Option<i64>,
    /// Its round has a place.
    pub placed: bool,
}

#[derive(Debug, Clone)]
pub struct Call {
    pub id: ToolCallId,
    pub turn: TurnId,
    /// Its place among the calls of its message.
    pub index: i32,
    /// It changes nothing: it may run beside others of its kind.
    pub read_only: bool,
    pub status: pb::ToolCallStatus,
    /// Some generation may have reached its daemon.
    pub sent: bool,
    /// The newest dispatch.
    pub dispatched_ms: Option<i64>,
    /// Its daemon had no room: not to be sent before then.
    pub not_before_ms: Option<i64>,
    pub timeout_ms: i64,
    pub repeatable: bool,
    pub cancel_asked: bool,
    pub daemon: Daemon,
}

/// The daemon that has the call, or that the chat has chosen where the call was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    /// None is chosen, or it was revoked: nobody will run the call.
    None,
    Away,
    Here,
    /// Connected, with another journal than the one the call was sent to.
    OtherJournal,
}

/// How an open call is settled without its daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settlement {
    /// Outcome unknown: the journal it was sent to is gone.
    JournalLost,
    /// Outcome unknown: it was sent, and the daemon stayed away.
    DaemonAway,
    /// Failed: there is no daemon to send it to.
    NoDaemon,
    /// Cancelled: its turn ended before it was sent.
    Cancelled,
    /// Pending again: its journal is gone, and it may run twice.
    Again,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitReason {
    /// A daemon works, is about to say that it does, or has no room and is asked again. The turn's clock runs.
    Tools,
    /// A person must decide. The clock stands.
    Approval,
    /// The daemon is away. The clock stands.
    Daemon,
    /// The model could not answer and is asked again. The clock runs.
    Model,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Write these down and decide again.
    Settle(Vec<(ToolCallId, Settlement)>),
    /// End the turn and decide again.
    Fail {
        turn: TurnId,
        code: Code,
    },
    CallModel {
        turn: TurnId,
        iteration: i32,
    },
    /// A model is due, and others of the same owner are at work already: whoever gives it a place wakes the chat.
    Hold {
        turn: TurnId,
        iteration: i32,
    },
    Dispatch {
        turn: TurnId,
        calls: Vec<ToolCallId>,
    },
    Wait {
        turn: TurnId,
        until_ms: Option<i64>,
        reason: WaitReason,
    },
    Idle,
}

impl Decision {
    /// The status that the turn has while this is what it needs; None leaves it as it is.
    pub fn turn_status(&self) -> Option<pb::TurnStatus> {
        match self {
            Decision::Dispatch { .. } | Decision::Wait { reason: WaitReason::Tools, .. } => {
                Some(pb::TurnStatus::Running)
            }
            Decision::Wait { reason: WaitReason::Approval, .. } => Some(pb::TurnStatus::WaitingApproval),
            Decision::Wait { reason: WaitReason::Daemon, .. } => Some(pb::TurnStatus::WaitingDaemon),
            // A model call is begun by its claim, which starts the clock too.
            // What is held looks as it did.
            Decision::CallModel { .. }
            | Decision::Hold { .. }
            | Decision::Wait { reason: WaitReason::Model, .. }
            | Decision::Settle(_)
            | Decision::Fail { .. }
            | Decision::Idle => None,
        }
    }
}

fn ms(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

pub fn decide(rows: &Snapshot) -> Decision {
    let current = rows.turn.as_ref().map(|turn| turn.id);
    let settled: Vec<_> =
        rows.calls.iter().filter_map(|call| Some((call.id, settlement(call, current, rows.now_ms)?))).collect();
    if !settled.is_empty() {
        return Decision::Settle(settled);
    }
    let Some(turn) = &rows.turn else { return Decision::Idle };
    if turn.deadline_ms.is_some_and(|deadline| rows.now_ms >= deadline) {
        return Decision::Fail { turn: turn.id, code: Code::TurnDeadline };
    }
    let open: Vec<&Call> = rows.calls.iter().filter(|call| call.turn == turn.id).collect();
    if open.is_empty() {
        if turn.iteration >= rows.rounds_max {
            return Decision::Fail { turn: turn.id, code: Code::TurnRounds };
        }
        if let Some(at) = turn.not_before_ms.filter(|at| rows.now_ms < *at) {
            let until = turn.deadline_ms.map_or(at, |deadline| at.min(deadline));
            return Decision::Wait { turn: turn.id, until_ms: Some(until), reason: WaitReason::Model };
        }
        let (id, iteration) = (turn.id, turn.iteration);
        return if turn.placed || rows.place_free {
            Decision::CallModel { turn: id, iteration }
        } else {
            Decision::Hold { turn: id, iteration }
        };
    }
    // What stands behind an open call is not looked at: its time comes when that one has ended.
    let open: Vec<&Call> = open.iter().copied().filter(|call| !is_behind(call, &open)).collect();
    let ready: Vec<_> =
        open.iter().filter(|call| send_at(call).is_some_and(|at| rows.now_ms >= at)).map(|call| call.id).collect();
    if !ready.is_empty() {
        return Decision::Dispatch { turn: turn.id, calls: ready };
    }
    let works = |call: &&&Call| send_at(call).is_some() || (call.daemon == Daemon::Here && call.sent);
    let reason = if open.iter().any(|call| works(&call)) {
        WaitReason::Tools
    } else if open.iter().any(|call| call.status == pb::ToolCallStatus::WaitingApproval) {
        WaitReason::Approval
    } else {
        WaitReason::Daemon
    };
    let looks = open.iter().filter_map(|call| if call.daemon == Daemon::Away { gone_at(call) } else { send_at(call) });
    let deadline = turn.deadline_ms.filter(|_| reason == WaitReason::Tools);
    Decision::Wait { turn: turn.id, until_ms: looks.chain(deadline).min(), reason }
}

/// Whether the call must not be sent before another open one of its message has ended.
fn is_behind(call: &Call, open: &[&Call]) -> bool {
    let before = |other: &&&Call| other.index < call.index && !(other.read_only && call.read_only);
    !call.sent && open.iter().any(|other| before(&other))
}

fn settlement(call: &Call, current: Option<TurnId>, now_ms: i64) -> Option<Settlement> {
    let behind = current != Some(call.turn);
    if !call.sent {
        return match call.daemon {
            _ if behind => Some(Settlement::Cancelled),
            // A person may still choose a daemon while the approval waits.
            Daemon::None if call.status != pb::ToolCallStatus::WaitingApproval => Some(Settlement::NoDaemon),
            _ => None,
        };
    }
    match call.daemon {
        Daemon::None => Some(Settlement::DaemonAway),
        Daemon::OtherJournal if call.repeatable && !call.cancel_asked && !behind => Some(Settlement::Again),
        Daemon::OtherJournal => Some(Settlement::JournalLost),
        Daemon::Away if gone_at(call).is_none_or(|at| now_ms >= at) => Some(Settlement::DaemonAway),
        Daemon::Away | Daemon::Here => None,
    }
}

/// When a sent call whose daemon is away is given up.
fn gone_at(call: &Call) -> Option<i64> {
    let sent = call.dispatched_ms.filter(|_| call.sent)?;
    Some(sent.saturating_add(call.timeout_ms.max(0)).saturating_add(ms(limits::TOOL_AWAY_MAX)))
}

/// When the call is to be sent, or sent again: the journal makes a repetition harmless.
fn send_at(call: &Call) -> Option<i64> {
    if call.cancel_asked || !matches!(call.daemon, Daemon::Here | Daemon::OtherJournal) {
        return None;
    }
    let due = match call.status {
        pb::ToolCallStatus::Pending | pb::ToolCallStatus::WaitingDaemon => i64::MIN,
        pb::ToolCallStatus::Dispatched => {
            call.dispatched_ms.map_or(i64::MIN, |at| at.saturating_add(ms(limits::REDISPATCH_AFTER)))
        }
        pb::ToolCallStatus::Running => call.dispatched_ms.map_or(i64::MIN, |at| {
            at.saturating_add(call.timeout_ms.max(0)).saturating_add(ms(limits::REATTACH_AFTER))
        }),
        _ => return None,
    };
    Some(due.max(call.not_before_ms.unwrap_or(i64::MIN)))
}

/// After so many refusals a call is sent again so much later. `salt` keeps calls that were refused together apart.
pub(crate) fn refused_again_after(refusals: i32, salt: u128) -> std::time::Duration {
    let doubled = limits::REFUSED_AGAIN_MIN * 2u32.pow(refusals.clamp(0, 10).unsigned_abs());
    let delay = doubled.min(limits::REFUSED_AGAIN_MAX);
    delay.mul_f64(0.75 + (salt % 256) as f64 / 512.0)
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
