//! Every NATS subject, as a type. Subjects are built and parsed here and nowhere else; `Display`, [`Topic::parse`] and
//! [`Topic::wildcard`] round-trip. Ids are UUIDs, so no token can smuggle a dot or a wildcard in.

use prost::Message;
use reliant_types::{ChatId, DaemonId, ToolCallId, UserId, pb};
use std::fmt;
use uuid::Uuid;

/// A kind of subject and the message it carries.
pub trait Topic: fmt::Display + Clone + Send + Sync + Sized + 'static {
    type Message: Message + Default + Send + 'static;

    /// The subject with its parts in braces: a metric label and a span attribute.
    const TEMPLATE: &'static str;

    fn subject(&self) -> String {
        self.to_string()
    }

    /// `None`: the subject is not of this kind.
    fn parse(subject: &str) -> Option<Self>;

    /// The NATS subject that matches all of the kind.
    fn wildcard() -> String;
}

/// A subject on which an answer is expected.
pub trait RequestTopic: Topic {
    type Reply: Message + Default + Send + 'static;
}

const PREFIX: &str = "reliant.v1";

/// What a test needs to know of a kind of subject. Each message has a producer's span at its sender and a consumer's span
/// below it at whoever works on it.
#[derive(Debug, Clone, Copy)]
pub struct Declared {
    pub template: &'static str,
    /// Which of its messages have no span of their own, and why.
    pub spanless: Option<&'static str>,
}

fn id<T: From<Uuid>>(token: &str) -> Option<T> {
    // Only the hyphenated lower-case form, so that one id has one subject.
    let id = Uuid::try_parse(token).ok()?;
    (token.len() == 36 && id.hyphenated().to_string() == token).then(|| T::from(id))
}

/// A struct with no parts is written without braces.
macro_rules! define {
    ($(#[$doc:meta])* $name:ident {}) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name;
    };
    ($(#[$doc:meta])* $name:ident { $($part:ident: $ty:ty),+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name { $(pub $part: $ty),+ }
    };
}

macro_rules! topics {
    ($($(#[$doc:meta])* $name:ident = $kind:literal { $($part:ident: $ty:ty),* } -> $message:ty $(=> $reply:ty)?
       $(, spanless: $reason:literal)?;)*) => {
        $(
            define! { $(#[$doc])* $name { $($part: $ty),* } }

            impl fmt::Display for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str(concat!("reliant.v1.", $kind))?;
                    $(write!(f, ".{}", self.$part)?;)*
                    Ok(())
                }
            }

            impl Topic for $name {
                type Message = $message;
                const TEMPLATE: &'static str = concat!("reliant.v1.", $kind $(, ".{", stringify!($part), "}")*);

                fn parse(subject: &str) -> Option<Self> {
                    let rest = subject.strip_prefix(PREFIX)?.strip_prefix('.')?.strip_prefix($kind)?;
                    let mut tokens = rest.split('.');
                    tokens.next().filter(|token| token.is_empty())?;
                    let topic = Self { $($part: id(tokens.next()?)?,)* };
                    tokens.next().is_none().then_some(topic)
                }

                fn wildcard() -> String {
                    #[allow(unused_mut)]
                    let mut subject = String::from(concat!("reliant.v1.", $kind));
                    $({ let _ = stringify!($part); subject.push_str(".*"); })*
                    subject
                }
            }

            $(impl RequestTopic for $name { type Reply = $reply; })?
        )*

        /// All subjects.
        pub const DECLARED: &[Declared] = &[$({
            let declared = Declared { template: $name::TEMPLATE, spanless: None };
            $(let declared = Declared { spanless: Some($reason), ..declared };)?
            declared
        }),*];
    };
}

topics! {
    /// Worker or api to the gateway that holds the daemon's stream.
    ToolSubject = "tool" { daemon: DaemonId } -> pb::ToolRequest => pb::ToolReply;
    /// Gateway to one of the workers: a call came to its end.
    ResultSubject = "result" { daemon: DaemonId, call: ToolCallId } -> pb::ToolResult => pb::ResultAck;
    /// To the api replicas with a viewer of the chat.
    UpdateSubject = "update" { user: UserId, chat: ChatId } -> pb::ChatUpdate,
        spanless: "live pieces and their lengths: a span per piece would cost more than the piece; they carry the \
                   context of what makes them, and metrics count them";
    /// To the api replicas with a viewer of the user's feed.
    FeedSubject = "feed" { user: UserId } -> pb::FeedUpdate;
    /// Api to the producer of a live block: a worker's instance id or a daemon's id.
    PrefixSubject = "prefix" { producer: Uuid } -> pb::PrefixRequest => pb::PrefixReply;
    /// A daemon came or went.
    PresenceSubject = "presence" { user: UserId, daemon: DaemonId } -> pb::Presence;
    /// To the worker with a burst of the chat: something is wanted of it, or its turn was cancelled.
    BurstSubject = "burst" { worker: Uuid } -> pb::BurstHint;
    /// To all: revocations. Also polled, as a publish may be lost.
    ControlSubject = "control.revoked" {} -> pb::Control;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn uuid() -> impl Strategy<Value = Uuid> {
        any::<u128>().prop_map(Uuid::from_u128)
    }

    /// NATS' own rule: `*` is one token.
    fn matches(wildcard: &str, subject: &str) -> bool {
        let (wildcard, subject): (Vec<_>, Vec<_>) = (wildcard.split('.').collect(), subject.split('.').collect());
        wildcard.len() == subject.len() && wildcard.iter().zip(&subject).all(|(w, s)| *w == "*" || w == s)
    }

    fn check<T: Topic + PartialEq + fmt::Debug>(topic: T) {
        let subject = topic.subject();
        assert_eq!(T::parse(&subject), Some(topic));
        assert!(matches(&T::wildcard(), &subject), "{subject}");
        assert_eq!(subject.split('.').count(), T::TEMPLATE.split('.').count());
        assert_eq!(DECLARED.iter().filter(|declared| declared.template == T::TEMPLATE).count(), 1);
        assert!(T::parse(&T::wildcard()).is_none_or(|_| T::wildcard() == subject));
        for bad in [
            format!("{subject}.x"),
            format!("x{subject}"),
            subject.replacen("v1", "v2", 1),
            format!("{subject}."),
            subject.to_uppercase(),
        ] {
            assert_eq!(T::parse(&bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn subjects_round_trip(a in uuid(), b in uuid()) {
            check(ToolSubject { daemon: a.into() });
            check(ResultSubject { daemon: a.into(), call: b.into() });
            check(UpdateSubject { user: a.into(), chat: b.into() });
            check(FeedSubject { user: a.into() });
            check(PrefixSubject { producer: a });
            check(PresenceSubject { user: a.into(), daemon: b.into() });
            check(BurstSubject { worker: a });
            check(ControlSubject);
            // No subject is read as another kind.
            let tool = ToolSubject { daemon: a.into() }.subject();
            prop_assert_eq!(FeedSubject::parse(&tool), None);
            prop_assert_eq!(PrefixSubject::parse(&tool), None);
        }

        #[test]
        fn any_text_is_parsed_without_panic(text in ".{0,200}") {
            let _ = ToolSubject::parse(&text);
            let _ = ResultSubject::parse(&format!("reliant.v1.result.{text}"));
        }
    }
}
