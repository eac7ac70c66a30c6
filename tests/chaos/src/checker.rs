//! When all is over: what was promised, against what Postgres, the journals, the marker files and the viewers say.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use reliant_client::{ChatSession, From};
use reliant_daemon::journal::{
    Journal,
    state::{Entry, Phase, Tombstone},
};
use reliant_harness::{Arena, CallLook, Host, StoredMessage};
use reliant_types::{ToolCallId, pb};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    report::{CAUSES, Findings},
    scripts::{Marks, key_of},
    seat::{Ledger, Seat},
    tally::Tally,
};

/// After the last fault is healed, for all that is under way.
const QUIET_PATIENCE: Duration = Duration::from_secs(120);
const CATCH_UP_PATIENCE: Duration = Duration::from_secs(40);
const STOP_PATIENCE: Duration = Duration::from_secs(20);
const JOURNAL_MAX_BYTES: u64 = 1 << 30;
/// The daemon's last acknowledgement may still be on its way when the turn has ended.
const DELIVERY: Duration = Duration::from_secs(3);
/// Clocks are the same machine's; rows are stamped when a transaction begins.
const SLACK_MS: i64 = 1000;
/// A daemon that was started anew is known as such by then; what is sent before may be meant for the journal it had.
const KNOWN_AGAIN_MS: i64 = 20_000;

pub struct Subject<'a> {
    pub arena: &'a Arc<Arena>,
    pub ledger: &'a Ledger,
    pub hosts: &'a [Host],
    pub tally: &'a Tally,
}

/// Reads everything; `seats` are done watching.
pub async fn check(subject: &Subject<'_>, seats: Vec<Seat>) -> Result<Findings> {
    let mut found = Findings::default();
    quiet(subject, &mut found).await?;
    turns(subject, &mut found).await?;
    logs(subject, &mut found).await?;
    viewers(subject, seats, &mut found).await?;
    calls(subject, &mut found).await?;
    tokio::time::sleep(DELIVERY).await;
    subject.arena.stop_hosts(STOP_PATIENCE).await;
    journals(subject, &mut found).await?;
    Ok(found)
}

