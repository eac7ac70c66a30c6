//! The layers in front of the tunnel, and the listener's settings. The layers, from the outside in: trace context, metrics,
//! access log, catch panic, load shed, timeout (unary calls only), authentication, rate limit per principal.

use reliant_middleware::{Authenticator, PublicMethods, RateLimitConfig, StackConfig, StackLayer};
use std::{sync::Arc, time::Duration};
use tonic::transport::Server;
use tower::layer::util::{Identity, Stack};

use crate::GatewayConfig;

/// A half-open connection is found in these two together: under ten seconds.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// A daemon has one stream, and a second one while it moves.
const STREAMS_PER_CONNECTION: u32 = 8;
/// A daemon makes one call, which writes its row; at most so many in a row when its network comes and goes.
const CONNECTS_PER_SECOND: f64 = 5.0;
const CONNECTS_BURST: u32 = 50;
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 512 * 1024;

pub(crate) fn server(
    config: &GatewayConfig,
    authenticator: Arc<dyn Authenticator>,
) -> Server<Stack<StackLayer, Identity>> {
    let layers = StackConfig {
        // Daemons are on other people's machines: what they ask to be sampled does not decide for us.
        trust_sampled: false,
        max_streams: config.max_daemons,
        max_public_streams: config.public_streams,
        attempts: config.attempts.clone(),
        // Health and reflection are all that is open without a token.
        public: PublicMethods::platform(),
        rate_limit: RateLimitConfig { calls_per_second: CONNECTS_PER_SECOND, burst: CONNECTS_BURST },
        ..StackConfig::new(authenticator)
    };
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .layer(StackLayer::new(&layers))
}
