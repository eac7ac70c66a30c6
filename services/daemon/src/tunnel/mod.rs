//! The daemon's way to the cloud: dial out, serve, dial again. One stream serves at a time; when a gateway drains, the
//! next stream is opened before the old one is left. Results are offered over the newest.

pub mod backoff;
mod session;

#[cfg(test)]
mod tests;

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use reliant_telemetry::{ClientCall, TraceContext, chain, metrics};
use reliant_types::{Secret, pb};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use backoff::{Backoff, Why};
use session::{Event, Session, SessionError};

use crate::{calls::Calls, error::DaemonError};

const CONNECT: &str = "reliant.v1.TunnelService/Connect";
/// A daemon that was told to stop may still deliver what it has.
const LAST_RESULTS: Duration = Duration::from_secs(10);

/// What the cloud is told of this daemon.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Declared {
    pub roots: Vec<pb::Root>,
    pub tools: Vec<pb::ToolDeclaration>,
}

/// For people and for the status file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Connection {
    pub connected: bool,
    pub gateway: String,
    pub gateway_id: String,
    pub daemon_id: String,
    /// RFC 3339.
    pub since: String,
    pub last_error: String,
}

pub struct Shared {
    pub calls: Arc<Calls>,
    pub token: Secret,
    pub gateways: Vec<String>,
    pub hostname: String,
    pub declared: watch::Sender<Declared>,
    /// What the newest hello said.
    pub hello_said: Mutex<Declared>,
    pub connection: watch::Sender<Connection>,
    /// This process's number, once a gateway gave one; kept for the process's life.
    instance: AtomicI64,
    sessions: AtomicU64,
    /// The call that opened the newest stream, or was to.
    dialled: Mutex<TraceContext>,
}

impl Shared {
    pub fn new(calls: Arc<Calls>, token: Secret, gateways: Vec<String>, hostname: String) -> Self {
        let since = chrono::Utc::now().to_rfc3339();
        Self {
            calls,
            token,
            gateways,
            hostname,
            declared: watch::Sender::default(),
            hello_said: Mutex::default(),
            connection: watch::Sender::new(Connection { since, ..Default::default() }),
            instance: AtomicI64::new(0),
            sessions: AtomicU64::new(0),
            dialled: Mutex::default(),
        }
    }

    /// A call for a stream; it links to the one before it.
    fn call(&self, address: &str) -> ClientCall {
        let mut dialled = self.dialled.lock();
        let call = ClientCall::start(CONNECT, address, &dialled);
        *dialled = TraceContext::of(call.span());
        call
    }

    fn hello(&self) -> pb::Hello {
        let declared = self.declared.borrow().clone();
        *self.hello_said.lock() = declared.clone();
        pb::Hello {
            incarnation: self.calls.journal.incarnation().to_string(),
            instance: self.instance.load(Ordering::Acquire),
            hostname: self.hostname.clone(),
            os: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            version: env!("CARGO_PKG_VERSION").into(),
            roots: declared.roots,
            tools: declared.tools,
            running_call_ids: self.calls.running_ids(),
        }
    }

    fn connected(&self, session: &Session) {
        self.instance.store(session.welcome.instance, Ordering::Release);
        tracing::info!(
            gateway = %session.address,
            gateway.id = %session.welcome.gateway_id,
            daemon.id = %session.welcome.daemon_id,
            daemon.instance = session.welcome.instance,
            lease.epoch = session.welcome.lease_epoch,
            "connected"
        );
        self.connection.send_replace(Connection {
            connected: true,
            gateway: session.address.clone(),
            gateway_id: session.welcome.gateway_id.clone(),
            daemon_id: session.welcome.daemon_id.clone(),
            since: chrono::Utc::now().to_rfc3339(),
            last_error: String::new(),
        });
    }

    fn disconnected(&self, error: &SessionError) {
        self.connection.send_modify(|c| {
            if c.connected {
                c.since = chrono::Utc::now().to_rfc3339();
            }
            c.connected = false;
            c.last_error = error.to_string();
        });
    }

    /// A number for the next stream, and the gateway it is to go to: another one each time, where several are known.
    fn next(&self) -> (u64, &str) {
        let number = self.sessions.fetch_add(1, Ordering::Relaxed) + 1;
        (number, &self.gateways[number as usize % self.gateways.len()])
    }

    async fn open(&self) -> Result<Session, SessionError> {
        let (number, address) = self.next();
        Session::open(self, number, address).await
    }
}

