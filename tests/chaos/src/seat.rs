//! One chat and somebody who watches it without a pause, over the client that checks what it is told.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use parking_lot::Mutex;
use reliant_client::{ChatSession, Client, ClientUpdate};
use reliant_types::{ChatId, TurnId, pb};
use tokio::{
    sync::{Notify, oneshot},
    task::JoinHandle,
    time::{Instant, timeout_at},
};

/// Live text of one attempt, as the viewer got it.
#[derive(Debug, Clone, Copy)]
pub struct Pieces {
    pub first_at: Instant,
    pub count: u64,
}

#[derive(Debug, Default)]
pub struct Seen {
    turns: HashMap<String, pb::TurnStatus>,
    /// By message and epoch. Only of the newest messages.
    pieces: BTreeMap<(String, i64), Pieces>,
    /// Errors that coming back does not cure.
    pub errors: Vec<String>,
}

/// What was accepted, and what must come of it.
#[derive(Debug, Clone)]
pub struct Accepted {
    pub chat: ChatId,
    pub turn: TurnId,
    pub client_message_id: String,
    pub key: String,
    pub at: Instant,
}

/// Everything that was accepted in this campaign.
#[derive(Debug, Default)]
pub struct Ledger {
    pub accepted: Mutex<Vec<Accepted>>,
    keys: AtomicU64,
    /// Calls of people that the client library gave up.
    pub failed_calls: Mutex<Vec<String>>,
}

impl Ledger {
    pub fn key(&self, name: &str) -> String {
        format!("{name}-{}", self.keys.fetch_add(1, Ordering::Relaxed))
    }
}

pub struct Seat {
    pub chat: ChatId,
    pub client: Client,
    ledger: Arc<Ledger>,
    seen: Arc<Mutex<Seen>>,
    changed: Arc<Notify>,
    stop: Option<oneshot::Sender<()>>,
    watching: JoinHandle<ChatSession>,
}

const MODEL: &str = "sim/default";
const PIECES_MAX: usize = 64;
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// A person tries again by hand what the client library gave up.
const ACCEPT_PATIENCE: Duration = Duration::from_secs(300);

impl Seat {
    /// A new chat.
    pub async fn take(client: &Client, mode: pb::ChatMode, ledger: &Arc<Ledger>) -> Result<Self> {
        Self::take_with(client, MODEL, mode, ledger).await
    }

    /// A new chat with this model.
    pub async fn take_with(client: &Client, model: &str, mode: pb::ChatMode, ledger: &Arc<Ledger>) -> Result<Self> {
        let request = pb::CreateChatRequest {
            title: "chaos".into(),
            model: model.into(),
            mode: mode as i32,
            ..Default::default()
        };
        let (chat, _) = client.new_chat(request).await?;
        let session = client.open(chat).await?;
        let (seen, changed) = (Arc::new(Mutex::new(Seen::default())), Arc::new(Notify::new()));
        let (stop, stopped) = oneshot::channel();
        let watching = tokio::spawn(watch(session, seen.clone(), changed.clone(), stopped));
        Ok(Self { chat, client: client.clone(), ledger: ledger.clone(), seen, changed, stop: Some(stop), watching })
    }

    /// Sends until it is accepted: the same message each time.
    pub async fn send(&self, key: &str, text: &str) -> Result<Accepted> {
        send(&self.client, self.chat, &self.ledger, key, text).await
    }

    /// Approves until somebody has written it down.
    pub async fn approve(&self, approval: &str) -> Result<()> {
        let request = pb::DecideApprovalRequest {
            approval_id: approval.to_owned(),
            approve: true,
            scope: pb::ApprovalScope::Once as i32,
        };
        if let Err(failure) = self.client.decide_approval(request).await {
            self.ledger.failed_calls.lock().push(format!("DecideApproval: {failure}"));
            return Err(failure.into());
        }
        Ok(())
    }

    pub fn status(&self, turn: TurnId) -> Option<pb::TurnStatus> {
        self.seen.lock().turns.get(&turn.to_string()).copied()
    }

