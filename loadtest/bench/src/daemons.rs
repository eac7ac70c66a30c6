//! Tool round trips through gateway and daemon, and what a connected daemon costs a gateway.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use reliant_bus::{Bus, BusConfig, ResultSubject, ToolSubject};
use reliant_devstack::resident_kib;
use reliant_rpc::tunnel_service_client::TunnelServiceClient;
use reliant_types::{DaemonId, ToolCallId, limits, pb};
use tokio::{sync::mpsc, task::JoinSet};

use reliant_load::{Samples, samples::US};

use crate::{Amount, Bench, floors::SyncProbe, report::Report};

const DAEMONS: usize = 1000;
const CONNECT_AT_ONCE: usize = 16;
const SETTLE: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(30);

async fn bus(bench: &Bench) -> Result<Bus> {
    Ok(Bus::connect(&BusConfig { url: bench.rig.nats.nats_url.clone(), ..BusConfig::default() }).await?)
}

/// Dispatch leaving a worker to the result arriving there. This process is the worker: it sends, receives and
/// acknowledges, and the mesh's own worker, which would take each result as well, is away. Before each round trip its two
/// floors are measured once, so that they meet the same moment of the machine.
pub async fn round_trips(bench: &mut Bench, report: &mut Report) -> Result<()> {
    bench.rig.mesh.workers[0].stop(PATIENCE).await;
    let done = trips(bench, report).await;
    bench.rig.mesh.workers[0].restart(PATIENCE).await?;
    done
}

async fn trips(bench: &Bench, report: &mut Report) -> Result<()> {
    let bus = bus(bench).await?;
    let daemon: DaemonId = bench.daemon.id.parse()?;
    let known = bench.ada.client.list_daemons(pb::ListDaemonsRequest { include_revoked: false }).await?.daemons;
    let known = known.into_iter().find(|known| known.id == bench.daemon.id).context("the daemon is not listed")?;
    let root_id = known.roots.first().map(|root| root.id.clone()).unwrap_or_default();
    let incarnation = incarnation(bench).await?;
    let nats = reliant_bus::probe::Probe::connect(&bench.rig.nats.nats_url).await?;
    let Amount { trips, warm_up, .. } = bench.amount;
    let mut file = SyncProbe::new(bench.rig.dir(), warm_up + trips)?;
    let [mut times, mut rounds, mut syncs] = [const { Vec::new() }; 3];
    for number in 0..warm_up + trips {
        let (round, sync) = (nats.round_trip().await?, file.write()?);
        let call = ToolCallId::new();
        let mut results = bus.subscribe(&ResultSubject { daemon, call }).await?;
        bus.flush().await;
        let dispatch = dispatch(call, &bench.ada.user.to_string(), &incarnation, &root_id);
        let begun = Instant::now();
        let subject = ToolSubject { daemon };
        let reply = bus.request(&subject, &dispatch, limits::NATS_REQUEST_TIMEOUT);
        let (reply, result) = tokio::join!(reply, results.next());
        let took = begun.elapsed();
        let Some(pb::tool_reply::Reply::Dispatch(reply)) = reply?.reply else { anyhow::bail!("not a dispatch reply") };
        ensure!(
            matches!(reply.outcome(), pb::DispatchOutcome::Started | pb::DispatchOutcome::Finished),
            "the daemon did not start the call: {reply:?}"
        );
        let received = result.context("no result came")?;
        let result = &received.message;
        ensure!(result.status() == pb::ToolCallStatus::Succeeded, "the call did not succeed: {result:?}");
        let ack = pb::ResultAck {
            call_id: result.call_id.clone(),
            generation: result.generation,
            outcome: pb::AckOutcome::Committed.into(),
            acknowledged_at_ms: 0,
        };
        received.reply(&bus, &ack).await?;
        if number >= warm_up {
            times.push(took);
            rounds.push(round);
            syncs.push(sync);
        }
    }
    let samples = Samples::of(times, US);
    report.set("tool_round_trip_us_p50", samples.at(0.5));
    report.set("tool_round_trip_us_p95", samples.at(0.95));
    report.set("nats_round_trip_us_p50", Samples::of(rounds, US).at(0.5));
    report.set("fdatasync_us_p50", Samples::of(syncs, US).at(0.5));
    Ok(())
}

