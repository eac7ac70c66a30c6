//! Who holds a token, by the store: JWTs of people, and personal access tokens of programs and daemons.
//!
//! An answer is remembered at most a second ([`TOKEN_CACHE_TTL`]), so a token revoked through any replica is void
//! within a second even where the hint was lost; [`StoreAuthenticator::revoke`] makes it immediate. Concurrent
//! questions about one token are one question to the store. Nothing here grows without a bound, and what was refused has
//! a small memory of its own: made-up tokens drop no good ones.

use std::{
    collections::{HashMap, VecDeque},
    path::PathBuf,
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use parking_lot::Mutex;
use reliant_telemetry::chain;
use reliant_types::{Code, DaemonId, Failure, Secret, TokenId, UserId, code::Class};
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    auth::Authenticator,
    jwt::{Jwt, JwtError},
    principal::{Principal, PrincipalKind},
};

/// How long an answer about a personal access token is believed.
pub const TOKEN_CACHE_TTL: Duration = Duration::from_millis(900);
/// How long a JWT's subject is believed to be the same user. JWTs cannot be revoked; users can be removed.
const SUBJECT_CACHE_TTL: Duration = Duration::from_secs(30);
/// How long a token that was good counts as known. It is asked about anew meanwhile.
const KNOWN_FOR: Duration = Duration::from_secs(600);
const CACHE_MAX: usize = 16_384;
const REFUSED_MAX: usize = 4096;
/// Different tokens asked about at one time; past it the caller is told to come back.
const IN_FLIGHT_MAX: usize = 2048;
/// How often the store is asked for revocations that streams must learn of.
const REVOCATION_POLL: Duration = Duration::from_millis(500);
/// A poll looks back past the last one by so much: a transaction may commit after its timestamp.
const REVOCATION_OVERLAP: Duration = Duration::from_secs(10);
/// Personal access tokens begin so.
const TOKEN_PREFIX: &str = "rlt_";
/// JWTs begin so: base64 of `{"`.
const JWT_PREFIX: &str = "eyJ";

/// How people's tokens are signed.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthConfig {
    /// The Ed25519 key in PEM form. A private key signs and verifies, a public key only verifies.
    pub jwt_key_pem: Secret,
    /// The file with that key, if it is not given here.
    pub jwt_key_file: Option<PathBuf>,
    /// How long an access token is good.
    #[serde(with = "humantime_serde")]
    pub access_token_ttl: Duration,
}

