//! The three servers as one thing: started together, killed, paused and restarted one by one.

use reliant_types::boxed;
use std::{
    mem,
    path::{self, Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use crate::{
    DataDirLock, NatsRole, NatsUser, Placement, Server, StackConfig, StackError, Tools, external, nats,
    ports::free_port,
    postgres::{self, Cluster},
    process::{Launch, POLL, Process},
    secrets::Secrets,
    temporal,
};

/// A port can be taken between our look and the server's bind; then another one is tried.
const PORT_ATTEMPTS: usize = 5;
/// What an ended server may have needed to end well.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// Running servers. Dropped, it kills them; [`Stack::stop`] lets them end well.
pub struct Stack {
    /// Empty where the server is [`Placement::Off`]. Names the user and its password: not for logs.
    pub postgres_url: String,
    /// As above; the user is [`NatsRole::Local`].
    pub nats_url: String,
    /// host:port.
    pub temporal_address: String,
    /// http://host:port/metrics of a private Temporal.
    pub temporal_metrics_url: Option<String>,
    config: StackConfig,
    secrets: Secrets,
    postgres: Option<Slot<(Cluster, u16)>>,
    nats: Option<Slot<(PathBuf, u16)>>,
    temporal: Option<Slot<(PathBuf, temporal::Ports)>>,
    // Last, so that the directory is free only when nobody runs in it.
    lock: DataDirLock,
}

/// A private server: what starts it again, and its process while it has one.
struct Slot<S> {
    spec: S,
    process: Mutex<Option<Process>>,
}

impl<S> Slot<S> {
    fn new(spec: S, process: Process) -> Self {
        Self { spec, process: Mutex::new(Some(process)) }
    }

    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack").field("data_dir", &self.config.data_dir).finish_non_exhaustive()
    }
}

impl Stack {
    /// Starts what is private, all at once, and returns when every one of them answers.
    #[boxed]
    pub async fn start(mut config: StackConfig) -> Result<Stack, StackError> {
        // The servers run in another working directory.
        config.data_dir = path::absolute(&config.data_dir).map_err(StackError::io("find", &config.data_dir))?;
        let lock = DataDirLock::acquire(&config.data_dir)?;
        for server in Server::ALL {
            if let Placement::External(url) = config.placement(server) {
                external::reachable(server, url).await?;
            }
        }
        let secrets = Secrets::load_or_make(&config.data_dir)?;
        let tools = Tools::new(&config.tools_dir);
        let deadline = Instant::now() + config.start_timeout;
        let (postgres, nats, temporal) = tokio::try_join!(
            start_postgres(&config, &tools, &secrets, deadline),
            start_nats(&config, &tools, &secrets, deadline),
            start_temporal(&config, &tools, deadline),
        )?;
        let mut stack = Stack {
            postgres_url: url_of(&config.postgres),
            nats_url: url_of(&config.nats),
            temporal_address: url_of(&config.temporal),
            temporal_metrics_url: None,
            config,
            secrets,
            postgres,
            nats,
            temporal,
            lock,
        };
        if stack.postgres.is_some() {
            stack.postgres_url = stack.database_url(postgres::DATABASE);
        }
        if let Some(slot) = &stack.nats {
            stack.nats_url = nats_url(slot.spec.1, &nats::user(&stack.secrets, NatsRole::Local));
        }
        if let Some(slot) = &stack.temporal {
            let ports = slot.spec.1;
            stack.temporal_address = format!("127.0.0.1:{}", ports.grpc);
            stack.temporal_metrics_url = Some(format!("http://127.0.0.1:{}/metrics", ports.metrics));
        }
        Ok(stack)
    }

    /// What a second process on this data directory is told (see [`StackError::AlreadyRunning`]).
    pub fn announce(&self, info: &str) -> Result<(), StackError> {
        self.lock.announce(info)
    }

    pub fn data_dir(&self) -> &Path {
        &self.config.data_dir
    }

    pub fn log_file(&self, server: Server) -> PathBuf {
        log_file(&self.config, server)
    }

    /// The private NATS server's user of a role; `None` for an external server.
    pub fn nats_user(&self, role: NatsRole) -> Option<NatsUser> {
        self.nats.as_ref().map(|_| nats::user(&self.secrets, role))
    }

    /// The NATS URL with a role's own user in it; an external server's URL as it was given.
    pub fn nats_url_for(&self, role: NatsRole) -> String {
        match &self.nats {
            Some(slot) => nats_url(slot.spec.1, &nats::user(&self.secrets, role)),
            None => self.nats_url.clone(),
        }
    }

    /// 127.0.0.1's port of a private server.
    pub fn port(&self, server: Server) -> Option<u16> {
        match server {
            Server::Postgres => self.postgres.as_ref().map(|slot| slot.spec.1),
            Server::Nats => self.nats.as_ref().map(|slot| slot.spec.1),
            Server::Temporal => self.temporal.as_ref().map(|slot| slot.spec.1.grpc),
        }
    }

    /// The process of a private server that runs.
    pub fn pid(&self, server: Server) -> Option<u32> {
        self.with(server, |process| process.is_alive().then(|| process.pid().as_raw_pid().unsigned_abs()))?
    }

    /// kill -9. It stays dead until [`Stack::restart`].
    pub fn kill(&self, server: Server) -> Result<(), StackError> {
        self.with(server, Process::kill_now).ok_or(StackError::NotOurs { server })
    }

    /// SIGSTOP to the server and all its processes.
    pub fn pause(&self, server: Server) -> Result<(), StackError> {
        self.with(server, |process| process.pause()).ok_or(StackError::NotOurs { server })
    }

    pub fn resume(&self, server: Server) -> Result<(), StackError> {
        self.with(server, |process| process.resume()).ok_or(StackError::NotOurs { server })
    }

    /// Asks it to end, as an operator would. It stays away until [`Stack::restart`].
    #[boxed]
    pub async fn stop_one(&self, server: Server) -> Result<(), StackError> {
        match self.take(server) {
            Some(mut process) => {
                process.stop(stop_signal(server), STOP_PATIENCE).await;
                Ok(())
            }
            None => Err(StackError::NotOurs { server }),
        }
    }

    /// Starts it again on the same port with the same data, killing it first where it still runs.
    #[boxed]
    pub async fn restart(&self, server: Server) -> Result<(), StackError> {
        // Killed by its drop.
        drop(self.take(server));
        let deadline = Instant::now() + self.config.start_timeout;
        let log = self.log_file(server);
        match server {
            Server::Postgres => {
                let slot = self.postgres.as_ref().ok_or(StackError::NotOurs { server })?;
                let process = run_postgres(&slot.spec.0, slot.spec.1, &log, true, deadline).await?;
                *slot.process() = Some(process);
            }
            Server::Nats => {
                let slot = self.nats.as_ref().ok_or(StackError::NotOurs { server })?;
                let process = run_nats(&self.config, &slot.spec.0, slot.spec.1, true, deadline).await?;
                *slot.process() = Some(process);
            }
            Server::Temporal => {
                let slot = self.temporal.as_ref().ok_or(StackError::NotOurs { server })?;
                let process = run_temporal(&self.config, &slot.spec.0, slot.spec.1, true, deadline).await?;
                *slot.process() = Some(process);
            }
        }
        Ok(())
    }

    /// Ends all private servers well, who uses another's data first, and frees the data directory.
    #[boxed]
    pub async fn stop(self) {
        for server in Server::ALL {
            if let Some(mut process) = self.take(server) {
                process.stop(stop_signal(server), STOP_PATIENCE).await;
            }
        }
    }

    /// The URL of another database on the private Postgres.
    pub fn database_url(&self, name: &str) -> String {
        match &self.postgres {
            Some(slot) => {
                format!("postgres://{}:{}@127.0.0.1:{}/{name}", postgres::USER, self.secrets.postgres, slot.spec.1)
            }
            None => self.postgres_url.clone(),
        }
    }

    /// An empty database on the private Postgres.
    #[boxed]
    pub async fn create_database(&self, name: &str) -> Result<String, StackError> {
        postgres::check_name(name)?;
        self.sql("postgres", &format!("CREATE DATABASE {name}")).await?;
        Ok(self.database_url(name))
    }

    /// A copy of `template`, to which nobody may be connected.
    #[boxed]
    pub async fn database_from_template(&self, template: &str, name: &str) -> Result<String, StackError> {
        postgres::check_name(template)?;
        postgres::check_name(name)?;
        self.sql("postgres", &format!("CREATE DATABASE {name} TEMPLATE {template}")).await?;
        Ok(self.database_url(name))
    }

    /// Also ends the connections to it.
    #[boxed]
    pub async fn drop_database(&self, name: &str) -> Result<(), StackError> {
        postgres::check_name(name)?;
        self.sql("postgres", &format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await.map(drop)
    }

    /// One statement by psql on the private Postgres, answered with its unadorned output.
    #[boxed]
    pub async fn sql(&self, database: &str, sql: &str) -> Result<String, StackError> {
        let slot = self.postgres.as_ref().ok_or(StackError::NotOurs { server: Server::Postgres })?;
        slot.spec.0.sql(slot.spec.1, &self.secrets.postgres, database, sql).await
    }

    fn with<T>(&self, server: Server, act: impl FnOnce(&mut Process) -> T) -> Option<T> {
        let mut guard = match server {
            Server::Postgres => self.postgres.as_ref()?.process(),
            Server::Nats => self.nats.as_ref()?.process(),
            Server::Temporal => self.temporal.as_ref()?.process(),
        };
        guard.as_mut().map(act)
    }

    fn take(&self, server: Server) -> Option<Process> {
        match server {
            Server::Postgres => mem::take(&mut *self.postgres.as_ref()?.process()),
            Server::Nats => mem::take(&mut *self.nats.as_ref()?.process()),
            Server::Temporal => mem::take(&mut *self.temporal.as_ref()?.process()),
        }
    }
}

fn url_of(placement: &Placement) -> String {
    match placement {
        Placement::External(url) => url.clone(),
        Placement::Private { .. } | Placement::Off => String::new(),
    }
}

fn nats_url(port: u16, user: &NatsUser) -> String {
    format!("nats://{}:{}@127.0.0.1:{port}", user.name, user.password)
}

fn log_file(config: &StackConfig, server: Server) -> PathBuf {
    config.data_dir.join("logs").join(format!("{}.log", server.to_string().to_lowercase()))
}

/// Postgres reads SIGINT as "end now, with a checkpoint"; SIGTERM would wait for its clients.
fn stop_signal(server: Server) -> Signal {
    if server == Server::Postgres { Signal::INT } else { Signal::TERM }
}

/// The wished port of a private server; `None`: it is not ours to start.
fn wish(config: &StackConfig, server: Server) -> Option<u16> {
    match config.placement(server) {
        Placement::Private { port } => Some(*port),
        Placement::External(_) | Placement::Off => None,
    }
}

fn port_was_taken(error: &StackError) -> bool {
    matches!(error, StackError::Died { tail, .. }
        if tail.to_lowercase().contains("address already in use") || tail.contains("can't set") && tail.contains("port"))
}

async fn start_postgres(
    config: &StackConfig,
    tools: &Tools,
    secrets: &Secrets,
    deadline: Instant,
) -> Result<Option<Slot<(Cluster, u16)>>, StackError> {
    let Some(mut wish) = wish(config, Server::Postgres) else { return Ok(None) };
    let log = log_file(config, Server::Postgres);
    let cluster = Cluster::prepare(tools, &config.data_dir, config.durable, &secrets.postgres, deadline).await?;
    for attempt in 1.. {
        let port = free_port(wish)?;
        match run_postgres(&cluster, port, &log, false, deadline).await {
            Err(error) if attempt < PORT_ATTEMPTS && port_was_taken(&error) => wish = 0,
            Err(error) => return Err(error),
            Ok(process) => return Ok(Some(Slot::new((cluster, port), process))),
        }
    }
    Err(StackError::NoPort)
}

async fn run_postgres(
    cluster: &Cluster,
    port: u16,
    log: &Path,
    append_log: bool,
    deadline: Instant,
) -> Result<Process, StackError> {
    loop {
        let mut process = Process::start(cluster.launch(port, log.to_owned(), append_log))?;
        let pid = process.pid();
        match process.until_ready(deadline, || async { cluster.is_ready(pid) }).await {
            Ok(()) => return Ok(process),
            Err(StackError::Died { tail, .. })
                if tail.contains(postgres::PREDECESSOR_LINGERS) && Instant::now() < deadline =>
            {
                sleep(POLL).await;
            }
            Err(error) => return Err(error),
        }
    }
}

async fn start_nats(
    config: &StackConfig,
    tools: &Tools,
    secrets: &Secrets,
    deadline: Instant,
) -> Result<Option<Slot<(PathBuf, u16)>>, StackError> {
    let Some(mut wish) = wish(config, Server::Nats) else { return Ok(None) };
    let program = tools.nats()?;
    for attempt in 1.. {
        let port = free_port(wish)?;
        nats::write_config(&config.data_dir, port, secrets)?;
        match run_nats(config, &program, port, false, deadline).await {
            Err(error) if attempt < PORT_ATTEMPTS && port_was_taken(&error) => wish = 0,
            Err(error) => return Err(error),
            Ok(process) => return Ok(Some(Slot::new((program, port), process))),
        }
    }
    Err(StackError::NoPort)
}

async fn run_nats(
    config: &StackConfig,
    program: &Path,
    port: u16,
    append_log: bool,
    deadline: Instant,
) -> Result<Process, StackError> {
    let mut process = Process::start(Launch {
        name: Server::Nats.name(),
        identity: crate::leash::Identity::Same,
        program: program.to_owned(),
        env: Vec::new(),
        inherits: None,
        working_dir: "/".into(),
        args: vec!["--config".into(), config.data_dir.join(nats::CONFIG_FILE).into()],
        log: log_file(config, Server::Nats),
        append_log,
    })?;
    process.until_ready(deadline, || nats::is_ready(port)).await?;
    Ok(process)
}

async fn start_temporal(
    config: &StackConfig,
    tools: &Tools,
    deadline: Instant,
) -> Result<Option<Slot<(PathBuf, temporal::Ports)>>, StackError> {
    let Some(mut wish) = wish(config, Server::Temporal) else { return Ok(None) };
    let program = tools.temporal()?;
    for attempt in 1.. {
        let ports = temporal::Ports { grpc: free_port(wish)?, http: free_port(0)?, metrics: free_port(0)? };
        match run_temporal(config, &program, ports, false, deadline).await {
            Err(error) if attempt < PORT_ATTEMPTS && port_was_taken(&error) => wish = 0,
            Err(error) => return Err(error),
            Ok(process) => return Ok(Some(Slot::new((program, ports), process))),
        }
    }
    Err(StackError::NoPort)
}

async fn run_temporal(
    config: &StackConfig,
    program: &Path,
    ports: temporal::Ports,
    append_log: bool,
    deadline: Instant,
) -> Result<Process, StackError> {
    let mut process = Process::start(Launch {
        name: Server::Temporal.name(),
        identity: crate::leash::Identity::Same,
        program: program.to_owned(),
        env: Vec::new(),
        inherits: None,
        working_dir: "/".into(),
        args: temporal::args(&config.data_dir, ports),
        log: log_file(config, Server::Temporal),
        append_log,
    })?;
    process.until_ready(deadline, || temporal::is_ready(ports)).await?;
    Ok(process)
}
