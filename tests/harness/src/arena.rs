//! A whole mesh in which anything may die, at any moment: servers of its own, a proxy on every connection, and a
//! supervisor that starts again what has ended, as an orchestrator would.
//!
//! A process under a fault is claimed, so that one fault at a time is its own; what dies unclaimed has died by itself,
//! and is told of.

use std::{
    collections::HashSet,
    io::{Read as _, Seek as _, SeekFrom},
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use parking_lot::Mutex;
use reliant_client::{Client, ClientConfig};
use reliant_devstack::{DaemonSpec, Mesh, MeshSpec, NatsRole, RoleProcess, Server, Stack, StackConfig};
use reliant_middleware::Jwt;
use reliant_store::{Store, StoreConfig};
use reliant_types::{UserId, boxed, pb};
use tempfile::TempDir;

use crate::{
    Observer, Proxy, init,
    link::{Link, Peer},
    rig::binary,
    wait::eventually,
};

const DATABASE: &str = "arena";
const TASK_QUEUE: &str = "arena";
const TOKEN_TTL: Duration = Duration::from_secs(6 * 3600);
const CONNECT_PATIENCE: Duration = Duration::from_secs(60);
/// Of one start; a role that waits for a server under a fault is given the time.
pub(crate) const START_PATIENCE: Duration = Duration::from_secs(90);
/// Of the log of a role that ended by itself.
const COLLAPSE_LINES: usize = 8;
/// Read from the end of a log at most.
const LOG_TAIL_MAX_BYTES: u64 = 4 * 1024 * 1024;
const SUPERVISE_EVERY: Duration = Duration::from_millis(250);
/// Calls of people are tried again as long as a fault lasts, and longer.
const CALL_DEADLINE: Duration = Duration::from_secs(180);

#[derive(Debug, Clone)]
pub struct ArenaOptions {
    pub apis: usize,
    pub workers: usize,
    pub gateways: usize,
    /// More TOML for all roles.
    pub config: String,
    /// Postgres waits for its disk at each commit, as in production; without it a slow disk is not noticed.
    pub durable: bool,
}

impl Default for ArenaOptions {
    fn default() -> Self {
        Self { apis: 2, workers: 3, gateways: 2, config: String::new(), durable: false }
    }
}

/// A role process under supervision.
#[derive(Debug)]
pub struct Supervised {
    pub name: String,
    /// `api`, `worker`, `gateway` or `daemon`.
    pub kind: &'static str,
    /// What the role says of itself in `instances`.
    pub address: String,
    /// Of a role, where its metrics are.
    pub(crate) admin: Option<SocketAddr>,
    /// Of a daemon.
    pub(crate) state_dir: Option<PathBuf>,
    log: PathBuf,
    pub(crate) process: tokio::sync::Mutex<RoleProcess>,
}

impl Supervised {
    pub async fn pid(&self) -> u32 {
        self.process.lock().await.pid()
    }

    /// The last lines of its log.
    #[boxed]
    pub async fn log_tail(&self, lines: usize) -> String {
        let log = self.log.clone();
        tokio::task::spawn_blocking(move || last_lines(&log, lines)).await.unwrap_or_default()
    }

    /// What the role says of a metric without labels.
    #[boxed]
    pub async fn metric(&self, name: &str) -> Result<f64> {
        let admin = self.admin.with_context(|| format!("{} has no admin page", self.name))?;
        let (_, page) = reliant_devstack::http_get(admin, "/metrics").await?;
        let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        value.with_context(|| format!("{} says nothing of {name}", self.name))
    }
}

/// What a fault can be done to.
#[derive(Debug, Clone)]
pub enum Node {
    Role(Arc<Supervised>),
    Server(Server),
    /// The workers' ways to who answers model calls.
    Provider,
}

impl Node {
    pub fn peer(&self) -> Peer {
        match self {
            Node::Role(role) => Peer::Role(role.name.clone()),
            Node::Server(server) => Peer::Server(*server),
            Node::Provider => Peer::Provider,
        }
    }
}

/// A process that ended without being told to.
#[derive(Debug, Clone)]
pub struct Collapse {
    pub name: String,
    pub log_tail: String,
}

/// Somebody with a client of their own behind a balancer over all api replicas.
pub struct Visitor {
    pub user: UserId,
    pub token: String,
    pub client: Client,
    balancer: Proxy,
}

pub struct Host {
    pub id: String,
    pub name: String,
    pub root: PathBuf,
    pub state_dir: PathBuf,
    pub role: Arc<Supervised>,
}

pub struct Arena {
    pub observer: Observer,
    pub store: Store,
    pub roles: Vec<Arc<Supervised>>,
    pub(crate) stack: Stack,
    pub(crate) links: Mutex<Vec<Arc<Link>>>,
    pub(crate) collapses: Mutex<Vec<Collapse>>,
    claimed: Mutex<HashSet<Peer>>,
    pub(crate) server_faults: AtomicU64,
    hosts: Mutex<Vec<Arc<Supervised>>>,
    apis: Vec<(String, SocketAddr)>,
    gateways: Vec<(String, SocketAddr)>,
    jwt: Jwt,
    // The simulator and the daemons' starter; its roles have moved to `roles`.
    mesh: Mesh,
    dir: TempDir,
}

/// While it lives nobody else does anything to this process.
pub struct Claim {
    arena: Arc<Arena>,
    peer: Peer,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.arena.claimed.lock().remove(&self.peer);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // A backend of Postgres that is still paused would never notice that its server is gone, and outlive it.
        for server in Server::ALL {
            let _ = self.stack.resume(server);
        }
    }
}

