//! Publishing and asking. While NATS is away both fail at once; nothing is kept for later, as the truth is elsewhere.

use async_nats::{Client, ConnectOptions, HeaderMap, PublishErrorKind, RequestErrorKind};
use bytes::Bytes;
use prost::Message;
use reliant_telemetry::{
    TraceContext, hop, hop_span,
    metrics::{self, BUS_DURATION},
    names::{TRACEPARENT, TRACESTATE},
};
use reliant_types::{InstanceId, Secret, boxed, limits, pb};
use std::{
    hash::{BuildHasher, RandomState},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::watch;

use crate::{
    BurstSubject, BusError, RequestTopic, Subscription, Topic,
    health::{self, Down, Events},
};

/// Commands that wait for the socket.
const OUTGOING_MAX: usize = 4096;
/// How long a publish waits for room in that queue.
const OUTGOING_WAIT: Duration = Duration::from_secs(1);
const PING_INTERVAL: Duration = Duration::from_secs(3);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const RECONNECT_MAX: Duration = Duration::from_millis(400);
const RECONNECT_JITTER: Duration = Duration::from_millis(100);
/// How long `connect` waits for the first connection before it goes on without.
const FIRST_CONNECTION_WAIT: Duration = Duration::from_secs(2);
const FLUSH_WAIT: Duration = Duration::from_secs(2);
/// NATS counts headers as payload; ours are two short fields.
const HEADER_MAX_BYTES: usize = 1024;
const PAYLOAD_MAX_BYTES: usize = limits::NATS_PAYLOAD_MAX_BYTES - HEADER_MAX_BYTES;

#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BusConfig {
    /// For example "nats://127.0.0.1:4222"; several, separated by commas, for a cluster. A user and password in the
    /// first of them count where `user` is empty; they are taken as they stand, without percent-decoding.
    #[serde(serialize_with = "without_login")]
    pub url: String,
    /// The role's NATS user; empty: none.
    pub user: String,
    pub password: Secret,
    /// A credentials file, instead of user and password.
    pub credentials: Option<PathBuf>,
    /// Names this connection in the NATS server's monitoring.
    pub name: String,
    /// Where answers to this role's requests arrive; its NATS user must be allowed to subscribe below it.
    pub inbox_prefix: String,
}

impl Default for BusConfig {
    fn default() -> Self {
        Self {
            url: "nats://127.0.0.1:4222".into(),
            user: String::new(),
            password: Secret::default(),
            credentials: None,
            name: "reliant".into(),
            inbox_prefix: "_INBOX".into(),
        }
    }
}

/// The library takes no user and password from a URL by itself.
pub(crate) fn login_of(urls: &str) -> Option<(String, String)> {
    let server: async_nats::ServerAddr = urls.split(',').next()?.trim().parse().ok()?;
    Some((server.username()?.to_owned(), server.password().unwrap_or_default().to_owned()))
}

fn without_login<S: serde::Serializer>(urls: &str, serializer: S) -> Result<S::Ok, S::Error> {
    let shown = urls.split(',').map(|url| match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://***@{host}"),
        _ => url.to_owned(),
    });
    serializer.serialize_str(&shown.collect::<Vec<_>>().join(","))
}

/// A connection to NATS, shared by clones.
#[derive(Clone)]
pub struct Bus {
    client: Client,
    down: watch::Receiver<Down>,
    connections: Arc<AtomicU64>,
}

