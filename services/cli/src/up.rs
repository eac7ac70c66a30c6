//! `reliant up`: a whole mesh on this machine. It starts the same roles as production, each as its own process.

use std::{
    io::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use reliant_devstack::{DaemonSpec, Mesh, MeshSpec, Placement, RoleProcess, Server, Stack, StackConfig, StackError};
use reliant_middleware::Jwt;
use reliant_observe::{Observe, ObserveConfig};
use reliant_runtime::{Drain, config::ENV_PREFIX};
use reliant_store::{Store, StoreConfig};
use serde::{Deserialize, Serialize};

use crate::{
    args::{Global, UpArgs},
    config::{Config, settings},
};

/// What `reliant up` leaves for other commands on this machine, readable by its person alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Running {
    pub api_url: String,
    pub token: String,
    pub gateway_url: String,
    /// The page with traces, which is also where they are sent.
    #[serde(default)]
    pub observe_url: Option<String>,
}

const RUNNING_FILE: &str = "up.json";
/// How long a role may take to hand over what it holds, once Ctrl-C was pressed.
const DRAIN_PATIENCE: Duration = Duration::from_secs(20);
const SUPERVISE_INTERVAL: Duration = Duration::from_millis(500);
/// Keys that `up` gives each role itself, and whose value is not the person's to choose.
const CHOSEN_KEYS: [&str; 8] = [
    "api.listen",
    "api.admin",
    "gateway.listen",
    "gateway.admin",
    "worker.admin",
    "bus.url",
    "bus.inbox_prefix",
    "telemetry.spool_dir",
];
const LOCAL_SUBJECT: &str = "local";
const LOGIN_CODE_TTL: Duration = Duration::from_secs(24 * 60 * 60);
/// Of the token that other commands here use; each start writes a new one.
const TOKEN_TTL: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// `--data-dir`, `RELIANT_DATA_DIR`, else the usual place.
pub fn data_dir(given: &Option<PathBuf>) -> Result<PathBuf> {
    if let Some(dir) = given {
        return Ok(dir.clone());
    }
    if let Some(dir) = std::env::var_os("XDG_DATA_HOME").filter(|dir| !dir.is_empty()) {
        return Ok(PathBuf::from(dir).join("reliant"));
    }
    let home = std::env::home_dir().filter(|dir| !dir.as_os_str().is_empty());
    let home = home.context("there is no home directory; say where to keep data with --data-dir")?;
    Ok(home.join(".local/share/reliant"))
}

impl Running {
    pub fn read(data_dir: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(data_dir.join(RUNNING_FILE)).ok()?).ok()
    }
}

/// A started mesh with one person and one daemon.
pub struct Up {
    pub stack: Stack,
    pub mesh: Mesh,
    pub daemon: RoleProcess,
    pub store: Store,
    pub running: Running,
    pub login_url: String,
    /// Ends last: it sees how the others ended.
    _observe: Option<Observe>,
}

/// What differs between `up` and `demo`.
pub struct Plan {
    pub data_dir: PathBuf,
    pub tools_dir: Option<PathBuf>,
    pub root: PathBuf,
    pub trust_mcp: bool,
    pub usual_ports: bool,
    pub observe: bool,
    /// Variables that the daemon and its tools get besides the harmless ones.
    pub environment: Vec<String>,
    pub config: Option<PathBuf>,
    /// `--set` of each role.
    pub settings: Vec<(String, String)>,
}

