//! `reliant daemon …`: identity, start, and a look at the one that runs.

use std::{
    io::{IsTerminal as _, Read as _, Seek as _, SeekFrom},
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use reliant_daemon::{Built, DaemonConfig, RootConfig};
use reliant_runtime::{AdminServer, Drain, InstanceId, TaskKind, check_fn};
use reliant_types::{Secret, pb};

use crate::{
    args::{DaemonCommand, DaemonLogsArgs, DaemonRegisterArgs, DaemonStartArgs, DaemonState, DaemonTrustArgs, Global},
    config::Config,
    front, server,
    up::{hostname, say, write_private},
};

const STOP_PATIENCE: Duration = Duration::from_secs(30);
const TOKEN_FILE: &str = "token";
/// What it was registered as.
const NAME_FILE: &str = "name";
const FOLLOW_INTERVAL: Duration = Duration::from_millis(250);
const LOG_TAIL_MAX_BYTES: u64 = 4 * 1024 * 1024;

pub async fn run(global: Global, command: DaemonCommand) -> Result<()> {
    match command {
        DaemonCommand::Register(args) => register(global, args).await,
        DaemonCommand::Start(args) => start(global, args).await,
        DaemonCommand::Status(state) => status(&global, &state),
        DaemonCommand::Stop(state) => {
            let pid = reliant_daemon::stop(&state_dir(&global, &state)?, STOP_PATIENCE).await?;
            say(&format!("the daemon (process {pid}) stopped"));
            Ok(())
        }
        DaemonCommand::Logs(args) => logs(&global, args).await,
        DaemonCommand::Trust(args) => trust(&global, args),
    }
}

fn state_dir(global: &Global, state: &DaemonState) -> Result<PathBuf> {
    if let Some(dir) = &state.state_dir {
        return Ok(dir.clone());
    }
    let configured = Config::load(global)?.daemon.state_dir;
    if configured.as_os_str().is_empty() { Ok(DaemonConfig::default_state_dir()?) } else { Ok(configured) }
}

async fn register(global: Global, args: DaemonRegisterArgs) -> Result<()> {
    let client = front::connect(&args.front).await?;
    let name = args.name.unwrap_or_else(hostname);
    let made = client.register_daemon(pb::RegisterDaemonRequest { name: name.clone(), replace: args.replace }).await?;
    let path = state_dir(&global, &args.state)?.join(TOKEN_FILE);
    write_private(&path, made.token.as_bytes())?;
    write_private(&path.with_file_name(NAME_FILE), name.as_bytes())?;
    say(&format!("registered '{name}' as {}", made.daemon_id));
    say(&format!("its token is kept in {} and is not shown again", path.display()));
    match &args.state.state_dir {
        Some(dir) => say(&format!("start it with: reliant daemon start --state-dir {}", dir.display())),
        None => say("start it with: reliant daemon start"),
    }
    Ok(())
}

async fn start(global: Global, args: DaemonStartArgs) -> Result<()> {
    let mut config = Config::load(&global)?;
    config.daemon.state_dir = state_dir(&global, &args.state)?;
    if let Some(gateway) = args.gateway {
        config.daemon.gateway = gateway;
    }
    if args.no_landlock {
        config.daemon.landlock = false;
    }
    if args.allow_home {
        config.daemon.allow_home = true;
    }
    if !args.root.is_empty() {
        config.daemon.roots = args.root.iter().map(|root| parse_root(root)).collect::<Result<_>>()?;
    }
    if config.daemon.token.is_empty() {
        let path = config.daemon.state_dir.join(TOKEN_FILE);
        let token = std::fs::read_to_string(&path)
            .with_context(|| format!("no token in {}; run `reliant daemon register` first", path.display()))?;
        config.daemon.token = Secret::new(token.trim());
        if config.daemon.name.is_empty() {
            let name = std::fs::read_to_string(path.with_file_name(NAME_FILE)).unwrap_or_default();
            config.daemon.name = name.trim().to_owned();
        }
    }
    if args.reset_journal
        && let Some(aside) = reliant_daemon::reset_journal(&config.daemon.state_dir)?
    {
        say(&format!("the old journal was put aside as {}", aside.display()));
    }
    std::fs::create_dir_all(&config.daemon.state_dir)
        .with_context(|| format!("could not make {}", config.daemon.state_dir.display()))?;
    config.telemetry.log_file.get_or_insert_with(|| reliant_daemon::log_path(&config.daemon.state_dir));
    config.telemetry.spool_dir.get_or_insert_with(|| config.daemon.state_dir.join("spans"));
    let guard = server::telemetry(&config, "reliant-daemon", InstanceId::new())?;
    let drain = Drain::new();
    drain.watch_signals().context("could not listen for signals")?;
    let admin = config.daemon.admin;
    let mut daemon = reliant_daemon::build(config.daemon).await?;
    if let Some(addr) = admin {
        daemon = with_admin(daemon, addr, &drain).await?;
    }
    daemon.run(drain.token()).await?;
    guard.shutdown();
    Ok(())
}

/// `/health`, `/ready` and `/metrics`, until the process ends.
async fn with_admin(daemon: Built, addr: SocketAddr, drain: &Drain) -> Result<Built> {
    let connection = Arc::new(daemon.connection());
    let check = check_fn("gateway", move || {
        let connection = connection.clone();
        async move { connection() }
    });
    let admin = AdminServer::bind(addr, vec![check]).await;
    let admin = admin.with_context(|| {
        format!("the daemon's admin address {addr} cannot be listened on; give daemon.admin another")
    })?;
    let daemon = daemon.with_admin(admin.local_addr());
    drain.spawn(TaskKind::Upkeep("admin"), admin.serve(drain.clone()));
    Ok(daemon)
}

/// `NAME=DIR` or `DIR`.
fn parse_root(text: &str) -> Result<RootConfig> {
    let (name, path) = text.split_once('=').unwrap_or(("", text));
    let path = std::fs::canonicalize(path).with_context(|| format!("the root {path} cannot be opened"))?;
    Ok(RootConfig { name: name.to_owned(), path })
}

fn status(global: &Global, state: &DaemonState) -> Result<()> {
    let dir = state_dir(global, state)?;
    let Some(status) = reliant_daemon::status(&dir)? else {
        bail!("no daemon runs with {}; start one with `reliant daemon start`", dir.display());
    };
    let state = if status.connected { "connected" } else { "not connected" };
    say(&format!(
        "{} (process {}, version {}): {state} to {}",
        status.name, status.pid, status.version, status.gateway
    ));
    if !status.last_error.is_empty() && !status.connected {
        say(&format!("  last error: {}", status.last_error));
    }
    for root in &status.roots {
        say(&format!("  root {}: {}", root.name, root.path.display()));
    }
    say(&format!("  tools: {}", status.tools.join(", ")));
    for server in &status.mcp {
        say(&format!(
            "  MCP server {} ({}): {}, {} tools {}",
            server.server, server.root, server.state, server.tools, server.error
        ));
    }
    if let Some(admin) = status.admin {
        say(&format!("  admin pages: http://{admin}/ready and /metrics"));
    }
    say(&format!("  Landlock: {}", if status.landlock { "on" } else { "off" }));
    for call in &status.running {
        say(&format!("  running: {} {} since {}", call.tool, call.call_id, call.started_at));
    }
    say(&format!("  results not acknowledged: {}; journal: {} bytes", status.unacknowledged, status.journal_bytes));
    Ok(())
}

async fn logs(global: &Global, args: DaemonLogsArgs) -> Result<()> {
    let path = reliant_daemon::log_path(&state_dir(global, &args.state)?);
    let mut file = std::fs::File::open(&path)
        .with_context(|| format!("there is no log at {}; has the daemon run?", path.display()))?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_MAX_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    for line in &lines[lines.len().saturating_sub(args.lines)..] {
        say(line);
    }
    if !args.follow {
        return Ok(());
    }
    loop {
        tokio::time::sleep(FOLLOW_INTERVAL).await;
        let mut more = Vec::new();
        file.read_to_end(&mut more)?;
        for line in String::from_utf8_lossy(&more).lines() {
            say(line);
        }
    }
}

fn trust(global: &Global, args: DaemonTrustArgs) -> Result<()> {
    let dir = state_dir(global, &args.state)?;
    let root = std::fs::canonicalize(&args.root)
        .with_context(|| format!("the directory {} cannot be opened", args.root.display()))?;
    let mut pending = reliant_daemon::pending_trust(&dir, &root)?;
    if let Some(name) = &args.server {
        pending.retain(|server| server.name == *name);
    }
    if pending.is_empty() {
        say("nothing to trust: .mcp.json names no such server that was not trusted before");
        return Ok(());
    }
    for server in &pending {
        say(&format!("{}: {}", server.name, server.summary));
    }
    if !args.yes && !agreed()? {
        bail!("nothing was trusted");
    }
    reliant_daemon::trust(&dir, &root, &pending)?;
    for server in pending {
        say(&format!(
            "trusted: {}; it may start from now on, until its entry in .mcp.json or a file of the root that it names changes",
            server.name
        ));
    }
    Ok(())
}

/// Asks at the terminal; without one nobody can have seen what is shown.
fn agreed() -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        bail!("there is no terminal to ask at; give --yes to trust what is shown");
    }
    say("trust this? [y/N]");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("the answer could not be read")?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
