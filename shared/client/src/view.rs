//! What a viewer knows, and whether the server kept its word: each event once and in order, live text without holes.
//!
//! A pure state machine. What breaks the promise is counted and not applied; after a hole a chat stands still until
//! the stream is opened again ([`View::begin_stream`]), which continues after the last event that was in order.

mod blocks;
pub(crate) mod chat;

use std::collections::BTreeMap;

use bytes::Bytes;
use reliant_types::{ChatId, pb};

pub use blocks::{BlockKey, LiveBlock};
pub use chat::ChatView;

/// What was seen of the server's promise. Counts only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verification {
    /// Events or live bytes that were skipped.
    pub holes: u64,
    /// Events or live bytes that came again on one stream.
    pub duplicates: u64,
    /// What came after its time or before it: a late event, a piece before its opening event or after its commit.
    pub reorderings: u64,
    /// Live text that is not what was committed, or not what it was before a reconnect.
    pub text_mismatches: u64,
    /// Streams that began before the last event that had been sent, in the same log: the server forgot it.
    pub rollbacks: u64,
    /// Streams that began elsewhere than was asked, in another log or before a cursor that the server never gave; legal.
    pub resets: u64,
    /// Attempts that took over; legal.
    pub epoch_changes: u64,
    /// Pieces of an attempt that had been taken over or had ended; legal, they are dropped.
    pub stale: u64,
    /// Texts committed before all of their pieces came; legal, the commit has the whole.
    pub short_texts: u64,
    /// New live bytes.
    pub bytes: u64,
    /// Streams opened after the first.
    pub reconnects: u64,
    /// Times the server said that this viewer was too slow.
    pub lagged: u64,
}

impl Verification {
    /// How often the promise was broken.
    pub fn violations(&self) -> u64 {
        self.holes + self.duplicates + self.reorderings + self.text_mismatches + self.rollbacks
    }

    pub fn is_clean(&self) -> bool {
        self.violations() == 0
    }

    /// The promise was kept, and each live text had come to its end before its commit: what is to be expected where
    /// nothing fails.
    pub fn is_complete(&self) -> bool {
        self.is_clean() && self.short_texts == 0
    }

    pub fn add(&mut self, other: &Verification) {
        self.holes += other.holes;
        self.duplicates += other.duplicates;
        self.reorderings += other.reorderings;
        self.text_mismatches += other.text_mismatches;
        self.rollbacks += other.rollbacks;
        self.resets += other.resets;
        self.epoch_changes += other.epoch_changes;
        self.stale += other.stale;
        self.short_texts += other.short_texts;
        self.bytes += other.bytes;
        self.reconnects += other.reconnects;
        self.lagged += other.lagged;
    }
}

/// From where a chat is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// All its events.
    Start,
    /// Its state now, and what follows.
    Snapshot,
    After {
        seq: i64,
        log_epoch: i64,
    },
}

/// One thing that is new to the viewer.
#[derive(Debug, Clone, PartialEq)]
pub enum ClientUpdate {
    Event(pb::ChatEvent),
    /// Only the bytes that were not known yet.
    Delta(pb::Delta),
    Snapshot(pb::ChatSnapshot),
    Feed(pb::FeedEvent),
    /// All that was stored has come; `None` is the user's feed.
    CaughtUp {
        chat: Option<ChatId>,
        seq: i64,
    },
    /// The viewer was too slow; live pieces are refilled by the server.
    Lagged {
        dropped: i64,
    },
    Heartbeat,
    /// A new stream was opened in place of a lost one.
    Reconnected,
}

/// What came of one update.
#[derive(Debug, Default, PartialEq)]
pub struct Applied {
    /// `None`: nothing new (a repetition, a hole, a stale piece).
    pub update: Option<ClientUpdate>,
    /// Something is missing: open a new stream.
    pub heal: bool,
}

impl Applied {
    fn new(update: ClientUpdate) -> Self {
        Self { update: Some(update), heal: false }
    }

    const NOTHING: Self = Self { update: None, heal: false };
    const HEAL: Self = Self { update: None, heal: true };
}

/// The user's feed.
#[derive(Debug, Default)]
pub struct FeedView {
    pub last_seq: Option<i64>,
    log_epoch: i64,
    pub caught_up: bool,
    broken: bool,
    start: Start,
}

