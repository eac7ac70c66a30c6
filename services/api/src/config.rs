//! What an operator may set of the api role. Everything has a default that serves a laptop.

use std::{net::SocketAddr, time::Duration};

use reliant_middleware::{AttemptLimits, RateLimitConfig};
use reliant_runtime::ConnectionLimits;
use serde::{Deserialize, Serialize};

/// The api role.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ApiConfig {
    /// Where browsers and clients connect: gRPC, gRPC-web and the web page. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// `/health`, `/ready` and `/metrics`; not for the public network.
    pub admin: SocketAddr,
    /// As people reach this api, for example "https://agents.example.com". Empty: `http://` and the listen address.
    pub public_url: String,
    /// Origins of other sites whose pages may call this api, for example "https://console.example.com". The page that
    /// this api serves itself needs no entry.
    pub cors_origins: Vec<String>,
    pub limits: ApiLimits,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7440)),
            admin: SocketAddr::from(([127, 0, 0, 1], 7441)),
            public_url: String::new(),
            cors_origins: Vec::new(),
            limits: ApiLimits::default(),
        }
    }
}

/// What one replica takes on. Past a limit callers get RESOURCE_EXHAUSTED with a delay.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ApiLimits {
    /// Connections, whatever comes over them.
    pub connections: ConnectionLimits,
    /// Calls under way at one time, update streams not counted.
    pub concurrent_calls: usize,
    /// Open update streams of all users.
    pub streams: usize,
    /// Open streams without a token (gRPC reflection, health watches), which take no place of the others.
    pub public_streams: usize,
    /// Open update streams of one user.
    pub user_streams: usize,
    /// A call's time, update streams excepted.
    #[serde(with = "humantime_serde")]
    pub call_timeout: Duration,
    /// Calls of one principal: lasting, and at once after a pause.
    pub rate: RateLimitConfig,
    /// Unknown tokens and sign-in codes from one address.
    pub attempts: AttemptLimits,
    /// Live text kept in memory for viewers that join late, all chats together, in bytes; one user gets half.
    pub live_text_bytes: usize,
    /// Events and snapshots kept in memory for viewers that join or fall behind, in bytes; one user gets half. Past it they
    /// are read from Postgres each time.
    pub feed_bytes: usize,
    /// Wakes, hints and cancels on their way, after their answer was given.
    pub background_tasks: usize,
    /// A turn's own working time; it stands still while a person or a daemon is awaited.
    #[serde(with = "humantime_serde")]
    pub turn_deadline: Duration,
    /// After a drain began, running calls have so long.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
}

impl Default for ApiLimits {
    fn default() -> Self {
        Self {
            connections: ConnectionLimits::default(),
            concurrent_calls: 1024,
            streams: 10_000,
            public_streams: reliant_middleware::PUBLIC_STREAMS_MAX,
            user_streams: reliant_types::limits::USER_STREAMS_MAX,
            call_timeout: Duration::from_secs(15),
            rate: RateLimitConfig::default(),
            attempts: AttemptLimits::default(),
            live_text_bytes: 256 * 1024 * 1024,
            feed_bytes: 512 * 1024 * 1024,
            background_tasks: 1024,
            turn_deadline: reliant_types::limits::TURN_DEADLINE,
            drain: Duration::from_secs(15),
        }
    }
}