/// A stream that is served by a task of its own.
struct Served {
    task: JoinHandle<SessionError>,
    retire: CancellationToken,
    events: mpsc::Receiver<Event>,
    began: Instant,
}

fn serve(shared: &Arc<Shared>, session: Session) -> Served {
    shared.connected(&session);
    let (events_tx, events) = mpsc::channel(4);
    let retire = CancellationToken::new();
    let task = tokio::spawn(session.serve(shared.clone(), events_tx, retire.clone()));
    Served { task, retire, events, began: Instant::now() }
}

fn why(error: &SessionError, lasted: Option<Duration>) -> Why {
    match error {
        SessionError::Status(status) => Why::of_status(status, lasted),
        _ => lasted.map_or(Why::Failed, Why::Ended),
    }
}

/// Dials and serves until `stop`, or until the gateway says never to come back.
pub async fn run(shared: Arc<Shared>, stop: CancellationToken) -> Result<(), DaemonError> {
    let mut backoff = Backoff::default();
    let mut warned = false;
    loop {
        let opened = tokio::select! {
            opened = shared.open() => opened,
            () = stop.cancelled() => return Ok(()),
        };
        let (error, lasted) = match opened {
            Ok(session) => {
                warned = false;
                let served = serve(&shared, session);
                match served_to_the_end(&shared, served, &stop).await {
                    Some((error, began)) => (error, Some(began.elapsed())),
                    None => return Ok(()),
                }
            }
            Err(error) => (error, None),
        };
        shared.disconnected(&error);
        if let SessionError::Stop(reason) = error {
            tracing::error!(reason = %reason, "the gateway told this daemon to stop");
            shared.calls.drain(Duration::ZERO).await;
            let _ = tokio::time::timeout(LAST_RESULTS, session::deliver_rest(&shared)).await;
            return Err(DaemonError::Stopped(reason));
        }
        let why = why(&error, lasted);
        let delay = backoff.next(why);
        metrics::DAEMON_RECONNECTS.inc();
        match why {
            Why::Refused => tracing::error!(
                error = %chain(&error),
                "the gateway refuses this daemon's token; run `reliant daemon register`; trying again all the same"
            ),
            _ if !warned => tracing::warn!(error = %chain(&error), delay = ?delay, "not connected"),
            _ => tracing::debug!(error = %chain(&error), delay = ?delay, "not connected"),
        }
        warned = true;
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = stop.cancelled() => return Ok(()),
        }
    }
}

/// `None`: we were asked to stop, and the stream was left in order.
async fn served_to_the_end(
    shared: &Arc<Shared>,
    mut served: Served,
    stop: &CancellationToken,
) -> Option<(SessionError, Instant)> {
    loop {
        let reason = tokio::select! {
            end = &mut served.task => return Some((end.unwrap_or(SessionError::Ended), served.began)),
            () = stop.cancelled() => {
                served.retire.cancel();
                let _ = (&mut served.task).await;
                return None;
            }
            Some(Event::Drain(reason)) = served.events.recv() => reason,
        };
        tracing::info!(reason = %reason, "the gateway drains; opening the next stream");
        match open_next(shared, &mut served, stop).await {
            Ok(session) => {
                let next = serve(shared, session);
                served.retire.cancel();
                // It ends by itself, soon.
                served = next;
            }
            Err(end) => return end,
        }
    }
}

/// Keeps serving the old stream while the next one is dialled.
async fn open_next(
    shared: &Arc<Shared>,
    served: &mut Served,
    stop: &CancellationToken,
) -> Result<Session, Option<(SessionError, Instant)>> {
    let mut backoff = Backoff::default();
    // Gateways tell their daemons to go all at once.
    let mut delay = backoff.next(Why::Ended(backoff::GOOD_SESSION));
    loop {
        let dial = async {
            tokio::time::sleep(delay).await;
            shared.open().await
        };
        let opened = tokio::select! {
            opened = dial => opened,
            end = &mut served.task => return Err(Some((end.unwrap_or(SessionError::Ended), served.began))),
            () = stop.cancelled() => {
                served.retire.cancel();
                let _ = (&mut served.task).await;
                return Err(None);
            }
        };
        match opened {
            Ok(session) => return Ok(session),
            Err(error @ SessionError::Stop(_)) => return Err(Some((error, served.began))),
            Err(error) => {
                tracing::debug!(error = %chain(&error), "the next stream could not be opened");
                delay = backoff.next(why(&error, None));
            }
        }
    }
}