impl Bus {
    /// Connects, and keeps connecting in the background. An unreachable server is no error here: see [`Bus::is_connected`].
    #[boxed]
    pub async fn connect(config: &BusConfig) -> Result<Bus, BusError> {
        let events = Events::new();
        let look = events.look.clone();
        let connections = events.connections.clone();
        let jitter = RandomState::new();
        let mut options = ConnectOptions::new()
            .name(&config.name)
            .custom_inbox_prefix(&config.inbox_prefix)
            .retry_on_initial_connect()
            .connection_timeout(CONNECT_TIMEOUT)
            .ping_interval(PING_INTERVAL)
            .subscription_capacity(limits::NATS_SUBSCRIPTION_MAX)
            .client_capacity(OUTGOING_MAX)
            .reconnect_delay_callback(move |attempt| {
                let base = Duration::from_millis(50).saturating_mul(attempt.min(100) as u32).min(RECONNECT_MAX);
                let spread = jitter.hash_one(std::time::Instant::now()) % RECONNECT_JITTER.as_millis() as u64;
                base + Duration::from_millis(spread)
            })
            .event_callback(move |event| {
                events.on(event);
                std::future::ready(())
            });
        if let Some(path) = &config.credentials {
            let unusable = |reason: String| BusError::Credentials { path: path.display().to_string(), reason };
            let text = tokio::fs::read_to_string(path).await.map_err(|error| unusable(error.kind().to_string()))?;
            options = options.credentials(&text).map_err(|error| unusable(error.kind().to_string()))?;
        } else if !config.user.is_empty() {
            options = options.user_and_password(config.user.clone(), config.password.expose().to_owned());
        } else if let Some((user, password)) = login_of(&config.url) {
            options = options.user_and_password(user, password);
        }
        let servers = config.url.split(',').map(str::trim).map(str::to_owned).collect::<Vec<_>>();
        let client = options.connect(servers).await.map_err(|_| BusError::Address(config.url.clone()))?;
        let (sender, mut down) = watch::channel(Some(std::time::Instant::now()));
        tokio::spawn(health::follow(client.clone(), look, sender));
        let up = tokio::time::timeout(FIRST_CONNECTION_WAIT, down.wait_for(Option::is_none)).await.is_ok();
        if !up {
            tracing::warn!("NATS is not reachable yet; it is tried again in the background");
        }
        Ok(Bus { client, down, connections })
    }

    /// Sends, with the context of a short span below the current one.
    pub async fn publish<T: Topic>(&self, topic: &T, message: &T::Message) -> Result<(), BusError> {
        let trace = Self::context_of_publish::<T>();
        self.publish_with(&trace, topic, message).await
    }

    /// Sends with this context and without a span of its own: for live pieces.
    pub async fn publish_with<T: Topic>(
        &self,
        trace: &TraceContext,
        topic: &T,
        message: &T::Message,
    ) -> Result<(), BusError> {
        let timer = metrics::guard(&BUS_DURATION, &[T::TEMPLATE, "publish"]);
        let payload = encode(T::TEMPLATE, message);
        let result = self.send(T::TEMPLATE, topic.subject().into(), headers(trace), payload).await;
        timer.done(outcome(&result));
        result
    }

    /// Asks, and waits for the answer until `timeout`.
    pub async fn request<T: RequestTopic>(
        &self,
        topic: &T,
        message: &T::Message,
        timeout: Duration,
    ) -> Result<T::Reply, BusError> {
        let trace = hop_span(send_span(T::TEMPLATE, "request"));
        self.request_with(&trace, topic, message, timeout).await
    }

    /// Asks with this context and without a span of its own.
    pub async fn request_with<T: RequestTopic>(
        &self,
        trace: &TraceContext,
        topic: &T,
        message: &T::Message,
        timeout: Duration,
    ) -> Result<T::Reply, BusError> {
        let timer = metrics::guard(&BUS_DURATION, &[T::TEMPLATE, "request"]);
        let payload = encode(T::TEMPLATE, message);
        let answer = self.ask(T::TEMPLATE, topic.subject(), headers(trace), payload, timeout).await;
        let result = answer.and_then(|answer| T::Reply::decode(answer).map_err(|_| BusError::Undecodable(T::TEMPLATE)));
        timer.done(outcome(&result));
        result
    }

    /// One exact subject.
    pub async fn subscribe<T: Topic>(&self, topic: &T) -> Result<Subscription<T>, BusError> {
        Ok(Subscription::new(self.subscribe_to(T::TEMPLATE, topic.subject(), None).await?))
    }

    /// All subjects of the kind. With a group, each message goes to one of its members.
    pub async fn subscribe_wildcard<T: Topic>(&self, group: Option<&str>) -> Result<Subscription<T>, BusError> {
        Ok(Subscription::new(self.subscribe_to(T::TEMPLATE, T::wildcard(), group).await?))
    }

