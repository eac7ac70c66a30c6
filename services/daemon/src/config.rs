//! What the daemon is told. Everything has a default but the gateway's token.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use reliant_types::{Secret, environment::may_be_named, limits};
use serde::{Deserialize, Serialize};

use crate::error::DaemonError;
pub use crate::tools::sandbox::Network;

/// Roots one daemon offers.
pub const ROOTS_MAX: usize = 32;

/// The daemon's configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DaemonConfig {
    /// Where gateways listen, `http://host:port`; several, separated by commas, are tried in turn.
    pub gateway: String,
    /// The daemon's token, as `reliant daemon register` showed it.
    pub token: Secret,
    /// A name for people; empty: the host's name.
    pub name: String,
    /// Holds the journal, kept outputs, the trust file, the log. Empty: `~/.local/share/reliant/daemon`.
    pub state_dir: PathBuf,
    /// The directories that are offered; empty: the current directory.
    pub roots: Vec<RootConfig>,
    /// Run shell commands under Landlock where the kernel has it.
    pub landlock: bool,
    /// Paths that shell commands may read besides the usual ones, where Landlock is on.
    pub landlock_read: Vec<PathBuf>,
    /// Paths that shell commands may write besides the root and temporary files, where Landlock is on.
    pub landlock_write: Vec<PathBuf>,
    /// Variables that shell commands and MCP servers get besides the harmless ones (the search path, the language,
    /// proxies, the homes of toolchains), for example `DATABASE_URL`. The others stay with the daemon.
    pub environment: Vec<String>,
    /// Whether commands may use the network, where Landlock is on: `open`, or `none` for no TCP.
    pub network: Network,
    /// Offer a root that holds the home directory, the whole system or the daemon's own state.
    pub allow_home: bool,
    /// MCP servers by name that run without Landlock.
    pub mcp_unconfined: Vec<String>,
    /// Start the MCP servers of each root's `.mcp.json`, once they are trusted.
    pub mcp: bool,
    /// Calls that run at one time; more are refused.
    pub max_running: usize,
    /// Bytes the journal may hold; past that new calls are refused and no result is dropped.
    pub journal_max_bytes: u64,
    /// Bytes of kept tool output on disk; past that the oldest goes first.
    pub outputs_max_bytes: u64,
    /// Seconds that running calls get to end when the daemon is asked to stop.
    pub drain_seconds: u64,
    /// Where `/health`, `/ready` and `/metrics` are served, a loopback address; none by default.
    pub admin: Option<SocketAddr>,
    /// Offers `noop`, an empty tool for measurements.
    pub bench_tools: bool,
}

/// A directory that is offered to chats.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RootConfig {
    /// For people; empty: the directory's name.
    pub name: String,
    pub path: PathBuf,
}

impl Default for DaemonConfig {
    fn default() -> Self {
        Self {
            gateway: "http://127.0.0.1:7442".into(),
            token: Secret::default(),
            name: String::new(),
            state_dir: PathBuf::new(),
            roots: Vec::new(),
            landlock: true,
            landlock_read: Vec::new(),
            landlock_write: Vec::new(),
            environment: Vec::new(),
            network: Network::Open,
            allow_home: false,
            mcp_unconfined: Vec::new(),
            mcp: true,
            max_running: limits::DAEMON_RUNNING_CALLS_MAX,
            journal_max_bytes: 256 * 1024 * 1024,
            outputs_max_bytes: 1024 * 1024 * 1024,
            drain_seconds: 10,
            admin: None,
            bench_tools: false,
        }
    }
}