pub async fn run(global: Global, args: UpArgs) -> Result<()> {
    let data_dir = data_dir(&args.data_dir)?;
    if let Some((pid, info)) = reliant_devstack::running_info(&data_dir) {
        if args.reset {
            bail!("reliant runs here (process {pid}); stop it with Ctrl-C before --reset");
        }
        say(&format!("already running at {} (process {pid})", info.unwrap_or_else(|| "an unknown address".into())));
        return Ok(());
    }
    if args.reset && data_dir.exists() {
        say(&format!("deleting {}", data_dir.display()));
        std::fs::remove_dir_all(&data_dir).with_context(|| format!("could not delete {}", data_dir.display()))?;
    }
    let root = std::fs::canonicalize(&args.root)
        .with_context(|| format!("the directory {} cannot be opened", args.root.display()))?;
    // A key that no role knows is refused here, and not by each role's log.
    let config = Config::load(&global)?;
    let settings = settings(&global)?;
    if let Some((key, _)) = settings.iter().find(|(key, _)| CHOSEN_KEYS.contains(&key.as_str())) {
        bail!(
            "--set {key} has no effect here: `reliant up` chooses it; start the roles with `reliant server` to set it"
        );
    }
    let drain = Drain::new();
    drain.watch_signals().context("could not listen for Ctrl-C")?;
    let started = Instant::now();
    let environment = config.daemon.environment;
    let plan = Plan {
        data_dir,
        tools_dir: args.tools_dir,
        root,
        trust_mcp: args.trust_mcp,
        usual_ports: true,
        observe: args.observe,
        environment,
        config: global.config,
        settings,
    };
    let up = tokio::select! {
        up = start(plan) => match up {
            Err(error) => match error.downcast_ref::<StackError>() {
                Some(StackError::AlreadyRunning { info, .. }) => {
                    say(&format!("already running at {}", info.as_deref().unwrap_or("an address it has not said yet")));
                    return Ok(());
                }
                _ => return Err(error),
            },
            Ok(up) => up,
        },
        () = drain.draining() => bail!("stopped while starting"),
    };
    announce(&up, started.elapsed());
    supervise(up, &drain).await
}