    pub fn is_connected(&self) -> bool {
        self.down.borrow().is_none()
    }

    /// `None` while connected.
    pub fn disconnected_for(&self) -> Option<Duration> {
        self.down.borrow().map(|since| since.elapsed())
    }

    /// How often a connection was made. Where it has grown, messages may have been missed in between, and requests for
    /// what is subscribed here may have found nobody.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Waits until what was published is on the socket; gives up after two seconds.
    #[boxed]
    pub async fn flush(&self) {
        if self.is_connected() {
            let _ = tokio::time::timeout(FLUSH_WAIT, self.client.flush()).await;
        }
    }

    /// Ends all subscriptions after what they hold, flushes and closes. For the end of a process.
    #[boxed]
    pub async fn drain(&self) {
        self.flush().await;
        let _ = tokio::time::timeout(FLUSH_WAIT, self.client.drain()).await;
    }

    /// For `doctor`; `None` before the first connection.
    pub fn server_version(&self) -> Option<String> {
        self.client.try_server_info().map(|info| info.version)
    }

    /// The context of a short span below what came into this process: for a message that is sent later, without its
    /// sender's span. Where nothing came in, a trace begins.
    pub fn context_of_publish<T: Topic>() -> TraceContext {
        hop_span(send_span(T::TEMPLATE, "publish"))
    }

    /// [`Self::context_of_publish`], below `parent`.
    pub fn context_below<T: Topic>(parent: &TraceContext) -> TraceContext {
        hop(parent, send_span(T::TEMPLATE, "publish"))
    }

    /// Tells the worker with a burst of a chat to look at Postgres again. It may be lost: the worker looks by itself, too.
    #[boxed]
    pub async fn hint_burst(
        &self,
        worker: InstanceId,
        hint: &pb::BurstHint,
        parent: &TraceContext,
    ) -> Result<(), BusError> {
        let trace = Self::context_below::<BurstSubject>(parent);
        self.publish_with(&trace, &BurstSubject { worker: worker.0 }, hint).await
    }

    /// The same for a request. One that is asked again links to the one `before` it.
    pub fn context_of_request<T: RequestTopic>(parent: &TraceContext, before: &TraceContext) -> TraceContext {
        let span = send_span(T::TEMPLATE, "request");
        before.link(&span);
        hop(parent, span)
    }

    #[boxed]
    pub(crate) async fn send(
        &self,
        template: &'static str,
        subject: async_nats::Subject,
        headers: Option<HeaderMap>,
        payload: Result<Bytes, BusError>,
    ) -> Result<(), BusError> {
        let payload = payload?;
        let bytes = payload.len();
        if !self.is_connected() {
            return Err(BusError::Disconnected);
        }
        let sent = async {
            match headers {
                Some(headers) => self.client.publish_with_headers(subject, headers, payload).await,
                None => self.client.publish(subject, payload).await,
            }
        };
        match tokio::time::timeout(OUTGOING_WAIT, sent).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(match error.kind() {
                PublishErrorKind::MaxPayloadExceeded => {
                    BusError::TooLarge { template, bytes, limit: self.client.max_payload() }
                }
                PublishErrorKind::InvalidSubject => BusError::Refused { template, reason: error.to_string() },
                PublishErrorKind::Send => BusError::Disconnected,
            }),
            Err(_) => Err(BusError::Busy),
        }
    }

    #[boxed]
    async fn ask(
        &self,
        template: &'static str,
        subject: String,
        headers: Option<HeaderMap>,
        payload: Result<Bytes, BusError>,
        timeout: Duration,
    ) -> Result<Bytes, BusError> {
        let payload = payload?;
        let bytes = payload.len();
        if !self.is_connected() {
            return Err(BusError::Disconnected);
        }
        let mut request = async_nats::Request::new().payload(payload).timeout(Some(timeout));
        if let Some(headers) = headers {
            request = request.headers(headers);
        }
        let mut down = self.down.clone();
        let answer = tokio::select! {
            biased;
            answer = self.client.send_request(subject, request) => answer,
            // An answer to a request of the old connection would come to nobody.
            _ = down.wait_for(Option::is_some) => return Err(BusError::Disconnected),
        };
        let answer = answer.map_err(|error| match error.kind() {
            RequestErrorKind::TimedOut => BusError::Timeout(template),
            RequestErrorKind::NoResponders => BusError::NoResponders(template),
            RequestErrorKind::MaxPayloadExceeded => {
                BusError::TooLarge { template, bytes, limit: self.client.max_payload() }
            }
            RequestErrorKind::InvalidSubject => BusError::Refused { template, reason: error.to_string() },
            RequestErrorKind::Other => BusError::Disconnected,
        })?;
        Ok(answer.payload)
    }

    #[boxed]
    async fn subscribe_to(
        &self,
        template: &'static str,
        subject: String,
        group: Option<&str>,
    ) -> Result<async_nats::Subscriber, BusError> {
        let made = async {
            match group {
                Some(group) => self.client.queue_subscribe(subject, group.to_owned()).await,
                None => self.client.subscribe(subject).await,
            }
        };
        match tokio::time::timeout(OUTGOING_WAIT, made).await {
            Ok(Ok(subscriber)) => Ok(subscriber),
            Ok(Err(error)) => Err(BusError::Refused { template, reason: error.to_string() }),
            Err(_) => Err(BusError::Busy),
        }
    }
}

