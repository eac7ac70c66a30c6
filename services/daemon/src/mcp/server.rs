//! One MCP server's life: started, asked for its tools, watched, started again with back-off when it dies, stopped
//! with the daemon. Whatever it does is bounded in time and size.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::FutureExt;
use parking_lot::RwLock;
use rmcp::{
    ClientHandler, RoleClient,
    model::{PaginatedRequestParams, Tool},
    service::{NotificationContext, Peer, RunningService},
};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::{
    config::{self, Entry, Spec},
    content::Digests,
    http,
    stdio::{self, Child, Launcher},
};
use crate::roots::Root;

const START_TIMEOUT: Duration = Duration::from_secs(60);
const LIST_TIMEOUT: Duration = Duration::from_secs(20);
const TOOLS_MAX: usize = 128;
const PAGES_MAX: usize = 20;
const BACKOFF_MIN: Duration = Duration::from_millis(500);
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// A server that was up for so long is started again without delay.
const GOOD_RUN: Duration = Duration::from_secs(30);
/// How long a call waits for its server to come up.
const UP_WAIT: Duration = Duration::from_secs(10);
/// How long a server that let a call time out has to answer anything at all.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);

/// One tool as its server names it.
#[derive(Debug, Clone)]
pub struct ServerTool {
    pub name: String,
    pub description: String,
    pub schema: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Starting,
    Up,
    Down(String),
}

/// Hears what the server tells by itself; everything else it asks is refused by the library's defaults.
#[derive(Debug, Clone)]
pub struct Handler(Arc<Notify>);

impl ClientHandler for Handler {
    async fn on_tool_list_changed(&self, _: NotificationContext<RoleClient>) {
        self.0.notify_one();
    }
}

pub type Service = RunningService<RoleClient, Handler>;

/// A server that is up.
#[derive(Debug, Clone)]
pub struct Connection {
    pub peer: Peer<RoleClient>,
    /// Cancelled by whoever finds that it is of no use any more.
    pub broken: CancellationToken,
}

impl Connection {
    /// After a call that timed out: a server that answers nothing at all is started again.
    pub async fn check(&self) {
        let sign = tokio::time::timeout(SIGN_OF_LIFE, self.peer.list_tools(None)).await;
        if !matches!(sign, Ok(Ok(_) | Err(rmcp::ServiceError::McpError(_)))) {
            self.broken.cancel();
        }
    }
}

pub struct Server {
    pub root: Arc<Root>,
    pub entry: Entry,
    tools: RwLock<Arc<Vec<ServerTool>>>,
    state: RwLock<State>,
    connection: watch::Sender<Option<Connection>>,
    tools_changed: Arc<Notify>,
    /// Somebody waits for a server that is down.
    wanted: Notify,
    pub stop: CancellationToken,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Server({})", self.entry.name)
    }
}

impl Server {
    pub fn new(root: Arc<Root>, entry: Entry) -> Self {
        Self {
            root,
            entry,
            tools: RwLock::default(),
            state: RwLock::new(State::Starting),
            connection: watch::Sender::new(None),
            tools_changed: Arc::new(Notify::new()),
            wanted: Notify::new(),
            stop: CancellationToken::new(),
        }
    }

    /// What it offered when it last was up: a server that is down comes up when it is called.
    pub fn tools(&self) -> Arc<Vec<ServerTool>> {
        self.tools.read().clone()
    }

    pub fn state(&self) -> State {
        self.state.read().clone()
    }

    /// The connection, once there is one.
    pub async fn connection(&self) -> Option<Connection> {
        let good = |c: &Option<Connection>| c.as_ref().is_some_and(|c| !c.broken.is_cancelled());
        let mut connection = self.connection.subscribe();
        if !good(&connection.borrow()) {
            self.wanted.notify_one();
        }
        let up = tokio::time::timeout(UP_WAIT, connection.wait_for(good)).await;
        up.ok()?.ok()?.clone()
    }

