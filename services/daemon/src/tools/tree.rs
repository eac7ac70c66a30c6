//! The processes that calls started, found by descent: a call's shell is the parent of whatever loses its own parent
//! while it lives, and the daemon is after it. Neither a session, a group nor an environment of its own takes a process
//! out of its call.
//!
//! The kernel keeps one such parent per process, so the table is one per process too. Where two calls end at the same
//! moment, what both left behind is counted to the first that looks.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    io,
    time::Duration,
};

use parking_lot::Mutex;
use reliant_types::ToolCallId;
use rustix::process::{Pid, Signal, WaitOptions};
use tokio::process::{Child, Command};

/// Rounds of looking and killing; a process may fork while it is looked for.
const KILL_ROUNDS: usize = 200;
const KILL_PAUSE: Duration = Duration::from_millis(3);

/// A process, told from a later one with the same pid by the clock ticks since boot at which it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Started {
    pub pid: u32,
    pub at: u64,
}

#[derive(Debug, Default)]
struct Table {
    /// Children that the daemon started and waits for.
    own: HashSet<u32>,
    /// What calls that have ended left running.
    background: BTreeMap<ToolCallId, BTreeSet<Started>>,
}

static TABLE: Mutex<Option<Table>> = Mutex::new(None);

fn with_table<T>(work: impl FnOnce(&mut Table) -> T) -> T {
    work(TABLE.lock().get_or_insert_default())
}

#[derive(Debug, Clone, Copy)]
struct Stat {
    started: Started,
    parent: u32,
    session: u32,
    is_zombie: bool,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything; fields are counted behind it.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    Some(Stat {
        started: Started { pid, at: fields.get(19)?.parse().ok()? },
        parent: fields.get(1)?.parse().ok()?,
        session: fields.get(3)?.parse().ok()?,
        is_zombie: matches!(*fields.first()?, "Z" | "X"),
    })
}

/// A living process as it is now.
pub fn started(pid: u32) -> Option<Started> {
    stat(pid).map(|stat| stat.started)
}

fn all() -> Vec<Stat> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten();
    entries.filter_map(|entry| stat(entry.ok()?.file_name().to_str()?.parse().ok()?)).collect()
}

/// Makes this process the parent of what the calls' shells leave behind.
pub fn adopt_orphans() {
    if let Err(error) = rustix::process::set_child_subreaper(Some(rustix::process::getpid())) {
        tracing::warn!(error = %reliant_telemetry::chain(&error), "processes that commands leave in the background cannot be found again");
    }
}

/// Starts a child that is known as the daemon's own from its first moment.
pub fn spawn(command: &mut Command) -> io::Result<Child> {
    with_table(|table| {
        let child = command.spawn()?;
        table.own.extend(child.id());
        Ok(child)
    })
}

/// After a child of [`spawn`] was waited for.
pub fn forget(pid: u32) {
    with_table(|table| table.own.remove(&pid));
}

impl Table {
    /// The living processes of a call, and the dead children that nobody else waits for.
    fn of_call(&self, call: ToolCallId, leader: Option<Started>) -> Vec<Stat> {
        let processes = all();
        let this = std::process::id();
        let session = processes.iter().find(|p| p.started.pid == this).map(|p| p.session);
        let known = self.background.get(&call);
        let elsewhere = |p: &Stat| self.background.iter().any(|(of, set)| *of != call && set.contains(&p.started));
        // A child that the daemon did not start was handed to it; one in the daemon's own session is of no call.
        let orphan = |p: &Stat| {
            p.parent == this && !self.own.contains(&p.started.pid) && Some(p.session) != session && !elsewhere(p)
        };
        let is_root = |p: &Stat| match leader {
            Some(leader) => {
                p.started == leader || (p.started.at >= leader.at && (p.session == leader.pid || orphan(p)))
            }
            None => false,
        };
        let mut found: HashMap<u32, Stat> = processes
            .iter()
            .filter(|p| is_root(p) || known.is_some_and(|known| known.contains(&p.started)))
            .map(|p| (p.started.pid, *p))
            .collect();
        loop {
            let before = found.len();
            for p in &processes {
                if found.contains_key(&p.parent) {
                    found.insert(p.started.pid, *p);
                }
            }
            if found.len() == before {
                return found.into_values().collect();
            }
        }
    }

    /// Waits for dead children that were handed to the daemon.
    fn reap(&self, processes: &[Stat]) {
        let this = std::process::id();
        for p in processes.iter().filter(|p| p.is_zombie && p.parent == this) {
            if !self.own.contains(&p.started.pid)
                && let Some(pid) = i32::try_from(p.started.pid).ok().and_then(Pid::from_raw)
            {
                let _ = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG);
            }
        }
    }
}

/// After a call's shell has ended: how many processes of it still run. Blocking.
pub fn left_behind(call: ToolCallId, leader: Started) -> usize {
    with_table(|table| {
        let found = table.of_call(call, Some(leader));
        table.reap(&found);
        let alive: BTreeSet<_> = found.iter().filter(|p| !p.is_zombie).map(|p| p.started).collect();
        let count = alive.len();
        if count > 0 {
            table.background.insert(call, alive);
        }
        count
    })
}

/// Kills the processes of a call. Blocking. Answers how many are alive all the same.
pub fn kill(call: ToolCallId, leader: Option<Started>) -> usize {
    let mut alive = 0;
    for _ in 0..KILL_ROUNDS {
        alive = with_table(|table| {
            let found = table.of_call(call, leader);
            table.reap(&found);
            let alive: Vec<_> = found.iter().filter(|p| !p.is_zombie).collect();
            for p in &alive {
                if let Some(pid) = i32::try_from(p.started.pid).ok().and_then(Pid::from_raw) {
                    let _ = rustix::process::kill_process(pid, Signal::KILL);
                }
            }
            alive.len()
        });
        if alive == 0 {
            break;
        }
        pause();
    }
    with_table(|table| table.background.remove(&call));
    alive
}

#[expect(clippy::disallowed_methods, reason = "its callers run off the reactor, as their docs say")]
fn pause() {
    std::thread::sleep(KILL_PAUSE);
}

/// Looks after what runs in the background, and answers the calls that have nothing left. Blocking.
pub fn settle_background() -> Vec<ToolCallId> {
    with_table(|table| {
        let calls: Vec<_> = table.background.keys().copied().collect();
        let mut settled = Vec::new();
        for call in calls {
            let found = table.of_call(call, None);
            table.reap(&found);
            let alive: BTreeSet<_> = found.iter().filter(|p| !p.is_zombie).map(|p| p.started).collect();
            if alive.is_empty() {
                table.background.remove(&call);
                settled.push(call);
            } else {
                table.background.insert(call, alive);
            }
        }
        settled
    })
}

/// Kills what runs in the background, for the daemon's end. Blocking. Answers the calls.
pub fn kill_background() -> Vec<ToolCallId> {
    let calls: Vec<_> = with_table(|table| table.background.keys().copied().collect());
    for call in &calls {
        kill(*call, None);
    }
    calls
}
