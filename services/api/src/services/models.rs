//! The models that chats may use.

use std::sync::Arc;

use reliant_middleware::Principal;
use reliant_rpc::model_service_server::ModelService;
use reliant_types::{Failure, pb};

use crate::app::{App, service};

pub struct ModelList(pub Arc<App>);

service!(ModelService for ModelList {
    list_models(ListModelsRequest) -> ListModelsResponse = list;
});

impl ModelList {
    async fn list(&self, _: Principal, _: pb::ListModelsRequest) -> Result<pb::ListModelsResponse, Failure> {
        Ok(pb::ListModelsResponse { models: self.0.deps.models.list() })
    }
}
