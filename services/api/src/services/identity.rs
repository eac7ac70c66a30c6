//! Sign-in by one-time links, and who one is.

use std::{sync::Arc, time::Duration};

use chrono::Utc;
use reliant_middleware::{Principal, PrincipalKind, require_person};
use reliant_rpc::identity_service_server::IdentityService;
use reliant_types::{Code, Failure, pb, timestamp};
use tonic::{Request, Response, Status};

use crate::app::{App, answer, refused};

const LOGIN_CODE_TTL: Duration = Duration::from_secs(10 * 60);
const LOGIN_CODE_MAX_BYTES: usize = 256;

pub struct Identity(pub Arc<App>);

#[tonic::async_trait]
impl IdentityService for Identity {
    /// The one method without a caller; its secret is the code.
    async fn exchange_login_code(
        &self,
        request: Request<pb::ExchangeLoginCodeRequest>,
    ) -> Result<Response<pb::ExchangeLoginCodeResponse>, Status> {
        answer(self.exchange(request.into_inner()).await)
    }

    async fn create_login_code(
        &self,
        request: Request<pb::CreateLoginCodeRequest>,
    ) -> Result<Response<pb::CreateLoginCodeResponse>, Status> {
        let caller = require_person(&request)?;
        answer(self.create(caller).await)
    }

    async fn get_current_user(
        &self,
        request: Request<pb::GetCurrentUserRequest>,
    ) -> Result<Response<pb::GetCurrentUserResponse>, Status> {
        let caller = require_person(&request)?;
        answer(self.current(caller).await)
    }
}

impl Identity {
    async fn exchange(&self, request: pb::ExchangeLoginCodeRequest) -> Result<pb::ExchangeLoginCodeResponse, Failure> {
        if request.code.is_empty() || request.code.len() > LOGIN_CODE_MAX_BYTES {
            return Err(Failure::field("code", "code is not one of a sign-in link; ask for a new link"));
        }
        let user = self.0.deps.store.use_login_code(&request.code).await.map_err(refused)?;
        let (access_token, expires_at) = self.0.deps.jwt.sign(&user.subject, self.0.deps.access_token_ttl)?;
        Ok(pb::ExchangeLoginCodeResponse { access_token, expires_at: Some(timestamp(expires_at.into())) })
    }

    async fn create(&self, caller: Principal) -> Result<pb::CreateLoginCodeResponse, Failure> {
        require_signed_in(&caller, "make sign-in links")?;
        let code = self.0.deps.store.create_login_code(caller.user, LOGIN_CODE_TTL).await.map_err(refused)?;
        Ok(pb::CreateLoginCodeResponse { code, expires_at: Some(timestamp(Utc::now() + LOGIN_CODE_TTL)) })
    }

    async fn current(&self, caller: Principal) -> Result<pb::GetCurrentUserResponse, Failure> {
        let user = self.0.deps.store.user(caller.user).await.map_err(refused)?;
        Ok(pb::GetCurrentUserResponse { user_id: user.id.to_string(), name: user.name, role: user.role })
    }
}

/// A person, not a program with a token: a token must not make what outlives it.
pub fn require_signed_in(caller: &Principal, what: &str) -> Result<(), Failure> {
    if caller.kind == PrincipalKind::Person {
        return Ok(());
    }
    Err(Failure::new(Code::ScopeMissing, format!("only a signed-in person may {what}; sign in and use that token")))
}
