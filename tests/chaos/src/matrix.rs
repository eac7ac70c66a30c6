//! What is done to whom, and when: processes × faults × steps. No step makes a cell impossible: a process can be struck
//! while a chat is at a step that is in another's hands, and is then needed for the next one. What cannot be done to a
//! process at all is listed with the reason, by [`impossible`].

use std::{fmt, time::Duration};

use reliant_devstack::Server;
use reliant_harness::{Fault, Network, Peer};

use crate::chance::Chance;

macro_rules! names {
    ($type:ident { $($variant:ident = $name:literal,)* }) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $type { $($variant,)* }

        impl $type {
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }
    };
}

names!(Process {
    Api = "api",
    Worker = "worker",
    Gateway = "gateway",
    Daemon = "daemon",
    Nats = "NATS",
    Postgres = "Postgres",
    Temporal = "Temporal",
    Provider = "provider",
});

names!(Kind {
    Kill = "kill -9",
    Terminate = "SIGTERM",
    Pause = "pause 6 s",
    LongPause = "pause 20 s",
    Cut = "cut",
    HalfOpen = "half-open",
    Slow = "slow",
    LostJournal = "lost journal",
    FullDisk = "full disk",
});

names!(Step {
    Accepted = "accepted",
    Queued = "queued",
    Streaming = "model streaming",
    Dispatched = "tool dispatched",
    Running = "tool running",
    Result = "result on its way",
    Approval = "approval waiting",
    Persisting = "persisting",
});

impl Kind {
    /// As the report's JSON has it.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Terminate => "terminate",
            Self::Pause => "pause_6_s",
            Self::LongPause => "pause_20_s",
            Self::Cut => "cut",
            Self::HalfOpen => "half_open",
            Self::Slow => "slow_network",
            Self::LostJournal => "lost_journal",
            Self::FullDisk => "full_disk",
        }
    }
}

impl Process {
    pub const fn server(self) -> Option<Server> {
        match self {
            Self::Nats => Some(Server::Nats),
            Self::Postgres => Some(Server::Postgres),
            Self::Temporal => Some(Server::Temporal),
            _ => None,
        }
    }

    pub fn kinds(self) -> Vec<Kind> {
        Kind::ALL.iter().copied().filter(|kind| impossible(self, *kind).is_none()).collect()
    }
}

/// Why this is never done to that process.
pub fn impossible(process: Process, kind: Kind) -> Option<&'static str> {
    match (process, kind) {
        (Process::Daemon, _) => None,
        (_, Kind::LostJournal) => Some("only a daemon has a journal"),
        (Process::Api | Process::Worker | Process::Gateway | Process::Provider, Kind::FullDisk) => {
            Some("it keeps nothing on a disk")
        }
        (_, Kind::FullDisk) => Some("a server without a disk accepts nothing until its operator gave it one"),
        (Process::Provider, Kind::Kill | Kind::Terminate | Kind::Pause | Kind::LongPause) => {
            Some("it is not ours; what is seen of its end is what its network does")
        }
        _ => None,
    }
}

const fn cell(process: Process, kind: Kind, step: Step) -> Cell {
    Cell { process, kind, step }
}

/// Cells that no seed may leave out: those whose outcome is a promise of its own.
const PINNED: &[Cell] = &[
    cell(Process::Daemon, Kind::Kill, Step::Running),
    cell(Process::Daemon, Kind::LostJournal, Step::Running),
    cell(Process::Daemon, Kind::Kill, Step::Dispatched),
    cell(Process::Daemon, Kind::Kill, Step::Result),
    cell(Process::Daemon, Kind::FullDisk, Step::Dispatched),
    cell(Process::Daemon, Kind::FullDisk, Step::Running),
    cell(Process::Provider, Kind::Cut, Step::Streaming),
    cell(Process::Provider, Kind::HalfOpen, Step::Streaming),
    cell(Process::Provider, Kind::Slow, Step::Streaming),
    // What a worker or a gateway that is gone, or seems to be, leaves to another one.
    cell(Process::Worker, Kind::Pause, Step::Streaming),
    cell(Process::Worker, Kind::LongPause, Step::Persisting),
    cell(Process::Worker, Kind::Kill, Step::Running),
    cell(Process::Gateway, Kind::Terminate, Step::Running),
    cell(Process::Gateway, Kind::Kill, Step::Result),
];
/// So many of them in a plan that has no room for all.
const PINNED_SHORT: usize = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cell {
    pub process: Process,
    pub kind: Kind,
    pub step: Step,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} × {} × {}", self.process, self.kind, self.step)
    }
}