async fn quiet(subject: &Subject<'_>, found: &mut Findings) -> Result<()> {
    let deadline = Instant::now() + QUIET_PATIENCE;
    loop {
        let open = subject.arena.observer.open_turns().await?;
        if open.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            found.broken.push(format!("{} turns do not end: {open:?}", open.len()));
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Every accepted message is one turn that was answered.
async fn turns(subject: &Subject<'_>, found: &mut Findings) -> Result<()> {
    let rows = subject.arena.observer.turns().await?;
    let status: HashMap<Uuid, (String, String)> =
        rows.iter().map(|(id, status, error)| (*id, (status.clone(), error.clone()))).collect();
    let accepted = subject.ledger.accepted.lock().clone();
    found.turns = accepted.len();
    let mut turn_of = HashMap::new();
    let mut answered: HashMap<Uuid, Vec<StoredMessage>> = HashMap::new();
    for chat in accepted.iter().map(|one| one.chat).collect::<HashSet<_>>() {
        for message in subject.arena.observer.messages(chat).await? {
            if let Some(turn) = message.turn {
                answered.entry(turn).or_default().push(message);
            }
        }
    }
    for one in &accepted {
        if turn_of.insert(one.client_message_id.clone(), one.turn).is_some_and(|before| before != one.turn) {
            found.duplicated.push(format!("{}: the message became two turns", one.key));
        }
        match status.get(&one.turn.0) {
            None => found.lost.push(format!("{}: turn {} is not stored", one.key, one.turn)),
            Some((status, error)) if status != "succeeded" => {
                found.lost.push(format!("{}: turn {} is {status}: {error}", one.key, one.turn));
            }
            Some(_) => {}
        }
        let messages = answered.get(&one.turn.0).map(Vec::as_slice).unwrap_or_default();
        let own = messages.iter().filter(|message| message.client_message_id.as_ref() == Some(&one.client_message_id));
        match own.count() {
            1 => {}
            0 => found.lost.push(format!("{}: the person's message is not stored", one.key)),
            n => found.duplicated.push(format!("{}: the person's message is stored {n} times", one.key)),
        }
        if !messages.last().is_some_and(|message| message.role == "assistant" && !message.blocks.is_empty()) {
            found.lost.push(format!("{}: the turn's last message is no answer", one.key));
        }
    }
    if rows.len() != turn_of.len() {
        let known: HashSet<Uuid> = turn_of.values().map(|turn| turn.0).collect();
        let others = rows.iter().filter(|(id, _, _)| !known.contains(id)).count();
        found.broken.push(format!("{others} turns are stored that nobody was told of"));
    }
    Ok(())
}

async fn logs(subject: &Subject<'_>, found: &mut Findings) -> Result<()> {
    let observer = &subject.arena.observer;
    for (what, logs) in [("chat", observer.chat_logs().await?), ("user", observer.user_logs().await?)] {
        for log in logs.iter().filter(|log| !log.is_contiguous()) {
            found.broken.push(format!("the log of {what} {} has a gap: {log:?}", log.id));
        }
    }
    Ok(())
}

/// What was seen is what is stored, once and in order.
async fn viewers(subject: &Subject<'_>, seats: Vec<Seat>, found: &mut Findings) -> Result<()> {
    let counters: HashMap<Uuid, i64> =
        subject.arena.observer.chat_logs().await?.iter().map(|log| (log.id, log.counter)).collect();
    for seat in seats {
        found.broken.extend(seat.errors().into_iter().map(|error| format!("a viewer was refused: {error}")));
        let (chat, client) = (seat.chat, seat.client.clone());
        let counter = counters.get(&chat.0).copied().unwrap_or_default();
        let mut watched = seat.leave().await?;
        let stored = subject.arena.observer.messages(chat).await?;
        compare(&mut watched, counter, &stored, "the viewer", found).await;
        let seen = watched.verification();
        found.reconnects += seen.reconnects;
        found.epoch_changes += seen.epoch_changes;
        // Somebody who comes now and asks for all of it.
        match client.open_from(chat, From::Start).await {
            Ok(mut again) => compare(&mut again, counter, &stored, "a late viewer", found).await,
            Err(error) => found.broken.push(format!("chat {chat} cannot be opened: {error}")),
        }
    }
    Ok(())
}

async fn compare(session: &mut ChatSession, counter: i64, stored: &[StoredMessage], who: &str, found: &mut Findings) {
    let chat = session.chat();
    let deadline = Instant::now() + CATCH_UP_PATIENCE;
    while session.view().last_seq != Some(counter) {
        if let Err(error) = session.subscription().next_before(deadline).await {
            let at = session.view().last_seq;
            found.broken.push(format!("{who} of chat {chat} stands at {at:?} of {counter}: {error}"));
            return;
        }
    }
    let seen = session.verification();
    if !seen.is_clean() {
        found.broken.push(format!("{who} of chat {chat} was not served well: {seen:?}"));
    }
    let known: BTreeMap<&str, &pb::Message> =
        session.view().messages.values().map(|message| (message.id.as_str(), message)).collect();
    let whole = session.view().messages.keys().next() == Some(&1);
    for message in stored {
        match known.get(message.id.to_string().as_str()) {
            Some(seen) if seen.blocks == message.blocks => {}
            Some(seen) => found.broken.push(format!(
                "{who} of chat {chat} knows another text of message {}: {:?} and stored {:?}",
                message.id, seen.blocks, message.blocks
            )),
            // A snapshot has the newest messages only.
            None if !whole => {}
            None => found.broken.push(format!("{who} of chat {chat} does not know message {}", message.id)),
        }
    }
}

async fn calls(subject: &Subject<'_>, found: &mut Findings) -> Result<()> {
    let calls = subject.arena.observer.all_calls().await?;
    found.tool_calls = calls.len();
    let mut marks: BTreeMap<(String, i32, i32), (usize, usize)> = BTreeMap::new();
    for host in subject.hosts {
        let read = Marks::read(&host.root);
        found.broken.extend(read.strange.iter().map(|line| format!("a torn line in {}: {line:?}", host.name)));
        for (key, lines) in &read.begun {
            marks.entry(key.clone()).or_default().0 += lines.len();
        }
        for (key, lines) in &read.ended {
            marks.entry(key.clone()).or_default().1 += lines.len();
        }
    }
    for (key, (begun, ended)) in &marks {
        if *begun > 1 || *ended > 1 {
            found.duplicated.push(format!("the call {key:?} began {begun} times and ended {ended} times"));
        }
    }
    let mut asked = HashMap::new();
    let mut expected = subject.tally.expected_unknown();
    for call in &calls {
        let Some(key) = key_of(&call.input) else {
            found.broken.push(format!("call {} has a strange input: {}", call.id, call.input));
            continue;
        };
        if let Some(other) = asked.insert(key.clone(), call.id) {
            found.duplicated.push(format!("the model's call {key:?} is stored as {other} and {}", call.id));
        }
        let (begun, ended) = marks.get(&key).copied().unwrap_or_default();
        if let Some(cause) = expected.remove(&call.id).filter(|cause| *cause != call.unknown_cause) {
            found.broken.push(format!(
                "call {key:?} was cut off and must be unknown by {cause}, but is {} {}",
                call.status, call.unknown_cause
            ));
        }
        match call.status.as_str() {
            "succeeded" if begun == 1 && ended == 1 => {}
            "succeeded" => {
                found.broken.push(format!("call {key:?} succeeded, but began {begun} and ended {ended} times"))
            }
            "outcome_unknown" => {
                found.unknown += 1;
                *found.causes.entry(call.unknown_cause.clone()).or_default() += 1;
                if !CAUSES.contains(&call.unknown_cause.as_str()) {
                    found
                        .broken
                        .push(format!("call {key:?} is unknown by '{}', which is no cause", call.unknown_cause));
                }
                if let Some(why) = unexplained(subject, call) {
                    found.unexplained.push(format!("call {key:?} ({}): {why}", call.unknown_cause));
                }
            }
            // A command that was started in that moment has the daemon's limit, and its own writes fail.
            "failed" if begun == 0 && during(call, &subject.tally.full_disks_of(&host_name(subject, call)), 0) => {}
            other => {
                let text: String = call.result.chars().take(200).collect();
                found.broken.push(format!(
                    "call {key:?} of daemon {} is {other} {}: {text}",
                    host_name(subject, call),
                    call.error_code
                ));
            }
        }
    }
    for key in marks.keys().filter(|key| !asked.contains_key(*key)) {
        found.broken.push(format!("the call {key:?} ran and is not stored"));
    }
    Ok(())
}

fn host_name(subject: &Subject<'_>, call: &CallLook) -> String {
    let id = call.daemon.map(|id| id.to_string()).unwrap_or_default();
    subject.hosts.iter().find(|host| host.id == id).map(|host| host.role.name.clone()).unwrap_or_default()
}

/// Whether one of these times was while the call was under way, or up to `before_ms` before.
fn during(call: &CallLook, times: &[i64], before_ms: i64) -> bool {
    let (from, to) = (call.dispatched_ms.unwrap_or(i64::MIN), call.ended_ms.unwrap_or(i64::MAX));
    times.iter().any(|at| at + SLACK_MS + before_ms >= from && *at <= to.saturating_add(SLACK_MS))
}

/// Why this unknown outcome cannot have come of a fault; None where it can.
fn unexplained(subject: &Subject<'_>, call: &CallLook) -> Option<String> {
    let host = host_name(subject, call);
    let ended = during(call, &subject.tally.ends_of(&host), 0);
    let lost = during(call, &subject.tally.losses_of(&host), KNOWN_AGAIN_MS);
    match call.unknown_cause.as_str() {
        "process_died" if ended => None,
        "process_died" => Some(format!("{host} was not ended while it ran")),
        "journal_lost" if lost => None,
        "journal_lost" => Some(format!("{host} kept its journal")),
        // No daemon stays away for hours here.
        other => Some(format!("no fault of this campaign is a reason for '{other}'")),
    }
}

/// What the daemons wrote down: nothing runs, nothing waits for its acknowledgement, and it agrees with the rows.
async fn journals(subject: &Subject<'_>, found: &mut Findings) -> Result<()> {
    let rows = subject.arena.observer.all_calls().await?;
    for host in subject.hosts {
        let dir = host.state_dir.clone();
        let read = tokio::task::spawn_blocking(move || {
            let journal = Journal::open(&dir, JOURNAL_MAX_BYTES)?;
            let contents = (journal.calls(), journal.tombstones(), journal.floor_ms());
            journal.close();
            Ok::<_, reliant_daemon::journal::JournalError>(contents)
        });
        match read.await? {
            Ok((calls, tombstones, floor_ms)) => {
                let notes = notes_of(calls, tombstones);
                // A journal that has run for long says nothing of what ended long ago.
                let whole = subject.tally.losses_of(&host.role.name).is_empty() && floor_ms == 0;
                let own = rows.iter().filter(|row| row.daemon.is_some_and(|daemon| daemon.to_string() == host.id));
                let wrong = contradictions(&notes, &own.collect::<Vec<_>>(), whole);
                found.broken.extend(wrong.into_iter().map(|text| format!("the journal of {} {text}", host.name)));
            }
            Err(error) => found.broken.push(format!("the journal of {} cannot be read: {error}", host.name)),
        }
    }
    Ok(())
}

/// What a journal says of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Said {
    Running,
    /// Ended, and nobody has taken the result.
    Offered,
    /// Ended; its result was taken or thrown away.
    Ended,
    /// It did not run here and must not start any more.
    Barred,
}

type Notes = BTreeMap<Uuid, Vec<(Said, i64)>>;

fn notes_of(calls: Vec<(ToolCallId, Entry)>, tombstones: Vec<(ToolCallId, Tombstone)>) -> Notes {
    let mut notes = Notes::new();
    for (id, entry) in calls {
        let said = match entry.phase {
            Phase::Running => Said::Running,
            Phase::Finished { .. } => Said::Offered,
            Phase::Parked { .. } => Said::Ended,
        };
        notes.entry(id.0).or_default().push((said, entry.header.generation));
    }
    for (id, tombstone) in tombstones {
        let said = if tombstone.ran { Said::Ended } else { Said::Barred };
        notes.entry(id.0).or_default().push((said, tombstone.generation));
    }
    notes
}

/// Where a journal and the rows of its daemon's calls differ. A journal that was lost knows only what came later.
fn contradictions(notes: &Notes, rows: &[&CallLook], whole: bool) -> Vec<String> {
    let mut all = Vec::new();
    let generations: HashMap<Uuid, i64> = rows.iter().map(|row| (row.id, row.generation)).collect();
    for (id, said) in notes {
        for (said, generation) in said {
            match said {
                Said::Running => all.push(format!("says that {id} still runs")),
                Said::Offered => all.push(format!("has a result of {id} that nobody took")),
                Said::Ended | Said::Barred => {}
            }
            match generations.get(id) {
                None => all.push(format!("knows {id}, which is not stored as its daemon's")),
                Some(stored) if generation > stored => {
                    all.push(format!("has {id} at generation {generation}, and the row at {stored}"));
                }
                Some(_) => {}
            }
        }
    }
    // Only what ran here ends so.
    let ran = rows.iter().filter(|row| matches!(row.status.as_str(), "succeeded" | "outcome_unknown"));
    for row in ran.filter(|_| whole) {
        let ended = notes.get(&row.id).is_some_and(|said| said.iter().any(|(said, _)| *said == Said::Ended));
        if !ended {
            all.push(format!("does not say that {} ended, and the row is {}", row.id, row.status));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: u128, status: &str, generation: i64) -> CallLook {
        CallLook { id: Uuid::from_u128(id), status: status.into(), generation, ..CallLook::default() }
    }

    /// One call of the daemon's, and what its journal says of it.
    fn check(status: &str, generation: i64, said: &[(Said, i64)], whole: bool, expected: &[&str]) {
        let row = row(7, status, generation);
        let notes = Notes::from([(row.id, said.to_vec())]);
        let found = contradictions(&notes, &[&row], whole);
        assert_eq!(found.len(), expected.len(), "{found:?}");
        assert!(found.iter().zip(expected).all(|(found, part)| found.contains(part)), "{found:?}");
    }

    #[test]
    fn a_journal_agrees_with_its_rows() {
        check("succeeded", 2, &[(Said::Ended, 2)], true, &[]);
        check("outcome_unknown", 2, &[(Said::Ended, 1)], true, &[]);
        check("succeeded", 2, &[(Said::Barred, 1), (Said::Ended, 2)], true, &[]);
        check("failed", 1, &[(Said::Barred, 1)], true, &[]);
        check("failed", 1, &[], true, &[]);
        check("succeeded", 1, &[], false, &[]);
    }

    #[test]
    fn what_a_journal_contradicts_is_found() {
        check("succeeded", 1, &[], true, &["does not say"]);
        check("succeeded", 1, &[(Said::Barred, 1)], true, &["does not say"]);
        check("outcome_unknown", 1, &[(Said::Running, 1)], true, &["still runs", "does not say"]);
        check("succeeded", 1, &[(Said::Offered, 1)], false, &["nobody took"]);
        check("succeeded", 1, &[(Said::Ended, 2)], true, &["at generation 2, and the row at 1"]);
        check("cancelled", 1, &[(Said::Barred, 2)], false, &["at generation 2, and the row at 1"]);
        let notes = Notes::from([(Uuid::from_u128(8), vec![(Said::Ended, 1)])]);
        assert_eq!(contradictions(&notes, &[], false).len(), 1);
    }
}
