//! The providers' clients: one attempt of one model call over a pooled connection, and how its refusals are read.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use reliant_telemetry::{TraceContext, hop_span};
use reliant_types::{Code, Failure, boxed, pb};
use reqwest::{
    Client, Response, StatusCode, Url,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER},
};
use tokio::time::timeout;

use crate::{
    ModelConfig, ModelError, ModelRequest, ModelStream, ModelsConfig, ModelsConfigError, ProviderConfig, ProviderKind,
    ResolvedModel, RetryPolicy,
    error::scrub,
    metrics::Call,
    wire::{Decoder, ErrorBody, ErrorDetail, anthropic, openai},
};

/// What is read of an error's body.
const ERROR_BODY_MAX_BYTES: usize = 64 * 1024;
const ERROR_BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// A provider that asks for a longer wait is asked again after this.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60 * 60);
const POOL_IDLE: Duration = Duration::from_secs(300);
const POOL_IDLE_PER_HOST_MAX: usize = 256;
const MODEL_ID_MAX_BYTES: usize = 4096;

/// All configured models. Cheap to clone.
#[derive(Clone)]
pub struct Models {
    inner: Arc<Inner>,
}

struct Inner {
    config: ModelsConfig,
    default: String,
    providers: HashMap<String, Arc<Provider>>,
    models: HashMap<String, ModelConfig>,
}

struct Provider {
    config: ProviderConfig,
    /// A client that cannot be made (no CA certificates on this machine) spoils its own provider only.
    client: Result<Client, String>,
    url: Url,
    headers: HeaderMap,
    traceparent: bool,
    own: bool,
}

/// A request made ready, to be sent any number of times.
pub(crate) struct Prepared {
    provider: Arc<Provider>,
    model: ResolvedModel,
    body: Bytes,
}

impl Prepared {
    pub(crate) fn provider_label(&self) -> &str {
        &self.model.provider
    }
}

impl Models {
    /// Checks the configuration and makes the clients; opens no connection.
    pub fn new(config: ModelsConfig) -> Result<Self, ModelsConfigError> {
        config.validate()?;
        // An error means that the process has one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut providers = HashMap::new();
        for provider in &config.providers {
            providers.insert(provider.name.clone(), Arc::new(Provider::new(provider, &config)?));
        }
        let models = config.models.iter().map(|model| (model.id.clone(), model.clone())).collect();
        Ok(Self { inner: Arc::new(Inner { default: config.default_model(), providers, models, config }) })
    }

    /// The model of new chats; empty where nothing is configured.
    pub fn default_model(&self) -> &str {
        &self.inner.default
    }

    /// The models that are known by name, the default marked; a provider may take others too.
    pub fn list(&self) -> Vec<pb::Model> {
        let inner = &self.inner;
        let default = (!inner.models.contains_key(&inner.default)).then_some(inner.default.as_str());
        let ids = default.into_iter().chain(inner.config.models.iter().map(|model| model.id.as_str()));
        ids.filter_map(|id| self.resolve(id).ok()).map(|model| model.shown(&inner.default)).collect()
    }

    /// The model of an id; `MODEL_UNKNOWN` with the way out where there is none.
    pub fn resolve(&self, id: &str) -> Result<ResolvedModel, Failure> {
        let unknown = || {
            let shown: String = id.chars().take(100).collect();
            let some: Vec<&str> = self.inner.config.models.iter().take(5).map(|model| model.id.as_str()).collect();
            let hint = if some.is_empty() {
                "none is configured; set OPENAI_API_KEY or ANTHROPIC_API_KEY".to_owned()
            } else {
                format!("known are {} and what ListModels says", some.join(", "))
            };
            let mut failure = Failure::new(Code::ModelUnknown, format!("there is no model '{shown}'; {hint}"));
            failure.field = Some("model".into());
            failure
        };
        if id.len() > MODEL_ID_MAX_BYTES || id.chars().any(char::is_control) {
            return Err(unknown());
        }
        let (provider, name) = ModelsConfig::split(id).ok_or_else(unknown)?;
        let config = &self.inner.providers.get(provider).ok_or_else(unknown)?.config;
        let listed = self.inner.models.get(id);
        if listed.is_none() && !config.pass_through {
            return Err(unknown());
        }
        Ok(ResolvedModel::new(id, name, config, listed))
    }