/// Each process × fault and each process × step at least once, the rest sampled; in an order of the seed. A plan that is
/// too short for that has no long pauses.
pub fn plan(seed: u64, count: usize) -> Vec<Cell> {
    let mut chance = Chance::new(seed, 1);
    let mut cells = Vec::new();
    for process in Process::ALL {
        let mut steps = Step::ALL.to_vec();
        chance.shuffle(&mut steps);
        let kinds = process.kinds();
        // Where there are more of the ones, the others come again; the long pause does not.
        let quick: Vec<Kind> = kinds.iter().copied().filter(|kind| *kind != Kind::LongPause).collect();
        for place in 0..steps.len().max(kinds.len()) {
            let kind = kinds.get(place).copied().unwrap_or(quick[place % quick.len()]);
            cells.push(Cell { process: *process, kind, step: steps[place % steps.len()] });
        }
    }
    chance.shuffle(&mut cells);
    let mut pinned = PINNED.to_vec();
    if cells.len() + pinned.len() > count {
        pinned.truncate(PINNED_SHORT);
        cells.retain(|cell| {
            let named = matches!(cell.kind, Kind::LongPause | Kind::LostJournal | Kind::FullDisk);
            !named && cell.process != Process::Provider
        });
        cells.truncate(count.saturating_sub(pinned.len()));
    }
    cells.extend(pinned);
    chance.shuffle(&mut cells);
    while cells.len() < count {
        let process = *chance.pick(Process::ALL);
        let kind = *chance.pick(&process.kinds());
        // Once per process is in the part above; it takes long.
        if kind == Kind::LongPause {
            continue;
        }
        cells.push(Cell { process, kind, step: *chance.pick(Step::ALL) });
    }
    cells
}

/// The fault of a cell, its times sampled.
pub fn fault(cell: &Cell, chance: &mut Chance) -> Fault {
    let network = |network, lasting, only| Fault::Network { network, lasting, only };
    // A role may lose one of its ways or all of them.
    let only = match cell.process {
        Process::Api | Process::Worker => chance.pick(&[
            None,
            Some(Peer::Server(Server::Postgres)),
            Some(Peer::Server(Server::Nats)),
            Some(Peer::Server(Server::Temporal)),
        ]),
        Process::Gateway => {
            chance.pick(&[None, Some(Peer::Server(Server::Postgres)), Some(Peer::Server(Server::Nats))])
        }
        _ => &None,
    }
    .clone();
    match cell.kind {
        Kind::Kill => Fault::Kill { back_after: chance.between(100, 1500) },
        Kind::Terminate => Fault::Terminate { back_after: chance.between(0, 500) },
        Kind::Pause => Fault::Pause(Duration::from_secs(6)),
        Kind::LongPause => Fault::Pause(Duration::from_secs(20)),
        Kind::Cut => network(Network::Cut, chance.between(300, 4000), only),
        Kind::HalfOpen => network(Network::Silent, chance.between(1000, 6000), only),
        Kind::Slow => {
            let delay = chance.between(50, 300);
            network(Network::Slow(delay), chance.between(2000, 5000), only)
        }
        Kind::LostJournal => Fault::LoseJournal { back_after: chance.between(100, 1500) },
        Kind::FullDisk => Fault::FullDisk(chance.between(500, 4000)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_pair_is_planned_and_the_seed_decides() {
        for seed in 0..20 {
            let cells = plan(seed, 200);
            assert_eq!(cells.len(), 200);
            assert_eq!(cells, plan(seed, 200));
            let kinds: HashSet<_> = cells.iter().map(|cell| (cell.process, cell.kind)).collect();
            let steps: HashSet<_> = cells.iter().map(|cell| (cell.process, cell.step)).collect();
            assert_eq!(kinds.len(), Process::ALL.iter().map(|process| process.kinds().len()).sum::<usize>());
            assert!(cells.iter().all(|cell| impossible(cell.process, cell.kind).is_none()));
            assert!(PINNED.iter().all(|cell| cells.contains(cell)));
            assert_eq!(steps.len(), Process::ALL.len() * Step::ALL.len());
        }
        assert_ne!(plan(1, 100), plan(2, 100));
        let short = plan(1, 12);
        assert_eq!(short.len(), 12);
        assert!(PINNED[..PINNED_SHORT].iter().all(|cell| short.contains(cell)));
    }
}
