//! Personal access tokens: made, listed, revoked.

use std::sync::Arc;

use reliant_bus::ControlSubject;
use reliant_middleware::Principal;
use reliant_middleware::principal::SCOPE_API;
use reliant_rpc::token_service_server::TokenService;
use reliant_telemetry::chain;
use reliant_types::{Failure, TokenId, pb};

use super::identity::require_signed_in;
use crate::app::{self, App, refused, service};

const NAME_MAX_CHARS: usize = 100;
const VALID_DAYS: i32 = 90;
const VALID_DAYS_MAX: i32 = 365;

pub struct Tokens(pub Arc<App>);

service!(TokenService for Tokens {
    create_token(CreateTokenRequest) -> CreateTokenResponse = create;
    list_tokens(ListTokensRequest) -> ListTokensResponse = list;
    revoke_token(RevokeTokenRequest) -> RevokeTokenResponse = revoke;
});

impl Tokens {
    async fn create(
        &self,
        caller: Principal,
        request: pb::CreateTokenRequest,
    ) -> Result<pb::CreateTokenResponse, Failure> {
        require_signed_in(&caller, "make tokens")?;
        let name = app::line("name", &request.name, NAME_MAX_CHARS)?;
        let scopes = scopes(request.scopes)?;
        let days = match request.valid_days {
            0 => VALID_DAYS,
            days @ 1..=VALID_DAYS_MAX => days,
            days => {
                let message = format!("valid_days is {days}; it may be 1 to {VALID_DAYS_MAX}, or 0 for {VALID_DAYS}");
                return Err(Failure::field("valid_days", message));
            }
        };
        let expires_at = chrono::Utc::now() + chrono::Duration::days(days.into());
        let store = &self.0.deps.store;
        let (token, secret) =
            store.create_token(caller.user, &name, &scopes, None, Some(expires_at)).await.map_err(refused)?;
        Ok(pb::CreateTokenResponse { token: Some(token), secret })
    }

    async fn list(&self, caller: Principal, _: pb::ListTokensRequest) -> Result<pb::ListTokensResponse, Failure> {
        let tokens = self.0.deps.store.list_tokens(caller.user).await.map_err(refused)?;
        Ok(pb::ListTokensResponse { tokens })
    }

    async fn revoke(
        &self,
        caller: Principal,
        request: pb::RevokeTokenRequest,
    ) -> Result<pb::RevokeTokenResponse, Failure> {
        let token = app::id::<TokenId>("token_id", &request.token_id)?;
        self.0.deps.store.revoke_token(caller.user, token).await.map_err(refused)?;
        self.0.authenticator.revoke(token);
        let revoked = pb::TokenRevoked { token_id: token.to_string() };
        let control = pb::Control { kind: Some(pb::control::Kind::TokenRevoked(revoked)) };
        // A hint: every replica and gateway also asks, twice a second.
        if let Err(error) = self.0.effects.bus().publish(&ControlSubject, &control).await {
            tracing::debug!(error = %chain(&error), token.id = %token, "others were not told of a revocation; they will find it");
        }
        Ok(pb::RevokeTokenResponse {})
    }
}

fn scopes(scopes: Vec<String>) -> Result<Vec<String>, Failure> {
    if scopes.is_empty() {
        return Ok(vec![SCOPE_API.to_owned()]);
    }
    match scopes.iter().find(|scope| *scope != SCOPE_API) {
        None => Ok(vec![SCOPE_API.to_owned()]),
        Some(other) => {
            let shown: String = other.chars().take(40).collect();
            let message =
                format!("scope '{shown}' is not known; 'api' is. Daemons get their token from RegisterDaemon");
            Err(Failure::field("scopes", message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_api_scope_is_given() {
        assert_eq!(scopes(vec![]).unwrap(), ["api"]);
        assert_eq!(scopes(vec!["api".into(), "api".into()]).unwrap(), ["api"]);
        assert_eq!(scopes(vec!["daemon".into()]).unwrap_err().field.as_deref(), Some("scopes"));
    }
}
