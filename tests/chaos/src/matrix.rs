//! What is done to whom, and when: processes × faults × steps. No cell is impossible: a process can be struck while a chat
//! is at a step that is in another's hands, and is then needed for the next one.

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
});

names!(Kind {
    Kill = "kill -9",
    Terminate = "SIGTERM",
    Pause = "pause 6 s",
    LongPause = "pause 20 s",
    Cut = "cut",
    HalfOpen = "half-open",
    Slow = "slow",
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

impl Process {
    pub const fn server(self) -> Option<Server> {
        match self {
            Self::Nats => Some(Server::Nats),
            Self::Postgres => Some(Server::Postgres),
            Self::Temporal => Some(Server::Temporal),
            _ => None,
        }
    }
}

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
        for (place, step) in steps.into_iter().enumerate() {
            // Seven kinds over eight steps: the last step gets one of the quick ones again.
            let kind = Kind::ALL.get(place).copied().unwrap_or(Kind::Kill);
            cells.push(Cell { process: *process, kind, step });
        }
    }
    chance.shuffle(&mut cells);
    if cells.len() > count {
        cells.retain(|cell| cell.kind != Kind::LongPause);
        cells.truncate(count);
    }
    while cells.len() < count {
        let kind = *chance.pick(Kind::ALL);
        // Once per process is in the part above; it takes long.
        if kind == Kind::LongPause {
            continue;
        }
        cells.push(Cell { process: *chance.pick(Process::ALL), kind, step: *chance.pick(Step::ALL) });
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
            assert_eq!(kinds.len(), Process::ALL.len() * Kind::ALL.len());
            assert_eq!(steps.len(), Process::ALL.len() * Step::ALL.len());
        }
        assert_ne!(plan(1, 100), plan(2, 100));
    }
}