impl Arena {
    #[boxed]
    pub async fn start(options: ArenaOptions) -> Result<Arc<Self>> {
        init();
        let dir = TempDir::with_prefix("reliant-arena-")?;
        let servers = StackConfig { durable: options.durable, ..StackConfig::for_tests(dir.path().join("servers")) };
        let stack = Stack::start(servers).await?;
        stack.create_database(DATABASE).await?;
        let database_url = stack.database_url(DATABASE);
        let store =
            Store::connect(&StoreConfig { url: database_url.clone(), max_connections: 2, ..StoreConfig::default() })
                .await?;
        store.migrate().await?;

        let mut links = Vec::new();
        let mut role_env = Vec::new();
        for (kind, count, nats_role) in [
            ("api", options.apis, NatsRole::Api),
            ("worker", options.workers, NatsRole::Worker),
            ("gateway", options.gateways, NatsRole::Gateway),
        ] {
            for index in 0..count {
                let name = format!("{kind}-{index}");
                for server in [Server::Postgres, Server::Nats, Server::Temporal] {
                    if kind == "gateway" && server == Server::Temporal {
                        continue;
                    }
                    let port = stack.port(server).context("the server is ours")?;
                    let target = SocketAddr::from(([127, 0, 0, 1], port));
                    let link = Link::start(Peer::Role(name.clone()), Peer::Server(server), target).await?;
                    let (key, url) = match server {
                        Server::Postgres => ("RELIANT_STORE__URL", database_url.clone()),
                        Server::Nats => ("RELIANT_BUS__URL", stack.nats_url_for(nats_role)),
                        Server::Temporal => ("RELIANT_FLOWS__ADDRESS", format!("http://127.0.0.1:{port}")),
                    };
                    let url = url.replace(&format!(":{port}"), &format!(":{}", link.proxy.address().port()));
                    role_env.push((name.clone(), key.to_owned(), url));
                    links.push(Arc::new(link));
                }
                if kind == "worker" {
                    // The provider's address is known when it listens; until then there is nobody behind the way.
                    let link = Link::to_nobody(Peer::Role(name.clone()), Peer::Provider).await?;
                    let url = format!("http://{}/v1", link.proxy.address());
                    role_env.push((name, "RELIANT_SIM__URL".to_owned(), url));
                    links.push(Arc::new(link));
                }
            }
        }
        let pem = Jwt::generate_pem();
        let jwt_key_file = dir.path().join("jwt.pem");
        std::fs::write(&jwt_key_file, &pem)?;
        let spec = MeshSpec {
            binary: binary()?,
            dir: dir.path().to_owned(),
            database_url: database_url.clone(),
            temporal_address: stack.temporal_address.clone(),
            task_queue: TASK_QUEUE.to_owned(),
            jwt_key_file,
            apis: options.apis,
            workers: options.workers,
            gateways: options.gateways,
            usual_ports: false,
            extra_config: options.config,
            env: Vec::new(),
            role_env,
        };
        let mut mesh = Mesh::start(spec, &stack).await?;
        let provider = mesh.sim.addresses().listen.context("the simulator tells its address")?;
        for link in links.iter().filter(|link| link.to == Peer::Provider) {
            link.proxy.target(vec![provider]);
        }
        let listen = |roles: &[RoleProcess]| -> Vec<(String, SocketAddr)> {
            let all = roles.iter().filter_map(|role| Some((role.name().to_owned(), role.addresses().listen?)));
            all.collect()
        };
        let (apis, gateways) = (listen(&mesh.apis), listen(&mesh.gateways));
        let mut roles = Vec::new();
        for (kind, processes) in [
            ("api", std::mem::take(&mut mesh.apis)),
            ("worker", std::mem::take(&mut mesh.workers)),
            ("gateway", std::mem::take(&mut mesh.gateways)),
        ] {
            roles.extend(processes.into_iter().map(|process| Arc::new(supervised(kind, process))));
        }
        let arena = Arc::new(Self {
            observer: Observer::connect(&database_url).await?,
            store,
            roles,
            stack,
            links: Mutex::new(links),
            collapses: Mutex::default(),
            claimed: Mutex::default(),
            server_faults: AtomicU64::new(0),
            hosts: Mutex::default(),
            apis,
            gateways,
            jwt: Jwt::from_pem(&pem)?,
            mesh,
            dir,
        });
        let supervised = Arc::downgrade(&arena);
        tokio::spawn(async move {
            while let Some(arena) = supervised.upgrade() {
                arena.supervise().await;
                drop(arena);
                tokio::time::sleep(SUPERVISE_EVERY).await;
            }
        });
        Ok(arena)
    }

    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// Where the roles' logs are.
    pub fn logs(&self) -> PathBuf {
        self.dir.path().join("logs")
    }

