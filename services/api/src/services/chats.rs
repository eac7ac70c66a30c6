//! Chats: made, listed, renamed, archived, configured.

use std::sync::Arc;

use reliant_middleware::Principal;
use reliant_rpc::chat_service_server::ChatService;
use reliant_store::{ChatPage, NewChat};
use reliant_types::{ChatId, Code, DaemonId, Failure, ProjectId, limits, pb};

use crate::app::{self, App, refused, service};

const ROOT_ID_MAX_CHARS: usize = 200;
const PAGE_TOKEN_MAX_BYTES: usize = 512;
const PAGE_SIZE_MAX: i32 = 200;

pub struct Chats(pub Arc<App>);

service!(ChatService for Chats {
    create_chat(CreateChatRequest) -> CreateChatResponse = create;
    list_chats(ListChatsRequest) -> ListChatsResponse = list;
    get_chat(GetChatRequest) -> GetChatResponse = get;
    rename_chat(RenameChatRequest) -> RenameChatResponse = rename;
    archive_chat(ArchiveChatRequest) -> ArchiveChatResponse = archive;
    configure_chat(ConfigureChatRequest) -> ConfigureChatResponse = configure;
});

impl Chats {
    async fn create(
        &self,
        caller: Principal,
        request: pb::CreateChatRequest,
    ) -> Result<pb::CreateChatResponse, Failure> {
        let new = NewChat {
            user: caller.user,
            title: app::optional_line("title", &request.title, limits::TITLE_MAX_CHARS)?,
            project: app::optional_id::<ProjectId>("project_id", &request.project_id)?,
            daemon: app::optional_id::<DaemonId>("daemon_id", &request.daemon_id)?,
            root_id: app::optional_line("root_id", &request.root_id, ROOT_ID_MAX_CHARS)?,
            model: self.model(&request.model)?,
            mode: mode(request.mode)?.unwrap_or(pb::ChatMode::Ask),
            client_request_id: app::optional_line(
                "client_request_id",
                &request.client_request_id,
                limits::CLIENT_REQUEST_ID_MAX_CHARS,
            )?,
        };
        let committed = self.0.deps.store.create_chat(&new).await.map_err(refused)?;
        Ok(pb::CreateChatResponse { chat: Some(self.0.effects.after(committed)) })
    }

    async fn list(&self, caller: Principal, request: pb::ListChatsRequest) -> Result<pb::ListChatsResponse, Failure> {
        if request.page_token.len() > PAGE_TOKEN_MAX_BYTES {
            return Err(Failure::field("page_token", "page_token is not one that ListChats gave"));
        }
        let page = ChatPage {
            size: app::page_size(request.page_size, PAGE_SIZE_MAX)?,
            token: request.page_token,
            include_archived: request.include_archived,
        };
        let (chats, next_page_token) = self.0.deps.store.list_chats(caller.user, &page).await.map_err(refused)?;
        Ok(pb::ListChatsResponse { chats, next_page_token })
    }

    async fn get(&self, caller: Principal, request: pb::GetChatRequest) -> Result<pb::GetChatResponse, Failure> {
        let chat = app::id::<ChatId>("chat_id", &request.chat_id)?;
        let chat = self.0.deps.store.get_chat(caller.user, chat).await.map_err(refused)?;
        Ok(pb::GetChatResponse { chat: Some(chat) })
    }

    async fn rename(
        &self,
        caller: Principal,
        request: pb::RenameChatRequest,
    ) -> Result<pb::RenameChatResponse, Failure> {
        let chat = app::id::<ChatId>("chat_id", &request.chat_id)?;
        let title = app::line("title", &request.title, limits::TITLE_MAX_CHARS)?;
        let committed = self.0.deps.store.rename_chat(caller.user, chat, &title).await.map_err(refused)?;
        Ok(pb::RenameChatResponse { chat: Some(self.0.effects.after(committed)) })
    }

    async fn archive(
        &self,
        caller: Principal,
        request: pb::ArchiveChatRequest,
    ) -> Result<pb::ArchiveChatResponse, Failure> {
        let chat = app::id::<ChatId>("chat_id", &request.chat_id)?;
        let committed = self.0.deps.store.archive_chat(caller.user, chat, request.archived).await.map_err(refused)?;
        Ok(pb::ArchiveChatResponse { chat: Some(self.0.effects.after(committed)) })
    }

    async fn configure(
        &self,
        caller: Principal,
        request: pb::ConfigureChatRequest,
    ) -> Result<pb::ConfigureChatResponse, Failure> {
        let chat = app::id::<ChatId>("chat_id", &request.chat_id)?;
        let mode = mode(request.mode)?;
        let model = match request.model.as_str() {
            "" => None,
            model => Some(self.model(model)?),
        };
        if mode.is_none() && model.is_none() {
            return Err(Failure::field("mode", "nothing to change: set mode, model or both"));
        }
        let committed =
            self.0.deps.store.configure_chat(caller.user, chat, mode, model.as_deref()).await.map_err(refused)?;
        Ok(pb::ConfigureChatResponse { chat: Some(self.0.effects.after(committed)) })
    }

    /// The id of a model that there is; the default one for an empty id.
    fn model(&self, id: &str) -> Result<String, Failure> {
        let models = &self.0.deps.models;
        let id = match (id, models.default_model()) {
            ("", "") => {
                let message = "no model is configured on this server; set OPENAI_API_KEY or ANTHROPIC_API_KEY for its workers and apis";
                return Err(Failure { field: Some("model".into()), ..Failure::new(Code::ModelUnknown, message) });
            }
            ("", default) => default,
            (id, _) => id,
        };
        models.resolve(id).map_err(|failure| Failure { field: Some("model".into()), ..failure })?;
        Ok(id.to_owned())
    }
}

/// `None` for unspecified.
fn mode(mode: i32) -> Result<Option<pb::ChatMode>, Failure> {
    match pb::ChatMode::try_from(mode) {
        Ok(pb::ChatMode::Unspecified) => Ok(None),
        Ok(mode) => Ok(Some(mode)),
        Err(_) => Err(Failure::field("mode", format!("mode {mode} is not known; it may be ASK, AUTO or PLAN"))),
    }
}
