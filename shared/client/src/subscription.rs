//! A stream of updates that reconnects by itself: after a loss, after silence past the heartbeat's deadline, and after
//! a hole. What its [`View`] has seen is never asked for again.

use std::time::Duration;

use reliant_rpc::{self as rpc, update_service_client::UpdateServiceClient};
use reliant_runtime::Backoff;
use reliant_telemetry::{ClientCall, TraceContext};
use reliant_types::{ChatId, Code, Failure, boxed, code::Class, limits, pb};
use tokio::time::{Instant, timeout_at};
use tonic::{Status, Streaming};
use tracing::Instrument as _;

use crate::{
    Client,
    calls::{RESPONSE_MAX_BYTES, backoff},
    view::{ClientUpdate, From, Verification, View},
};

const SUBSCRIBE: &str = "reliant.v1.UpdateService/Subscribe";
/// The first answer of a new stream must come within this.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// A stream that lived this long was a good one: the next back-off begins small.
const GOOD_STREAM: Duration = Duration::from_secs(5);

pub struct Subscription {
    client: Client,
    view: View,
    stream: Option<Stream>,
    backoff: Backoff,
    /// Not before then is the next stream opened.
    retry_at: Option<Instant>,
    opened_before: bool,
    /// The call that opened the newest stream.
    before: TraceContext,
}

struct Stream {
    updates: Streaming<pb::SubscribeResponse>,
    opened: Instant,
    heard: Instant,
}

impl Client {
    /// A subscription that follows nothing yet; it connects at the first [`Subscription::next`].
    pub fn subscription(&self) -> Subscription {
        Subscription {
            client: self.clone(),
            view: View::new(),
            stream: None,
            backoff: backoff(),
            retry_at: None,
            opened_before: false,
            before: TraceContext::default(),
        }
    }

    /// Follows these chats from their state now, and the user's feed if asked.
    pub fn subscribe(&self, chats: &[ChatId], feed: bool) -> Subscription {
        let mut subscription = self.subscription();
        for chat in chats {
            subscription.follow(*chat, From::Snapshot);
        }
        if feed {
            subscription.follow_feed();
        }
        subscription
    }
}

impl Subscription {
    /// Adds a chat; the stream is opened anew for it.
    pub fn follow(&mut self, chat: ChatId, from: From) {
        if self.view.chat(chat).is_none() {
            self.view.follow(chat, from);
            self.stream = None;
        }
    }

    pub fn unfollow(&mut self, chat: ChatId) {
        self.view.unfollow(chat);
    }

    /// Adds the user's feed, from now on.
    pub fn follow_feed(&mut self) {
        if self.view.feed().is_none() {
            self.view.follow_feed(None);
            self.stream = None;
        }
    }

    pub fn view(&self) -> &View {
        &self.view
    }

