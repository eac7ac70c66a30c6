//! One chat, used as a person would: send, watch, decide approvals, wait for the end.

use std::time::Duration;

use reliant_types::{ChatId, Code, Failure, TurnId, boxed, pb};
use tokio::time::Instant;
use tracing::Instrument as _;

use crate::{
    Client, Subscription,
    view::{ChatView, ClientUpdate, From, Verification, chat::is_ended},
};

/// What a session does when a call asks for approval.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Approvals {
    /// Somebody else decides.
    #[default]
    Leave,
    ApproveOnce,
    ApproveForSession,
    Deny,
}

/// A turn, as seen from its sender. Times are of this process's clock.
#[derive(Debug, Clone)]
pub struct TurnReport {
    pub turn: pb::Turn,
    /// All of the turn, the person's own included, oldest first.
    pub messages: Vec<pb::Message>,
    pub tool_calls: Vec<pb::ToolCall>,
    pub sent_at: Instant,
    /// SendMessage answered.
    pub accepted_at: Instant,
    /// The first piece of live text or thinking.
    pub first_delta_at: Option<Instant>,
    pub ended_at: Instant,
    pub deltas: u64,
    /// What was seen of the promise since the session began.
    pub verification: Verification,
}

impl TurnReport {
    pub fn succeeded(&self) -> bool {
        self.turn.status() == pb::TurnStatus::Succeeded
    }

    pub fn first_token(&self) -> Option<Duration> {
        self.first_delta_at.map(|at| at.saturating_duration_since(self.sent_at))
    }

    pub fn total(&self) -> Duration {
        self.ended_at.saturating_duration_since(self.sent_at)
    }

    /// The text of the model's last message.
    pub fn answer(&self) -> String {
        let last = self.messages.iter().rev().find(|message| message.role() == pb::Role::Assistant);
        last.map(text_of).unwrap_or_default()
    }

    pub fn trace_id(&self) -> &str {
        &self.turn.trace_id
    }
}

/// The text blocks of a message.
pub fn text_of(message: &pb::Message) -> String {
    let texts = message.blocks.iter().filter_map(|block| match &block.block {
        Some(pb::content_block::Block::Text(text)) => Some(text.text.as_str()),
        _ => None,
    });
    texts.collect()
}

pub struct ChatSession {
    chat: ChatId,
    pub approvals: Approvals,
    subscription: Subscription,
}

impl Client {
    /// Opens a chat and waits until its state is known.
    #[boxed]
    pub async fn open(&self, chat: ChatId) -> Result<ChatSession, Failure> {
        self.open_from(chat, From::Snapshot).await
    }

    /// [`Self::open`], from a chosen place in the chat's log.
    #[boxed]
    pub async fn open_from(&self, chat: ChatId, from: From) -> Result<ChatSession, Failure> {
        let mut subscription = self.subscription();
        subscription.follow(chat, from);
        let deadline = Instant::now() + self.config().call_deadline;
        Box::pin(subscription.caught_up(deadline)).await?;
        Ok(ChatSession { chat, approvals: Approvals::default(), subscription })
    }

    /// A new chat, as its id.
    #[boxed]
    pub async fn new_chat(&self, request: pb::CreateChatRequest) -> Result<(ChatId, pb::Chat), Failure> {
        let chat = self.create_chat(request).await?.chat.unwrap_or_default();
        let id = chat.id.parse().map_err(|_| Failure::new(Code::Internal, "the server made a chat without an id"))?;
        Ok((id, chat))
    }

    /// Sends one message to a chat and waits for its turn's end, on a stream of its own.
    #[boxed]
    pub async fn send_and_wait(&self, chat: ChatId, text: &str, timeout: Duration) -> Result<TurnReport, Failure> {
        let mut session = self.open(chat).await?;
        session.send_and_wait(text, timeout).await
    }

    /// Waits for a turn's end, on a stream of its own.
    #[boxed]
    pub async fn wait_turn(&self, chat: ChatId, turn: TurnId, timeout: Duration) -> Result<pb::Turn, Failure> {
        let mut session = self.open(chat).await?;
        session.wait_turn(turn, timeout).await
    }

    /// Approves all that waits in a chat now; says how many.
    #[boxed]
    pub async fn approve_all(&self, chat: ChatId) -> Result<usize, Failure> {
        let request = pb::ListApprovalsRequest { chat_id: chat.to_string(), page_size: 200, ..Default::default() };
        let mut approved = 0;
        loop {
            let page = self.list_approvals(request.clone()).await?;
            for approval in &page.approvals {
                self.decide(&approval.id, true, pb::ApprovalScope::Once).await?;
            }
            approved += page.approvals.len();
            // What was decided is not listed any more.
            if !page.has_more || page.approvals.is_empty() {
                return Ok(approved);
            }
        }
    }

    async fn decide(&self, approval: &str, approve: bool, scope: pb::ApprovalScope) -> Result<(), Failure> {
        let approval_id = approval.to_owned();
        self.decide_approval(pb::DecideApprovalRequest { approval_id, approve, scope: scope.into() }).await?;
        Ok(())
    }
}

impl ChatSession {
    pub fn chat(&self) -> ChatId {
        self.chat
    }

    pub fn approvals(mut self, approvals: Approvals) -> Self {
        self.approvals = approvals;
        self
    }

    /// What is known of the chat.
    pub fn view(&self) -> &ChatView {
        self.subscription.view().chat(self.chat).expect("the session follows its chat from its birth")
    }

    pub fn verification(&self) -> Verification {
        self.subscription.verification()
    }

