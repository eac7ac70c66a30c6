//! `Failure` to `tonic::Status` and back. The code travels as the reason of `google.rpc.ErrorInfo`, the delay as `RetryInfo`,
//! the field at fault as `BadRequest`.

use reliant_types::{Code, Failure, code::Class};
use tonic_types::{ErrorDetails, StatusExt};

/// The domain of every `ErrorInfo` of ours.
pub const ERROR_DOMAIN: &str = "reliant";

/// The status a caller gets.
pub fn status(failure: &Failure) -> tonic::Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(failure.code.as_str(), ERROR_DOMAIN, std::collections::HashMap::<String, String>::new());
    if let Some(delay) = failure.retry_after {
        details.set_retry_info(Some(delay));
    }
    if let Some(field) = &failure.field {
        details.add_bad_request_violation(field, &failure.message);
    }
    tonic::Status::with_error_details(tonic::Code::from_i32(failure.code.class() as i32), &failure.message, details)
}

/// The failure a status tells of. A status without our details (of a proxy, of the transport) keeps its class.
pub fn failure(status: &tonic::Status) -> Failure {
    let info = status.get_details_error_info().filter(|info| info.domain == ERROR_DOMAIN);
    let code = match info {
        Some(info) => Code::parse(&info.reason),
        None => foreign(status.code()),
    };
    let field = status
        .get_details_bad_request()
        .and_then(|bad| bad.field_violations.into_iter().next())
        .map(|violation| violation.field);
    let message = match status.message() {
        "" => format!("the server answered {}", status.code()),
        message => message.to_owned(),
    };
    Failure { code, message, retry_after: status.get_details_retry_info().and_then(|retry| retry.retry_delay), field }
}

fn foreign(code: tonic::Code) -> Code {
    use tonic::Code as Grpc;
    match code {
        Grpc::Cancelled => Code::Cancelled,
        Grpc::InvalidArgument | Grpc::OutOfRange => Code::InvalidArgument,
        Grpc::DeadlineExceeded => Code::DeadlineExceeded,
        Grpc::NotFound => Code::NotFound,
        Grpc::AlreadyExists => Code::AlreadyExists,
        Grpc::PermissionDenied => Code::ScopeMissing,
        Grpc::ResourceExhausted => Code::QueueFull,
        Grpc::Unauthenticated => Code::TokenInvalid,
        Grpc::Unavailable | Grpc::Aborted => Code::Unavailable,
        // An http2 reset by a server that went away shows as one of these; whoever retries decides by the code.
        Grpc::Ok | Grpc::Unknown | Grpc::Unimplemented | Grpc::Internal | Grpc::DataLoss | Grpc::FailedPrecondition => {
            Code::Internal
        }
    }
}

const _: () = {
    // The class numbers are gRPC's own; a slip here would change every answer.
    assert!(Class::Cancelled as i32 == tonic::Code::Cancelled as i32);
    assert!(Class::Unauthenticated as i32 == tonic::Code::Unauthenticated as i32);
    assert!(Class::Unavailable as i32 == tonic::Code::Unavailable as i32);
    assert!(Class::Aborted as i32 == tonic::Code::Aborted as i32);
};

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn failures_round_trip() {
        for code in Code::ALL {
            let sent = Failure::new(*code, "a sentence").retry_after(Duration::from_millis(1500));
            let status = status(&sent);
            assert_eq!(status.code() as i32, code.class() as i32);
            assert_eq!(failure(&status), sent);
        }
        let field = Failure::field("text", "it is empty");
        assert_eq!(failure(&status(&field)), field);
    }

    #[test]
    fn a_foreign_status_keeps_its_class() {
        let away = failure(&tonic::Status::unavailable("connection refused"));
        assert_eq!((away.code, away.message.as_str()), (Code::Unavailable, "connection refused"));
        assert!(away.is_retryable());
        assert_eq!(failure(&tonic::Status::unauthenticated("")).code, Code::TokenInvalid);
    }
}
