//! Many light daemons: real streams over connections of their own, and the real daemon's back-off; no journal, no tools.
//! Each dispatch is answered at once.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use parking_lot::Mutex;
use reliant_daemon::backoff::{Backoff, Why};
use reliant_rpc::tunnel_service_client::TunnelServiceClient;
use reliant_types::{DaemonId, Incarnation, pb};
use tokio::{sync::mpsc, task::JoinSet};

/// Frames on their way to one gateway.
const FRAMES: usize = 8;

/// What happened to one of them.
#[derive(Debug, Default)]
pub struct Seen {
    /// Streams that were welcomed and have not ended.
    pub live: AtomicUsize,
    /// Which gateway welcomed it last, by place among the swarm's gateways.
    pub gateway: AtomicUsize,
    instance: AtomicI64,
}

pub struct Light {
    pub id: DaemonId,
    pub incarnation: Incarnation,
    pub seen: Seen,
}

/// Refused dials, by code; and those of them that came with a delay.
pub type Refusals = BTreeMap<String, (usize, usize)>;

/// Ends with its daemons when it is dropped.
pub struct Swarm {
    pub daemons: Vec<Arc<Light>>,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

struct Shared {
    gateways: Vec<String>,
    refusals: Mutex<Refusals>,
    dials: AtomicUsize,
}

impl Swarm {
    /// Dials with all of them. The first dial is spread over `spread`, as that of daemons which start on their own.
    pub fn start(tokens: Vec<(DaemonId, String)>, gateways: Vec<String>, spread: Duration) -> Self {
        let shared = Arc::new(Shared { gateways, refusals: Mutex::default(), dials: AtomicUsize::new(0) });
        let mut tasks = JoinSet::new();
        let count = tokens.len().max(1) as u32;
        let daemons: Vec<Arc<Light>> = (0..)
            .zip(tokens)
            .map(|(number, (id, token))| {
                let light = Arc::new(Light { id, incarnation: Incarnation::new(), seen: Seen::default() });
                tasks.spawn(run(shared.clone(), light.clone(), token, number as usize, spread * number / count));
                light
            })
            .collect();
        Self { daemons, shared, _tasks: tasks }
    }

    pub fn connected(&self) -> usize {
        self.daemons.iter().filter(|light| light.seen.live.load(Ordering::Relaxed) > 0).count()
    }

    /// Streams that were welcomed and have not ended, of all of them.
    pub fn streams(&self) -> usize {
        self.daemons.iter().map(|light| light.seen.live.load(Ordering::Relaxed)).sum()
    }

    pub fn on_gateway(&self, gateway: usize) -> usize {
        let there = |light: &&Arc<Light>| {
            light.seen.live.load(Ordering::Relaxed) > 0 && light.seen.gateway.load(Ordering::Relaxed) == gateway
        };
        self.daemons.iter().filter(there).count()
    }

    pub fn dials(&self) -> usize {
        self.shared.dials.load(Ordering::Relaxed)
    }

    pub fn refusals(&self) -> Refusals {
        self.shared.refusals.lock().clone()
    }
}

/// As the daemon's own loop: dial, serve, wait, dial the next gateway.
async fn run(shared: Arc<Shared>, light: Arc<Light>, token: String, number: usize, first: Duration) {
    tokio::time::sleep(first).await;
    let mut backoff = Backoff::default();
    for dial in number.. {
        let place = dial % shared.gateways.len();
        shared.dials.fetch_add(1, Ordering::Relaxed);
        let mut welcomed = None;
        let ended = serve(&shared.gateways[place], &light, &token, place, &mut welcomed).await;
        let lasted = welcomed.map(|at: Instant| at.elapsed());
        if lasted.is_some() {
            light.seen.live.fetch_sub(1, Ordering::Relaxed);
        }
        let why = match ended.as_ref().err().and_then(|error| error.downcast_ref::<tonic::Status>()) {
            Some(status) => {
                if lasted.is_none() {
                    let failure = reliant_rpc::failure(status);
                    let mut refusals = shared.refusals.lock();
                    let (count, delayed) = refusals.entry(failure.code.to_string()).or_default();
                    *count += 1;
                    *delayed += usize::from(failure.retry_after.is_some());
                }
                Why::of_status(status, lasted)
            }
            None => lasted.map_or(Why::Failed, Why::Ended),
        };
        tokio::time::sleep(backoff.next(why)).await;
    }
}

async fn serve(gateway: &str, light: &Light, token: &str, place: usize, welcomed: &mut Option<Instant>) -> Result<()> {
    use pb::{connect_request::Frame as Up, connect_response::Frame as Down};
    let incarnation = light.incarnation.to_string();
    let (frames, outgoing) = mpsc::channel(FRAMES);
    let up = |request_id, frame| pb::ConnectRequest { trace: None, request_id, frame: Some(frame) };
    let hello = pb::Hello {
        incarnation: incarnation.clone(),
        instance: light.seen.instance.load(Ordering::Relaxed),
        version: "light".into(),
        ..Default::default()
    };
    frames.send(up(0, Up::Hello(hello))).await?;
    let mut request = tonic::Request::new(tokio_stream::wrappers::ReceiverStream::new(outgoing));
    ensure!(reliant_rpc::authorize(&mut request, token), "the token is no header");
    let channel = reliant_rpc::channel(gateway).await?;
    let mut incoming = TunnelServiceClient::new(channel).connect(request).await?.into_inner();
    while let Some(response) = incoming.message().await? {
        match response.frame {
            Some(Down::Welcome(welcome)) => {
                light.seen.instance.store(welcome.instance, Ordering::Relaxed);
                light.seen.gateway.store(place, Ordering::Relaxed);
                if welcomed.replace(Instant::now()).is_none() {
                    light.seen.live.fetch_add(1, Ordering::Relaxed);
                }
            }
            Some(Down::Dispatch(dispatch)) => {
                let reply = pb::DispatchReply {
                    call_id: dispatch.call_id.clone(),
                    generation: dispatch.generation,
                    outcome: pb::DispatchOutcome::Started.into(),
                    incarnation: incarnation.clone(),
                    ..Default::default()
                };
                frames.send(up(response.request_id, Up::DispatchReply(reply))).await?;
                let result = pb::ToolResult {
                    call_id: dispatch.call_id,
                    generation: dispatch.generation,
                    status: pb::ToolCallStatus::Succeeded.into(),
                    incarnation: incarnation.clone(),
                    ..Default::default()
                };
                frames.send(up(0, Up::Result(result))).await?;
            }
            Some(Down::GoAway(_)) => return Ok(()),
            _ => {}
        }
    }
    Ok(())
}
