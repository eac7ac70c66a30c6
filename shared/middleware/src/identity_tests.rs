use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use super::*;

#[derive(Default)]
struct Fake {
    asked: AtomicUsize,
    users: Mutex<HashMap<String, UserId>>,
    tokens: Mutex<HashMap<String, Result<TokenInfo, Failure>>>,
    revoked: Mutex<Vec<TokenId>>,
    away: Mutex<bool>,
}

#[async_trait]
impl TokenSource for Fake {
    async fn user_by_subject(&self, subject: &str) -> Result<Option<UserId>, Failure> {
        Ok(self.users.lock().get(subject).copied())
    }

    async fn token_by_secret(&self, secret: &str) -> Result<TokenInfo, Failure> {
        self.asked.fetch_add(1, SeqCst);
        tokio::time::sleep(Duration::from_millis(5)).await;
        if *self.away.lock() {
            return Err(Failure::new(Code::Unavailable, "the database is away"));
        }
        let unknown = || Err(Failure::new(Code::TokenInvalid, "unknown token"));
        self.tokens.lock().get(secret).cloned().unwrap_or_else(unknown)
    }

    async fn revoked_within(&self, _: Duration) -> Result<Vec<TokenId>, Failure> {
        Ok(self.revoked.lock().clone())
    }
}

fn token(daemon: Option<DaemonId>) -> TokenInfo {
    TokenInfo { id: TokenId::new(), user: UserId::new(), daemon, scopes: vec!["api".into()], expires_at: None }
}

fn set_up() -> (Arc<Fake>, StoreAuthenticator, TokenInfo) {
    let fake = Arc::new(Fake::default());
    let info = token(None);
    fake.tokens.lock().insert("rlt_a".into(), Ok(info.clone()));
    let jwt = Jwt::from_pem(&Jwt::generate_pem()).unwrap();
    (fake.clone(), StoreAuthenticator::over(fake, jwt), info)
}

#[tokio::test]
async fn a_signed_in_person_is_the_user_of_the_subject() {
    let (fake, auth, _) = set_up();
    let ada = UserId::new();
    fake.users.lock().insert("ada".into(), ada);
    let sign = |subject| auth.jwt().sign(subject, Duration::from_secs(60)).unwrap().0;
    let principal = auth.authenticate(&sign("ada")).await.unwrap();
    assert_eq!((principal.user, principal.kind), (ada, PrincipalKind::Person));
    assert!(principal.expires_at.is_some());
    assert_eq!(auth.authenticate(&sign("bob")).await.unwrap_err().code, Code::TokenInvalid);
    let foreign = Jwt::from_pem(&Jwt::generate_pem()).unwrap().sign("ada", Duration::from_secs(60)).unwrap().0;
    assert_eq!(auth.authenticate(&foreign).await.unwrap_err().code, Code::TokenInvalid);
}

