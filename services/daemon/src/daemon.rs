//! The daemon put together: `build` takes the state directory and recovers, `run` serves until it is told to stop.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use reliant_telemetry::chain;
use reliant_types::{Incarnation, boxed};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    calls::{Calls, Parts},
    config::DaemonConfig,
    error::DaemonError,
    journal::Journal,
    mcp::Mcp,
    output::Outputs,
    roots::Roots,
    state_dir::StateDir,
    status::{self, RootStatus, Status},
    tools::{Toolbox, environment::hide_own_environment, process, sandbox::Sandbox, tree},
    tunnel::{self, Declared, Shared},
};

const STATUS_INTERVAL: Duration = Duration::from_millis(500);
/// Roots' AGENTS.md and the like are looked at this often.
const DECLARE_INTERVAL: Duration = Duration::from_secs(5);
/// Between two looks at what runs in the background.
const SETTLE_INTERVAL: Duration = Duration::from_secs(10);
const TRIM_INTERVAL: Duration = Duration::from_secs(600);
/// After the last call ended: for its result to be collected.
const COLLECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A daemon that owns its state directory and has recovered, not connected yet.
pub struct Built {
    config: DaemonConfig,
    state_dir: StateDir,
    journal: Arc<Journal>,
    calls: Arc<Calls>,
    mcp: Arc<Mcp>,
    roots: Roots,
    shared: Arc<Shared>,
    started_at: String,
    admin: Option<SocketAddr>,
}

/// Takes the state directory, opens the journal, ends what an earlier process left.
#[boxed]
pub async fn build(config: DaemonConfig) -> Result<Built, DaemonError> {
    let config = config.checked()?;
    outlive_limits();
    let state_dir = StateDir::open(&config.state_dir)?;
    let dir = state_dir.path().to_owned();
    let roots = Roots::open_guarded(&config.roots, &dir, config.allow_home)?;
    let journal = Arc::new(Journal::open(&dir, config.journal_max_bytes)?);
    hide_own_environment();
    tree::adopt_orphans();
    let sandbox = Sandbox::probe(&config, &dir);
    for root in roots.iter() {
        sandbox.warn_of_root(root.path());
    }
    let mcp = Mcp::new(&config, roots.clone(), dir.clone(), sandbox.clone());
    let toolbox =
        Arc::new(Toolbox { mcp: mcp.clone(), files: Arc::default(), sandbox, bench_tools: config.bench_tools });
    let calls = Calls::new(Parts {
        journal: journal.clone(),
        outputs: Arc::new(Outputs::new(dir.join("outputs"), config.outputs_max_bytes)),
        roots: roots.clone(),
        toolbox,
        max_running: config.max_running,
        running_dir: dir.join("running"),
    });
    calls.recover().await?;
    let gateways = config.gateways().map(str::to_owned).collect();
    let shared = Arc::new(Shared::new(calls.clone(), config.token.clone(), gateways, hostname()));
    let started_at = chrono::Utc::now().to_rfc3339();
    let built = Built { config, state_dir, journal, calls, mcp, roots, shared, started_at, admin: None };
    built.shared.declared.send_replace(declared(&built.calls, &built.roots));
    Ok(built)
}

fn declared(calls: &Calls, roots: &Roots) -> Declared {
    Declared { roots: roots.iter().map(|r| r.declaration()).collect(), tools: calls.toolbox.declarations() }
}

/// A write past a limit on file sizes is to fail like one on a full disk, not to end the process. A handler, and not the
/// signal ignored: what the tools start has the usual behaviour again.
fn outlive_limits() {
    let kind = tokio::signal::unix::SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw());
    if let Err(error) = tokio::signal::unix::signal(kind) {
        tracing::warn!(error = %chain(&error), "a limit on file sizes would end this daemon");
    }
}

fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

impl Built {
    pub fn incarnation(&self) -> Incarnation {
        self.journal.incarnation()
    }

    /// The ids of the roots, in the order of the configuration.
    pub fn root_ids(&self) -> Vec<String> {
        self.roots.iter().map(|r| r.id.clone()).collect()
    }

    /// Says in the status file where the admin pages are, which whoever composes the process serves.
    pub fn with_admin(mut self, addr: SocketAddr) -> Self {
        self.admin = Some(addr);
        self
    }

