//! Every RPC of the front door as a method: token, trace context, deadline, and retries where repeating is safe.
//!
//! A call that repeats what it did before (reads, settings, decisions, cancels, SendMessage by its client message id, and
//! CreateChat by its client request id) is tried again until its deadline. Any other is tried again only where the server certainly did nothing: it
//! refused the call, or could not be connected to.

use std::{error::Error as _, io, time::Duration};

use reliant_rpc as rpc;
use reliant_runtime::{Backoff, Retry};
use reliant_telemetry::{ClientCall, TraceContext};
use reliant_types::{Code, Failure, boxed, code::Class, limits, pb};
use tokio::time::Instant;
use tonic::{Request, Response, Status, transport::Channel};
use tracing::Instrument as _;

use crate::config::ClientConfig;

/// What a client of another language takes without a setting: past this the server is at fault.
pub(crate) const RESPONSE_MAX_BYTES: usize = limits::GRPC_MESSAGE_MAX_BYTES;
const BACKOFF_INITIAL: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

pub(crate) const fn backoff() -> Backoff {
    Backoff::new(BACKOFF_INITIAL, BACKOFF_MAX)
}

/// Whether a call may be made twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Repeatable,
    Once,
}

/// Cheap to clone; clones share one connection.
#[derive(Clone, Debug)]
pub struct Client {
    pub(crate) channel: Channel,
    pub(crate) config: ClientConfig,
}

impl Client {
    /// Connects, waiting for a server that is just starting as long as a call may take.
    #[boxed]
    pub async fn connect(config: ClientConfig) -> Result<Self, Failure> {
        let deadline = Instant::now() + config.call_deadline;
        let judge = |error: &rpc::RpcError| match error {
            rpc::RpcError::Address { .. } => Retry::No,
            rpc::RpcError::Connect { .. } => Retry::Yes,
        };
        let channel =
            reliant_runtime::retry::retry(backoff(), deadline, judge, || rpc::channel(&config.endpoint)).await?;
        Ok(Self { channel, config })
    }

    /// Connects at the first call.
    pub fn lazy(config: ClientConfig) -> Result<Self, Failure> {
        Ok(Self { channel: rpc::channel_lazy(&config.endpoint)?, config })
    }

    pub fn config(&self) -> &ClientConfig {
        &self.config
    }

    /// For what has no method here: health, reflection.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// A request with token and the current span's trace context.
    pub(crate) async fn request<T>(&self, message: T) -> Result<Request<T>, Failure> {
        let mut request = Request::new(message);
        if let Some(token) = self.config.token.get().await?
            && !rpc::authorize(&mut request, token.expose())
        {
            return Err(Failure::new(Code::TokenInvalid, "the token has characters that no token has"));
        }
        rpc::inject(&mut request, &TraceContext::current());
        Ok(request)
    }

    async fn call<Q, R, F>(
        &self,
        method: &'static str,
        kind: Kind,
        message: Q,
        send: impl Fn(Channel, Request<Q>) -> F,
    ) -> Result<R, Failure>
    where
        Q: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let deadline = Instant::now() + self.config.call_deadline;
        let mut backoff = backoff();
        let mut before = TraceContext::default();
        loop {
            // A retry stands beside the attempt it replaces, not under it.
            let called = ClientCall::start(method, &self.config.endpoint, &before);
            let attempt = async {
                let mut request = self.request(message.clone()).await.map_err(Attempt::Local)?;
                let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
                request.set_timeout(self.config.attempt_timeout.min(left));
                let limit = self.config.attempt_timeout.min(left);
                match tokio::time::timeout(limit, send(self.channel.clone(), request)).await {
                    Ok(response) => response.map(Response::into_inner).map_err(Attempt::Remote),
                    Err(_) => Err(Attempt::Remote(Status::deadline_exceeded("no answer in time"))),
                }
            };
            let outcome = attempt.instrument(called.span().clone()).await;
            before = TraceContext::of(called.span());
            let code = match &outcome {
                Ok(_) => tonic::Code::Ok,
                // Nobody cancelled it, whatever the transport calls it.
                Err(Attempt::Remote(status)) if was_left_behind(status) => tonic::Code::Unavailable,
                Err(Attempt::Remote(status)) => status.code(),
                Err(Attempt::Local(_)) => tonic::Code::Unauthenticated,
            };
            called.settle(code);
            let status = match outcome {
                Ok(response) => return Ok(response),
                Err(Attempt::Local(failure)) => return Err(failure),
                Err(Attempt::Remote(status)) => status,
            };
            let delay = match judge(&status, kind) {
                Retry::No => return Err(rpc::failure(&status)),
                Retry::Yes => backoff.next_delay(),
                Retry::After(least) => backoff.next_delay().max(least),
            };
            if Instant::now() + delay >= deadline {
                return Err(rpc::failure(&status));
            }
            tokio::time::sleep(delay).await;
        }
    }
}

