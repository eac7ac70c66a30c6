//! Messages: accepted and listed. Once `SendMessage` has answered, the turn runs, whatever dies.

use std::sync::Arc;

use reliant_middleware::Principal;
use reliant_rpc::message_service_server::MessageService;
use reliant_store::SendMessage;
use reliant_telemetry::{hop_span, metrics::Phase};
use reliant_types::{ChatId, Code, Failure, limits, pb};

use crate::app::{self, App, refused, service};

const PAGE_SIZE_MAX: i32 = 500;

pub struct Messages(pub Arc<App>);

service!(MessageService for Messages {
    send_message(SendMessageRequest) -> SendMessageResponse = send;
    list_messages(ListMessagesRequest) -> ListMessagesResponse = list;
});

impl Messages {
    async fn send(
        &self,
        caller: Principal,
        request: pb::SendMessageRequest,
    ) -> Result<pb::SendMessageResponse, Failure> {
        let begun = std::time::Instant::now();
        let chat = app::id::<ChatId>("chat_id", &request.chat_id)?;
        let client_message_id =
            app::line("client_message_id", &request.client_message_id, limits::CLIENT_MESSAGE_ID_MAX_CHARS)?;
        check_text(&request.text)?;
        // The turn's trace hangs on a span that has ended, so that this process's death orphans nothing.
        let trace = hop_span(tracing::info_span!("turn.accept", chat.id = %chat, user.id = %caller.user));
        let message = SendMessage {
            user: caller.user,
            chat,
            client_message_id,
            text: request.text,
            traceparent: trace.traceparent,
            deadline: self.0.turn_deadline,
        };
        let committed = self.0.deps.store.send_message(&message).await.map_err(refused)?;
        // The rows' stamps begin what comes after; the commit is part of that.
        if let Some(stamped) = committed.value.stamped {
            Phase::Accept.observe(stamped.duration_since(begun), &tracing::Span::current());
        }
        let sent = self.0.effects.after(committed);
        Ok(pb::SendMessageResponse { message: Some(sent.message), turn: Some(sent.turn), duplicate: sent.duplicate })
    }

    async fn list(
        &self,
        caller: Principal,
        request: pb::ListMessagesRequest,
    ) -> Result<pb::ListMessagesResponse, Failure> {
        let chat = app::id::<ChatId>("chat_id", &request.chat_id)?;
        let size = app::page_size(request.page_size, PAGE_SIZE_MAX)?;
        if request.before_ordinal < 0 {
            return Err(Failure::field("before_ordinal", "before_ordinal is below 0; 0 asks for the newest messages"));
        }
        let (messages, has_more) =
            self.0.deps.store.list_messages(caller.user, chat, size, request.before_ordinal).await.map_err(refused)?;
        Ok(pb::ListMessagesResponse { messages, has_more })
    }
}

fn check_text(text: &str) -> Result<(), Failure> {
    if text.trim().is_empty() {
        return Err(Failure::field("text", "text is empty; write what the agent should do"));
    }
    if text.len() > limits::MESSAGE_TEXT_MAX_BYTES {
        let message = format!(
            "text has {} bytes; a message may have {} (1 MiB). Put long content into a file that the agent can read",
            text.len(),
            limits::MESSAGE_TEXT_MAX_BYTES
        );
        return Err(Failure { field: Some("text".into()), ..Failure::new(Code::MessageTooLarge, message) });
    }
    if text.contains('\0') {
        return Err(Failure::field("text", "text has a NUL character, which cannot be stored"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_cannot_be_taken_are_refused_with_a_sentence() {
        assert!(check_text("hello").is_ok());
        assert!(check_text(&"x".repeat(limits::MESSAGE_TEXT_MAX_BYTES)).is_ok());
        for (text, code) in [
            (String::new(), Code::InvalidArgument),
            (" \n".into(), Code::InvalidArgument),
            ("a\0b".into(), Code::InvalidArgument),
            ("x".repeat(limits::MESSAGE_TEXT_MAX_BYTES + 1), Code::MessageTooLarge),
        ] {
            let failure = check_text(&text).unwrap_err();
            assert_eq!((failure.code, failure.field.as_deref()), (code, Some("text")));
        }
    }
}
