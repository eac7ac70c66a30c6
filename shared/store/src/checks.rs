//! What is refused before a row is written, with the field and the way out.

use reliant_telemetry::sampled;
use reliant_types::{Code, Failure, limits};

/// Postgres cannot hold U+0000 in a text.
pub(crate) fn no_nul(field: &str, text: &str) -> Result<(), Failure> {
    if text.contains('\0') {
        return Err(Failure::field(
            field,
            format!("{field} holds the character U+0000, which cannot be stored; remove it"),
        ));
    }
    Ok(())
}

pub(crate) fn name(field: &str, text: &str, max_chars: usize) -> Result<(), Failure> {
    no_nul(field, text)?;
    let chars = text.chars().count();
    if text.trim().is_empty() || chars > max_chars {
        return Err(Failure::field(field, format!("{field} has 1 to {max_chars} characters; this one has {chars}")));
    }
    Ok(())
}

pub(crate) fn message(text: &str, client_message_id: &str) -> Result<(), Failure> {
    if text.len() > limits::MESSAGE_TEXT_MAX_BYTES {
        return Err(Failure {
            field: Some("text".into()),
            ..Failure::new(
                Code::MessageTooLarge,
                format!(
                    "the message has {} bytes and may have {}; put long content into a file",
                    text.len(),
                    limits::MESSAGE_TEXT_MAX_BYTES
                ),
            )
        });
    }
    if text.trim().is_empty() {
        return Err(Failure::field("text", "the message is empty"));
    }
    no_nul("text", text)?;
    name("client_message_id", client_message_id, limits::CLIENT_MESSAGE_ID_MAX_CHARS)
}

/// 0 means the default.
pub(crate) fn page_size(asked: i32, default: i64, max: i64) -> Result<i64, Failure> {
    match i64::from(asked) {
        0 => Ok(default),
        size if (1..=max).contains(&size) => Ok(size),
        _ => Err(Failure::field("page_size", format!("page_size is 1 to {max}, or 0 for {default}"))),
    }
}

/// What one user may have of something. `way_out` says how there is room again.
pub(crate) fn at_most(what: &'static str, held: i64, max: i64, way_out: &str) -> Result<(), Failure> {
    if held < max {
        return Ok(());
    }
    sampled::refused(what);
    let text = format!("you have {held} {what}, which is as many as one user may have; {way_out}");
    Err(Failure::new(Code::LimitReached, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_input_names_its_field() {
        let check = |text: &str, id: &str, code: Code, field: &str| {
            let failure = message(text, id).unwrap_err();
            assert_eq!((failure.code, failure.field.as_deref()), (code, Some(field)));
        };
        check("", "a", Code::InvalidArgument, "text");
        check("a\0b", "a", Code::InvalidArgument, "text");
        check(&"x".repeat(limits::MESSAGE_TEXT_MAX_BYTES + 1), "a", Code::MessageTooLarge, "text");
        check("hi", "", Code::InvalidArgument, "client_message_id");
        check("hi", &"x".repeat(129), Code::InvalidArgument, "client_message_id");
        assert!(message("hi", &"ä".repeat(128)).is_ok());
        assert!(page_size(201, 50, 200).is_err());
        assert_eq!(page_size(0, 50, 200), Ok(50));
    }
}