    /// One attempt. Errors before the first byte are returned here, later ones by the stream.
    #[boxed]
    pub async fn stream(&self, request: ModelRequest) -> Result<ModelStream, ModelError> {
        let prepared = self.prepare(&request)?;
        drop(request);
        self.attempt(&prepared, &mut TraceContext::default()).await
    }

    pub fn retry_policy(&self) -> &RetryPolicy {
        &self.inner.config.retry
    }

    pub(crate) fn prepare(&self, request: &ModelRequest) -> Result<Prepared, ModelError> {
        let model = self.resolve(&request.model).map_err(|failure| ModelError::Unknown { message: failure.message })?;
        let provider = self.inner.providers[&model.provider].clone();
        let max_tokens = model.output_tokens(request.max_output_tokens);
        let body = match model.kind {
            ProviderKind::OpenAi => openai::body(request, &model.name, max_tokens, provider.own),
            ProviderKind::Anthropic => {
                let cache = provider.config.prompt_cache;
                anthropic::body(request, &model.name, max_tokens, model.thinking_tokens, cache)
            }
        };
        Ok(Prepared { provider, model, body: body.into() })
    }

    /// `before`: the attempt that this one replaces, to which it links; then this one.
    pub(crate) async fn attempt(
        &self,
        prepared: &Prepared,
        before: &mut TraceContext,
    ) -> Result<ModelStream, ModelError> {
        let Prepared { provider, model, body } = prepared;
        let mut call = Call::start(model, provider.url.host_str().unwrap_or_default());
        before.link(&call.span);
        *before = TraceContext::of(&call.span);
        let key = provider.config.api_key.expose();
        let stall = self.inner.config.stall;
        match provider.send(body.clone(), stall).await {
            Ok(response) => {
                let decoder = Decoder::new(model.kind, key);
                Ok(ModelStream::new(response.bytes_stream(), decoder, stall, model.clone(), call))
            }
            Err(error) => {
                call.error(&error);
                Err(error)
            }
        }
    }
}

impl Provider {
    fn new(config: &ProviderConfig, all: &ModelsConfig) -> Result<Self, ModelsConfigError> {
        let name = config.name.clone();
        let url = endpoint(config).ok_or(ModelsConfigError::BaseUrl { name: name.clone() })?;
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let key = config.api_key.expose();
        if !key.is_empty() {
            let (header, value) = match config.kind {
                ProviderKind::OpenAi => (AUTHORIZATION, format!("Bearer {key}")),
                ProviderKind::Anthropic => (HeaderName::from_static("x-api-key"), key.to_owned()),
            };
            let mut value = HeaderValue::from_str(&value).map_err(|_| ModelsConfigError::ApiKey { name })?;
            value.set_sensitive(true);
            headers.insert(header, value);
        }
        if config.kind == ProviderKind::Anthropic {
            headers.insert("anthropic-version", HeaderValue::from_static(anthropic::VERSION));
        }
        let local = is_loopback(&url);
        let mut builder = Client::builder()
            .user_agent(concat!("reliant/", env!("CARGO_PKG_VERSION")))
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(30))
            .connect_timeout(all.connect_timeout)
            .pool_idle_timeout(POOL_IDLE)
            .pool_max_idle_per_host(POOL_IDLE_PER_HOST_MAX)
            // A redirect would carry the prompt to a place nobody configured.
            .redirect(reqwest::redirect::Policy::none())
            .http1_only();
        if local {
            // A proxy of the environment cannot reach our own machine.
            builder = builder.no_proxy();
        }
        if url.scheme() == "http" {
            // No certificate is needed, so none is read; a machine without any can still use a local server.
            builder = builder.tls_certs_only([]);
        }
        Ok(Self {
            client: builder.build().map_err(|error| chain(&error)),
            traceparent: config.send_traceparent.unwrap_or(local),
            own: url.host_str() == Some("api.openai.com"),
            config: config.clone(),
            url,
            headers,
        })
    }

    /// The response whose body is the stream.
    async fn send(&self, body: Bytes, stall: Duration) -> Result<Response, ModelError> {
        let key = self.config.api_key.expose();
        let client = self.client.as_ref().map_err(|error| ModelError::Connect { message: error.clone() })?;
        let mut headers = self.headers.clone();
        if self.traceparent {
            // The call's own span is open until the answer's end; what the provider is told of has ended.
            let span = tracing::info_span!("model.send", otel.kind = "producer", server.address = self.url.host_str());
            hop_span(span).inject_http(&mut headers);
        }
        let sent = client.post(self.url.clone()).headers(headers).body(body).send();
        let response = match timeout(stall, sent).await {
            Err(_) => return Err(ModelError::Stall { after: stall }),
            Ok(Err(error)) => return Err(ModelError::Connect { message: scrub(&chain(&error.without_url()), key) }),
            Ok(Ok(response)) => response,
        };
        let status = response.status();
        if !status.is_success() {
            let delay = retry_after(response.headers(), SystemTime::now());
            return Err(refusal(status, delay, &head(response).await, key));
        }
        let kind = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        match kind.as_str() {
            "application/json" => {
                let body = head(response).await;
                Err(match serde_json::from_slice::<ErrorBody>(&body) {
                    Ok(body) => refusal(StatusCode::BAD_GATEWAY, None, b"", key).or(body.error, key),
                    Err(_) => ModelError::garbage("a JSON document in place of an event stream"),
                })
            }
            "text/html" | "application/x-ndjson" => {
                Err(ModelError::garbage(format!("{kind} in place of an event stream")))
            }
            _ => Ok(response),
        }
    }
}