impl DaemonConfig {
    /// Refuses what cannot work, with the way out; fills what was left empty.
    pub fn checked(mut self) -> Result<Self, DaemonError> {
        let bad = |text: String| Err(DaemonError::Config(text));
        if self.token.is_empty() {
            return bad(
                "no token: run `reliant daemon register` and give what it shows as RELIANT_DAEMON__TOKEN".into()
            );
        }
        for address in self.gateways() {
            let uri: http::Uri = match address.parse() {
                Ok(uri) => uri,
                Err(_) => return bad(format!("gateway '{address}' is not an address; write http://host:port")),
            };
            if uri.scheme_str() != Some("http") || uri.host().is_none() {
                return bad(format!("gateway '{address}' cannot be dialled; write http://host:port"));
            }
        }
        if self.gateways().next().is_none() {
            return bad("gateway is empty; write http://host:port".into());
        }
        if self.roots.is_empty() {
            let here =
                std::env::current_dir().map_err(|e| DaemonError::Config(format!("no current directory: {e}")))?;
            self.roots.push(RootConfig { name: String::new(), path: here });
        }
        if self.roots.len() > ROOTS_MAX {
            return bad(format!("{} roots; at most {ROOTS_MAX} can be offered", self.roots.len()));
        }
        if self.max_running == 0 || self.max_running > limits::DAEMON_RUNNING_CALLS_MAX {
            return bad(format!("max_running must be 1 to {}", limits::DAEMON_RUNNING_CALLS_MAX));
        }
        if let Some(name) = self.environment.iter().find(|name| !may_be_named(name)) {
            return bad(format!(
                "environment names '{name}', which tools never get; name variables of the project, without values"
            ));
        }
        if let Some(admin) = self.admin.filter(|admin| !admin.ip().is_loopback()) {
            return bad(format!("admin {admin} would be reachable from elsewhere; write 127.0.0.1:port"));
        }
        if self.state_dir.as_os_str().is_empty() {
            self.state_dir = Self::default_state_dir()?;
        }
        Ok(self)
    }

    /// Where the state goes when nothing is configured.
    pub fn default_state_dir() -> Result<PathBuf, DaemonError> {
        match std::env::home_dir().filter(|d| !d.as_os_str().is_empty()) {
            Some(home) => Ok(home.join(".local/share/reliant/daemon")),
            None => Err(DaemonError::Config("there is no home directory; give state_dir".into())),
        }
    }

    pub(crate) fn gateways(&self) -> impl Iterator<Item = &str> {
        self.gateway.split(',').map(str::trim).filter(|a| !a.is_empty())
    }

    pub(crate) fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut DaemonConfig)) -> Result<DaemonConfig, DaemonError> {
        let mut config = DaemonConfig { token: "rlt_x".into(), state_dir: "/tmp/x".into(), ..Default::default() };
        change(&mut config);
        config.checked()
    }

    #[test]
    fn what_cannot_work_is_refused_with_a_sentence() {
        assert!(check(|_| ()).is_ok());
        assert!(check(|c| c.gateway = "http://a:1, http://b:2".into()).is_ok());
        assert!(check(|c| c.token = Secret::default()).is_err());
        assert!(check(|c| c.gateway = String::new()).is_err());
        assert!(check(|c| c.gateway = "localhost:1".into()).is_err());
        assert!(check(|c| c.max_running = 0).is_err());
        assert!(check(|c| c.environment = vec!["DATABASE_URL".into()]).is_ok());
        assert!(check(|c| c.environment = vec!["RELIANT_STORE__URL".into()]).is_err());
        assert!(check(|c| c.environment = vec!["A=b".into()]).is_err());
        assert!(check(|c| c.admin = Some(([127, 0, 0, 1], 0).into())).is_ok());
        assert!(check(|c| c.admin = Some(([0, 0, 0, 0], 7446).into())).is_err());
        assert!(serde_json::from_str::<DaemonConfig>(r#"{"gatewai": "x"}"#).is_err());
    }

    #[test]
    fn the_token_is_not_dumped() {
        let config = DaemonConfig { token: "rlt_secret".into(), ..Default::default() };
        assert!(!serde_json::to_string(&config).unwrap().contains("rlt_secret"));
        assert!(!format!("{config:?}").contains("rlt_secret"));
    }
}
