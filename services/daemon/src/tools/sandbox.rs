//! Landlock for shell commands and MCP servers: the root, temporary files and caches of the root's own can be written,
//! toolchains and the system can be read and run, the rest of the home directory (keys, tokens, other projects) cannot be
//! seen, processes outside cannot be signalled, and no terminal can be reached.
//!
//! Landlock binds a thread and what it starts. The commands of a root are started by one thread that has bound itself
//! first, so that a later command can end a server which an earlier one left in the background.

mod caches;
mod domain;
mod git;
mod paths;

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};

use self::domain::{Domain, Rules};
pub use self::paths::surroundings;
use super::{environment::Environment, tree};
use crate::config::DaemonConfig;

/// What confined commands may do on the network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    #[default]
    Open,
    /// No TCP. UDP is open all the same: Landlock has no rule for it.
    None,
}

/// Who is confined. Each kind has domains of its own: a shell command cannot signal an MCP server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    Shell,
    Server,
}

#[derive(Debug, Clone)]
pub struct Sandbox {
    /// The Landlock ABI in force; 0 where there is none.
    level: i32,
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
    caches: PathBuf,
    network: Network,
    environment: Environment,
    domains: Arc<Mutex<HashMap<(Kind, PathBuf), Domain>>>,
}

/// Promises that need a newer kernel, by the ABI that brings them.
const PROMISES: &[(i32, &str)] = &[
    (3, "files outside the root may be truncated"),
    (5, "devices outside the root may be controlled"),
    (6, "processes outside may be signalled, and abstract Unix sockets connected to"),
    (9, "Unix sockets with a path (ssh-agent, the session bus, docker, tmux) may be connected to"),
];
const NETWORK_LEVEL: i32 = 4;

impl Sandbox {
    /// Finds out once what the kernel gives, and says in the log what it does not.
    pub fn probe(config: &DaemonConfig, state_dir: &Path) -> Self {
        let level = if config.landlock { domain::probe() } else { 0 };
        match (level, config.landlock) {
            (0, true) => tracing::warn!("this system has no Landlock: shell commands can read and write what you can"),
            (0, false) => tracing::warn!("Landlock is switched off: shell commands can read and write what you can"),
            _ => tracing::info!(abi = level, "shell commands run under Landlock"),
        }
        let mut missing: Vec<&str> = PROMISES.iter().filter(|(abi, _)| level < *abi).map(|(_, text)| *text).collect();
        if config.network == Network::None {
            let text = if level < NETWORK_LEVEL { "the network is open" } else { "the network is open for UDP" };
            missing.push(text);
        }
        if level > 0 && !missing.is_empty() {
            tracing::warn!(abi = level, missing = missing.join("; "), "this kernel's Landlock leaves something open");
        }
        let mut sandbox = Self {
            level,
            read: config.landlock_read.clone(),
            write: config.landlock_write.clone(),
            caches: state_dir.join("caches"),
            network: config.network,
            environment: Environment::new(&config.environment),
            domains: Arc::default(),
        };
        if sandbox.is_on() {
            sandbox.read.extend(paths::readable());
            sandbox.write.extend(paths::writable());
        }
        sandbox
    }

    pub fn is_on(&self) -> bool {
        self.level > 0
    }