enum Attempt {
    /// There was no token to send.
    Local(Failure),
    Remote(Status),
}

/// Whether, and when, a failed call is made again.
fn judge(status: &Status, kind: Kind) -> Retry {
    let failure = rpc::failure(status);
    // Without details it was not our handler that spoke, but the transport or a proxy.
    let again = if status.details().is_empty() {
        let transport = matches!(
            status.code(),
            tonic::Code::Unavailable
                | tonic::Code::Unknown
                | tonic::Code::Internal
                | tonic::Code::Cancelled
                | tonic::Code::DeadlineExceeded
        );
        was_refused(status) || (kind == Kind::Repeatable && transport)
    } else {
        match failure.code {
            Code::QueueFull | Code::RateLimited | Code::Draining => true,
            _ => {
                kind == Kind::Repeatable && matches!(failure.code.class(), Class::Unavailable | Class::DeadlineExceeded)
            }
        }
    };
    match (again, failure.retry_after) {
        (false, _) => Retry::No,
        (true, Some(delay)) => Retry::After(delay),
        (true, None) => Retry::Yes,
    }
}

/// Nothing listened: the call never left.
fn was_refused(status: &Status) -> bool {
    came_of(status, |error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// The connection closed, as that to a draining server does, under a call that had no answer yet.
fn was_left_behind(status: &Status) -> bool {
    came_of(status, hyper::Error::is_canceled)
}

fn came_of<E: std::error::Error + 'static>(status: &Status, is: impl Fn(&E) -> bool) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.downcast_ref::<E>().is_some_and(&is) {
            return true;
        }
        source = error.source();
    }
    false
}

/// With an id of its own, however often a request is made it makes one chat.
fn identified(mut request: pb::CreateChatRequest) -> pb::CreateChatRequest {
    if request.client_request_id.is_empty() {
        request.client_request_id = uuid::Uuid::now_v7().to_string();
    }
    request
}

macro_rules! rpcs {
    ($($service:literal, $module:ident::$client:ident {
        $($name:ident, $rpc:literal, $kind:ident, $request:ident => $response:ident $(, $prepare:ident)?;)*
    })*) => {
        impl Client {$($(
            #[boxed]
            pub async fn $name(&self, request: pb::$request) -> Result<pb::$response, Failure> {
                let method = concat!("reliant.v1.", $service, "/", $rpc);
                $(let request = $prepare(request);)?
                self.call(method, Kind::$kind, request, |channel, request| async move {
                    rpc::$module::$client::new(channel).max_decoding_message_size(RESPONSE_MAX_BYTES).$name(request).await
                })
                .await
            }
        )*)*}

        #[cfg(test)]
        const METHODS: &[&str] = &[$($(concat!("reliant.v1.", $service, "/", $rpc),)*)*];
    };
}

