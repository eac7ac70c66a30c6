//! Client channels that notice a dead peer in under ten seconds and never wait for ever to connect.

use reliant_types::boxed;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE: Duration = Duration::from_secs(5);
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
/// Fixed, not adaptive: h2 closes a connection on which more small frames wait unread than half its window stands for,
/// and an adaptive window begins at 64 KiB. Some hundred update streams of one client would be cut by their first deltas.
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    #[error("'{address}' is not an address; an example is http://127.0.0.1:7440")]
    Address {
        address: String,
        #[source]
        source: tonic::transport::Error,
    },
    #[error("{address} cannot be reached; is the server up?")]
    Connect {
        address: String,
        #[source]
        source: tonic::transport::Error,
    },
}

impl From<RpcError> for reliant_types::Failure {
    fn from(error: RpcError) -> Self {
        let code = match error {
            RpcError::Address { .. } => reliant_types::Code::InvalidArgument,
            RpcError::Connect { .. } => reliant_types::Code::Unavailable,
        };
        Self::new(code, error.to_string())
    }
}

/// Connects now.
#[boxed]
pub async fn channel(address: &str) -> Result<Channel, RpcError> {
    endpoint(address)?.connect().await.map_err(|source| RpcError::Connect { address: address.to_owned(), source })
}

/// Connects at the first call, and again after each loss. Must be called within a tokio runtime.
pub fn channel_lazy(address: &str) -> Result<Channel, RpcError> {
    Ok(endpoint(address)?.connect_lazy())
}

/// The settings of every channel, for callers that add their own.
pub fn endpoint(address: &str) -> Result<Endpoint, RpcError> {
    let url = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    Ok(Endpoint::from_shared(url)
        .map_err(|source| RpcError::Address { address: address.to_owned(), source })?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .tcp_nodelay(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_are_checked_and_dead_ones_are_said() {
        assert!(matches!(endpoint("http://a b"), Err(RpcError::Address { .. })));
        let error = channel("127.0.0.1:1").await.expect_err("nothing listens there");
        assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
    }
}
