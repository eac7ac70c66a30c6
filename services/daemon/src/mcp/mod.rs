//! MCP servers of the roots' `.mcp.json`: those that a person trusted are started in the background, so that their
//! tools can be offered; the files are looked at again every few seconds. A server's own word about what its tools do
//! is never believed.

mod call;
mod config;
mod content;
mod http;
mod names;
mod schema;
mod server;
mod shown;
mod stdio;
pub mod trust;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, RwLock};
use reliant_types::{Code, Failure, limits, pb};
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use call::McpCall;
use content::Digests;
#[cfg(test)]
pub use schema::is_schema;
use server::{Server, State};
use stdio::Launcher;
use trust::TrustStore;

use crate::{
    config::DaemonConfig,
    roots::Roots,
    status::McpStatus,
    tools::{Job, Outcome, process, sandbox::Sandbox},
};

const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// All MCP tools' declarations together: they travel in one frame.
const DECLARATIONS_MAX_BYTES: usize = 1024 * 1024;
/// A file's author chooses part of a warning's text.
const WARNING_MAX_CHARS: usize = 2000;
const STOP_TIMEOUT: Duration = Duration::from_secs(4);

/// One tool under the name that models see.
#[derive(Debug, Clone)]
struct Offered {
    root_id: String,
    name: String,
    server: Arc<Server>,
    tool: server::ServerTool,
}

#[derive(Debug)]
pub struct Mcp {
    enabled: bool,
    roots: Roots,
    state_dir: PathBuf,
    launcher: Launcher,
    digests: Digests,
    /// By root id and name.
    servers: RwLock<BTreeMap<(String, String), Arc<Server>>>,
    /// Those that do not run, and why.
    idle: RwLock<Vec<McpStatus>>,
    offered: RwLock<Arc<Vec<Offered>>>,
    changed: watch::Sender<u64>,
    /// What was warned of at the last look, and in this one.
    warned: Mutex<[HashSet<String>; 2]>,
    /// More tools are offered than can be declared.
    too_many: AtomicBool,
    tasks: TaskTracker,
}

impl Mcp {
    pub fn new(config: &DaemonConfig, roots: Roots, state_dir: PathBuf, sandbox: Sandbox) -> Arc<Self> {
        let mark = process::server_mark(&state_dir);
        let launcher = Launcher { sandbox, mark, unconfined: config.mcp_unconfined.clone() };
        Arc::new(Self {
            enabled: config.mcp,
            roots,
            state_dir,
            launcher,
            digests: Digests::default(),
            servers: RwLock::default(),
            idle: RwLock::default(),
            offered: RwLock::default(),
            changed: watch::Sender::new(0),
            warned: Mutex::default(),
            too_many: AtomicBool::new(false),
            tasks: TaskTracker::new(),
        })
    }