    pub fn subscription(&mut self) -> &mut Subscription {
        &mut self.subscription
    }

    pub fn client(&self) -> &Client {
        self.subscription.client()
    }

    /// The next update, with approvals decided on the way as this session's rule says.
    #[boxed]
    pub async fn next(&mut self) -> Result<ClientUpdate, Failure> {
        let update = self.subscription.next().await?;
        if self.approvals != Approvals::Leave {
            for approval in asked(&update) {
                self.decide(&approval).await?;
            }
        }
        Ok(update)
    }

    async fn decide(&self, approval: &str) -> Result<(), Failure> {
        let (approve, scope) = match self.approvals {
            Approvals::Leave => return Ok(()),
            Approvals::ApproveOnce => (true, pb::ApprovalScope::Once),
            Approvals::ApproveForSession => (true, pb::ApprovalScope::Session),
            Approvals::Deny => (false, pb::ApprovalScope::Once),
        };
        self.client().decide(approval, approve, scope).await
    }

    /// Sends a message; answers once it is stored.
    #[boxed]
    pub async fn send(&self, text: &str) -> Result<pb::SendMessageResponse, Failure> {
        self.send_as(&uuid::Uuid::now_v7().to_string(), text).await
    }

    /// [`Self::send`] with a client message id of one's own.
    #[boxed]
    pub async fn send_as(&self, client_message_id: &str, text: &str) -> Result<pb::SendMessageResponse, Failure> {
        let request = pb::SendMessageRequest {
            chat_id: self.chat.to_string(),
            client_message_id: client_message_id.to_owned(),
            text: text.to_owned(),
        };
        // reliant_telemetry::names::span::CLIENT_SEND
        let span = tracing::info_span!("client.send_message", chat.id = %self.chat);
        self.client().send_message(request).instrument(span).await
    }

    #[boxed]
    pub async fn cancel(&self, turn: TurnId) -> Result<pb::Turn, Failure> {
        let response = self.client().cancel_turn(pb::CancelTurnRequest { turn_id: turn.to_string() }).await?;
        Ok(response.turn.unwrap_or_default())
    }

    /// Sends a message and watches its turn to the end. `timeout` is for all of it.
    #[boxed]
    pub async fn send_and_wait(&mut self, text: &str, timeout: Duration) -> Result<TurnReport, Failure> {
        let sent_at = Instant::now();
        let deadline = sent_at + timeout;
        let answer = within(deadline, self.send(text)).await?;
        let accepted_at = Instant::now();
        let turn = answer.turn.map(|turn| turn.id).unwrap_or_default();
        let mut first_delta_at = None;
        let mut deltas = 0;
        while !self.has_ended(&turn) {
            if let ClientUpdate::Delta(delta) = within(deadline, self.next()).await? {
                if self.is_of_turn(&turn, &delta) {
                    first_delta_at.get_or_insert_with(Instant::now);
                }
                deltas += 1;
            }
        }
        let ended_at = Instant::now();
        let view = self.view();
        Ok(TurnReport {
            turn: view.turns.get(&turn).cloned().unwrap_or_default(),
            messages: view.messages_of(&turn).cloned().collect(),
            tool_calls: view.tool_calls_of(&turn).into_iter().cloned().collect(),
            sent_at,
            accepted_at,
            first_delta_at,
            ended_at,
            deltas,
            verification: self.verification(),
        })
    }

    /// Watches until the turn has ended.
    #[boxed]
    pub async fn wait_turn(&mut self, turn: TurnId, timeout: Duration) -> Result<pb::Turn, Failure> {
        let deadline = Instant::now() + timeout;
        let id = turn.to_string();
        // An old turn may have ended before the snapshot's turns begin.
        if !self.view().turns.contains_key(&id) {
            let turn = self
                .client()
                .get_turn(pb::GetTurnRequest { turn_id: id.clone(), ..Default::default() })
                .await?
                .turn
                .unwrap_or_default();
            if is_ended(turn.status()) {
                return Ok(turn);
            }
        }
        while !self.has_ended(&id) {
            within(deadline, self.next()).await?;
        }
        Ok(self.view().turns.get(&id).cloned().unwrap_or_default())
    }

    fn has_ended(&self, turn: &str) -> bool {
        self.view().turns.get(turn).is_some_and(|turn| is_ended(turn.status()))
    }

    /// Model text of this turn, not output of tools.
    fn is_of_turn(&self, turn: &str, delta: &pb::Delta) -> bool {
        let target = delta.block.as_ref().map(|block| block.target_id.as_str());
        self.view().attempts.iter().any(|((of, _), started)| of == turn && Some(started.message_id.as_str()) == target)
    }
}

/// Approvals that an update says are waiting.
fn asked(update: &ClientUpdate) -> Vec<String> {
    let pending = |approval: &&pb::Approval| approval.status() == pb::ApprovalStatus::Pending;
    match update {
        ClientUpdate::Event(pb::ChatEvent { kind: Some(pb::chat_event::Kind::ApprovalChanged(approval)), .. }) => {
            Some(approval).filter(pending).map(|approval| approval.id.clone()).into_iter().collect()
        }
        ClientUpdate::Snapshot(snapshot) => {
            snapshot.approvals.iter().filter(pending).map(|approval| approval.id.clone()).collect()
        }
        _ => Vec::new(),
    }
}

async fn within<T>(deadline: Instant, future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    match tokio::time::timeout_at(deadline, future).await {
        Ok(result) => result,
        Err(_) => Err(Failure::new(Code::DeadlineExceeded, "the turn did not end in time")),
    }
}