    /// Lives until it is stopped. `changed` is called whenever the tools may have changed.
    pub async fn run(self: Arc<Self>, launcher: Launcher, changed: impl Fn() + Send + Sync) {
        let mut backoff = BACKOFF_MIN;
        while !self.stop.is_cancelled() {
            let began = Instant::now();
            let error = match self.life(&launcher, &changed).await {
                Ok(()) if self.stop.is_cancelled() => break,
                Ok(()) => "it ended".to_owned(),
                Err(error) => error,
            };
            self.connection.send_replace(None);
            if self.stop.is_cancelled() {
                break;
            }
            tracing::warn!(server = %self.entry.name, root = %self.root.name, error, "an MCP server is down");
            *self.state.write() = State::Down(error);
            changed();
            if began.elapsed() > GOOD_RUN {
                backoff = BACKOFF_MIN;
            }
            tokio::select! {
                () = self.stop.cancelled() => break,
                () = tokio::time::sleep(backoff) => {}
                () = self.wanted.notified(), if backoff > BACKOFF_MIN => {
                    tokio::time::sleep(BACKOFF_MIN).await;
                }
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
        self.connection.send_replace(None);
    }

    /// A server that ended may have been rewritten before: its start looks again.
    async fn is_as_trusted(&self) -> bool {
        let (root, key) = (self.root.clone(), self.entry.key.clone());
        let look = move || {
            let entries = config::read(&root.confine, &Digests::default()).unwrap_or_default();
            entries.iter().any(|entry| entry.key == key)
        };
        tokio::task::spawn_blocking(look).await.unwrap_or(false)
    }

    /// From start to end. `Err` says why it could not start.
    async fn life(&self, launcher: &Launcher, changed: &(impl Fn() + Sync)) -> Result<(), String> {
        *self.state.write() = State::Starting;
        let handler = Handler(self.tools_changed.clone());
        match self.entry.spec.as_ref().map_err(Clone::clone)? {
            Spec::Stdio { command, args, env } => {
                if !self.is_as_trusted().await {
                    return Err("its entry or a file that it names has changed since it was trusted".into());
                }
                let mut child = Child::spawn(&self.entry.name, command, args, env, self.root.path(), launcher).await?;
                let ended = self.connected(child.connect(handler), changed).await;
                child.end().await;
                ended
            }
            Spec::Http { url, headers } => self.connected(http::connect(handler, url, headers), changed).await,
        }
    }

    async fn connected(
        &self,
        connect: impl Future<Output = Result<(Service, stdio::Death), String>>,
        changed: &(impl Fn() + Sync),
    ) -> Result<(), String> {
        let (service, death) = tokio::select! {
            connected = tokio::time::timeout(START_TIMEOUT, connect) => {
                connected.map_err(|_| format!("it did not start within {START_TIMEOUT:?}"))??
            }
            () = self.stop.cancelled() => return Ok(()),
        };
        let peer = service.peer().clone();
        let end = service.cancellation_token();
        // Fused: it is waited for again after it ended.
        let mut waiting = std::pin::pin!(service.waiting().fuse());
        let mut death = std::pin::pin!(death);
        // A list is asked for while death is watched: a server may die over it.
        let mut listed = false;
        let broken = CancellationToken::new();
        let outcome = loop {
            let list = async {
                if listed {
                    self.tools_changed.notified().await;
                }
                list_tools(&peer).await
            };
            tokio::select! {
                tools = list => match tools {
                    Ok(tools) => {
                        tracing::info!(server = %self.entry.name, root = %self.root.name, tools = tools.len(), "an MCP server is up");
                        *self.tools.write() = Arc::new(tools);
                        *self.state.write() = State::Up;
                        self.connection.send_replace(Some(Connection { peer: peer.clone(), broken: broken.clone() }));
                        listed = true;
                        changed();
                    }
                    Err(error) => break Err(error),
                },
                _ = &mut waiting => break Ok(()),
                () = &mut death => break Err("its process ended".into()),
                () = self.stop.cancelled() => break Ok(()),
                () = broken.cancelled() => break Err("its connection is of no use any more".into()),
            }
        };
        self.connection.send_replace(None);
        end.cancel();
        let _ = tokio::time::timeout(Duration::from_secs(2), &mut waiting).await;
        outcome
    }
}

async fn list_tools(peer: &Peer<RoleClient>) -> Result<Vec<ServerTool>, String> {
    let list = async {
        let mut tools: Vec<ServerTool> = Vec::new();
        let mut cursor = None;
        for _ in 0..PAGES_MAX {
            let page = PaginatedRequestParams::default().with_cursor(cursor.take());
            let page = peer.list_tools(Some(page)).await.map_err(|e| format!("it did not list its tools: {e}"))?;
            tools.extend(page.tools.into_iter().filter_map(clean));
            if tools.len() > TOOLS_MAX {
                tracing::warn!(
                    tools = tools.len(),
                    "an MCP server offers more than {TOOLS_MAX} tools; the rest is left out"
                );
                tools.truncate(TOOLS_MAX);
                break;
            }
            match page.next_cursor.filter(|c| !c.is_empty()) {
                Some(next) => cursor = Some(next),
                None => break,
            }
        }
        // A name twice is a lie: the first one counts.
        let mut seen = std::collections::HashSet::new();
        tools.retain(|tool| seen.insert(tool.name.clone()));
        Ok(tools)
    };
    tokio::time::timeout(LIST_TIMEOUT, list)
        .await
        .unwrap_or_else(|_| Err(format!("it did not list its tools within {LIST_TIMEOUT:?}")))
}

fn clean(tool: Tool) -> Option<ServerTool> {
    let name = tool.name.into_owned();
    if name.is_empty() || name.len() > 256 {
        return None;
    }
    let description = super::names::description(tool.description.as_deref().unwrap_or(""));
    Some(ServerTool { description, schema: super::names::schema(&tool.input_schema), name })
}