/// Starts servers, roles and the daemon; says what takes a while.
pub async fn start(plan: Plan) -> Result<Up> {
    let mut config = if plan.usual_ports {
        StackConfig::new(&plan.data_dir)
    } else {
        StackConfig { durable: true, ..StackConfig::for_tests(&plan.data_dir) }
    };
    if let Some(dir) = &plan.tools_dir {
        config.tools_dir = dir.clone();
    }
    for (server, placement) in [
        (Server::Postgres, &mut config.postgres),
        (Server::Nats, &mut config.nats),
        (Server::Temporal, &mut config.temporal),
    ] {
        if let Some(url) = std::env::var(server.variable()).ok().filter(|url| !url.is_empty()) {
            *placement = Placement::External(url);
        }
    }
    let names: Vec<_> = config.private().map(Server::name).collect();
    let what = if names.is_empty() { "with your servers".to_owned() } else { format!("servers: {}", names.join(", ")) };
    let stack = progress(&what, Stack::start(config)).await?;

    let key_file = plan.data_dir.join("jwt.pem");
    if !key_file.exists() {
        write_private(&key_file, Jwt::generate_pem().as_bytes())?;
    }
    let extra_config = match &plan.config {
        Some(path) => std::fs::read_to_string(path)
            .with_context(|| format!("the configuration file {} cannot be read", path.display()))?,
        None => String::new(),
    };
    let observe = if plan.observe { Some(observe(plan.usual_ports).await?) } else { None };
    let mut env: Vec<_> = plan.settings.iter().map(|(key, value)| (variable(key), value.clone())).collect();
    if let Some(observe) = &observe {
        env.push(("RELIANT_TELEMETRY__OTLP_ENDPOINT".to_owned(), observe.url()));
    }
    let spec = MeshSpec {
        binary: std::env::current_exe().context("this program's own file cannot be found")?,
        dir: plan.data_dir.clone(),
        database_url: stack.postgres_url.clone(),
        temporal_address: stack.temporal_address.clone(),
        task_queue: "reliant".into(),
        jwt_key_file: key_file.clone(),
        apis: 1,
        workers: 1,
        gateways: 1,
        usual_ports: plan.usual_ports,
        extra_config,
        env,
        role_env: Vec::new(),
    };
    let mesh = progress("roles: api, worker, gateway", Mesh::start(spec, &stack)).await?;

    let store_config = StoreConfig { url: stack.postgres_url.clone(), max_connections: 2, ..StoreConfig::default() };
    let store = Store::connect(&store_config).await.context("Postgres cannot be reached")?;
    let name = std::env::var("USER").unwrap_or_else(|_| "you".into());
    let user = store.ensure_user(LOCAL_SUBJECT, &name, "admin").await?.id;
    let key = std::fs::read_to_string(&key_file).with_context(|| format!("{} cannot be read", key_file.display()))?;
    let (token, _) = Jwt::from_pem(&key)?.sign(LOCAL_SUBJECT, TOKEN_TTL)?;
    let code = store.create_login_code(user, LOGIN_CODE_TTL).await?;
    let observe_url = observe.as_ref().map(Observe::url);
    let running = Running { api_url: mesh.api_url(0), token, gateway_url: mesh.gateway_url(0), observe_url };
    write_private(&plan.data_dir.join(RUNNING_FILE), &serde_json::to_vec(&running)?)?;

    let (_, secret) = store.register_daemon(user, &hostname(), true).await?;
    let state_dir = plan.data_dir.join("daemon");
    if plan.trust_mcp {
        let pending = reliant_daemon::pending_trust(&state_dir, &plan.root)?;
        for server in &pending {
            say(&format!("trusted: {} ({})", server.name, server.summary));
        }
        reliant_daemon::trust(&state_dir, &plan.root, &pending)
            .context("the MCP servers of the root cannot be trusted")?;
    }
    let root_name = plan.root.file_name().map_or_else(|| "root".into(), |name| name.to_string_lossy().into_owned());
    let daemon = DaemonSpec {
        name: "daemon-0".into(),
        gateway_url: running.gateway_url.clone(),
        token: secret,
        state_dir,
        roots: vec![(root_name, plan.root.clone())],
        environment: plan.environment,
        extra_config: String::new(),
    };
    let daemon = progress("daemon", mesh.start_daemon(daemon)).await?;
    let connected = async {
        loop {
            let daemons = store.list_daemons(user, false).await?;
            if daemons.iter().any(|daemon| daemon.connected) {
                return Ok::<_, anyhow::Error>(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    progress("daemon's connection", async {
        match tokio::time::timeout(Duration::from_secs(30), connected).await {
            Ok(result) => result,
            Err(_) => bail!("the daemon did not connect within 30 s; its log is {}", daemon.log().display()),
        }
    })
    .await?;
    stack.announce(&running.api_url)?;
    let login_url = format!("{}/#code={code}", running.api_url);
    Ok(Up { stack, mesh, daemon, store, running, login_url, _observe: observe })
}

/// The environment variable of a configuration key.
fn variable(key: &str) -> String {
    format!("{ENV_PREFIX}{}", key.to_uppercase().replace('.', "__"))
}

/// On the usual port where it is free, else on any.
async fn observe(usual_port: bool) -> Result<Observe> {
    let usual = ObserveConfig::default();
    let any = ObserveConfig { listen: SocketAddr::from(([127, 0, 0, 1], 0)), ..ObserveConfig::default() };
    if usual_port && let Ok(observe) = Observe::start(usual).await {
        return Ok(observe);
    }
    Ok(Observe::start(any).await?)
}

fn announce(up: &Up, took: Duration) {
    say(&format!("ready in {:.1} s", took.as_secs_f64()));
    say("");
    say(&format!("  browser    {}", up.login_url));
    say("             (the link signs you in once; `reliant up` prints a new one each time)");
    say("  terminal   reliant chat");
    say(&format!("  api        {}", up.running.api_url));
    say(&format!("  gateway    {}", up.running.gateway_url));
    if let Some(url) = &up.running.observe_url {
        say(&format!("  traces     {url} (and `reliant trace` for the newest turn)"));
    }
    say(&format!("  logs       {}", up.stack.data_dir().join("logs").display()));
    let mut keys = vec!["OPENAI_API_KEY", "ANTHROPIC_API_KEY"];
    keys.retain(|name| std::env::var_os(name).is_some_and(|key| !key.is_empty()));
    say(&match keys.len() {
        1.. => format!("  models     real ones ({}), and the simulator", keys.join(", ")),
        0 => "  models     a simulator answers; set OPENAI_API_KEY or ANTHROPIC_API_KEY for a real model".into(),
    });
    say("");
    say("Ctrl-C stops everything.");
}

/// Until Ctrl-C; a role that dies is said and started again, as an orchestrator would.
async fn supervise(mut up: Up, drain: &Drain) -> Result<()> {
    while !drain.is_draining() {
        tokio::select! {
            () = drain.draining() => break,
            () = tokio::time::sleep(SUPERVISE_INTERVAL) => {}
        }
        let Up { mesh, daemon, stack, .. } = &mut up;
        let roles = mesh.apis.iter_mut().chain(&mut mesh.workers).chain(&mut mesh.gateways);
        for role in roles.chain([&mut mesh.sim, daemon]) {
            if !role.is_alive() && !drain.is_draining() {
                say(&format!("{} ended; its log is {}; starting it again", role.name(), role.log().display()));
                if let Err(error) = role.restart(Duration::from_secs(30)).await {
                    say(&format!("{} could not be started again: {error}", role.name()));
                }
            }
        }
        for server in Server::ALL {
            if stack.port(server).is_some() && stack.pid(server).is_none() && !drain.is_draining() {
                say(&format!("{server} ended; its log is {}; starting it again", stack.log_file(server).display()));
                if let Err(error) = stack.restart(server).await {
                    say(&format!("{server} could not be started again: {error}"));
                }
            }
        }
    }
    say("stopping: daemon, api, worker, gateway, then the servers");
    stop(up).await;
    say("stopped");
    Ok(())
}

/// Drains the daemon first, the servers last.
pub async fn stop(mut up: Up) {
    // Other commands then say that nothing runs here; a file that stays only costs them a refused connection.
    let _ = std::fs::remove_file(up.stack.data_dir().join(RUNNING_FILE));
    up.daemon.stop(DRAIN_PATIENCE).await;
    up.mesh.stop(DRAIN_PATIENCE).await;
    drop(up.store);
    up.stack.stop().await;
}

/// Says what is waited for, once it takes longer than a second.
async fn progress<T, E>(what: &str, work: impl Future<Output = Result<T, E>>) -> Result<T>
where
    E: Into<anyhow::Error>,
{
    let mut work = std::pin::pin!(work);
    let started = Instant::now();
    if let Ok(done) = tokio::time::timeout(Duration::from_secs(1), &mut work).await {
        return done.map_err(Into::into);
    }
    say(&format!("starting {what} …"));
    let done = work.await.map_err(Into::into)?;
    say(&format!("{what}: up after {:.1} s", started.elapsed().as_secs_f64()));
    Ok(done)
}

pub fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "this-machine".into() } else { name.into() }
}

/// Readable by the owner alone, whole or not at all; its directory is made if absent.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("could not make {}", dir.display()))?;
    }
    Ok(reliant_devstack::write_private(path, bytes)?)
}

/// The program's own voice. Whoever closed the pipe wants no more of it, and what runs goes on.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_of_up_is_a_variable_of_its_roles() {
        assert_eq!(variable("api.limits.streams"), "RELIANT_API__LIMITS__STREAMS");
        let global = |set: &str| Global { config: None, set: vec![set.into()] };
        assert_eq!(settings(&global("a.b=c=d")).unwrap(), [("a.b".to_owned(), "c=d".to_owned())]);
        assert!(settings(&global("a.b")).is_err());
        assert!(Config::load(&global("api.limits.nonsense=3")).is_err());
    }
}
