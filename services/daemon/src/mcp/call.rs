//! One call of an MCP tool, from the request to what the model reads.

use std::sync::Arc;

use reliant_types::{Code, pb};
use rmcp::{
    RoleClient, ServiceError,
    model::{
        CallToolRequest, CallToolRequestParams, CallToolResult, ClientRequest, ContentBlock, JsonObject,
        RequestMetaObject, ResourceContents, ServerResult,
    },
    service::{Peer, PeerRequestOptions, RequestHandle},
};

use super::server::{Connection, Server};
use crate::{
    output::{Block, Gather},
    tools::{Job, Outcome},
};

const ERROR_MAX_CHARS: usize = 2000;

/// A call whose tool was found.
#[derive(Debug)]
pub struct McpCall {
    pub server: Arc<Server>,
    /// As the server names it.
    pub tool: String,
    pub arguments: JsonObject,
}

enum End {
    Answered(Box<Result<ServerResult, ServiceError>>),
    Cancelled,
    TimedOut,
}

pub async fn call(call: McpCall, job: Job) -> Outcome {
    let server = call.server.clone();
    let name = server.entry.name.clone();
    let deadline = tokio::time::Instant::now() + job.timeout;
    let connection = tokio::select! {
        connection = server.connection() => connection,
        () = job.cancel.cancelled() => return Outcome::cancelled("cancelled before it was sent to the MCP server"),
    };
    let Some(connection) = connection else {
        let why = match server.state() {
            super::server::State::Down(error) => error,
            _ => "it is still starting".into(),
        };
        return Outcome::failed(
            Code::McpServerFailed,
            format!("the MCP server '{name}' is not up: {why}; nothing was run"),
        );
    };
    let mut handle = match send(&connection.peer, call, &job.traceparent).await {
        Ok(handle) => handle,
        // It never left.
        Err(error) => {
            connection.broken.cancel();
            return Outcome::failed(
                Code::McpServerFailed,
                format!("the MCP server '{name}' is gone ({}); nothing was run", text(&error)),
            );
        }
    };
    let end = tokio::select! {
        answer = &mut handle.rx => End::Answered(Box::new(answer.unwrap_or(Err(ServiceError::TransportClosed)))),
        () = job.cancel.cancelled() => End::Cancelled,
        () = tokio::time::sleep_until(deadline) => End::TimedOut,
    };
    match end {
        End::Answered(answer) => match *answer {
            Ok(result) => answered(&name, result, &job),
            Err(error) => failed(&connection, &name, &error),
        },
        End::Cancelled => {
            tell(handle, "cancelled").await;
            Outcome::cancelled(format!("cancelled; the MCP server '{name}' was told, and may have done part of it"))
        }
        End::TimedOut => {
            tell(handle, "timed out").await;
            tokio::spawn(async move { connection.check().await });
            Outcome::timed_out(format!(
                "the MCP server '{name}' did not answer within {} s; it was told to stop, and may have done part of it",
                job.timeout.as_secs_f32()
            ))
        }
    }
}

async fn send(
    peer: &Peer<RoleClient>,
    call: McpCall,
    traceparent: &str,
) -> Result<RequestHandle<RoleClient>, ServiceError> {
    let params = CallToolRequestParams::new(call.tool).with_arguments(call.arguments);
    let mut options = PeerRequestOptions::no_options();
    if !traceparent.is_empty() {
        let mut meta = RequestMetaObject::new();
        meta.set_traceparent(traceparent);
        options = options.with_meta(meta);
    }
    peer.send_cancellable_request(ClientRequest::CallToolRequest(CallToolRequest::new(params)), options).await
}

/// A server that hangs must not hold the call a second time.
async fn tell(handle: RequestHandle<RoleClient>, reason: &str) {
    let _ = tokio::time::timeout(std::time::Duration::from_millis(200), handle.cancel(Some(reason.into()))).await;
}

fn text(error: &impl std::fmt::Display) -> String {
    error.to_string().chars().filter(|c| !c.is_control() || *c == '\n').take(ERROR_MAX_CHARS).collect()
}

fn failed(connection: &Connection, name: &str, error: &ServiceError) -> Outcome {
    match error {
        ServiceError::McpError(error) => {
            // The server's own word that the call did not work.
            let code = if error.code.0 == -32602 { Code::ToolArgumentsInvalid } else { Code::ToolFailed };
            Outcome::failed(code, format!("the MCP server '{name}' refused the call: {}", text(&error.message)))
        }
        ServiceError::UnexpectedResponse => Outcome::failed(
            Code::McpServerFailed,
            format!("the MCP server '{name}' answered something that is no tool result"),
        ),
        ServiceError::TransportSend(cause) => {
            connection.broken.cancel();
            if never_connected(cause) {
                return Outcome::failed(
                    Code::McpServerFailed,
                    format!("the MCP server '{name}' cannot be reached; nothing was run"),
                );
            }
            died(name)
        }
        _ => {
            connection.broken.cancel();
            died(name)
        }
    }
}

fn died(name: &str) -> Outcome {
    Outcome::process_died(format!(
        "the MCP server '{name}' died or lost its connection while the call ran; whether it took effect is not known: \
         look before you repeat it"
    ))
}

/// A refused connection is the one case in which it is certain that nothing was sent.
fn never_connected(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return io.kind() == std::io::ErrorKind::ConnectionRefused;
        }
        cause = error.source();
    }
    false
}

fn answered(name: &str, result: ServerResult, job: &Job) -> Outcome {
    let result = match result {
        ServerResult::CallToolResult(result) => result,
        // A result without content reads as one of these.
        ServerResult::EmptyResult(_) => CallToolResult::default(),
        _ => return failed_shape(name),
    };
    let is_error = result.is_error == Some(true);
    let mut content = render(&result);
    if content.is_empty() {
        content = "(no content)".into();
    }
    let mut gather = Gather::new(job.hub.clone(), job.output.clone());
    gather.push(Block::Stdout, content.as_bytes());
    gather.flush();
    let outcome = Outcome::succeeded(content);
    if is_error {
        return Outcome { status: pb::ToolCallStatus::Failed, is_error: true, ..outcome };
    }
    outcome
}

fn failed_shape(name: &str) -> Outcome {
    Outcome::failed(Code::McpServerFailed, format!("the MCP server '{name}' asks for more than a tool call can give"))
}

fn render(result: &CallToolResult) -> String {
    let mut parts = Vec::new();
    for block in &result.content {
        parts.push(match block {
            ContentBlock::Text(text) => text.text.clone(),
            ContentBlock::Image(image) => {
                format!("[image, {}, {} bytes of base64, not shown]", image.mime_type, image.data.len())
            }
            ContentBlock::Audio(audio) => format!("[audio, {}, not shown]", audio.mime_type),
            ContentBlock::Resource(resource) => match &resource.resource {
                ResourceContents::TextResourceContents { uri, text, .. } => format!("[resource {uri}]\n{text}"),
                ResourceContents::BlobResourceContents { uri, blob, .. } => {
                    format!("[resource {uri}, {} bytes of base64, not shown]", blob.len())
                }
                _ => "[resource of a kind that is not known]".into(),
            },
            ContentBlock::ResourceLink(link) => format!("[resource {} ({})]", link.uri, link.name),
            _ => "[content of a kind that is not known]".into(),
        });
    }
    // Servers repeat structured content as text; where one does not, it is all there is.
    if parts.is_empty()
        && let Some(structured) = &result.structured_content
    {
        parts.push(structured.to_string());
    }
    parts.join("\n")
}
