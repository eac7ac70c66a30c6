//! Receiving. What cannot be decoded is counted and skipped; a slow receiver loses messages here and the sender's other
//! receivers notice nothing.

use futures::StreamExt;
use parking_lot::Mutex;
use prost::Message;
use reliant_telemetry::{
    TraceContext, metrics,
    names::{TRACEPARENT, TRACESTATE},
};
use std::marker::PhantomData;

use crate::{Bus, BusError, RequestTopic, Topic, client::encode};

/// Messages of one subject, or of all of a kind. Dropping it unsubscribes.
pub struct Subscription<T> {
    subscriber: async_nats::Subscriber,
    topic: PhantomData<fn() -> T>,
}

/// One message. Do not work in the loop that receives: hand it on.
pub struct Received<T: Topic> {
    pub topic: T,
    pub message: T::Message,
    pub trace: TraceContext,
    reply: Option<async_nats::Subject>,
    /// Counts the work on the message when it is dropped.
    _working: prometheus::HistogramTimer,
}

impl<T: Topic> Subscription<T> {
    pub(crate) fn new(subscriber: async_nats::Subscriber) -> Self {
        Self { subscriber, topic: PhantomData }
    }

    /// The next message; `None` once the subscription or the connection was closed for good. Cancel-safe.
    pub async fn next(&mut self) -> Option<Received<T>> {
        loop {
            let message = self.subscriber.next().await?;
            metrics::BUS_CONSUMED.with_label_values(&[T::TEMPLATE]).inc();
            match read(message) {
                Ok(received) => return Some(received),
                Err(reason) => undecodable(T::TEMPLATE, reason),
            }
        }
    }

    /// Unsubscribes now and waits until the command is taken.
    pub async fn unsubscribe(mut self) {
        let _ = self.subscriber.unsubscribe().await;
    }
}

impl<T: Topic> Received<T> {
    pub fn wants_reply(&self) -> bool {
        self.reply.is_some()
    }

    /// A span for working on this message, below its sender's.
    pub fn span(&self) -> tracing::Span {
        let span = tracing::info_span!(
            // reliant_telemetry::names::span::BUS_PROCESS
            "process",
            otel.name = format!("process {}", T::TEMPLATE),
            otel.kind = "consumer",
            messaging.system = "nats",
            messaging.operation.name = "process",
            messaging.operation.type = "process",
            messaging.destination.template = T::TEMPLATE,
            messaging.destination.name = self.topic.subject(),
        );
        self.trace.set_parent(&span);
        span
    }
}

impl<T: RequestTopic> Received<T> {
    /// Answers the one who asked.
    pub async fn reply(&self, bus: &Bus, reply: &T::Reply) -> Result<(), BusError> {
        let timer = metrics::guard(&metrics::BUS_DURATION, &[T::TEMPLATE, "reply"]);
        let result = match &self.reply {
            Some(subject) => bus.send(T::TEMPLATE, subject.clone(), None, encode(T::TEMPLATE, reply)).await,
            None => Err(BusError::NoReplySubject(T::TEMPLATE)),
        };
        timer.done(result.as_ref().map_or_else(BusError::outcome, |()| "ok"));
        result
    }
}

fn read<T: Topic>(message: async_nats::Message) -> Result<Received<T>, &'static str> {
    let topic = T::parse(&message.subject).ok_or("its subject is not of the kind")?;
    let trace = match &message.headers {
        Some(headers) => {
            let text = |name| headers.get(name).map(|value| value.as_str()).unwrap_or("");
            TraceContext::from_parts(text(TRACEPARENT), text(TRACESTATE))
        }
        None => TraceContext::default(),
    };
    let decoded = T::Message::decode(message.payload).map_err(|_| "its payload is not the expected message")?;
    let working = metrics::BUS_PROCESS.with_label_values(&[T::TEMPLATE]).start_timer();
    Ok(Received { topic, message: decoded, trace, reply: message.reply, _working: working })
}

/// Counted each time; logged once per kind of subject, as a sender that is wrong is wrong often.
fn undecodable(template: &'static str, reason: &'static str) {
    static LOGGED: Mutex<Vec<&'static str>> = Mutex::new(Vec::new());
    metrics::BUS_UNDECODABLE.with_label_values(&[template]).inc();
    let mut logged = LOGGED.lock();
    if !logged.contains(&template) {
        logged.push(template);
        drop(logged);
        tracing::warn!(
            messaging.destination.template = template,
            reason,
            "a message was skipped; later ones are only counted"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ToolSubject;
    use reliant_types::{DaemonId, pb};

    fn message(subject: &str, payload: &'static [u8]) -> async_nats::Message {
        async_nats::Message {
            subject: subject.into(),
            reply: None,
            payload: payload.into(),
            headers: None,
            status: None,
            description: None,
            length: 0,
        }
    }

    #[test]
    fn only_what_is_well_formed_is_received() {
        let topic = ToolSubject { daemon: DaemonId::new() };
        let good = read::<ToolSubject>(message(&topic.subject(), b""));
        assert!(good.is_ok_and(|received| received.topic == topic && !received.wants_reply()));
        assert!(read::<ToolSubject>(message("reliant.v1.tool.x", b"")).is_err());
        assert!(read::<ToolSubject>(message(&topic.subject(), b"\xff\xff\xff")).is_err());
    }

    #[test]
    fn hostile_headers_are_no_context() {
        let topic = ToolSubject { daemon: DaemonId::new() };
        let mut bad = message(&topic.subject(), b"");
        let mut headers = async_nats::HeaderMap::new();
        headers.insert(TRACEPARENT, "00-zz");
        bad.headers = Some(headers);
        assert!(
            read::<ToolSubject>(bad)
                .is_ok_and(|received| received.trace.is_empty() && received.message == pb::ToolRequest::default())
        );
    }
}