rpcs! {
    "ChatService", chat_service_client::ChatServiceClient {
        create_chat, "CreateChat", Repeatable, CreateChatRequest => CreateChatResponse, identified;
        list_chats, "ListChats", Repeatable, ListChatsRequest => ListChatsResponse;
        get_chat, "GetChat", Repeatable, GetChatRequest => GetChatResponse;
        rename_chat, "RenameChat", Repeatable, RenameChatRequest => RenameChatResponse;
        archive_chat, "ArchiveChat", Repeatable, ArchiveChatRequest => ArchiveChatResponse;
        configure_chat, "ConfigureChat", Repeatable, ConfigureChatRequest => ConfigureChatResponse;
    }
    "MessageService", message_service_client::MessageServiceClient {
        send_message, "SendMessage", Repeatable, SendMessageRequest => SendMessageResponse;
        list_messages, "ListMessages", Repeatable, ListMessagesRequest => ListMessagesResponse;
    }
    "TurnService", turn_service_client::TurnServiceClient {
        get_turn, "GetTurn", Repeatable, GetTurnRequest => GetTurnResponse;
        cancel_turn, "CancelTurn", Repeatable, CancelTurnRequest => CancelTurnResponse;
    }
    "ApprovalService", approval_service_client::ApprovalServiceClient {
        list_approvals, "ListApprovals", Repeatable, ListApprovalsRequest => ListApprovalsResponse;
        decide_approval, "DecideApproval", Repeatable, DecideApprovalRequest => DecideApprovalResponse;
    }
    "ProjectService", project_service_client::ProjectServiceClient {
        create_project, "CreateProject", Once, CreateProjectRequest => CreateProjectResponse;
        list_projects, "ListProjects", Repeatable, ListProjectsRequest => ListProjectsResponse;
    }
    "DaemonService", daemon_service_client::DaemonServiceClient {
        register_daemon, "RegisterDaemon", Once, RegisterDaemonRequest => RegisterDaemonResponse;
        list_daemons, "ListDaemons", Repeatable, ListDaemonsRequest => ListDaemonsResponse;
        select_daemon, "SelectDaemon", Repeatable, SelectDaemonRequest => SelectDaemonResponse;
        revoke_daemon, "RevokeDaemon", Repeatable, RevokeDaemonRequest => RevokeDaemonResponse;
    }
    "IdentityService", identity_service_client::IdentityServiceClient {
        exchange_login_code, "ExchangeLoginCode", Once, ExchangeLoginCodeRequest => ExchangeLoginCodeResponse;
        create_login_code, "CreateLoginCode", Once, CreateLoginCodeRequest => CreateLoginCodeResponse;
        get_current_user, "GetCurrentUser", Repeatable, GetCurrentUserRequest => GetCurrentUserResponse;
    }
    "TokenService", token_service_client::TokenServiceClient {
        create_token, "CreateToken", Once, CreateTokenRequest => CreateTokenResponse;
        list_tokens, "ListTokens", Repeatable, ListTokensRequest => ListTokensResponse;
        revoke_token, "RevokeToken", Repeatable, RevokeTokenRequest => RevokeTokenResponse;
    }
    "TelemetryService", telemetry_service_client::TelemetryServiceClient {
        report_page_spans, "ReportPageSpans", Once, ReportPageSpansRequest => ReportPageSpansResponse;
    }
    "ModelService", model_service_client::ModelServiceClient {
        list_models, "ListModels", Repeatable, ListModelsRequest => ListModelsResponse;
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    fn said(code: Code) -> Status {
        rpc::status(&Failure::new(code, "x"))
    }

    #[test]
    fn only_what_is_safe_is_tried_again() {
        let check = |status: Status, repeatable, once| {
            assert_eq!(judge(&status, Kind::Repeatable), repeatable, "{status:?}");
            assert_eq!(judge(&status, Kind::Once), once, "{status:?}");
        };
        check(said(Code::Unavailable), Retry::Yes, Retry::No);
        check(said(Code::Draining), Retry::Yes, Retry::Yes);
        check(said(Code::QueueFull), Retry::Yes, Retry::Yes);
        check(said(Code::NotFound), Retry::No, Retry::No);
        check(said(Code::Internal), Retry::No, Retry::No);
        check(said(Code::TokenExpired), Retry::No, Retry::No);
        check(Status::unavailable("reset"), Retry::Yes, Retry::No);
        check(Status::unknown("transport error"), Retry::Yes, Retry::No);
        check(Status::unimplemented("no"), Retry::No, Retry::No);
        let delay = Duration::from_secs(3);
        let limited = rpc::status(&Failure::new(Code::RateLimited, "x").retry_after(delay));
        check(limited, Retry::After(delay), Retry::After(delay));
    }

    #[tokio::test]
    async fn a_refused_connection_is_known_to_have_done_nothing() {
        let mut config = ClientConfig::new("127.0.0.1:1", "rlt_x");
        config.call_deadline = Duration::from_millis(300);
        let client = Client::lazy(config.clone()).unwrap();
        let begun = Instant::now();
        let failure = client.create_chat(pb::CreateChatRequest::default()).await.unwrap_err();
        assert_eq!(failure.code, Code::Unavailable);
        assert!(begun.elapsed() >= Duration::from_millis(100), "it was tried again");
        assert_eq!(Client::connect(config).await.unwrap_err().code, Code::Unavailable);
    }

    /// Every unary RPC of the front door has its method here.
    #[test]
    fn no_rpc_is_forgotten() {
        let set = prost_types::FileDescriptorSet::decode(pb::FILE_DESCRIPTOR_SET).unwrap();
        for file in set.file.iter().filter(|file| file.package() == "reliant.v1") {
            for service in &file.service {
                for method in service.method.iter().filter(|method| !method.server_streaming()) {
                    let name = format!("reliant.v1.{}/{}", service.name(), method.name());
                    assert!(METHODS.contains(&name.as_str()), "{name}");
                }
            }
        }
    }
}
