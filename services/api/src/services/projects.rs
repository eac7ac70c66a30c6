//! Projects: made and listed.

use std::sync::Arc;

use reliant_middleware::Principal;
use reliant_rpc::project_service_server::ProjectService;
use reliant_types::{Failure, pb};

use crate::app::{self, App, refused, service};

const NAME_MAX_CHARS: usize = 200;

pub struct Projects(pub Arc<App>);

service!(ProjectService for Projects {
    create_project(CreateProjectRequest) -> CreateProjectResponse = create;
    list_projects(ListProjectsRequest) -> ListProjectsResponse = list;
});

impl Projects {
    async fn create(
        &self,
        caller: Principal,
        request: pb::CreateProjectRequest,
    ) -> Result<pb::CreateProjectResponse, Failure> {
        let name = app::line("name", &request.name, NAME_MAX_CHARS)?;
        let project = self.0.deps.store.create_project(caller.user, &name).await.map_err(refused)?;
        Ok(pb::CreateProjectResponse { project: Some(project) })
    }

    async fn list(&self, caller: Principal, _: pb::ListProjectsRequest) -> Result<pb::ListProjectsResponse, Failure> {
        let projects = self.0.deps.store.list_projects(caller.user).await.map_err(refused)?;
        Ok(pb::ListProjectsResponse { projects })
    }
}