    /// Where Postgres and Temporal keep their data.
    pub fn servers_dir(&self) -> &std::path::Path {
        self.stack.data_dir()
    }

    /// Temporal itself, past every proxy, as `http://host:port`.
    pub fn temporal_url(&self) -> String {
        format!("http://{}", self.stack.temporal_address)
    }

    pub fn task_queue(&self) -> &'static str {
        TASK_QUEUE
    }

    /// Keeps the directory with all logs when the arena ends.
    pub fn keep_files(self: Arc<Self>) {
        if let Ok(mut arena) = Arc::try_unwrap(self) {
            arena.dir.disable_cleanup(true);
        }
    }

    pub fn roles_of(&self, kind: &str) -> Vec<Arc<Supervised>> {
        self.roles.iter().filter(|role| role.kind == kind).cloned().collect()
    }

    /// The role that announced itself at this address.
    pub fn role_at(&self, address: &str) -> Option<Arc<Supervised>> {
        self.roles.iter().find(|role| role.address == address).cloned()
    }

    pub fn role_named(&self, name: &str) -> Option<Arc<Supervised>> {
        self.roles.iter().find(|role| role.name == name).cloned()
    }

    /// The role whose connection to Postgres comes from this port there.
    pub fn role_by_port(&self, port: u16) -> Option<Arc<Supervised>> {
        let links = self.links.lock().clone();
        let link = links.iter().find(|link| link.to == Peer::Server(Server::Postgres) && link.proxy.owns_port(port))?;
        match &link.from {
            Peer::Role(name) => self.role_named(name),
            Peer::Server(_) | Peer::Provider => None,
        }
    }

    /// The api replica that the visitor's newest connection went to.
    pub fn api_of(&self, visitor: &Visitor) -> Option<Arc<Supervised>> {
        self.role_named(&self.apis.get(visitor.balancer.last_target())?.0)
    }

    /// A person, signed in through a balancer of their own over all api replicas.
    #[boxed]
    pub async fn visitor(&self, name: &str) -> Result<Visitor> {
        let subject = format!("{name}@test");
        let user = self.store.ensure_user(&subject, name, "member").await?.id;
        let (token, _) = self.jwt.sign(&subject, TOKEN_TTL)?;
        let mut targets = Vec::new();
        for (api, address) in &self.apis {
            let link = Link::start(Peer::Role(format!("client-{name}")), Peer::Role(api.clone()), *address).await?;
            targets.push(link.proxy.address());
            self.links.lock().push(Arc::new(link));
        }
        let balancer = Proxy::start(targets).await?;
        let config = ClientConfig::new(format!("http://{}", balancer.address()), token.clone());
        let client = Client::connect(config.call_deadline(CALL_DEADLINE)).await?;
        Ok(Visitor { user, token, client, balancer })
    }

    /// Registers and starts a daemon that knows all gateways, each by a way of its own.
    #[boxed]
    pub async fn host(&self, visitor: &Visitor, name: &str) -> Result<Host> {
        let base = self.dir.path().join(format!("daemon-{name}"));
        let (root, state_dir) = (base.join("project"), base.join("state"));
        std::fs::create_dir_all(&root)?;
        let request = pb::RegisterDaemonRequest { name: name.to_owned(), replace: true };
        let made = visitor.client.register_daemon(request).await?;
        let process_name = format!("daemon-{name}");
        let mut ways = Vec::new();
        for (gateway, address) in &self.gateways {
            let link = Link::start(Peer::Role(process_name.clone()), Peer::Role(gateway.clone()), *address).await?;
            ways.push(format!("http://{}", link.proxy.address()));
            self.links.lock().push(Arc::new(link));
        }
        let process = self
            .mesh
            .start_daemon(DaemonSpec {
                name: process_name,
                gateway_url: ways.join(","),
                token: made.token.clone(),
                state_dir: state_dir.clone(),
                roots: vec![("project".into(), root.clone())],
                environment: Vec::new(),
                extra_config: String::new(),
            })
            .await?;
        let role = Arc::new(Supervised { state_dir: Some(state_dir.clone()), ..supervised("daemon", process) });
        self.hosts.lock().push(role.clone());
        eventually("the daemon's connection", CONNECT_PATIENCE, || async {
            let list = visitor.client.list_daemons(pb::ListDaemonsRequest { include_revoked: false }).await?;
            Ok(list.daemons.into_iter().find(|daemon| daemon.id == made.daemon_id && daemon.connected))
        })
        .await?;
        Ok(Host { id: made.daemon_id, name: name.to_owned(), root, state_dir, role })
    }

    /// Links that end at `peer`.
    pub fn links_of(&self, peer: &Peer) -> Vec<Arc<Link>> {
        self.links.lock().iter().filter(|link| link.touches(peer)).cloned().collect()
    }

    /// None: somebody else is at it.
    pub fn claim(self: &Arc<Self>, node: &Node) -> Option<Claim> {
        let peer = node.peer();
        let new = self.claimed.lock().insert(peer.clone());
        new.then(|| Claim { arena: self.clone(), peer })
    }

    /// What is under a fault now, or is being started again after one.
    pub fn claimed(&self) -> Vec<Peer> {
        self.claimed.lock().iter().cloned().collect()
    }

    /// How many faults servers have had so far; two equal readings with none under way mean that there was none between.
    pub fn server_faults(&self) -> u64 {
        self.server_faults.load(Ordering::Relaxed)
    }

    pub fn collapses(&self) -> Vec<Collapse> {
        self.collapses.lock().clone()
    }

    async fn supervise(self: &Arc<Self>) {
        let all: Vec<_> = self.roles.iter().cloned().chain(self.hosts.lock().iter().cloned()).collect();
        for role in all {
            let Ok(mut process) = role.process.try_lock() else { continue };
            if process.is_alive() {
                continue;
            }
            drop(process);
            let Some(claim) = self.claim(&Node::Role(role.clone())) else { continue };
            let log_tail = role.log_tail(COLLAPSE_LINES).await;
            self.collapses.lock().push(Collapse { name: role.name.clone(), log_tail });
            let arena = self.clone();
            tokio::spawn(async move {
                // A role that cannot start yet is tried again by the next look.
                let _ = arena.restart(&role).await;
                drop(claim);
            });
        }
    }

    /// Starts an ended role again, trying on while what it needs is away.
    pub(crate) async fn restart(&self, role: &Supervised) -> Result<()> {
        let deadline = tokio::time::Instant::now() + START_PATIENCE;
        let mut process = role.process.lock().await;
        loop {
            match process.restart(START_PATIENCE).await {
                Ok(()) => return Ok(()),
                Err(error) if tokio::time::Instant::now() >= deadline => {
                    return Err(error).with_context(|| format!("{} did not come back", role.name));
                }
                Err(_) => tokio::time::sleep(SUPERVISE_EVERY).await,
            }
        }
    }

    /// Stops every daemon, so that its journal can be read.
    #[boxed]
    pub async fn stop_hosts(&self, patience: Duration) {
        let hosts = self.hosts.lock().clone();
        let stops = hosts.iter().map(|host| async {
            self.claimed.lock().insert(Peer::Role(host.name.clone()));
            host.process.lock().await.stop(patience).await;
        });
        futures::future::join_all(stops).await;
    }
}

fn supervised(kind: &'static str, process: RoleProcess) -> Supervised {
    let addresses = process.addresses();
    // A worker has no front; it announces its admin listener.
    let address = addresses.listen.or(addresses.admin).map(|address| address.to_string()).unwrap_or_default();
    let name = process.name().to_owned();
    Supervised {
        name,
        kind,
        address,
        admin: addresses.admin,
        state_dir: None,
        log: process.log(),
        process: tokio::sync::Mutex::new(process),
    }
}

/// Reads no more of a log than its end.
fn last_lines(log: &std::path::Path, lines: usize) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_MAX_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_MAX_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
