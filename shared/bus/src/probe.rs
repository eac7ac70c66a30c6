//! Raw NATS request-reply, the floor under every hop: no trace context, no protobuf, two connections.

use std::time::{Duration, Instant};

use futures::StreamExt as _;

use crate::BusError;

const SUBJECT: &str = "reliant.v1.control.probe";
const PAYLOAD_BYTES: usize = 200;

/// `count` round trips, one after another.
pub async fn round_trips(url: &str, count: usize) -> Result<Vec<Duration>, BusError> {
    let (asker, answerer) = (connect(url).await?, connect(url).await?);
    let mut questions = answerer.subscribe(SUBJECT).await.map_err(|_| BusError::Disconnected)?;
    answerer.flush().await.map_err(|_| BusError::Disconnected)?;
    let answers = tokio::spawn(async move {
        while let Some(question) = questions.next().await {
            if let Some(reply) = question.reply
                && answerer.publish(reply, question.payload).await.is_err()
            {
                return;
            }
        }
    });
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let begun = Instant::now();
        asker.request(SUBJECT, vec![7; PAYLOAD_BYTES].into()).await.map_err(|_| BusError::Disconnected)?;
        times.push(begun.elapsed());
    }
    answers.abort();
    Ok(times)
}

async fn connect(url: &str) -> Result<async_nats::Client, BusError> {
    let options = match crate::client::login_of(url) {
        Some((user, password)) => async_nats::ConnectOptions::with_user_and_password(user, password),
        None => async_nats::ConnectOptions::new(),
    };
    options.connect(url).await.map_err(|_| BusError::Address(host(url)))
}

/// The address without user and password.
fn host(url: &str) -> String {
    url.rsplit('@').next().unwrap_or_default().to_owned()
}
