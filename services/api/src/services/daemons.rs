//! Daemons: registered, listed, chosen for a chat, revoked.

use std::sync::Arc;

use reliant_bus::ControlSubject;
use reliant_middleware::{Principal, PrincipalKind};
use reliant_rpc::daemon_service_server::DaemonService;
use reliant_telemetry::chain;
use reliant_types::{ChatId, DaemonId, Failure, pb};

use crate::app::{self, App, refused, service};

const NAME_MAX_CHARS: usize = 100;
const ROOT_ID_MAX_CHARS: usize = 200;

pub struct Daemons(pub Arc<App>);

service!(DaemonService for Daemons {
    register_daemon(RegisterDaemonRequest) -> RegisterDaemonResponse = register;
    list_daemons(ListDaemonsRequest) -> ListDaemonsResponse = list;
    select_daemon(SelectDaemonRequest) -> SelectDaemonResponse = select;
    revoke_daemon(RevokeDaemonRequest) -> RevokeDaemonResponse = revoke;
});

impl Daemons {
    async fn register(
        &self,
        caller: Principal,
        request: pb::RegisterDaemonRequest,
    ) -> Result<pb::RegisterDaemonResponse, Failure> {
        let name = app::line("name", &request.name, NAME_MAX_CHARS)?;
        let made_by = match caller.kind {
            PrincipalKind::Token { id, .. } => Some(id),
            PrincipalKind::Person | PrincipalKind::Daemon { .. } => None,
        };
        let (daemon, token) = self
            .0
            .deps
            .store
            .register_daemon_by(caller.user, &name, request.replace, made_by)
            .await
            .map_err(refused)?;
        Ok(pb::RegisterDaemonResponse { daemon_id: daemon.to_string(), token })
    }

    async fn list(
        &self,
        caller: Principal,
        request: pb::ListDaemonsRequest,
    ) -> Result<pb::ListDaemonsResponse, Failure> {
        let daemons = self.0.deps.store.list_daemons(caller.user, request.include_revoked).await.map_err(refused)?;
        Ok(pb::ListDaemonsResponse { daemons })
    }

    async fn select(
        &self,
        caller: Principal,
        request: pb::SelectDaemonRequest,
    ) -> Result<pb::SelectDaemonResponse, Failure> {
        let chat = app::id::<ChatId>("chat_id", &request.chat_id)?;
        let daemon = app::id::<DaemonId>("daemon_id", &request.daemon_id)?;
        let root_id = app::optional_line("root_id", &request.root_id, ROOT_ID_MAX_CHARS)?;
        let committed = self.0.deps.store.select_daemon(caller.user, chat, daemon, &root_id).await.map_err(refused)?;
        let chat = self.0.effects.after(committed);
        Ok(pb::SelectDaemonResponse { chat_id: chat.id, daemon_id: chat.daemon_id, root_id: chat.root_id })
    }

    async fn revoke(
        &self,
        caller: Principal,
        request: pb::RevokeDaemonRequest,
    ) -> Result<pb::RevokeDaemonResponse, Failure> {
        let daemon = app::id::<DaemonId>("daemon_id", &request.daemon_id)?;
        let committed = self.0.deps.store.revoke_daemon(caller.user, daemon).await.map_err(refused)?;
        self.0.effects.after(committed);
        let revoked = pb::DaemonRevoked { daemon_id: daemon.to_string() };
        let control = pb::Control { kind: Some(pb::control::Kind::DaemonRevoked(revoked)) };
        // A hint: gateways also ask every second.
        if let Err(error) = self.0.effects.bus().publish(&ControlSubject, &control).await {
            tracing::debug!(error = %chain(&error), daemon.id = %daemon, "gateways were not told of a revocation; they will find it");
        }
        Ok(pb::RevokeDaemonResponse {})
    }
}
