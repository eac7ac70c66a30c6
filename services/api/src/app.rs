//! What every service of the api shares, and the shape of a handler: the caller is known, the request is checked, a
//! [`Failure`] becomes a status in one place.

use std::{str::FromStr, sync::Arc, time::Duration};

use reliant_middleware::StoreAuthenticator;
use reliant_store::StoreError;
use reliant_telemetry::chain;
use reliant_types::{Code, Failure};
use tonic::{Response, Status};

use crate::{ApiDeps, effects::Effects, feed::Hub};

pub struct App {
    pub deps: ApiDeps,
    pub authenticator: StoreAuthenticator,
    pub effects: Effects,
    pub hub: Arc<Hub>,
    pub turn_deadline: Duration,
}

/// Implements a generated service trait: each method finds out who calls, and hands the caller and the message over to
/// the named method of the service.
macro_rules! service {
    ($trait:ident for $service:ident { $($method:ident($request:ident) -> $response:ident = $handler:ident;)* }) => {
        #[tonic::async_trait]
        impl $trait for $service {
            $(async fn $method(
                &self,
                request: tonic::Request<reliant_types::pb::$request>,
            ) -> Result<tonic::Response<reliant_types::pb::$response>, tonic::Status> {
                let caller = reliant_middleware::require_person(&request)?;
                $crate::app::answer(self.$handler(caller, request.into_inner()).await)
            })*
        }
    };
}
pub(crate) use service;

/// A handler's outcome as gRPC has it.
pub fn answer<T>(outcome: Result<T, Failure>) -> Result<Response<T>, Status> {
    outcome.map(Response::new).map_err(|failure| reliant_rpc::status(&failure))
}

/// A store's error as its caller meets it. What is nobody's mistake but ours is logged here, with its chain, once; the
/// store itself has said which statement the database refused.
pub fn refused(error: StoreError) -> Failure {
    let causes = chain(&error).to_string();
    let was_said = matches!(error, StoreError::Internal(_));
    let failure = Failure::from(error);
    match failure.code {
        Code::Internal if !was_said => tracing::error!(error = causes, "a request failed in the store"),
        Code::Unavailable => tracing::warn!(error = causes, "the store did not answer"),
        _ => {}
    }
    failure
}

/// An id in a request.
pub fn id<T: FromStr<Err: std::fmt::Display>>(field: &str, text: &str) -> Result<T, Failure> {
    if text.is_empty() {
        return Err(Failure::field(field, format!("{field} is missing")));
    }
    text.parse().map_err(|error| Failure::field(field, format!("{field}: {error}")))
}

/// An id that may be left out.
pub fn optional_id<T: FromStr<Err: std::fmt::Display>>(field: &str, text: &str) -> Result<Option<T>, Failure> {
    if text.is_empty() { Ok(None) } else { id(field, text).map(Some) }
}

/// A line of text: not empty, not longer than `max_chars`, no control characters. Blanks around it are dropped.
pub fn line(field: &str, text: &str, max_chars: usize) -> Result<String, Failure> {
    let text = text.trim();
    if text.is_empty() {
        return Err(Failure::field(field, format!("{field} is empty; it takes 1 to {max_chars} characters")));
    }
    optional_line(field, text, max_chars)
}

pub fn optional_line(field: &str, text: &str, max_chars: usize) -> Result<String, Failure> {
    let text = text.trim();
    let chars = text.chars().count();
    if chars > max_chars {
        return Err(Failure::field(field, format!("{field} has {chars} characters; at most {max_chars} are allowed")));
    }
    if text.chars().any(char::is_control) {
        return Err(Failure::field(field, format!("{field} has control characters; plain text is allowed")));
    }
    Ok(text.to_owned())
}

/// A page's size; 0 is the store's default.
pub fn page_size(size: i32, max: i32) -> Result<i32, Failure> {
    if (0..=max).contains(&size) {
        return Ok(size);
    }
    Err(Failure::field("page_size", format!("page_size is {size}; it may be 1 to {max}, or 0 for the default")))
}

#[cfg(test)]
mod tests {
    use reliant_types::ChatId;

    use super::*;

    #[test]
    fn bad_fields_are_named_with_the_way_out() {
        let field = |failure: Failure| (failure.field.unwrap(), failure.message);
        let (name, message) = field(id::<ChatId>("chat_id", "x").unwrap_err());
        assert_eq!(
            (name.as_str(), message.as_str()),
            ("chat_id", "chat_id: 'x' is not a chat id; ids are UUIDs in hyphenated form")
        );
        assert_eq!(field(id::<ChatId>("chat_id", "").unwrap_err()).1, "chat_id is missing");
        assert_eq!(optional_id::<ChatId>("chat_id", ""), Ok(None));
        assert_eq!(line("title", "  a title ", 10).unwrap(), "a title");
        for bad in ["", "   ", "12345678901", "a\nb", "\0"] {
            assert_eq!(field(line("title", bad, 10).unwrap_err()).0, "title", "{bad:?}");
        }
        assert_eq!(line("title", "ééééééééé\u{1F600}", 10).unwrap().chars().count(), 10);
        assert!(page_size(0, 200).is_ok() && page_size(200, 200).is_ok());
        assert!(page_size(-1, 200).is_err() && page_size(201, 200).is_err());
    }
}
