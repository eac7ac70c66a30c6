//! Approvals: listed and decided. The first decision stands.

use std::sync::Arc;

use reliant_middleware::Principal;
use reliant_rpc::approval_service_server::ApprovalService;
use reliant_types::{ApprovalId, ChatId, Failure, pb};

use tracing::Instrument as _;

use crate::app::{self, App, refused, service};

const PAGE_SIZE_MAX: i32 = 200;

pub struct Approvals(pub Arc<App>);

service!(ApprovalService for Approvals {
    list_approvals(ListApprovalsRequest) -> ListApprovalsResponse = list;
    decide_approval(DecideApprovalRequest) -> DecideApprovalResponse = decide;
});

impl Approvals {
    async fn list(
        &self,
        caller: Principal,
        request: pb::ListApprovalsRequest,
    ) -> Result<pb::ListApprovalsResponse, Failure> {
        let chat = app::optional_id::<ChatId>("chat_id", &request.chat_id)?;
        let size = app::page_size(request.page_size, PAGE_SIZE_MAX)?;
        let before = app::optional_id::<ApprovalId>("before_approval_id", &request.before_approval_id)?;
        let listed = self.0.deps.store.list_approvals(caller.user, chat, request.include_decided, size, before).await;
        let (approvals, has_more) = listed.map_err(refused)?;
        Ok(pb::ListApprovalsResponse { approvals, has_more })
    }

    async fn decide(
        &self,
        caller: Principal,
        request: pb::DecideApprovalRequest,
    ) -> Result<pb::DecideApprovalResponse, Failure> {
        let approval = app::id::<ApprovalId>("approval_id", &request.approval_id)?;
        let scope = match pb::ApprovalScope::try_from(request.scope) {
            Ok(pb::ApprovalScope::Unspecified | pb::ApprovalScope::Once) => pb::ApprovalScope::Once,
            Ok(pb::ApprovalScope::Session) => pb::ApprovalScope::Session,
            Err(_) => {
                let message = format!("scope {} is not known; it may be ONCE or SESSION", request.scope);
                return Err(Failure::field("scope", message));
            }
        };
        let decide = self.0.deps.store.decide_approval(caller.user, approval, request.approve, scope);
        let committed = decide.instrument(tracing::info_span!("approval.decide")).await.map_err(refused)?;
        Ok(pb::DecideApprovalResponse { approval: Some(self.0.effects.after(committed)) })
    }
}
