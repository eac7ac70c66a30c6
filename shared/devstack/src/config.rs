//! What to start, and where.

use std::{fmt, path::PathBuf, time::Duration};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Server {
    Postgres,
    Nats,
    Temporal,
}

impl Server {
    /// In the order in which they may be stopped: who uses another's data goes first.
    pub const ALL: [Server; 3] = [Server::Temporal, Server::Nats, Server::Postgres];

    pub const fn name(self) -> &'static str {
        match self {
            Server::Postgres => "Postgres",
            Server::Nats => "NATS",
            Server::Temporal => "Temporal",
        }
    }

    /// The environment variable that names one that runs elsewhere.
    pub const fn variable(self) -> &'static str {
        match self {
            Server::Postgres => "DATABASE_URL",
            Server::Nats => "NATS_URL",
            Server::Temporal => "TEMPORAL_ADDRESS",
        }
    }

    /// Where it listens by its own custom.
    pub(crate) const fn usual_port(self) -> u16 {
        match self {
            Server::Postgres => 5432,
            Server::Nats => 4222,
            Server::Temporal => 7233,
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where one server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// A child process of ours on 127.0.0.1. The port is a wish: a taken one falls back to a free one; 0: any.
    Private { port: u16 },
    /// Somebody else's, at this URL (Temporal: host:port).
    External(String),
    /// Not needed.
    Off,
}

impl Placement {
    /// A private server on any free port.
    pub const ANY: Placement = Placement::Private { port: 0 };
}

#[derive(Debug, Clone)]
pub struct StackConfig {
    /// Holds the servers' data, passwords and logs; made if absent.
    pub data_dir: PathBuf,
    /// Where `make tools` installed the servers.
    pub tools_dir: PathBuf,
    pub postgres: Placement,
    pub nats: Placement,
    pub temporal: Placement,
    /// False lets Postgres answer before its data is on disk: for tests, whose data may die with the machine.
    /// It survives kill -9 either way.
    pub durable: bool,
    /// All servers must be ready by then.
    pub start_timeout: Duration,
}

impl StackConfig {
    /// Ports that `reliant up` wishes for.
    pub const POSTGRES_PORT: u16 = 7450;
    pub const NATS_PORT: u16 = 7451;
    pub const TEMPORAL_PORT: u16 = 7452;

    /// All three private, on the usual ports where free, data safe on disk.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            tools_dir: Self::default_tools_dir(),
            postgres: Placement::Private { port: Self::POSTGRES_PORT },
            nats: Placement::Private { port: Self::NATS_PORT },
            temporal: Placement::Private { port: Self::TEMPORAL_PORT },
            durable: true,
            start_timeout: Duration::from_secs(60),
        }
    }

    /// All three private, on any ports, quick instead of durable.
    pub fn for_tests(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            postgres: Placement::ANY,
            nats: Placement::ANY,
            temporal: Placement::ANY,
            durable: false,
            ..Self::new(data_dir)
        }
    }

    /// `$RELIANT_CACHE`, else `~/.cache/reliant/tools`.
    pub fn default_tools_dir() -> PathBuf {
        match std::env::var_os("RELIANT_CACHE").filter(|dir| !dir.is_empty()) {
            Some(dir) => PathBuf::from(dir),
            None => {
                PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/reliant/tools")
            }
        }
    }

    /// The servers that [`crate::Stack::start`] starts.
    pub fn private(&self) -> impl Iterator<Item = Server> {
        Server::ALL.into_iter().rev().filter(|server| matches!(self.placement(*server), Placement::Private { .. }))
    }

    pub(crate) fn placement(&self, server: Server) -> &Placement {
        match server {
            Server::Postgres => &self.postgres,
            Server::Nats => &self.nats,
            Server::Temporal => &self.temporal,
        }
    }
}