/// Where a stream begins against what was known before it.
#[derive(Debug, Default)]
struct Start {
    /// Nothing came on this stream yet.
    first: bool,
    /// What is known was told by the server, and is not a cursor that the caller brought.
    told: bool,
}

impl Start {
    fn begin_stream(&mut self) {
        self.first = true;
    }

    /// Something came.
    fn passed(&mut self) {
        *self = Self { first: false, told: true };
    }

    /// Whether the server's word is taken that the log is at `seq` now, though `last` is past it. The first word of a
    /// stream must be: the server has nothing else, and what follows is counted from there.
    fn believes(&self, last: Option<i64>, seq: i64, same_log: bool, seen: &mut Verification) -> bool {
        if same_log && last.is_none_or(|last| seq >= last) {
            return true;
        }
        if same_log && !self.first {
            seen.reorderings += 1;
            return false;
        }
        let forgot = same_log && self.told;
        seen.rollbacks += u64::from(forgot);
        seen.resets += u64::from(!forgot);
        true
    }
}

/// All that one subscription follows.
#[derive(Debug, Default)]
pub struct View {
    chats: BTreeMap<ChatId, ChatView>,
    feed: Option<FeedView>,
    verification: Verification,
    streams: u64,
}

impl View {
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes effect with the next stream. A chat that is followed already stays as it is.
    pub fn follow(&mut self, chat: ChatId, from: From) {
        self.chats.entry(chat).or_insert_with(|| ChatView::new(from));
    }

    pub fn unfollow(&mut self, chat: ChatId) {
        self.chats.remove(&chat);
    }

    /// Follows the feed, from now on or after a known event.
    pub fn follow_feed(&mut self, after: Option<(i64, i64)>) {
        self.feed.get_or_insert_with(|| FeedView {
            last_seq: after.map(|(seq, _)| seq),
            log_epoch: after.map_or(0, |(_, epoch)| epoch),
            ..FeedView::default()
        });
    }

    pub fn chat(&self, chat: ChatId) -> Option<&ChatView> {
        self.chats.get(&chat)
    }

    pub fn chats(&self) -> impl Iterator<Item = (&ChatId, &ChatView)> {
        self.chats.iter()
    }

    pub fn feed(&self) -> Option<&FeedView> {
        self.feed.as_ref()
    }

    pub fn verification(&self) -> Verification {
        self.verification
    }

    /// Everything followed has been caught up with.
    pub fn is_caught_up(&self) -> bool {
        self.chats.values().all(|chat| chat.caught_up) && self.feed.as_ref().is_none_or(|feed| feed.caught_up)
    }

    /// The request of the next stream: each chat after its last event that was in order.
    pub fn begin_stream(&mut self) -> pb::SubscribeRequest {
        if self.streams > 0 {
            self.verification.reconnects += 1;
        }
        self.streams += 1;
        let chats = self.chats.iter_mut().map(|(id, chat)| {
            let (after_seq, log_epoch) = chat.begin_stream();
            pb::ChatCursor { chat_id: id.to_string(), after_seq, log_epoch }
        });
        let chats = chats.collect();
        let feed = self.feed.as_mut().map(|feed| {
            feed.caught_up = false;
            feed.broken = false;
            feed.start.begin_stream();
            pb::FeedCursor { after_seq: feed.last_seq.unwrap_or(-1), log_epoch: feed.log_epoch }
        });
        pb::SubscribeRequest { chats, feed }
    }