    pub fn verification(&self) -> Verification {
        self.view.verification()
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Goes on over another client's connection, perhaps to another replica, from where its view is.
    pub fn go_on_at(&mut self, client: Client) {
        self.client = client;
        self.stream = None;
    }

    /// Drops the connection, as a lost network would; the next update comes over a new one.
    pub fn disconnect(&mut self) {
        self.stream = None;
    }

    /// The next thing that is new. An error is one that coming back will not cure (the token, the chat); anything else
    /// is waited out, without end: the caller sets a deadline. Dropping the future loses nothing.
    #[boxed]
    pub async fn next(&mut self) -> Result<ClientUpdate, Failure> {
        loop {
            let Some(stream) = &mut self.stream else {
                if self.open().await? {
                    return Ok(ClientUpdate::Reconnected);
                }
                continue;
            };
            let silence = stream.heard + limits::HEARTBEAT_DEADLINE;
            let response = match timeout_at(silence, stream.updates.message()).await {
                Ok(Ok(Some(response))) => response,
                Ok(Ok(None)) => {
                    self.lost("the server ended the stream", None);
                    continue;
                }
                Ok(Err(status)) => {
                    self.ended_by(&status)?;
                    continue;
                }
                Err(_) => {
                    self.lost("the server was silent", None);
                    continue;
                }
            };
            stream.heard = Instant::now();
            let applied = self.view.apply(response);
            if applied.heal {
                tracing::warn!(verification = ?self.view.verification(), "updates were missing; opening a new stream");
                self.lost("updates were missing", None);
            }
            if let Some(update) = applied.update {
                return Ok(update);
            }
        }
    }

    /// Waits until all that is stored has come.
    #[boxed]
    pub async fn caught_up(&mut self, deadline: Instant) -> Result<(), Failure> {
        while !self.view.is_caught_up() || self.stream.is_none() {
            self.next_before(deadline).await?;
        }
        Ok(())
    }

    /// [`Self::next`] with a deadline.
    #[boxed]
    pub async fn next_before(&mut self, deadline: Instant) -> Result<ClientUpdate, Failure> {
        match timeout_at(deadline, self.next()).await {
            Ok(update) => update,
            Err(_) => Err(Failure::new(Code::DeadlineExceeded, "the awaited update did not come in time")),
        }
    }

    /// Opens a stream, after the back-off. True: it replaces a lost one.
    async fn open(&mut self) -> Result<bool, Failure> {
        if let Some(at) = self.retry_at {
            tokio::time::sleep_until(at).await;
        }
        // Should this be dropped half way, the next try comes after a delay as well.
        self.retry_at = Some(Instant::now() + self.backoff.next_delay());
        // One call of its own for each stream, ended when it stands; the next one links to it.
        let called = ClientCall::start(SUBSCRIBE, &self.client.config().endpoint, &self.before);
        self.before = TraceContext::of(called.span());
        let view = self.view.begin_stream();
        let request = self.client.request(view).instrument(called.span().clone()).await?;
        let mut service = UpdateServiceClient::new(self.client.channel()).max_decoding_message_size(RESPONSE_MAX_BYTES);
        let answer = match timeout_at(Instant::now() + OPEN_TIMEOUT, service.subscribe(request)).await {
            Ok(answer) => answer,
            Err(_) => Err(Status::unavailable("no answer to the subscription")),
        };
        match answer {
            Ok(response) => {
                called.settle(tonic::Code::Ok);
                let now = Instant::now();
                self.stream = Some(Stream { updates: response.into_inner(), opened: now, heard: now });
                self.retry_at = None;
                Ok(std::mem::replace(&mut self.opened_before, true))
            }
            Err(status) => {
                called.settle(status.code());
                self.ended_by(&status)?;
                Ok(false)
            }
        }
    }

    fn ended_by(&mut self, status: &Status) -> Result<(), Failure> {
        let failure = rpc::failure(status);
        // Without details the transport spoke, not the server.
        if !status.details().is_empty() && !may_pass(&failure) {
            self.stream = None;
            return Err(failure);
        }
        if status.details().is_empty() && status.code() == tonic::Code::Unimplemented {
            return Err(failure);
        }
        self.lost(status.message(), failure.retry_after);
        Ok(())
    }

    fn lost(&mut self, why: &str, retry_after: Option<Duration>) {
        tracing::debug!(why, "the update stream was lost");
        if self.stream.take().is_some_and(|stream| stream.opened.elapsed() >= GOOD_STREAM) {
            self.backoff.reset();
        }
        let delay = self.backoff.next_delay().max(retry_after.unwrap_or_default());
        self.retry_at = Some(Instant::now() + delay);
    }
}

/// Whether coming back later may help.
fn may_pass(failure: &Failure) -> bool {
    matches!(
        failure.code.class(),
        Class::Unavailable
            | Class::ResourceExhausted
            | Class::DeadlineExceeded
            | Class::Aborted
            | Class::Cancelled
            | Class::Internal
            | Class::Unknown
    )
}