#[tokio::test]
async fn tokens_of_programs_and_daemons_are_told_apart() {
    let (fake, auth, info) = set_up();
    let daemon = DaemonId::new();
    let of_daemon = token(Some(daemon));
    fake.tokens.lock().insert("rlt_d".into(), Ok(of_daemon.clone()));
    let program = auth.authenticate("rlt_a").await.unwrap();
    assert_eq!(program.kind, PrincipalKind::Token { id: info.id, scopes: vec!["api".into()] });
    let principal = auth.authenticate("rlt_d").await.unwrap();
    assert_eq!(principal.kind, PrincipalKind::Daemon { id: daemon, token: of_daemon.id });
    for bad in ["", "x", "rlt_", "rlt_unknown", "eyJ", "eyJ.eyJ.x"] {
        assert_eq!(auth.authenticate(bad).await.unwrap_err().code, Code::TokenInvalid, "{bad:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn many_questions_at_once_are_one_and_an_answer_lasts_under_a_second() {
    let (fake, auth, _) = set_up();
    let calls = (0..100).map(|_| auth.authenticate("rlt_a"));
    assert!(futures::future::join_all(calls).await.iter().all(Result::is_ok));
    assert_eq!(fake.asked.load(SeqCst), 1);
    auth.authenticate("rlt_a").await.unwrap();
    assert_eq!(fake.asked.load(SeqCst), 1);

    // Revoked by another replica, and the hint was lost.
    fake.tokens.lock().insert("rlt_a".into(), Err(Failure::new(Code::TokenRevoked, "revoked")));
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(auth.authenticate("rlt_a").await.unwrap_err().code, Code::TokenRevoked);
}

#[tokio::test]
async fn a_revocation_is_immediate_where_it_is_told() {
    let (_, auth, info) = set_up();
    let principal = auth.authenticate("rlt_a").await.unwrap();
    let stream = auth.revoked(&principal);
    auth.revoke(info.id);
    stream.await;
    // The store still says it is good, as a lagging reader would.
    assert_eq!(auth.authenticate("rlt_a").await.unwrap_err().code, Code::TokenRevoked);
    // A stream that was let in just before ends as well.
    auth.revoked(&principal).await;
}

#[tokio::test(start_paused = true)]
async fn a_stream_learns_of_a_revocation_whose_hint_was_lost() {
    let (fake, auth, info) = set_up();
    let principal = auth.authenticate("rlt_a").await.unwrap();
    let stream = auth.revoked(&principal);
    tokio::spawn(auth.clone().watch_revocations());
    fake.revoked.lock().push(info.id);
    tokio::time::timeout(Duration::from_secs(1), stream).await.expect("revocable within a second");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_is_not_remembered_as_a_bad_token() {
    let (fake, auth, _) = set_up();
    *fake.away.lock() = true;
    assert_eq!(auth.authenticate("rlt_a").await.unwrap_err().code, Code::Unavailable);
    *fake.away.lock() = false;
    assert!(auth.authenticate("rlt_a").await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn memory_is_bounded_under_a_flood_of_made_up_tokens() {
    let (fake, auth, _) = set_up();
    auth.authenticate("rlt_a").await.unwrap();
    for n in 0..40 {
        let calls: Vec<_> = (0..1000).map(|m| format!("rlt_{n}_{m}")).collect();
        futures::future::join_all(calls.iter().map(|token| auth.authenticate(token))).await;
        let refused = auth.0.refused.lock();
        assert!(refused.failures.len() <= REFUSED_MAX && refused.oldest_first.len() <= REFUSED_MAX);
        assert!(auth.0.in_flight.lock().is_empty());
    }
    // 40,000 made-up tokens later, all within a good answer's time.
    let asked = fake.asked.load(SeqCst);
    auth.authenticate("rlt_a").await.unwrap();
    assert_eq!(fake.asked.load(SeqCst), asked, "the good token is still remembered");
    assert!(auth.is_known("rlt_a") && !auth.is_known("rlt_39_999"));
}

#[tokio::test(start_paused = true)]
async fn a_token_is_known_after_its_answer_has_run_out_and_until_it_is_refused() {
    let (fake, auth, _) = set_up();
    assert!(!auth.is_known("rlt_a"));
    auth.authenticate("rlt_a").await.unwrap();
    tokio::time::advance(Duration::from_secs(60)).await;
    assert!(auth.is_known("rlt_a"));
    fake.tokens.lock().insert("rlt_a".into(), Err(Failure::new(Code::TokenRevoked, "revoked")));
    assert_eq!(auth.authenticate("rlt_a").await.unwrap_err().code, Code::TokenRevoked);
    assert!(!auth.is_known("rlt_a"));
}

#[tokio::test(start_paused = true)]
async fn good_tokens_beyond_the_bound_drop_the_older_half_and_never_all() {
    let (_, auth, _) = set_up();
    for n in 0..=CACHE_MAX {
        let mut principal = Principal::person(UserId::new());
        principal.expires_at = None;
        tokio::time::advance(Duration::from_micros(1)).await;
        let key: Key = Sha256::digest(n.to_be_bytes()).into();
        auth.0.keep(key, &Ok(principal));
    }
    let cache = auth.0.cache.lock();
    assert_eq!(cache.len(), CACHE_MAX / 2 + 1);
    let newest: Key = Sha256::digest(CACHE_MAX.to_be_bytes()).into();
    assert!(cache.contains_key(&newest));
}

#[test]
fn a_missing_key_is_said() {
    assert!(matches!(AuthConfig::default().jwt(), Err(AuthConfigError::NoKey)));
    let config = AuthConfig { jwt_key_file: Some("/does/not/exist.pem".into()), ..AuthConfig::default() };
    assert!(config.jwt().unwrap_err().to_string().contains("/does/not/exist.pem"));
    let config = AuthConfig { jwt_key_pem: Jwt::generate_pem().into(), ..AuthConfig::default() };
    assert!(config.jwt().is_ok());
}
