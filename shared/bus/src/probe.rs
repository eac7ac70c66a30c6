//! Raw NATS request-reply, the floor under every hop: no trace context, no protobuf, two connections.

use std::time::{Duration, Instant};

use futures::StreamExt as _;

use crate::BusError;

const SUBJECT: &str = "reliant.v1.control.probe";
const PAYLOAD_BYTES: usize = 200;

/// Somebody who asks, and somebody who answers.
pub struct Probe {
    asker: async_nats::Client,
    answers: tokio::task::JoinHandle<()>,
}

impl Probe {
    pub async fn connect(url: &str) -> Result<Self, BusError> {
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
        Ok(Self { asker, answers })
    }

    pub async fn round_trip(&self) -> Result<Duration, BusError> {
        let begun = Instant::now();
        let asked = self.asker.request(SUBJECT, vec![7; PAYLOAD_BYTES].into()).await;
        asked.map(|_| begun.elapsed()).map_err(|_| BusError::Disconnected)
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.answers.abort();
    }
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
