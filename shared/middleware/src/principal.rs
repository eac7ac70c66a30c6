//! Who calls. The auth layer puts a [`Principal`] into the request's extensions; handlers take it out here and nowhere
//! else, so that a handler behind a stack without auth fails closed.

use std::time::SystemTime;

use reliant_types::{Code, DaemonId, Failure, TokenId, UserId};
use tonic::Status;

/// The scope of a personal access token that may call the api.
pub const SCOPE_API: &str = "api";

#[derive(Clone, Debug)]
pub struct Principal {
    /// On whose behalf; every read and write is scoped by it.
    pub user: UserId,
    pub kind: PrincipalKind,
    /// A stream does not outlive this.
    pub expires_at: Option<SystemTime>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PrincipalKind {
    /// Signed in with a JWT.
    Person,
    /// A program with a personal access token.
    Token {
        id: TokenId,
        scopes: Vec<String>,
    },
    Daemon {
        id: DaemonId,
        token: TokenId,
    },
}

impl Principal {
    pub fn person(user: UserId) -> Self {
        Self { user, kind: PrincipalKind::Person, expires_at: None }
    }

    /// The token that may be revoked under this principal.
    pub fn token(&self) -> Option<TokenId> {
        match &self.kind {
            PrincipalKind::Person => None,
            PrincipalKind::Token { id, .. } | PrincipalKind::Daemon { token: id, .. } => Some(*id),
        }
    }

    pub fn daemon(&self) -> Option<DaemonId> {
        match self.kind {
            PrincipalKind::Daemon { id, .. } => Some(id),
            PrincipalKind::Person | PrincipalKind::Token { .. } => None,
        }
    }

    /// A person has every scope of a person; a daemon has none of them.
    pub fn has_scope(&self, scope: &str) -> bool {
        match &self.kind {
            PrincipalKind::Person => true,
            PrincipalKind::Token { scopes, .. } => scopes.iter().any(|held| held == scope),
            PrincipalKind::Daemon { .. } => false,
        }
    }

    pub fn require_scope(&self, scope: &str) -> Result<(), Failure> {
        if self.has_scope(scope) {
            return Ok(());
        }
        Err(Failure::new(
            Code::ScopeMissing,
            format!("this token lacks the scope '{scope}'; make one that has it with 'reliant token create'"),
        ))
    }
}

/// The caller of `request`.
pub fn principal<T>(request: &tonic::Request<T>) -> Result<Principal, Status> {
    request.extensions().get::<Principal>().cloned().ok_or_else(|| reliant_rpc::status(&missing()))
}

/// A person, or a program with the scope `api` on a person's behalf; not a daemon.
pub fn require_person<T>(request: &tonic::Request<T>) -> Result<Principal, Status> {
    person(request.extensions()).cloned().map_err(|failure| reliant_rpc::status(&failure))
}

/// [`require_person`], before the request's body is read.
pub fn person(extensions: &http::Extensions) -> Result<&Principal, Failure> {
    let principal = extensions.get::<Principal>().ok_or_else(missing)?;
    principal.require_scope(SCOPE_API)?;
    Ok(principal)
}

/// A daemon, with its id and its owner.
pub fn require_daemon<T>(request: &tonic::Request<T>) -> Result<(DaemonId, Principal), Status> {
    let principal = principal(request)?;
    let Some(id) = principal.daemon() else {
        return Err(reliant_rpc::status(&Failure::new(
            Code::ScopeMissing,
            "only a daemon's token is accepted here; make one with 'reliant daemon register'",
        )));
    };
    Ok((id, principal))
}

pub(crate) fn missing() -> Failure {
    Failure::new(
        Code::TokenMissing,
        "no token was sent; sign in by the link that 'reliant up' prints, or send 'authorization: Bearer <token>'",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kind: PrincipalKind) -> tonic::Request<()> {
        let mut request = tonic::Request::new(());
        request.extensions_mut().insert(Principal { user: UserId::new(), kind, expires_at: None });
        request
    }

    #[test]
    fn each_kind_is_let_in_where_it_belongs() {
        let daemon = DaemonId::new();
        let token = |scopes: &[&str]| PrincipalKind::Token {
            id: TokenId::new(),
            scopes: scopes.iter().map(|scope| (*scope).to_owned()).collect(),
        };
        let cases = [
            (PrincipalKind::Person, true, false),
            (token(&["api"]), true, false),
            (token(&[]), false, false),
            (token(&["other"]), false, false),
            (PrincipalKind::Daemon { id: daemon, token: TokenId::new() }, false, true),
        ];
        for (kind, person, is_daemon) in cases {
            let request = request(kind.clone());
            assert_eq!(require_person(&request).is_ok(), person, "{kind:?}");
            assert_eq!(require_daemon(&request).is_ok(), is_daemon, "{kind:?}");
        }
    }

    #[test]
    fn without_an_auth_layer_nobody_is_let_in() {
        let status = principal(&tonic::Request::new(())).unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unauthenticated);
    }
}