/// `operation`: "publish" or "request".
fn send_span(template: &'static str, operation: &'static str) -> tracing::Span {
    tracing::info_span!(
        // reliant_telemetry::names::span::BUS_SEND
        "nats.send",
        otel.name = format!("{operation} {template}"),
        otel.kind = "producer",
        messaging.system = "nats",
        messaging.operation.name = operation,
        messaging.operation.type = "send",
        messaging.destination.template = template,
    )
}

fn outcome<T>(result: &Result<T, BusError>) -> &'static str {
    result.as_ref().map_or_else(BusError::outcome, |_| "ok")
}

pub(crate) fn encode<M: Message>(template: &'static str, message: &M) -> Result<Bytes, BusError> {
    if message.encoded_len() > PAYLOAD_MAX_BYTES {
        return Err(BusError::TooLarge { template, bytes: message.encoded_len(), limit: PAYLOAD_MAX_BYTES });
    }
    Ok(message.encode_to_vec().into())
}

fn headers(trace: &TraceContext) -> Option<HeaderMap> {
    if trace.is_empty() {
        return None;
    }
    let mut headers = HeaderMap::new();
    headers.insert(TRACEPARENT, trace.traceparent.as_str());
    if !trace.tracestate.is_empty() {
        headers.insert(TRACESTATE, trace.tracestate.as_str());
    }
    Some(headers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use reliant_types::pb;

    #[test]
    fn what_does_not_fit_is_refused_with_its_size() {
        let result = pb::ToolResult { content: vec![0; limits::NATS_PAYLOAD_MAX_BYTES].into(), ..Default::default() };
        assert!(matches!(
            encode("reliant.v1.result.{daemon}.{call}", &result),
            Err(BusError::TooLarge { bytes, limit, .. }) if bytes > limit
        ));
        assert!(encode("t", &pb::ToolResult::default()).is_ok());
    }

    #[tokio::test]
    async fn without_a_server_everything_fails_at_once() {
        let config = BusConfig { url: "nats://127.0.0.1:1".into(), ..Default::default() };
        let bus = Bus::connect(&config).await.expect("connects in the background");
        assert!(!bus.is_connected());
        assert!(bus.disconnected_for().is_some());
        let start = std::time::Instant::now();
        let daemon = crate::ToolSubject { daemon: reliant_types::DaemonId::new() };
        let asked = bus.request(&daemon, &pb::ToolRequest::default(), Duration::from_secs(30)).await;
        assert!(matches!(asked, Err(BusError::Disconnected)));
        for _ in 0..10_000 {
            assert!(bus.publish(&crate::ControlSubject, &pb::Control::default()).await.is_err());
        }
        bus.flush().await;
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    #[tokio::test]
    async fn an_address_that_is_none_is_said() {
        let config = BusConfig { url: "nats://a b:x".into(), ..Default::default() };
        assert!(matches!(Bus::connect(&config).await, Err(BusError::Address(_))));
    }
}