fn dispatch(call: ToolCallId, user: &str, incarnation: &str, root_id: &str) -> pb::ToolRequest {
    let dispatch = pb::Dispatch {
        call_id: call.to_string(),
        generation: 1,
        chat_id: reliant_types::ChatId::new().to_string(),
        user_id: user.to_owned(),
        incarnation: incarnation.to_owned(),
        root_id: root_id.to_owned(),
        tool: "noop".into(),
        input_json: "{}".into(),
        timeout_ms: 10_000,
        turn_id: reliant_types::TurnId::new().to_string(),
        iteration: 0,
        index: 0,
        dispatched_at_ms: 0,
    };
    pb::ToolRequest { request: Some(pb::tool_request::Request::Dispatch(dispatch)) }
}

/// As the daemon's journal says it.
async fn incarnation(bench: &Bench) -> Result<String> {
    let path = bench.daemon.state_dir.clone();
    let status = tokio::task::spawn_blocking(move || reliant_daemon::status(&path)).await??;
    Ok(status.context("the daemon does not run")?.incarnation)
}

/// Resident memory of a gateway before and after 1,000 daemons connected and each ran a call.
pub async fn memory(bench: &Bench, report: &mut Report) -> Result<()> {
    let bus = bus(bench).await?;
    let gateway = &bench.rig.mesh.gateways[0];
    let endpoint = bench.rig.mesh.gateway_url(0);
    let mut tokens = Vec::with_capacity(DAEMONS);
    for number in 0..DAEMONS {
        tokens.push(bench.rig.store.register_daemon(bench.ada.user, &format!("simulated-{number}"), true).await?);
    }
    let before = resident_kib(gateway.pid());
    let (connected, mut arrivals) = mpsc::channel(DAEMONS);
    let mut daemons = JoinSet::new();
    let mut waiting = tokens.into_iter();
    let mut here = Vec::with_capacity(DAEMONS);
    for (id, token) in waiting.by_ref().take(CONNECT_AT_ONCE) {
        daemons.spawn(simulate(endpoint.clone(), id, token, connected.clone()));
    }
    while here.len() < DAEMONS {
        tokio::select! {
            arrived = arrivals.recv() => {
                here.push(arrived.context("all simulated daemons ended")?);
                if let Some((id, token)) = waiting.next() {
                    daemons.spawn(simulate(endpoint.clone(), id, token, connected.clone()));
                }
            }
            Some(ended) = daemons.join_next() => ended?.context("a simulated daemon ended")?,
        }
    }
    for (daemon, incarnation) in &here {
        let call = ToolCallId::new();
        let mut results = bus.subscribe(&ResultSubject { daemon: *daemon, call }).await?;
        bus.flush().await;
        let request = dispatch(call, &bench.ada.user.to_string(), incarnation, "");
        bus.request(&ToolSubject { daemon: *daemon }, &request, limits::NATS_REQUEST_TIMEOUT).await?;
        results.next().await.context("no result came")?;
    }
    tokio::time::sleep(SETTLE).await;
    let after = resident_kib(gateway.pid());
    ensure!(daemons.len() == DAEMONS, "only {} simulated daemons are still connected", daemons.len());
    report.set("gateway_kib_per_daemon", after.saturating_sub(before) as f64 / DAEMONS as f64);
    Ok(())
}

/// A daemon that answers each dispatch at once, without a journal or a tool.
async fn simulate(
    endpoint: String,
    id: DaemonId,
    token: String,
    connected: mpsc::Sender<(DaemonId, String)>,
) -> Result<()> {
    use pb::{connect_request::Frame as Up, connect_response::Frame as Down};
    const FRAMES: usize = 8;
    let incarnation = reliant_types::Incarnation::new().to_string();
    let (frames, outgoing) = mpsc::channel(FRAMES);
    let up = |request_id, frame| pb::ConnectRequest { trace: None, request_id, frame: Some(frame) };
    let hello = pb::Hello { incarnation: incarnation.clone(), version: "simulated".into(), ..Default::default() };
    frames.send(up(0, Up::Hello(hello))).await?;
    let mut request = tonic::Request::new(tokio_stream::wrappers::ReceiverStream::new(outgoing));
    ensure!(reliant_rpc::authorize(&mut request, &token), "the token is no header");
    let channel = reliant_rpc::channel(&endpoint).await?;
    let mut incoming = TunnelServiceClient::new(channel).connect(request).await?.into_inner();
    while let Some(response) = incoming.message().await? {
        match response.frame {
            Some(Down::Welcome(_)) => connected.send((id, incarnation.clone())).await?,
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
            _ => {}
        }
    }
    anyhow::bail!("the gateway closed the stream")
}
