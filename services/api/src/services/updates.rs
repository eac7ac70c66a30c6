//! `UpdateService`, written out by hand for one reason: its updates are encoded once for all viewers, and the generated
//! server would encode each for each.

use std::{
    collections::HashSet,
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::{Stream, future::BoxFuture};
use http_body::Body as HttpBody;
use reliant_middleware::{person, reply};
use reliant_types::{ChatId, Code, Failure, limits, pb};
use tonic::{
    Request, Response, Status,
    body::Body,
    codegen::StdError,
    server::{Grpc, NamedService, ServerStreamingService},
};
use tower::Service;

use crate::{
    app::{self, App},
    feed::{Place, SharedCodec, Ticket},
};

type Updates = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

#[derive(Clone)]
pub struct UpdateServer(pub Arc<App>);

impl NamedService for UpdateServer {
    const NAME: &'static str = "reliant.v1.UpdateService";
}

impl<B> Service<http::Request<B>> for UpdateServer
where
    B: HttpBody + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let app = self.0.clone();
        Box::pin(async move {
            Ok(match request.uri().path() {
                "/reliant.v1.UpdateService/Subscribe" => {
                    // Before the request's body is awaited: a stream counts for its user at once.
                    let ticket = match enter(&app, request.extensions()) {
                        Ok(ticket) => ticket,
                        Err(failure) => return Ok(reply::refuse(&failure)),
                    };
                    let subscribe = Subscribe { app, ticket: Some(ticket) };
                    let mut grpc = Grpc::new(SharedCodec)
                        .apply_max_message_size_config(Some(limits::GRPC_MESSAGE_MAX_BYTES), None);
                    grpc.server_streaming(subscribe, request).await
                }
                _ => Status::unimplemented("UpdateService has the method Subscribe").into_http(),
            })
        })
    }
}

fn enter(app: &App, extensions: &http::Extensions) -> Result<Ticket, Failure> {
    app.hub.enter(person(extensions)?.user)
}

struct Subscribe {
    app: Arc<App>,
    ticket: Option<Ticket>,
}

impl ServerStreamingService<pb::SubscribeRequest> for Subscribe {
    type Response = Bytes;
    type ResponseStream = Updates;
    type Future = BoxFuture<'static, Result<Response<Updates>, Status>>;

    fn call(&mut self, request: Request<pb::SubscribeRequest>) -> Self::Future {
        let (app, ticket) = (self.app.clone(), self.ticket.take());
        Box::pin(async move {
            let opened = async {
                let (feed, chats) = places(request.into_inner())?;
                let ticket = ticket.ok_or_else(|| Failure::new(Code::Internal, "a stream's request came twice"))?;
                app.hub.subscribe(ticket, feed, chats).await
            };
            let stream = app::answer(opened.await)?.into_inner();
            Ok(Response::new(Box::pin(stream.into_stream()) as Updates))
        })
    }
}

/// The feed's place, if it is followed, and each chat's.
type Places = (Option<Place>, Vec<(ChatId, Place)>);

/// The request, checked.
fn places(request: pb::SubscribeRequest) -> Result<Places, Failure> {
    if request.chats.len() > limits::SUBSCRIBE_CHATS_MAX {
        let message = format!(
            "chats names {} chats; one stream follows at most {}. Open another stream for the rest",
            request.chats.len(),
            limits::SUBSCRIBE_CHATS_MAX
        );
        return Err(Failure::field("chats", message));
    }
    if request.chats.is_empty() && request.feed.is_none() {
        return Err(Failure::field("chats", "nothing to follow: name chats, set feed, or both"));
    }
    let mut seen = HashSet::new();
    let mut chats = Vec::with_capacity(request.chats.len());
    for (index, cursor) in request.chats.into_iter().enumerate() {
        let chat = app::id::<ChatId>(&format!("chats[{index}].chat_id"), &cursor.chat_id)?;
        if !seen.insert(chat) {
            return Err(Failure::field(format!("chats[{index}].chat_id"), format!("chat {chat} is named twice")));
        }
        chats.push((chat, place(&format!("chats[{index}]"), cursor.after_seq, cursor.log_epoch)?));
    }
    let feed = request.feed.map(|feed| place("feed", feed.after_seq, feed.log_epoch)).transpose()?;
    Ok((feed, chats))
}

fn place(field: &str, after: i64, log_epoch: i64) -> Result<Place, Failure> {
    if after < -1 {
        let message = format!(
            "{field}.after_seq is {after}; it is -1 for a snapshot, 0 for everything, or the last seq you have"
        );
        return Err(Failure::field(format!("{field}.after_seq"), message));
    }
    if log_epoch < 0 {
        return Err(Failure::field(
            format!("{field}.log_epoch"),
            format!("{field}.log_epoch is below 0; leave it out at first"),
        ));
    }
    Ok(Place { after, log_epoch })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_subscriptions_are_refused_by_field() {
        let cursor = |chat_id: &str, after_seq| pb::ChatCursor { chat_id: chat_id.into(), after_seq, log_epoch: 0 };
        let (one, two) = (ChatId::new().to_string(), ChatId::new().to_string());
        let check = |chats: Vec<pb::ChatCursor>, field: Option<&str>| {
            let outcome = places(pb::SubscribeRequest { chats, feed: None });
            assert_eq!(outcome.err().and_then(|failure| failure.field).as_deref(), field);
        };
        check(vec![cursor(&one, -1), cursor(&two, i64::MAX)], None);
        check(vec![], Some("chats"));
        check(vec![cursor(&one, 0), cursor("nope", 0)], Some("chats[1].chat_id"));
        check(vec![cursor(&one, 0), cursor(&one, 5)], Some("chats[1].chat_id"));
        check(vec![cursor(&one, -2)], Some("chats[0].after_seq"));
        check((0..501).map(|_| cursor(&one, 0)).collect(), Some("chats"));
        assert!(places(pb::SubscribeRequest { chats: vec![], feed: Some(pb::FeedCursor::default()) }).is_ok());
    }
}