    /// The viewer saw the turn's end in time.
    pub async fn ended(&self, turn: TurnId, deadline: Instant) -> Option<pb::TurnStatus> {
        self.until(deadline, |seat| {
            seat.status(turn).filter(|status| {
                matches!(status, pb::TurnStatus::Succeeded | pb::TurnStatus::Failed | pb::TurnStatus::Cancelled)
            })
        })
        .await
    }

    /// Looks at each change until there is an answer.
    pub async fn until<T>(&self, deadline: Instant, mut look: impl FnMut(&Self) -> Option<T>) -> Option<T> {
        loop {
            let changed = self.changed.notified();
            if let Some(found) = look(self) {
                return Some(found);
            }
            // A change between two looks is never missed for longer than this.
            let next = (Instant::now() + LOOK_EVERY * 20).min(deadline);
            if timeout_at(next, changed).await.is_err() && Instant::now() >= deadline {
                return look(self);
            }
        }
    }

    /// Live pieces of any attempt of epoch `least` or later that came first at or after `since`.
    pub fn pieces(&self, least: i64, since: Instant) -> Option<(i64, Pieces)> {
        let seen = self.seen.lock();
        let found = seen.pieces.iter().filter(|((_, epoch), pieces)| *epoch >= least && pieces.first_at >= since);
        found.map(|((_, epoch), pieces)| (*epoch, *pieces)).min_by_key(|(_, pieces)| pieces.first_at)
    }

    pub fn errors(&self) -> Vec<String> {
        self.seen.lock().errors.clone()
    }

    /// Ends the watch and hands over what it saw.
    pub async fn leave(mut self) -> Result<ChatSession> {
        drop(self.stop.take());
        Ok(self.watching.await?)
    }
}

/// [`Seat::send`], for a task of its own.
pub async fn send(client: &Client, chat: ChatId, ledger: &Ledger, key: &str, text: &str) -> Result<Accepted> {
    let request = pb::SendMessageRequest {
        chat_id: chat.to_string(),
        client_message_id: format!("m-{key}"),
        text: text.to_owned(),
    };
    let deadline = Instant::now() + ACCEPT_PATIENCE;
    loop {
        match client.send_message(request.clone()).await {
            Ok(response) => {
                let turn = response.turn.context("the answer has no turn")?.id.parse()?;
                let (client_message_id, key) = (request.client_message_id, key.to_owned());
                let accepted = Accepted { chat, turn, client_message_id, key, at: Instant::now() };
                ledger.accepted.lock().push(accepted.clone());
                return Ok(accepted);
            }
            Err(failure) => {
                ledger.failed_calls.lock().push(format!("SendMessage: {failure}"));
                anyhow::ensure!(Instant::now() < deadline, "the message was never accepted: {failure}");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }
}

async fn watch(
    mut session: ChatSession,
    seen: Arc<Mutex<Seen>>,
    changed: Arc<Notify>,
    mut stopped: oneshot::Receiver<()>,
) -> ChatSession {
    loop {
        let update = tokio::select! {
            _ = &mut stopped => return session,
            update = session.next() => update,
        };
        let update = match update {
            Ok(update) => update,
            Err(failure) => {
                seen.lock().errors.push(failure.to_string());
                // Not in a circle.
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        note(&mut seen.lock(), update);
        changed.notify_waiters();
    }
}

fn note(seen: &mut Seen, update: ClientUpdate) {
    match update {
        ClientUpdate::Event(event) => {
            if let Some(pb::chat_event::Kind::TurnChanged(turn)) = &event.kind {
                seen.turns.insert(turn.id.clone(), turn.status());
            }
        }
        ClientUpdate::Snapshot(snapshot) => {
            for turn in &snapshot.turns {
                seen.turns.insert(turn.id.clone(), turn.status());
            }
        }
        ClientUpdate::Delta(delta) => {
            let target = delta.block.map(|block| block.target_id).unwrap_or_default();
            let new = Pieces { first_at: Instant::now(), count: 0 };
            seen.pieces.entry((target, delta.epoch)).or_insert(new).count += 1;
            while seen.pieces.len() > PIECES_MAX {
                seen.pieces.pop_first();
            }
        }
        _ => {}
    }
}