    /// Whether the daemon is connected now, for `/ready`; else a sentence that says why not.
    pub fn connection(&self) -> impl Fn() -> Result<(), String> + Send + Sync + 'static {
        let connection = self.shared.connection.subscribe();
        move || match &*connection.borrow() {
            now if now.connected => Ok(()),
            now if now.last_error.is_empty() => Err("not connected yet".to_owned()),
            now => Err(format!("not connected: {}", now.last_error)),
        }
    }

    /// Serves until `stop`. Running calls then get their time, results their chance to be collected; whatever is not
    /// collected is offered by the next process. `Err`: the gateway told this daemon never to come back.
    #[boxed]
    pub async fn run(self, stop: CancellationToken) -> Result<(), DaemonError> {
        // Helpers live as long as this call does, however it ends.
        let helpers = CancellationToken::new();
        let _helpers = helpers.clone().drop_guard();
        let mcp = tokio::spawn(self.mcp.clone().run(helpers.child_token()));
        tokio::spawn(helpers.clone().run_until_cancelled_owned(keep_declared(
            self.shared.clone(),
            self.calls.clone(),
            self.roots.clone(),
            self.mcp.changes(),
        )));
        tokio::spawn(helpers.clone().run_until_cancelled_owned(keep_trimmed(self.calls.clone())));
        let running_dir = self.state_dir.path().join("running");
        tokio::spawn(helpers.clone().run_until_cancelled_owned(keep_settled(running_dir)));
        let leave = CancellationToken::new();
        let mut tunnel = tokio::spawn(tunnel::run(self.shared.clone(), leave.clone()));
        let mut tick = tokio::time::interval(STATUS_INTERVAL);
        let mut written = Status::default();
        let mut ended = None;
        while ended.is_none() && !stop.is_cancelled() {
            tokio::select! {
                done = &mut tunnel => ended = Some(done),
                () = stop.cancelled() => {}
                _ = tick.tick() => self.write_status(&mut written),
            }
        }
        let outcome = match ended {
            Some(done) => {
                self.calls.drain(Duration::ZERO).await;
                done.unwrap_or_else(|e| Err(DaemonError::Stopped(format!("a fault of the daemon: {e}"))))
            }
            None => {
                tracing::info!(running = self.calls.running_ids().len(), "stopping");
                self.calls.drain(self.config.drain()).await;
                self.collected().await;
                leave.cancel();
                tunnel.await.unwrap_or(Ok(()))
            }
        };
        helpers.cancel();
        let _ = mcp.await;
        let dir = self.state_dir.path().join("running");
        let _ = tokio::task::spawn_blocking(move || process::forget_running(&dir, &tree::kill_background())).await;
        self.write_status(&mut written);
        let journal = self.journal.clone();
        let _ = tokio::task::spawn_blocking(move || journal.close()).await;
        tracing::info!("stopped");
        outcome
    }

    async fn collected(&self) {
        let connected = || self.shared.connection.borrow().connected;
        let wait = async {
            while self.calls.outbox.len() > 0 && connected() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let _ = tokio::time::timeout(COLLECT_TIMEOUT, wait).await;
    }

    fn write_status(&self, written: &mut Status) {
        let connection = self.shared.connection.borrow().clone();
        let calls = &self.calls;
        let running = calls.running_status();
        let gauge = |state: &str, value: usize| {
            reliant_telemetry::metrics::JOURNAL_CALLS.with_label_values(&[state]).set(value as i64);
        };
        gauge("running", running.len());
        gauge("unacknowledged", calls.outbox.len());
        let now = Status {
            pid: std::process::id(),
            name: if self.config.name.is_empty() { self.shared.hostname.clone() } else { self.config.name.clone() },
            version: env!("CARGO_PKG_VERSION").into(),
            incarnation: self.journal.incarnation().to_string(),
            started_at: self.started_at.clone(),
            written_at: written.written_at.clone(),
            gateway: if connection.gateway.is_empty() { self.config.gateway.clone() } else { connection.gateway },
            connected: connection.connected,
            since: connection.since,
            daemon_id: connection.daemon_id,
            gateway_id: connection.gateway_id,
            last_error: connection.last_error,
            admin: self.admin,
            landlock: calls.toolbox.sandbox.is_on(),
            roots: self
                .roots
                .iter()
                .map(|r| RootStatus { id: r.id.clone(), name: r.name.clone(), path: r.path().to_owned() })
                .collect(),
            tools: self.shared.declared.borrow().tools.iter().map(|t| t.name.clone()).collect(),
            mcp: self.mcp.status(),
            running,
            unacknowledged: calls.outbox.len(),
            journal_bytes: self.journal.bytes(),
        };
        if now != *written {
            *written = Status { written_at: chrono::Utc::now().to_rfc3339(), ..now };
            if let Err(error) = status::write(self.state_dir.path(), written) {
                tracing::debug!(error = %chain(&error), "the status file cannot be written");
            }
        }
    }
}

async fn keep_declared(shared: Arc<Shared>, calls: Arc<Calls>, roots: Roots, mut changes: watch::Receiver<u64>) {
    loop {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(DECLARE_INTERVAL) => {}
        }
        let (calls, roots) = (calls.clone(), roots.clone());
        let Ok(now) = tokio::task::spawn_blocking(move || declared(&calls, &roots)).await else { return };
        shared.declared.send_if_modified(|old| {
            let changed = *old != now;
            if changed {
                *old = now;
            }
            changed
        });
    }
}

/// Waits for the background processes of calls that have ended.
async fn keep_settled(running_dir: PathBuf) {
    loop {
        tokio::time::sleep(SETTLE_INTERVAL).await;
        let dir = running_dir.clone();
        let settle = move || process::forget_running(&dir, &tree::settle_background());
        let _ = tokio::task::spawn_blocking(settle).await;
    }
}

async fn keep_trimmed(calls: Arc<Calls>) {
    loop {
        calls.journal.trim();
        let outputs = calls.outputs.clone();
        let _ = tokio::task::spawn_blocking(move || outputs.trim()).await;
        tokio::time::sleep(TRIM_INTERVAL).await;
    }
}
