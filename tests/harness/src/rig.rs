//! One mesh under test.
//!
//! Postgres and Temporal are shared by all rigs of a test process; each rig has its own database, task queue and NATS,
//! so that workers of one test never take another's work.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result};
use reliant_client::{Client, ClientConfig};
use reliant_devstack::{DaemonSpec, Mesh, MeshSpec, Placement, RoleProcess, Stack, StackConfig};
use reliant_middleware::Jwt;
use reliant_store::{Store, StoreConfig};
use reliant_types::{UserId, boxed, pb};
use tempfile::TempDir;
use tokio::sync::OnceCell;

use crate::wait::eventually;

const TEMPLATE: &str = "reliant_template";
const TOKEN_TTL: Duration = Duration::from_secs(3600);
const CONNECT_PATIENCE: Duration = Duration::from_secs(30);

/// Once per process: the TLS provider that every client needs.
pub fn init() {
    // A second installation is refused, and means that it is there.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

struct Servers {
    stack: Stack,
    _dir: TempDir,
}

static SERVERS: OnceCell<Servers> = OnceCell::const_new();
static RIGS: AtomicUsize = AtomicUsize::new(0);

async fn servers() -> Result<&'static Servers> {
    SERVERS
        .get_or_try_init(|| async {
            init();
            let dir = TempDir::with_prefix("reliant-servers-")?;
            let config = StackConfig { nats: Placement::Off, ..StackConfig::for_tests(dir.path()) };
            let stack = Stack::start(config).await?;
            stack.create_database(TEMPLATE).await?;
            let url = stack.database_url(TEMPLATE);
            let store = Store::connect(&StoreConfig { url, max_connections: 1, ..StoreConfig::default() }).await?;
            store.migrate().await?;
            store.close().await;
            Ok(Servers { stack, _dir: dir })
        })
        .await
}

#[derive(Debug, Clone)]
pub struct RigOptions {
    pub apis: usize,
    pub workers: usize,
    pub gateways: usize,
    /// More TOML for all roles.
    pub config: String,
    pub env: Vec<(String, String)>,
    /// All roles send all their spans to [`crate::sink()`].
    pub traced: bool,
    /// The `reliant` binary; default: the one built beside the test.
    pub binary: Option<PathBuf>,
}

impl Default for RigOptions {
    fn default() -> Self {
        Self { apis: 1, workers: 1, gateways: 1, config: String::new(), env: Vec::new(), traced: false, binary: None }
    }
}

/// A running mesh with its own database.
pub struct Rig {
    pub mesh: Mesh,
    pub store: Store,
    /// This rig's NATS.
    pub nats: Stack,
    pub database_url: String,
    pub temporal_address: String,
    pub task_queue: String,
    jwt: Jwt,
    dir: TempDir,
}

/// Somebody with a token and a client.
#[derive(Clone)]
pub struct Person {
    pub user: UserId,
    pub token: String,
    pub client: Client,
}

#[derive(Debug, Clone, Default)]
pub struct DaemonOptions {
    /// More keys of `[daemon]`.
    pub config: String,
    /// Files of the root, by relative path.
    pub files: Vec<(&'static str, String)>,
    /// Trust the MCP servers that `.mcp.json` names.
    pub trust_mcp: bool,
    /// Which gateway to dial.
    pub gateway: usize,
}

/// A daemon process and the directory it offers.
pub struct TestDaemon {
    pub id: String,
    pub root: PathBuf,
    pub state_dir: PathBuf,
    pub token: String,
    pub process: RoleProcess,
}

impl Rig {
    #[boxed]
    pub async fn start(options: RigOptions) -> Result<Self> {
        let servers = servers().await?;
        let number = RIGS.fetch_add(1, Ordering::Relaxed);
        let dir = TempDir::with_prefix("reliant-rig-")?;
        let nats = StackConfig {
            postgres: Placement::Off,
            temporal: Placement::Off,
            ..StackConfig::for_tests(dir.path().join("servers"))
        };
        let nats = Stack::start(nats).await?;
        let database = format!("rig_{number}");
        servers.stack.database_from_template(TEMPLATE, &database).await?;
        let database_url = servers.stack.database_url(&database);
        let pem = Jwt::generate_pem();
        let jwt_key_file = dir.path().join("jwt.pem");
        std::fs::write(&jwt_key_file, &pem)?;
        let task_queue = format!("rig-{}-{number}", std::process::id());
        let mut env = options.env;
        if options.traced {
            env.push(("RELIANT_TELEMETRY__OTLP_ENDPOINT".into(), crate::sink()?.url().into()));
            env.push(("RELIANT_TELEMETRY__SAMPLE_RATIO".into(), "1.0".into()));
        }
        let spec = MeshSpec {
            binary: options.binary.map_or_else(binary, Ok)?,
            dir: dir.path().to_owned(),
            database_url: database_url.clone(),
            temporal_address: servers.stack.temporal_address.clone(),
            task_queue: task_queue.clone(),
            jwt_key_file,
            apis: options.apis,
            workers: options.workers,
            gateways: options.gateways,
            usual_ports: false,
            extra_config: options.config,
            env,
            role_env: Vec::new(),
        };
        let mesh = Mesh::start(spec, &nats).await?;
        let store =
            Store::connect(&StoreConfig { url: database_url.clone(), max_connections: 4, ..StoreConfig::default() })
                .await?;
        Ok(Self {
            mesh,
            store,
            nats,
            database_url,
            temporal_address: servers.stack.temporal_address.clone(),
            task_queue,
            jwt: Jwt::from_pem(&pem)?,
            dir,
        })
    }