impl Default for AuthConfig {
    fn default() -> Self {
        Self { jwt_key_pem: Secret::default(), jwt_key_file: None, access_token_ttl: Duration::from_secs(12 * 3600) }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum AuthConfigError {
    #[error("no key for people's tokens: set auth.jwt_key_file or auth.jwt_key_pem to an Ed25519 key in PEM form")]
    NoKey,
    #[error("the key file {path} cannot be read")]
    KeyFile {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Key(#[from] JwtError),
}

impl AuthConfig {
    /// Reads the key.
    pub fn jwt(&self) -> Result<Jwt, AuthConfigError> {
        if !self.jwt_key_pem.is_empty() {
            return Ok(Jwt::from_pem(self.jwt_key_pem.expose())?);
        }
        let path = self.jwt_key_file.clone().ok_or(AuthConfigError::NoKey)?;
        match std::fs::read_to_string(&path) {
            Ok(pem) => Ok(Jwt::from_pem(&pem)?),
            Err(source) => Err(AuthConfigError::KeyFile { path, source }),
        }
    }
}

/// What the store knows of a personal access token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenInfo {
    pub id: TokenId,
    pub user: UserId,
    /// Set for a daemon's token.
    pub daemon: Option<DaemonId>,
    pub scopes: Vec<String>,
    pub expires_at: Option<SystemTime>,
}

/// The store, as seen from here.
#[async_trait]
pub trait TokenSource: Send + Sync + 'static {
    /// `None`: no such user.
    async fn user_by_subject(&self, subject: &str) -> Result<Option<UserId>, Failure>;

    /// `TOKEN_INVALID`, `TOKEN_EXPIRED` or `TOKEN_REVOKED` where it is not good.
    async fn token_by_secret(&self, secret: &str) -> Result<TokenInfo, Failure>;

    /// Tokens revoked no longer ago than this, by the store's clock.
    async fn revoked_within(&self, ago: Duration) -> Result<Vec<TokenId>, Failure>;
}

/// Clones share one cache.
#[derive(Clone)]
pub struct StoreAuthenticator(Arc<Inner>);

type Key = [u8; 32];
type Answer = Result<Principal, Failure>;

struct Inner {
    source: Arc<dyn TokenSource>,
    jwt: Jwt,
    cache: Mutex<HashMap<Key, Good>>,
    refused: Mutex<Refused>,
    in_flight: Mutex<HashMap<Key, Shared<BoxFuture<'static, Answer>>>>,
    streams: Mutex<HashMap<TokenId, Weak<CancellationToken>>>,
    /// Revoked a moment ago: an answer that was on its way must not be believed.
    revoked: Mutex<HashMap<TokenId, Instant>>,
}

/// A token that was good: believed until a moment, known for longer.
struct Good {
    principal: Principal,
    until: Instant,
    known_until: Instant,
}

/// Tokens that were refused a moment ago. All are remembered for the same time, so the oldest is the first to go.
#[derive(Default)]
struct Refused {
    failures: HashMap<Key, (Failure, Instant)>,
    oldest_first: VecDeque<Key>,
}

impl Refused {
    fn get(&self, key: &Key, now: Instant) -> Option<Failure> {
        let (failure, until) = self.failures.get(key)?;
        (now < *until).then(|| failure.clone())
    }

    fn keep(&mut self, key: Key, failure: Failure, until: Instant) {
        if self.failures.insert(key, (failure, until)).is_none() {
            self.oldest_first.push_back(key);
        }
        if self.oldest_first.len() > REFUSED_MAX
            && let Some(oldest) = self.oldest_first.pop_front()
        {
            self.failures.remove(&oldest);
        }
    }
}

impl StoreAuthenticator {
    pub fn new(store: reliant_store::Store, jwt: Jwt) -> Self {
        Self::over(Arc::new(store), jwt)
    }

    pub fn over(source: Arc<dyn TokenSource>, jwt: Jwt) -> Self {
        Self(Arc::new(Inner {
            source,
            jwt,
            cache: Mutex::default(),
            refused: Mutex::default(),
            in_flight: Mutex::default(),
            streams: Mutex::default(),
            revoked: Mutex::default(),
        }))
    }

    /// Signs people's tokens, where the key allows it.
    pub fn jwt(&self) -> &Jwt {
        &self.0.jwt
    }

    /// Makes a token void here at once, and ends its streams. For the hint that NATS carries, and for the replica that
    /// revoked it.
    pub fn revoke(&self, token: TokenId) {
        self.0.revoke(token);
    }

    /// Asks the store for revocations, for ever: how a stream learns of one whose hint was lost. To be spawned once.
    pub async fn watch_revocations(self) {
        let mut since = Instant::now();
        loop {
            tokio::time::sleep(REVOCATION_POLL).await;
            let asked = Instant::now();
            // A store that is away lets nobody in anew, and streams get nothing new from it either.
            match self.0.source.revoked_within(since.elapsed() + REVOCATION_OVERLAP).await {
                Ok(tokens) => {
                    tokens.into_iter().for_each(|token| self.0.revoke(token));
                    since = asked;
                }
                Err(failure) => tracing::debug!(error = %chain(&failure), "revocations could not be read"),
            }
        }
    }
}

#[async_trait]
impl Authenticator for StoreAuthenticator {
    async fn authenticate(&self, bearer: &str) -> Answer {
        let key: Key = Sha256::digest(bearer.as_bytes()).into();
        if let Some(answer) = self.0.cached(&key) {
            return answer;
        }
        let answer = self.0.join(key, bearer)?;
        answer.await
    }

    fn is_known(&self, bearer: &str) -> bool {
        let key: Key = Sha256::digest(bearer.as_bytes()).into();
        self.0.cache.lock().get(&key).is_some_and(|good| Instant::now() < good.known_until)
    }

    fn revoked(&self, principal: &Principal) -> BoxFuture<'static, ()> {
        let Some(token) = principal.token() else { return Box::pin(std::future::pending()) };
        let watch = self.0.watch(token);
        Box::pin(async move { watch.cancelled().await })
    }
}

impl Inner {
    fn cached(&self, key: &Key) -> Option<Answer> {
        let now = Instant::now();
        if let Some(good) = self.cache.lock().get(key).filter(|good| now < good.until) {
            return Some(Ok(good.principal.clone()));
        }
        self.refused.lock().get(key, now).map(Err)
    }

    /// The question under way for this token, or a new one. It runs to its end even if all who asked leave, so that a
    /// half-asked question holds no connection.
    fn join(self: &Arc<Self>, key: Key, bearer: &str) -> Result<Shared<BoxFuture<'static, Answer>>, Failure> {
        let mut in_flight = self.in_flight.lock();
        if let Some(answer) = in_flight.get(&key) {
            return Ok(answer.clone());
        }
        if in_flight.len() >= IN_FLIGHT_MAX {
            return Err(Failure::new(Code::QueueFull, "too many sign-ins at once; try again in a moment")
                .retry_after(Duration::from_secs(1)));
        }
        let inner = self.clone();
        let bearer = bearer.to_owned();
        let task = tokio::spawn(async move {
            let answer = inner.ask(&bearer).await;
            inner.keep(key, &answer);
            inner.in_flight.lock().remove(&key);
            answer
        });
        let inner = Arc::downgrade(self);
        let answer = async move {
            task.await.unwrap_or_else(|_| {
                // It panicked or the runtime ends; the next one asks anew.
                inner.upgrade().inspect(|inner| drop(inner.in_flight.lock().remove(&key)));
                Err(Failure::new(Code::Internal, "the token could not be checked"))
            })
        };
        let answer = answer.boxed().shared();
        in_flight.insert(key, answer.clone());
        Ok(answer)
    }