    /// Takes in one update, in the order received.
    pub fn apply(&mut self, response: pb::SubscribeResponse) -> Applied {
        use pb::subscribe_response::Update;
        match response.update {
            Some(Update::Event(event)) => self.of_chat(&event.chat_id.clone(), |chat, seen| chat.event(event, seen)),
            Some(Update::Delta(delta)) => self.of_chat(&delta.chat_id.clone(), |chat, seen| chat.delta(delta, seen)),
            Some(Update::Snapshot(snapshot)) => {
                let id = snapshot.chat.as_ref().map(|chat| chat.id.clone()).unwrap_or_default();
                self.of_chat(&id, |chat, seen| chat.snapshot(snapshot, seen))
            }
            Some(Update::FeedEvent(event)) => self.feed_event(event),
            Some(Update::CaughtUp(caught_up)) if caught_up.chat_id.is_empty() => self.feed_caught_up(&caught_up),
            Some(Update::CaughtUp(caught_up)) => {
                self.of_chat(&caught_up.chat_id.clone(), |chat, seen| chat.caught_up(&caught_up, seen))
            }
            Some(Update::Lagged(lagged)) => {
                self.verification.lagged += 1;
                Applied::new(ClientUpdate::Lagged { dropped: lagged.dropped })
            }
            Some(Update::Heartbeat(_)) => Applied::new(ClientUpdate::Heartbeat),
            // Of a newer server.
            None => Applied::NOTHING,
        }
    }

    /// What concerns a chat that is not followed (any more) is passed over.
    fn of_chat(&mut self, id: &str, apply: impl FnOnce(&mut ChatView, &mut Verification) -> Applied) -> Applied {
        match id.parse().ok().and_then(|id: ChatId| self.chats.get_mut(&id)) {
            Some(chat) => apply(chat, &mut self.verification),
            None => Applied::NOTHING,
        }
    }

    fn feed_event(&mut self, event: pb::FeedEvent) -> Applied {
        let Some(feed) = &mut self.feed else { return Applied::NOTHING };
        match in_order(feed.last_seq, event.seq, &mut feed.broken, &mut self.verification) {
            Order::Next => {
                feed.last_seq = Some(event.seq);
                feed.start.passed();
                Applied::new(ClientUpdate::Feed(event))
            }
            Order::Wrong { heal } => Applied { update: None, heal },
        }
    }

    fn feed_caught_up(&mut self, caught_up: &pb::CaughtUp) -> Applied {
        let Some(feed) = &mut self.feed else { return Applied::NOTHING };
        let same_log = feed.log_epoch == 0 || feed.log_epoch == caught_up.log_epoch;
        let goes_back = feed.last_seq.is_some_and(|last| caught_up.seq < last);
        // A feed has no snapshots: where it is counted from anew, this is what says so.
        if !same_log || goes_back && feed.start.first {
            feed.start.believes(feed.last_seq, caught_up.seq, same_log, &mut self.verification);
            feed.last_seq = None;
        }
        feed.log_epoch = caught_up.log_epoch;
        if let Some(heal) = behind(&mut feed.last_seq, caught_up.seq, &mut feed.broken, &mut self.verification) {
            return heal;
        }
        feed.start.passed();
        feed.caught_up = true;
        Applied::new(ClientUpdate::CaughtUp { chat: None, seq: caught_up.seq })
    }
}

/// Where an event stands to the ones before it.
enum Order {
    Next,
    Wrong { heal: bool },
}

/// Judges an event's number. `last` is `None` where the stream's first event sets it.
fn in_order(last: Option<i64>, seq: i64, broken: &mut bool, seen: &mut Verification) -> Order {
    let Some(last) = last else { return Order::Next };
    if seq <= last {
        seen.duplicates += 1;
        return Order::Wrong { heal: false };
    }
    if *broken {
        // What was missing comes after all, too late; the rest of this stream is not applied.
        seen.reorderings += u64::from(seq == last + 1);
        return Order::Wrong { heal: false };
    }
    if seq == last + 1 {
        return Order::Next;
    }
    seen.holes += (seq - last - 1) as u64;
    *broken = true;
    Order::Wrong { heal: true }
}

/// "All up to `seq` was sent" is a lie where something is missing.
fn behind(last: &mut Option<i64>, seq: i64, broken: &mut bool, seen: &mut Verification) -> Option<Applied> {
    if *broken {
        return Some(Applied::NOTHING);
    }
    match *last {
        None => *last = Some(seq),
        Some(last) if seq > last => {
            seen.holes += (seq - last) as u64;
            *broken = true;
            return Some(Applied::HEAL);
        }
        // Events were sent that "up to now" does not know of.
        Some(last) if seq < last => seen.reorderings += 1,
        Some(_) => {}
    }
    None
}

/// The part of `piece` that begins at `at` bytes.
fn tail(piece: &Bytes, at: usize) -> Bytes {
    piece.slice(at.min(piece.len())..)
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
