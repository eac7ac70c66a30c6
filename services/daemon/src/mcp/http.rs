//! MCP over streamable HTTP. Redirects are followed on the server's own host and port only, as the transport's client has
//! it: a header may be a secret. A lost session is not replayed by the transport: whether a call ran is ours to say.

use std::{collections::BTreeMap, collections::HashMap};

use http::{HeaderName, HeaderValue};
use reliant_telemetry::chain;
use rmcp::{
    ServiceExt,
    transport::{StreamableHttpClientTransport, streamable_http_client::StreamableHttpClientTransportConfig},
};

use super::{
    server::{Handler, Service},
    stdio::{Death, MESSAGE_MAX_BYTES, short},
};

pub async fn connect(
    handler: Handler,
    url: &str,
    headers: &BTreeMap<String, String>,
) -> Result<(Service, Death), String> {
    let mut custom = HashMap::new();
    for (name, value) in headers {
        let name: HeaderName = name.parse().map_err(|_| format!("'{}' is no header name", short(name)))?;
        let mut value =
            HeaderValue::from_str(value).map_err(|_| format!("the value of header {name} cannot be sent"))?;
        value.set_sensitive(true);
        custom.insert(name, value);
    }
    // The client wants a provider for TLS; a program that has one keeps it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut config = StreamableHttpClientTransportConfig::with_uri(url).custom_headers(custom);
    config.max_sse_event_size = MESSAGE_MAX_BYTES;
    config.max_json_response_size = MESSAGE_MAX_BYTES;
    config.reinit_on_expired_session = false;
    let transport = StreamableHttpClientTransport::from_config(config);
    let service = handler
        .serve(transport)
        .await
        .map_err(|e| format!("it cannot be reached or does not speak MCP: {}", short(&chain(&e))))?;
    Ok((service, Box::pin(std::future::pending())))
}