    async fn ask(&self, bearer: &str) -> Answer {
        if bearer.starts_with(JWT_PREFIX) {
            let claims = self.jwt.verify(bearer)?;
            let user = self.source.user_by_subject(&claims.sub).await?;
            let user =
                user.ok_or_else(|| Failure::new(Code::TokenInvalid, "the token's user does not exist any more"))?;
            return Ok(Principal { user, kind: PrincipalKind::Person, expires_at: Some(claims.expires_at()) });
        }
        if !bearer.starts_with(TOKEN_PREFIX) {
            return Err(Failure::new(Code::TokenInvalid, "the token is neither a sign-in token nor a 'rlt_…' token"));
        }
        let token = self.source.token_by_secret(bearer).await?;
        if self.revoked.lock().contains_key(&token.id) {
            return Err(Failure::new(Code::TokenRevoked, "the token was revoked; make a new one"));
        }
        let kind = match token.daemon {
            Some(id) => PrincipalKind::Daemon { id, token: token.id },
            None => PrincipalKind::Token { id: token.id, scopes: token.scopes },
        };
        Ok(Principal { user: token.user, kind, expires_at: token.expires_at })
    }

    /// Remembers an answer about the token, but not a failure of the store.
    fn keep(&self, key: Key, answer: &Answer) {
        let now = Instant::now();
        let principal = match answer {
            Ok(principal) => principal.clone(),
            Err(failure) => {
                if failure.code.class() == Class::Unauthenticated {
                    self.cache.lock().remove(&key);
                    self.refused.lock().keep(key, failure.clone(), now + TOKEN_CACHE_TTL);
                }
                return;
            }
        };
        let left = |most: Duration| match principal.expires_at {
            Some(at) => at.duration_since(SystemTime::now()).unwrap_or_default().min(most),
            None => most,
        };
        let ttl = if principal.kind == PrincipalKind::Person { left(SUBJECT_CACHE_TTL) } else { TOKEN_CACHE_TTL };
        let (until, known_until) = (now + ttl, now + left(KNOWN_FOR));
        let mut cache = self.cache.lock();
        if cache.len() >= CACHE_MAX && !cache.contains_key(&key) {
            make_room(&mut cache, now);
        }
        // Under the cache's lock, as in `revoke`: a revocation either is seen here or removes what is put here.
        let revoked = principal.token().is_some_and(|token| self.revoked.lock().contains_key(&token));
        if !revoked {
            cache.insert(key, Good { principal, until, known_until });
        }
    }

    fn revoke(&self, token: TokenId) {
        let now = Instant::now();
        {
            let mut cache = self.cache.lock();
            let mut revoked = self.revoked.lock();
            // Long enough for every answer that is on its way.
            revoked.retain(|_, at| now.saturating_duration_since(*at) < Duration::from_secs(60));
            if revoked.len() < CACHE_MAX {
                revoked.insert(token, now);
            }
            cache.retain(|_, good| good.principal.token() != Some(token));
        }
        if let Some(watch) = self.streams.lock().remove(&token).and_then(|watch| watch.upgrade()) {
            watch.cancel();
        }
    }

    fn watch(&self, token: TokenId) -> Arc<CancellationToken> {
        let mut streams = self.streams.lock();
        if let Some(watch) = streams.get(&token).and_then(Weak::upgrade) {
            return watch;
        }
        // Bounded by the streams that are open; the dead are cleared out when the map would grow.
        if streams.len() == streams.capacity() {
            streams.retain(|_, watch| watch.strong_count() > 0);
        }
        let watch = Arc::new(CancellationToken::new());
        streams.insert(token, Arc::downgrade(&watch));
        // Revoked between its authentication and here.
        if self.revoked.lock().contains_key(&token) {
            watch.cancel();
        }
        watch
    }
}

/// Drops what is known no more, else the half that was good the longest ago: what is left pays for thousands of calls.
fn make_room(cache: &mut HashMap<Key, Good>, now: Instant) {
    cache.retain(|_, good| now < good.known_until);
    if cache.len() < CACHE_MAX {
        return;
    }
    let mut ends: Vec<Instant> = cache.values().map(|good| good.known_until).collect();
    let middle = ends.len() / 2;
    let median = *ends.select_nth_unstable(middle).1;
    let mut to_drop = middle;
    cache.retain(|_, good| {
        let goes = good.known_until <= median && to_drop > 0;
        to_drop -= usize::from(goes);
        !goes
    });
}

#[cfg(test)]
#[path = "identity_tests.rs"]
mod tests;