    /// The shared Postgres and Temporal, for their pids and for killing them.
    #[boxed]
    pub async fn shared_servers() -> Result<&'static Stack> {
        Ok(&servers().await?.stack)
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A new person, signed in at the first api.
    #[boxed]
    pub async fn person(&self, name: &str) -> Result<Person> {
        let user = self.store.ensure_user(&format!("{name}@test"), name, "member").await?.id;
        let (token, _) = self.jwt.sign(&format!("{name}@test"), TOKEN_TTL)?;
        let client = Client::connect(ClientConfig::new(self.mesh.api_url(0), token.clone())).await?;
        Ok(Person { user, token, client })
    }

    /// Lets nobody into this rig's database, or everybody again: Postgres as good as away, for this rig alone.
    #[boxed]
    pub async fn close_database(&self, closed: bool) -> Result<()> {
        use sqlx::{Connection as _, Executor as _};
        let url = servers().await?.stack.database_url("postgres");
        let name = self.database_url.rsplit('/').next().and_then(|name| name.split('?').next()).unwrap_or_default();
        let mut admin = sqlx::PgConnection::connect(&url).await?;
        let statement = format!("ALTER DATABASE {name} WITH ALLOW_CONNECTIONS {}", !closed);
        admin.execute(sqlx::AssertSqlSafe(statement)).await?;
        if closed {
            let query = sqlx::query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1");
            query.bind(name.to_owned()).execute(&mut admin).await?;
        }
        admin.close().await?;
        Ok(())
    }

    /// A token of `name` that stopped being valid.
    pub fn expired_token(&self, name: &str) -> Result<String> {
        let long_ago = std::time::SystemTime::now() - 2 * TOKEN_TTL;
        Ok(self.jwt.sign_at(&format!("{name}@test"), long_ago, TOKEN_TTL)?.0)
    }

    /// Registers and starts a daemon of `person`, and waits until it is connected with its tools.
    #[boxed]
    pub async fn daemon(&self, person: &Person, name: &str, options: DaemonOptions) -> Result<TestDaemon> {
        let base = self.dir.path().join(format!("daemon-{name}"));
        let root = base.join("project");
        std::fs::create_dir_all(&root)?;
        for (path, content) in &options.files {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().context("a file has a parent")?)?;
            std::fs::write(path, content)?;
        }
        let state_dir = base.join("state");
        std::fs::create_dir_all(&state_dir)?;
        if options.trust_mcp {
            reliant_daemon::trust(&state_dir, &root, &reliant_daemon::pending_trust(&state_dir, &root)?)?;
        }
        let request = pb::RegisterDaemonRequest { name: name.to_owned(), replace: true };
        let made = person.client.register_daemon(request).await?;
        let process = self
            .mesh
            .start_daemon(DaemonSpec {
                name: format!("daemon-{name}"),
                gateway_url: self.mesh.gateway_url(options.gateway),
                token: made.token.clone(),
                state_dir: state_dir.clone(),
                roots: vec![("project".into(), root.clone())],
                environment: Vec::new(),
                extra_config: options.config,
            })
            .await?;
        let daemon = TestDaemon { id: made.daemon_id, root, state_dir, token: made.token, process };
        self.connected(person, &daemon.id, true).await?;
        Ok(daemon)
    }

    #[boxed]
    pub async fn connected(&self, person: &Person, daemon: &str, wanted: bool) -> Result<pb::Daemon> {
        eventually(&format!("daemon with connected = {wanted}"), CONNECT_PATIENCE, || async {
            let list = person.client.list_daemons(pb::ListDaemonsRequest { include_revoked: false }).await?;
            Ok(list.daemons.into_iter().find(|d| d.id == daemon && d.connected == wanted))
        })
        .await
    }
}

impl Person {
    /// A chat with this model; the person's only daemon is chosen if there is one.
    #[boxed]
    pub async fn chat(&self, model: &str, mode: pb::ChatMode) -> Result<pb::Chat> {
        let request = pb::CreateChatRequest {
            title: "test".into(),
            model: model.into(),
            mode: mode as i32,
            ..Default::default()
        };
        self.client.create_chat(request).await?.chat.context("the answer has no chat")
    }
}

/// The `reliant` binary built by the same cargo call as this test.
pub fn binary() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let beside = test.ancestors().skip(1).map(|dir| dir.join("reliant")).find(|path| path.is_file());
    beside.with_context(|| format!("no `reliant` binary near {}; build the workspace first", test.display()))
}

/// Where `make tools` put servers and test tools.
pub fn tools_dir() -> PathBuf {
    StackConfig::default_tools_dir()
}
