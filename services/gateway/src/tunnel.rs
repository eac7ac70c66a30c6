//! Accepts a daemon: who it is, its hello, its lease; then its stream is a [`Session`].

use reliant_middleware::{Principal, require_daemon};
use reliant_rpc::tunnel_service_server::TunnelService;
use reliant_runtime::{Drain, TaskKind};
use reliant_store::{DaemonHello, StoreError};
use reliant_telemetry::{TraceContext, chain, metrics, sampled};
use reliant_types::{
    Code, DaemonId, Failure, Incarnation,
    pb::{self, connect_request, connect_response::Frame},
};
use std::{sync::Arc, time::Duration};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    declare::{self, Fingerprint},
    hub::{Hub, Seat},
    requests,
    session::{Place, Session},
    streams::{DAEMON_STREAMS_MAX, Streams},
    writer::{Outgoing, Writer},
};

const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a daemon waits to be let in before it is told to come back later.
const ADMISSION_WAIT: Duration = Duration::from_secs(2);
const COME_BACK: Duration = Duration::from_secs(1);
/// Far more processes than a daemon ever has, and far from where counting on would overflow.
const INSTANCE_MAX: i64 = 1 << 40;

#[derive(Clone)]
pub(crate) struct Tunnel {
    pub hub: Arc<Hub>,
    pub drain: Drain,
    pub places: Arc<Semaphore>,
    pub streams: Arc<Streams>,
    pub admissions: Arc<Semaphore>,
}

#[tonic::async_trait]
impl TunnelService for Tunnel {
    type ConnectStream = Outgoing;

    async fn connect(
        &self,
        request: Request<Streaming<pb::ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let (daemon, principal) = require_daemon(&request)?;
        Box::pin(self.accept(daemon, principal, request.into_inner()))
            .await
            .map(Response::new)
            .map_err(|failure| {
                metrics::DAEMON_STREAM_ENDS.with_label_values(&["refused"]).inc();
                tracing::info!(daemon.id = %daemon, code = %failure.code, reason = %failure.message, "a daemon was not let in");
                reliant_rpc::status(&failure)
            })
    }
}

impl Tunnel {
    async fn accept(
        &self,
        daemon: DaemonId,
        principal: Principal,
        mut inbound: Streaming<pb::ConnectRequest>,
    ) -> Result<Outgoing, Failure> {
        self.check_open()?;
        let own = self.streams.enter(daemon).ok_or_else(|| {
            let message =
                format!("this daemon has {DAEMON_STREAMS_MAX} streams open here; it needs one. Close the others");
            Failure::new(Code::QueueFull, message).retry_after(COME_BACK)
        })?;
        let place = self.places.clone().try_acquire_owned().map_err(|_| {
            sampled::refused("daemons");
            Failure::new(Code::QueueFull, "this gateway holds as many daemons as it may; try again")
                .retry_after(COME_BACK)
        })?;
        let place = Place { _of_gateway: place, _of_daemon: own };
        let mut hello = hello(&mut inbound).await?;
        let incarnation = checked(&hello)?;
        let admission = tokio::time::timeout(ADMISSION_WAIT, self.admissions.acquire());
        let Ok(Ok(_admitted)) = admission.await else {
            sampled::refused("admissions");
            return Err(Failure::new(Code::QueueFull, "many daemons connect at once; try again").retry_after(COME_BACK));
        };
        // Before the lease: whoever sees the lease must find somebody who listens.
        let line = self.hub.lines.get(daemon, async || requests::subscribe(&self.hub.bus, daemon).await).await?;
        let (writer, outgoing) = Writer::new();
        let declared = self.shorten(daemon, &mut hello);
        let session = |seat| Session {
            hub: self.hub.clone(),
            seat,
            inbound,
            writer: writer.clone(),
            drain: self.drain.clone(),
            place,
            declared,
        };
        let lease = match self.lease(daemon, &principal, incarnation, hello).await {
            Ok(lease) => lease,
            Err(StoreError::DaemonReplaced) => {
                metrics::LEASE_CONFLICTS.inc();
                let seat = Arc::new(Seat::new(daemon, &principal, incarnation, 0, 0));
                let session = session(seat);
                self.drain.spawn(TaskKind::Work("results of an old daemon"), Box::pin(session.run_results_only()));
                return Ok(outgoing);
            }
            Err(error) => {
                tracing::warn!(error = %chain(&error), daemon.id = %daemon, "a lease was not given");
                return Err(error.into());
            }
        };
        let seat = Arc::new(Seat::new(daemon, &principal, incarnation, lease.instance, lease.epoch));
        self.welcome(&writer, &seat);
        if !self.hub.enter(&seat) {
            return Err(
                Failure::new(Code::Unavailable, "a newer stream of this daemon came first").retry_after(COME_BACK)
            );
        }
        tracing::info!(daemon.id = %daemon, daemon.instance = seat.instance, lease.epoch = seat.epoch, "a daemon connected");
        self.drain.spawn(TaskKind::Work("daemon stream"), Box::pin(session(seat).run(line)));
        Ok(outgoing)
    }