    /// Starts, watches and at the end stops the servers.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        if !self.enabled {
            return;
        }
        let mark = self.launcher.mark.clone();
        let killed = tokio::task::spawn_blocking(move || process::kill_servers(&mark)).await.unwrap_or(0);
        if killed > 0 {
            tracing::info!(killed, "MCP servers of an earlier daemon were ended");
        }
        while !stop.is_cancelled() {
            // Off the reactor, and given up on at the end: the files may be on a file system that does not answer.
            let (mcp, stopped) = (self.clone(), stop.clone());
            let look = tokio::task::spawn_blocking(move || mcp.look(&stopped));
            let _ = stop.run_until_cancelled(look).await;
            let _ = stop.run_until_cancelled(tokio::time::sleep(LOOK_INTERVAL)).await;
        }
        for server in std::mem::take(&mut *self.servers.write()).into_values() {
            server.stop.cancel();
        }
        self.tasks.close();
        let _ = tokio::time::timeout(STOP_TIMEOUT, self.tasks.wait()).await;
    }

    /// Once for as long as it stays so: a file that stays wrong does not fill the log, and one that changes all the time
    /// does not fill the memory.
    fn warn_once(&self, text: &str) {
        let text: String = text.chars().filter(|c| !c.is_control()).take(WARNING_MAX_CHARS).collect();
        let mut warned = self.warned.lock();
        let [before, now] = &mut *warned;
        if now.insert(text.clone()) && !before.contains(&text) {
            tracing::warn!("{text}");
        }
    }

    fn look(self: &Arc<Self>, stop: &CancellationToken) {
        self.compare(stop);
        let mut warned = self.warned.lock();
        let [before, now] = &mut *warned;
        *before = std::mem::take(now);
    }

    /// Brings what runs in line with the files and with what is trusted.
    fn compare(self: &Arc<Self>, stop: &CancellationToken) {
        let trusted = match TrustStore::load(&self.state_dir) {
            Ok(trusted) => trusted,
            Err(error) => return self.warn_once(&error.to_string()),
        };
        let mut wanted = BTreeMap::new();
        let mut idle = Vec::new();
        for root in self.roots.iter() {
            let entries = match config::read(&root.confine, &self.digests) {
                Ok(entries) => entries,
                Err(error) => {
                    self.warn_once(&format!("the MCP servers of {} are not started: {error}", root.path().display()));
                    continue;
                }
            };
            for entry in entries {
                let status = |state: &str, error: &str| McpStatus {
                    root: root.id.clone(),
                    server: entry.name.clone(),
                    state: state.into(),
                    tools: 0,
                    error: error.into(),
                };
                if let Err(error) = &entry.spec {
                    self.warn_once(&format!(
                        "the MCP server '{}' of {} is not started: {error}",
                        entry.name,
                        root.path().display()
                    ));
                    idle.push(status("refused", error));
                } else if trusted.has(&entry) {
                    wanted.insert((root.id.clone(), entry.name.clone()), (root.clone(), entry));
                } else {
                    let changed = if trusted.had(root.path(), &entry) {
                        " has changed since it was trusted, or a file that it names has. It"
                    } else {
                        ""
                    };
                    self.warn_once(&format!(
                        "the MCP server '{}' of {}{changed} would use `{}`; if you trust it: reliant daemon trust {} --server {}",
                        entry.name,
                        root.path().display(),
                        entry.summary,
                        root.path().display(),
                        entry.name
                    ));
                    idle.push(status("untrusted", ""));
                }
            }
        }
        *self.idle.write() = idle;
        let mut servers = self.servers.write();
        // Those that run are ended by now; a late look starts none behind their back.
        if stop.is_cancelled() {
            return;
        }
        let before = servers.len();
        servers.retain(|key, server| {
            let stays = wanted.get(key).is_some_and(|(_, entry)| *entry == server.entry);
            if !stays {
                server.stop.cancel();
            }
            stays
        });
        let mut changed = servers.len() != before;
        for (key, (root, entry)) in wanted {
            servers.entry(key).or_insert_with(|| {
                changed = true;
                let server = Arc::new(Server::new(root, entry));
                let mcp = Arc::downgrade(self);
                let refresh = move || {
                    if let Some(mcp) = mcp.upgrade() {
                        mcp.refresh();
                    }
                };
                self.tasks.spawn(server.clone().run(self.launcher.clone(), refresh));
                server
            });
        }
        drop(servers);
        if changed {
            self.refresh();
        }
    }

    /// Names the tools of all servers anew.
    fn refresh(&self) {
        let servers: Vec<_> = self.servers.read().values().cloned().collect();
        let mut offered = Vec::new();
        let mut budget = DECLARATIONS_MAX_BYTES;
        let mut too_many = false;
        for root in self.roots.iter() {
            let tools: Vec<_> = servers
                .iter()
                .filter(|s| s.root.id == root.id)
                .flat_map(|s| s.tools().iter().map(|t| (s.clone(), t.clone())).collect::<Vec<_>>())
                .collect();
            let pairs: Vec<_> = tools.iter().map(|(s, t)| (s.entry.name.as_str(), t.name.as_str())).collect();
            let names = names::offered(&pairs);
            for ((server, tool), name) in tools.into_iter().zip(names) {
                let cost = tool.description.len() + tool.schema.len() + 200;
                if cost > budget || offered.len() >= limits::DAEMON_TOOLS_MAX {
                    too_many = true;
                    continue;
                }
                budget -= cost;
                offered.push(Offered { root_id: root.id.clone(), name, server, tool });
            }
        }
        if too_many && !self.too_many.swap(too_many, Ordering::Relaxed) {
            tracing::warn!("the MCP servers offer more tools than can be declared; the rest is left out");
        }
        *self.offered.write() = Arc::new(offered);
        self.changed.send_modify(|n| *n += 1);
    }

    /// Ticks when tools may have changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub fn declarations(&self, room: usize) -> Vec<pb::ToolDeclaration> {
        let offered = self.offered.read().clone();
        offered
            .iter()
            .take(room)
            .map(|o| pb::ToolDeclaration {
                name: o.name.clone(),
                description: o.tool.description.clone(),
                input_schema_json: o.tool.schema.clone(),
                read_only: false,
                root_id: o.root_id.clone(),
            })
            .collect()
    }

    /// `None`: no server of that root offers such a tool.
    pub fn prepare(&self, root_id: &str, tool: &str, input: Value) -> Result<Option<McpCall>, Failure> {
        let offered = self.offered.read().clone();
        let Some(found) = offered.iter().find(|o| o.root_id == root_id && o.name == tool) else {
            if tool.starts_with("mcp__") && self.idle.read().iter().any(|s| s.root == root_id && s.state == "untrusted")
            {
                return Err(Failure::new(
                    Code::McpServerUntrusted,
                    format!(
                        "no MCP server that offers '{tool}' is trusted; run `reliant daemon trust` on the daemon's machine"
                    ),
                ));
            }
            return Ok(None);
        };
        let Value::Object(arguments) = input else {
            return Err(Failure::new(
                Code::ToolArgumentsInvalid,
                format!("the arguments of {tool} are not a JSON object"),
            ));
        };
        Ok(Some(McpCall { server: found.server.clone(), tool: found.tool.name.clone(), arguments }))
    }

    pub async fn call(&self, call: McpCall, job: Job) -> Outcome {
        call::call(call, job).await
    }

    pub fn status(&self) -> Vec<McpStatus> {
        let servers = self.servers.read();
        let mut all: Vec<McpStatus> = servers
            .values()
            .map(|server| {
                let (state, error) = match server.state() {
                    State::Starting => ("starting", String::new()),
                    State::Up => ("up", String::new()),
                    State::Down(error) => ("down", error),
                };
                McpStatus {
                    root: server.root.id.clone(),
                    server: server.entry.name.clone(),
                    state: state.into(),
                    tools: server.tools().len(),
                    error,
                }
            })
            .collect();
        all.extend(self.idle.read().iter().cloned());
        all
    }
}
