//! What an operator may set of the gateway role. Everything has a default that serves a laptop.

use reliant_middleware::{AttemptLimits, PUBLIC_STREAMS_MAX};
use reliant_runtime::ConnectionLimits;
use reliant_types::limits;
use serde::{Deserialize, Serialize};
use std::{net::SocketAddr, time::Duration};

/// The gateway role.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GatewayConfig {
    /// Where daemons connect. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// `/health`, `/ready` and `/metrics`; not for the public network.
    pub admin: SocketAddr,
    /// Daemon streams held at one time; past it a daemon is told to try elsewhere.
    pub max_daemons: usize,
    /// Open streams without a token (gRPC reflection, health watches), which take no daemon's place.
    pub public_streams: usize,
    /// Unknown tokens from one address.
    pub attempts: AttemptLimits,
    /// Connections, whatever comes over them.
    pub connections: ConnectionLimits,
    /// Daemons let in at one time. Each costs a transaction, so a reconnect storm queues here and not in Postgres.
    pub admissions: usize,
    /// After a drain began, daemons have so long to open their next stream elsewhere.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7442)),
            admin: SocketAddr::from(([127, 0, 0, 1], 7443)),
            max_daemons: limits::GATEWAY_DAEMONS_MAX,
            public_streams: PUBLIC_STREAMS_MAX,
            // All daemons of a large office come back at once.
            attempts: AttemptLimits { at_once: 1024, ..AttemptLimits::default() },
            connections: ConnectionLimits::default(),
            admissions: 32,
            drain: Duration::from_secs(15),
        }
    }
}