impl ModelError {
    /// The error that a body with status 200 tells of, or this one where the body says nothing.
    fn or(self, detail: ErrorDetail, key: &str) -> Self {
        if detail.message.is_none() && detail.kind.is_none() { self } else { detail.in_stream(key) }
    }
}

/// Where requests go.
fn endpoint(config: &ProviderConfig) -> Option<Url> {
    let base = config.base_url.trim_end_matches('/');
    let text = match config.kind {
        ProviderKind::OpenAi => format!("{base}/chat/completions"),
        // The habit is a base without the version, but many give it with.
        ProviderKind::Anthropic if base.ends_with("/v1") => format!("{base}/messages"),
        ProviderKind::Anthropic => format!("{base}/v1/messages"),
    };
    let url = Url::parse(&text).ok()?;
    let plain = matches!(url.scheme(), "http" | "https")
        && url.host_str().is_some_and(|host| !host.is_empty())
        && url.username().is_empty()
        && url.password().is_none()
        && !config.base_url.contains(['?', '#']);
    plain.then_some(url)
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The beginning of a body; nothing where it does not come.
async fn head(response: Response) -> BytesMut {
    let mut body = BytesMut::new();
    let mut stream = response.bytes_stream();
    let _ = timeout(ERROR_BODY_TIMEOUT, async {
        while let Some(Ok(chunk)) = stream.next().await {
            let room = ERROR_BODY_MAX_BYTES.saturating_sub(body.len());
            body.extend_from_slice(&chunk[..chunk.len().min(room)]);
            if room == 0 {
                break;
            }
        }
    })
    .await;
    body
}

fn refusal(status: StatusCode, retry_after: Option<Duration>, body: &[u8], key: &str) -> ModelError {
    let detail = serde_json::from_slice::<ErrorBody>(body).map(|body| body.error).unwrap_or_default();
    // An account without money also answers 429, and no waiting helps.
    let broke =
        detail.code.as_str() == Some("insufficient_quota") || detail.kind.as_deref() == Some("insufficient_quota");
    match status.as_u16() {
        429 if !broke => ModelError::RateLimited { retry_after },
        408 | 409 | 425 | 500.. => ModelError::Overloaded { status: status.as_u16(), retry_after },
        status => {
            let message = match detail.message {
                Some(message) => scrub(&message, key),
                None => StatusCode::from_u16(status)
                    .ok()
                    .and_then(|code| code.canonical_reason())
                    .unwrap_or("no reason given")
                    .to_owned(),
            };
            ModelError::Rejected { status, message }
        }
    }
}

/// `retry-after-ms`, or `retry-after` as seconds or as a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let number = |text: &str| text.parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0);
    let delay = match text("retry-after-ms").and_then(number) {
        Some(millis) => millis / 1000.0,
        None => {
            let text = text(RETRY_AFTER.as_str())?;
            match number(text) {
                Some(seconds) => seconds,
                None => {
                    let date = SystemTime::from(chrono::DateTime::parse_from_rfc2822(text).ok()?);
                    date.duration_since(now).unwrap_or_default().as_secs_f64()
                }
            }
        }
    };
    Some(Duration::from_secs_f64(delay.min(RETRY_AFTER_MAX.as_secs_f64())))
}