    #[cfg(test)]
    pub fn level(&self) -> i32 {
        self.level
    }

    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// For the shell tool's description.
    pub fn sentence(&self) -> &'static str {
        match (self.is_on(), self.network) {
            (false, _) => "Commands are not confined: they can do all that the daemon's user can.",
            (true, Network::Open) => {
                "Commands are confined (Landlock): they can write the project root, temporary files and caches of their \
                 own, and read the system and toolchains; the rest of the home directory is closed to them, and sudo \
                 does not work."
            }
            (true, Network::None) => {
                "Commands are confined (Landlock): they can write the project root, temporary files and caches of their \
                 own, and read the system and toolchains; the rest of the home directory and the network are closed to \
                 them, and sudo does not work."
            }
        }
    }

    /// Says what of a repository a root leaves out: git and shared dependencies lie above it.
    pub fn warn_of_root(&self, root: &Path) {
        if let Some(top) = self.is_on().then(|| git::top_above(root)).flatten() {
            tracing::warn!(
                root = %root.display(),
                repository = %top.display(),
                "this root is below the top of its repository, which commands cannot see: git and what is installed \
                 above the root do not work; offer the repository as the root, or name it in daemon.landlock_write"
            );
        }
    }

    /// Starts a command in a session of its own, bound to a root where Landlock is on; it may read `more` besides.
    pub async fn spawn(&self, kind: Kind, mut command: Command, root: &Path, more: &[PathBuf]) -> io::Result<Child> {
        own_session(&mut command);
        if !self.is_on() {
            return tree::spawn(&mut command);
        }
        let (sandbox, path, more) = (self.clone(), root.to_owned(), more.to_vec());
        let opened = tokio::task::spawn_blocking(move || sandbox.domain(kind, &path, &more)).await;
        let (domain, cache) = opened.unwrap_or_else(|_| Err(io::Error::other("the sandbox could not be made")))?;
        command.envs(caches::variables(&cache));
        domain.spawn(command).await
    }

    /// Starts a command of the person's own choice without Landlock.
    pub fn spawn_unconfined(&self, mut command: Command) -> io::Result<Child> {
        own_session(&mut command);
        tree::spawn(&mut command)
    }

    /// The root's domain as its paths are now: a directory that came or was replaced since makes a new one.
    fn domain(&self, kind: Kind, root: &Path, more: &[PathBuf]) -> io::Result<(Domain, PathBuf)> {
        let cache = caches::open(&self.caches, root)?;
        let mut rules = Rules::default();
        rules.read(&self.read);
        rules.read(more);
        rules.write(&self.write);
        rules.write([root, &cache]);
        rules.write_fd(git::common_dir(root));
        let mut domains = self.domains.lock();
        let key = (kind, root.to_owned());
        if let Some(domain) = domains.get(&key).filter(|domain| domain.has(&rules)) {
            return Ok((domain.clone(), cache));
        }
        let domain = Domain::start(rules, self.network)?;
        domains.insert(key, domain.clone());
        Ok((domain, cache))
    }
}

/// Makes a command the leader of a session without a terminal, and the parent of whatever of its descendants loses its
/// own. Both are kept across `exec` and end with the process.
#[expect(unsafe_code, reason = "only a hook between fork and exec can start a session in the child")]
fn own_session(command: &mut Command) {
    let hook = || {
        rustix::process::setsid()?;
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        Ok(())
    };
    // SAFETY: the hook makes three system calls; it takes no lock and allocates nothing.
    unsafe { command.pre_exec(hook) };
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn shell(sandbox: &Sandbox, root: &Path, script: &str) -> bool {
        let mut command = Command::new("bash");
        command.arg("-c").arg(script).current_dir(root).stderr(std::process::Stdio::null());
        sandbox.spawn(Kind::Shell, command, root, &[]).await.unwrap().wait().await.unwrap().success()
    }

    #[tokio::test]
    async fn a_command_writes_its_root_and_sees_no_secret() {
        let home = std::env::home_dir().unwrap();
        let Ok(elsewhere) = tempfile::Builder::new().prefix(".reliant-test-").tempdir_in(&home) else { return };
        std::fs::write(elsewhere.path().join("id_ed25519"), "key").unwrap();
        let root = elsewhere.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let state = tempfile::tempdir().unwrap();
        let probe = |change: &dyn Fn(&mut DaemonConfig)| {
            let mut config = DaemonConfig::default();
            change(&mut config);
            Sandbox::probe(&config, state.path())
        };
        let sandbox = probe(&|_| ());
        if !sandbox.is_on() {
            return;
        }
        assert!(
            shell(&sandbox, &root, "echo hi > file && cat file && mkdir d && mv file d/ && ls /usr >/dev/null").await
        );
        assert!(shell(&sandbox, &root, "f=$(mktemp) && echo x > $f && rm $f && echo > /dev/null").await);
        assert!(!shell(&sandbox, &root, "cat ../id_ed25519").await);
        assert!(!shell(&sandbox, &root, "echo x > ../new").await);
        assert!(!shell(&sandbox, &root, "echo x > /etc/reliant-test").await);
        // What it starts is bound too, and the daemon itself is not.
        assert!(!shell(&sandbox, &root, "setsid -w python3 -c \"open('../id_ed25519')\"").await);
        assert!(std::fs::read(elsewhere.path().join("id_ed25519")).is_ok());

        let open = probe(&|c| c.landlock = false);
        assert!(shell(&open, &root, "cat ../id_ed25519").await);
        let extra = probe(&|c| c.landlock_read.push(elsewhere.path().to_owned()));
        assert!(shell(&extra, &root, "cat ../id_ed25519").await);
        assert!(!shell(&extra, &root, "echo x > ../new").await);
    }
}