    fn check_open(&self) -> Result<(), Failure> {
        if self.drain.is_draining() {
            return Err(Failure::new(Code::Draining, "this gateway stops; try again").retry_after(COME_BACK));
        }
        if !self.hub.bus.is_connected() {
            return Err(Failure::new(Code::Unavailable, "this gateway is not connected to NATS; try again")
                .retry_after(COME_BACK));
        }
        Ok(())
    }

    /// Shortens what the daemon says to its limits.
    fn shorten(&self, daemon: DaemonId, hello: &mut pb::Hello) -> Fingerprint {
        if let Err(reason) = declare::bounded(&mut hello.roots, &mut hello.tools) {
            tracing::warn!(daemon.id = %daemon, reason, "declarations were shortened");
        }
        for text in [&mut hello.hostname, &mut hello.os, &mut hello.version] {
            text.truncate(text.floor_char_boundary(256));
        }
        Fingerprint::of(&hello.roots, &hello.tools)
    }

    async fn lease(
        &self,
        daemon: DaemonId,
        principal: &Principal,
        incarnation: Incarnation,
        hello: pb::Hello,
    ) -> Result<reliant_store::Lease, StoreError> {
        let committed = self
            .hub
            .store
            .connect_daemon(DaemonHello {
                daemon,
                user: principal.user,
                gateway: self.hub.gateway,
                incarnation,
                instance: hello.instance,
                hostname: hello.hostname,
                os: hello.os,
                version: hello.version,
                roots: hello.roots,
                tools: hello.tools,
            })
            .await?;
        self.hub.publish_feed(principal.user, committed.feed).await;
        if committed.value.journal_replaced {
            metrics::DAEMON_JOURNALS_REPLACED.inc();
            tracing::warn!(daemon.id = %daemon, "a daemon came with another journal than the last time");
        }
        Ok(committed.value)
    }

    fn welcome(&self, writer: &Writer, seat: &Seat) {
        let welcome = pb::Welcome {
            daemon_id: seat.daemon.to_string(),
            instance: seat.instance,
            gateway_id: self.hub.gateway.to_string(),
            lease_epoch: seat.epoch,
        };
        // The queue is new and empty.
        let _ = writer.send(TraceContext::default(), 0, Frame::Welcome(welcome));
    }
}

/// The journal that the hello names. Its instance is 0, or a number that an earlier lease gave out: one a process.
fn checked(hello: &pb::Hello) -> Result<Incarnation, Failure> {
    if !(0..=INSTANCE_MAX).contains(&hello.instance) {
        let message = format!("hello.instance is {}; it is 0, or the number of the last welcome", hello.instance);
        return Err(Failure::field("hello.instance", message));
    }
    hello
        .incarnation
        .parse()
        .map_err(|error: reliant_types::id::IdError| Failure::field("hello.incarnation", error.to_string()))
}

/// The first frame, which must be a hello.
async fn hello(inbound: &mut Streaming<pb::ConnectRequest>) -> Result<pb::Hello, Failure> {
    let first = tokio::time::timeout(HELLO_TIMEOUT, inbound.message())
        .await
        .map_err(|_| Failure::new(Code::DeadlineExceeded, "the daemon said no hello in time"))?
        .map_err(|_| Failure::field("frame", "the first frame cannot be read: it is garbage, or too large"))?;
    match first.and_then(|first| first.frame) {
        Some(connect_request::Frame::Hello(hello)) => Ok(hello),
        _ => Err(Failure::field("frame", "the first frame of a stream is hello")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_that_no_lease_gave_out_is_refused() {
        let hello =
            |instance| pb::Hello { instance, incarnation: Incarnation::new().to_string(), ..pb::Hello::default() };
        for good in [0, 1, INSTANCE_MAX] {
            assert!(checked(&hello(good)).is_ok(), "{good}");
        }
        for bad in [-1, i64::MIN, INSTANCE_MAX + 1, i64::MAX] {
            let refused = checked(&hello(bad)).expect_err("no lease gave it out");
            assert_eq!((refused.code, refused.field.as_deref()), (Code::InvalidArgument, Some("hello.instance")));
        }
        let nameless = checked(&pb::Hello::default()).expect_err("no journal");
        assert_eq!(nameless.field.as_deref(), Some("hello.incarnation"));
    }
}