/// An error with its causes: reqwest's own text alone says too little.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use reliant_types::Secret;

    use super::*;

    fn provider(kind: ProviderKind, base: &str) -> ProviderConfig {
        ProviderConfig::new("p", kind, base, Secret::new("k"))
    }

    #[test]
    fn endpoints_are_built_for_both_habits() {
        let url = |kind, base| endpoint(&provider(kind, base)).map(String::from);
        assert_eq!(url(ProviderKind::OpenAi, "http://x/v1/").unwrap(), "http://x/v1/chat/completions");
        assert_eq!(url(ProviderKind::Anthropic, "https://x").unwrap(), "https://x/v1/messages");
        assert_eq!(url(ProviderKind::Anthropic, "https://x/v1").unwrap(), "https://x/v1/messages");
        for bad in ["", "x", "ftp://x", "http://u:p@x/v1", "http://x/v1?key=1"] {
            assert_eq!(url(ProviderKind::OpenAi, bad), None, "{bad}");
        }
    }

    #[test]
    fn delays_are_read_in_every_form() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_445_412_470);
        let read = |name: &'static str, value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static(value));
            retry_after(&headers, now)
        };
        assert_eq!(read("retry-after", "7"), Some(Duration::from_secs(7)));
        assert_eq!(read("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::from_secs(10)));
        assert_eq!(read("retry-after", "999999999999"), Some(RETRY_AFTER_MAX));
        assert_eq!(read("retry-after-ms", "250"), Some(Duration::from_millis(250)));
        for bad in ["", "soon", "-1", "NaN", "inf"] {
            assert_eq!(read("retry-after", bad), None, "{bad}");
        }
    }

    #[test]
    fn statuses_become_errors() {
        let status = |code| StatusCode::from_u16(code).unwrap();
        assert!(matches!(refusal(status(429), None, b"", ""), ModelError::RateLimited { .. }));
        let broke = br#"{"error":{"message":"You exceeded your quota","code":"insufficient_quota"}}"#;
        assert!(matches!(refusal(status(429), None, broke, ""), ModelError::Rejected { status: 429, .. }));
        assert!(matches!(refusal(status(529), None, b"<html>", ""), ModelError::Overloaded { status: 529, .. }));
        assert_eq!(
            refusal(status(401), None, br#"{"error":{"message":"bad key SECRET"}}"#, "SECRET"),
            ModelError::Rejected { status: 401, message: "bad key ***".into() }
        );
        assert_eq!(
            refusal(status(301), None, b"", ""),
            ModelError::Rejected { status: 301, message: "Moved Permanently".into() }
        );
    }

    #[test]
    fn models_are_listed_and_resolved() {
        let env = |name: &str| (name == "OPENAI_API_KEY").then(|| "k".to_owned());
        let models = Models::new(ModelsConfig::default().with_env(env).with_sim("http://127.0.0.1:1/v1")).unwrap();
        let list = models.list();
        assert_eq!(list.iter().filter(|model| model.default).count(), 1);
        assert!(list.iter().any(|model| model.id == "sim/default"));
        assert!(models.resolve("openai/some-new-model").is_ok());
        assert!(models.resolve("sim/text?tokens=5").is_ok());
        for bad in ["nope/x", "openai", "openai/", "", "a\n/b"] {
            assert_eq!(models.resolve(bad).unwrap_err().code, Code::ModelUnknown, "{bad}");
        }
        let model = models.resolve("openai/gpt-4o").unwrap();
        let usage =
            pb::Usage { input_tokens: 1000, cache_read_tokens: 400, output_tokens: 100, ..pb::Usage::default() };
        assert_eq!(model.cost_microusd(&usage), 600 * 5 / 2 + 400 * 5 / 4 + 100 * 10);
    }
}
