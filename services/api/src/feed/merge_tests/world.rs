//! A chat's producers, its log, the wire, and viewers, as the property test moves them.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use reliant_types::pb::{self, chat_event::Kind, subscribe_response::Update};
use uuid::Uuid;

use super::client::Client;

use super::super::{
    live::Hole,
    merge::{Output, Source},
    state::{Admit, ChatState, Cursor, Older},
};

pub const CHAT: &str = "01900000-0000-7000-8000-000000000000";
pub const EPOCH: i64 = 1;
/// Small, so that viewers fall behind often.
pub const QUEUE: usize = 4;

/// One growing text, as its producer holds it.
#[derive(Clone)]
pub struct Live {
    pub epoch: i64,
    pub turn: Option<u128>,
    pub producer: u128,
    pub blocks: BTreeMap<i32, String>,
}

/// What is on its way to the replica.
#[expect(clippy::large_enum_variant, reason = "a test")]
pub enum Flight {
    Hint(pb::ChatEvent),
    Delta(pb::Delta),
    Length(pb::BlockLength),
    Log(Vec<pb::ChatEvent>),
    Refill(Hole, Vec<pb::Delta>),
}

pub struct Viewer {
    pub queue: VecDeque<Vec<Bytes>>,
    /// Not at the end: where it is. `None`: takes what comes.
    pub waiting: Option<Cursor>,
    pub client: Client,
}

#[derive(Default)]
pub struct World {
    pub log: Vec<pb::ChatEvent>,
    pub live: BTreeMap<u128, Live>,
    pub fence: i64,
    pub turn: u128,
    pub next: u128,
    pub flight: Vec<Flight>,
    pub viewers: Vec<Viewer>,
    pub state: Option<ChatState>,
}

pub fn id(n: u128) -> String {
    Uuid::from_u128(n).to_string()
}

impl World {
    pub fn state(&mut self) -> &mut ChatState {
        self.state.as_mut().expect("made at the start")
    }

    pub fn fresh(&mut self) -> u128 {
        self.next += 1;
        self.next
    }

    pub fn commit(&mut self, kind: Kind) {
        let event =
            pb::ChatEvent { chat_id: CHAT.into(), seq: self.log.len() as i64 + 1, time: None, kind: Some(kind) };
        self.log.push(event.clone());
        self.flight.push(Flight::Hint(event));
    }

    pub fn message(&self) -> Option<u128> {
        self.live.iter().find(|(_, live)| live.turn.is_some()).map(|(id, _)| *id)
    }

    pub fn started(&self, message: u128, restarted: bool) -> Kind {
        let live = &self.live[&message];
        Kind::MessageStarted(pb::MessageStarted {
            message_id: id(message),
            turn_id: id(live.turn.unwrap_or(0)),
            epoch: live.epoch,
            producer: id(live.producer),
            restarted,
            ..Default::default()
        })
    }

    pub fn call(&self, call: u128, status: pb::ToolCallStatus) -> pb::ToolCallChanged {
        let live = &self.live[&call];
        pb::ToolCallChanged {
            tool_call: Some(pb::ToolCall {
                id: id(call),
                generation: live.epoch,
                status: status as i32,
                ..Default::default()
            }),
            producer: id(live.producer),
        }
    }

    pub fn start_message(&mut self, old: Option<u128>, same_id: bool) {
        let restarted = old.is_some();
        let turn = match old.and_then(|old| self.live.remove(&old)) {
            Some(old) => old.turn,
            None => {
                self.turn = self.fresh();
                Some(self.turn)
            }
        };
        let message = old.filter(|_| same_id).unwrap_or_else(|| self.fresh());
        self.fence += 1;
        let producer = self.fresh();
        self.live.insert(message, Live { epoch: self.fence, turn, producer, blocks: BTreeMap::new() });
        self.commit(self.started(message, restarted));
    }

    pub fn write(&mut self, target: u128, block: i32, size: usize) {
        let live = self.live.get_mut(&target).expect("caller looked");
        let (epoch, tool) = (live.epoch, live.turn.is_none());
        let text = live.blocks.entry(block).or_default();
        let offset = text.len() as i64;
        let piece: String =
            (0..size).map(|n| if n % 3 == 2 { 'é' } else { char::from(b'a' + (offset % 26) as u8) }).collect();
        text.push_str(&piece);
        let kind = if tool { pb::StreamKind::Stdout } else { pb::StreamKind::Text } as i32;
        self.flight.push(Flight::Delta(delta(target, block, kind, epoch, offset, piece.into())));
    }

    pub fn lengths(&mut self) {
        for (target, live) in &self.live {
            for (block, text) in &live.blocks {
                self.flight.push(Flight::Length(pb::BlockLength {
                    chat_id: CHAT.into(),
                    block: Some(pb::BlockRef { target_id: id(*target), block: *block, kind: 1 }),
                    epoch: live.epoch,
                    length: text.len() as i64,
                }));
            }
        }
    }

    pub fn snapshot(&self) -> pb::ChatSnapshot {
        let (messages, calls): (Vec<_>, Vec<_>) = self.live.iter().partition(|(_, live)| live.turn.is_some());
        pb::ChatSnapshot {
            seq: self.log.len() as i64,
            log_epoch: EPOCH,
            started: messages
                .iter()
                .map(|(message, _)| match self.started(**message, false) {
                    Kind::MessageStarted(started) => started,
                    _ => unreachable!(),
                })
                .collect(),
            tool_calls: calls.iter().map(|(call, _)| self.call(**call, pb::ToolCallStatus::Running)).collect(),
            ..Default::default()
        }
    }

    pub fn producer_answer(&self, hole: &Hole, cut: usize) -> Vec<pb::Delta> {
        let Some(live) = self.live.get(&hole.target.as_u128()) else { return Vec::new() };
        if live.producer != hole.producer.as_u128() {
            return Vec::new();
        }
        let mut deltas = Vec::new();
        for (block, text) in &live.blocks {
            if hole.block >= 0 && hole.block != *block {
                continue;
            }
            let mut from = if hole.block < 0 { 0 } else { (hole.from as usize).min(text.len()) };
            // A hole of an older epoch may end within a character of this one's text; the producers begin before it.
            while !text.is_char_boundary(from) {
                from -= 1;
            }
            let rest: Vec<char> = text[from..].chars().collect();
            let mut offset = from as i64;
            for chunk in rest.chunks(cut.max(1)).take(3) {
                let piece: String = chunk.iter().collect();
                deltas.push(delta(hole.target.as_u128(), *block, 1, live.epoch, offset, piece.clone().into()));
                offset += piece.len() as i64;
            }
        }
        deltas
    }

    /// Something happens in the mesh.
    pub fn act(&mut self, what: u8, a: u8, b: u8) {
        let calls: Vec<_> = self.live.iter().filter(|(_, live)| live.turn.is_none()).map(|(id, _)| *id).collect();
        let call = calls.get(usize::from(a) % calls.len().max(1)).copied();
        match (what, self.message(), call) {
            (0, None, _) => self.start_message(None, false),
            (0 | 1, Some(message), _) => self.write(message, i32::from(a % 2), usize::from(b % 6)),
            (2, Some(message), _) => self.start_message(Some(message), a.is_multiple_of(2)),
            (3, Some(message), _) => {
                let turn = self.live[&message].turn.unwrap_or(0);
                self.live.remove(&message);
                self.commit(Kind::MessageCommitted(pb::Message {
                    id: id(message),
                    turn_id: id(turn),
                    role: pb::Role::Assistant as i32,
                    ..Default::default()
                }));
            }
            (4, Some(message), _) => {
                let turn = self.live.remove(&message).and_then(|live| live.turn).unwrap_or(0);
                let status = pb::TurnStatus::Cancelled as i32;
                self.commit(Kind::TurnChanged(pb::Turn { id: id(turn), status, ..Default::default() }));
            }
            (5, _, _) if calls.len() < 3 => {
                let (call, producer) = (self.fresh(), self.fresh());
                self.live.insert(call, Live { epoch: 1, turn: None, producer, blocks: BTreeMap::new() });
                self.commit(Kind::ToolCallChanged(self.call(call, pb::ToolCallStatus::Dispatched)));
            }
            (6, _, Some(call)) => self.write(call, i32::from(b % 2), usize::from(b % 9)),
            (7, _, Some(call)) if b.is_multiple_of(3) => {
                self.commit(Kind::ToolCallChanged(self.call(call, pb::ToolCallStatus::Running)));
            }
            (7, _, Some(call)) if b % 3 == 1 => {
                let again = self.live.get_mut(&call).expect("listed");
                again.epoch += 1;
                again.blocks.clear();
                self.commit(Kind::ToolCallChanged(self.call(call, pb::ToolCallStatus::Dispatched)));
            }
            (7, _, Some(call)) => {
                let ended = Kind::ToolCallChanged(self.call(call, pb::ToolCallStatus::Succeeded));
                self.live.remove(&call);
                self.commit(ended);
            }
            (8, ..) => self.commit(Kind::ChatChanged(pb::Chat::default())),
            (9, ..) => self.lengths(),
            _ => {}
        }
    }

    /// The network, the database or a viewer does something.
    pub fn stir(&mut self, what: u8, a: u8, b: u8) {
        match what {
            // Deliver: in order mostly, else anywhere; sometimes it comes again later.
            0..=4 if !self.flight.is_empty() => {
                let index = if what < 3 { 0 } else { usize::from(a) % self.flight.len() };
                let flight = self.flight.remove(index);
                if b.is_multiple_of(8)
                    && let Some(copy) = flight.copy()
                {
                    self.flight.push(copy);
                }
                self.deliver(flight);
            }
            5 if !self.flight.is_empty() => {
                let index = usize::from(a) % self.flight.len();
                if self.flight[index].copy().is_some() {
                    self.flight.remove(index);
                }
            }
            6 => self.read_log(usize::from(a % 8) + 1),
            7 => {
                let holes = self.state().merge().holes();
                if let Some(hole) = holes.get(usize::from(a) % holes.len().max(1)) {
                    let answer = self.producer_answer(hole, usize::from(b % 4));
                    self.flight.push(Flight::Refill(*hole, answer));
                }
            }
            8 if self.viewers.len() < 4 => {
                let after = match a % 4 {
                    0 => -1,
                    1 => 0,
                    2 => self.log.len() as i64 + i64::from(b % 3),
                    _ => i64::from(b) % (self.log.len() as i64 + 1),
                };
                let log_epoch = if b.is_multiple_of(16) { EPOCH + 1 } else { EPOCH * i64::from(b % 2) };
                let cursor = Cursor { after, log_epoch, greet: true, ..Cursor::default() };
                // What a client that resumes there has: every event up to there.
                let mut client = Client { seq: after, ..Client::default() };
                let had = usize::try_from(after).unwrap_or(0).min(self.log.len());
                self.log[..had].iter().for_each(|event| client.apply(event.clone(), &self.log));
                self.viewers.push(Viewer { queue: VecDeque::new(), waiting: Some(cursor), client });
                self.serve();
            }
            _ => {
                if !self.viewers.is_empty() {
                    let index = usize::from(a) % self.viewers.len();
                    self.drain(index);
                }
            }
        }
    }

    pub fn read_log(&mut self, limit: usize) {
        let seq = self.state().seq() as usize;
        let events = self.log.iter().skip(seq).take(limit).cloned().collect();
        self.flight.push(Flight::Log(events));
    }

    pub fn deliver(&mut self, flight: Flight) {
        let mut out = Vec::new();
        let merge = self.state().merge();
        match flight {
            Flight::Hint(event) => merge.event(event, Source::Hint, &mut out),
            Flight::Delta(delta) => merge.delta(delta, &mut out),
            Flight::Length(length) => merge.length(&length),
            Flight::Log(events) => events.into_iter().for_each(|event| merge.event(event, Source::Log, &mut out)),
            Flight::Refill(hole, deltas) => merge.refill(hole, deltas, &mut out),
        }
        self.spread(out);
        self.serve();
    }

    /// As the chat's task does it.
    pub fn spread(&mut self, out: Vec<Output>) {
        if out.is_empty() {
            return;
        }
        let state = self.state.as_mut().expect("made at the start");
        let batch = state.record(&out);
        for viewer in self.viewers.iter_mut().filter(|viewer| viewer.waiting.is_none()) {
            if viewer.queue.len() < QUEUE {
                viewer.queue.push_back(batch.clone());
            } else {
                viewer.waiting = Some(state.cursor_before(&out));
            }
        }
    }

    /// Admits the waiting viewers that can be; a lagged one only once it has room.
    pub fn serve(&mut self) {
        for index in 0..self.viewers.len() {
            for _ in 0..4 {
                let viewer = &self.viewers[index];
                let Some(cursor) = viewer.waiting.clone().filter(|_| viewer.queue.is_empty()) else { break };
                let admit = match self.state().admit(&cursor, None) {
                    Admit::NeedOlder { after } => {
                        let events = self.log[after as usize..]
                            .iter()
                            .map(|e| super::super::wire::encode(Update::Event(e.clone())));
                        let read = Older { after, events: events.take(1000).collect() };
                        if index % 2 == 0 {
                            self.state().keep_older(&read);
                        }
                        self.state().admit(&cursor, Some(&read))
                    }
                    admit => admit,
                };
                match admit {
                    Admit::Ready(updates) => {
                        let viewer = &mut self.viewers[index];
                        viewer.waiting = None;
                        viewer.queue.push_back(updates);
                    }
                    Admit::NeedSnapshot => {
                        let snapshot = self.snapshot();
                        self.state().set_snapshot(snapshot);
                    }
                    Admit::Behind => {
                        let seq = self.state().seq() as usize;
                        let mut out = Vec::new();
                        let log: Vec<_> = self.log[seq..].to_vec();
                        for event in log {
                            self.state().merge().event(event, Source::Log, &mut out);
                        }
                        self.spread(out);
                        if let Some(cursor) = &mut self.viewers[index].waiting {
                            cursor.checked = true;
                        }
                    }
                    Admit::NeedOlder { .. } => panic!("older events were given"),
                }
            }
        }
    }

    pub fn drain(&mut self, index: usize) {
        let viewer = &mut self.viewers[index];
        for batch in std::mem::take(&mut viewer.queue) {
            batch.into_iter().for_each(|update| viewer.client.receive(update, &self.log));
        }
        self.serve();
    }

    /// All is quiet: what was lost is found, and everybody has everything.
    pub fn settle(&mut self) {
        self.flight.retain(|flight| flight.copy().is_none());
        while let Some(flight) = self.flight.pop() {
            self.deliver(flight);
        }
        self.read_log(usize::MAX);
        while let Some(flight) = self.flight.pop() {
            self.deliver(flight);
        }
        self.state().merge().read_to_end();
        for round in 0.. {
            // Producers say them every second.
            self.lengths();
            for flight in std::mem::take(&mut self.flight) {
                self.deliver(flight);
            }
            let holes = self.state().merge().holes();
            if holes.is_empty() {
                break;
            }
            assert!(round < 1000, "holes that nothing fills: {holes:?}");
            for hole in holes {
                let answer = self.producer_answer(&hole, 2);
                self.deliver(Flight::Refill(hole, answer));
            }
        }
        assert!(!self.state().merge().has_gap());
        for _ in 0..4 {
            self.serve();
            (0..self.viewers.len()).for_each(|index| self.drain(index));
        }
        for viewer in &self.viewers {
            assert!(viewer.waiting.is_none(), "a viewer waits for ever: {:?}", viewer.waiting);
            assert_eq!(viewer.client.seq, self.log.len() as i64);
            assert!(viewer.client.caught_up);
            let seen: BTreeMap<_, _> =
                viewer.client.open.iter().map(|(k, (e, b))| (k.clone(), (*e, b.clone()))).collect();
            assert_eq!(seen.len(), self.live.len());
            for (target, live) in &self.live {
                let (epoch, blocks) = &seen[&id(*target)];
                assert_eq!(*epoch, live.epoch);
                for (block, text) in &live.blocks {
                    assert_eq!(blocks.get(block).map_or("", String::as_str), text);
                }
            }
        }
    }
}

impl Flight {
    /// What may be lost or come twice.
    pub fn copy(&self) -> Option<Flight> {
        match self {
            Flight::Hint(event) => Some(Flight::Hint(event.clone())),
            Flight::Delta(delta) => Some(Flight::Delta(delta.clone())),
            Flight::Length(length) => Some(Flight::Length(length.clone())),
            Flight::Log(_) | Flight::Refill(..) => None,
        }
    }
}

pub fn delta(target: u128, block: i32, kind: i32, epoch: i64, offset: i64, piece: Bytes) -> pb::Delta {
    pb::Delta {
        chat_id: CHAT.into(),
        block: Some(pb::BlockRef { target_id: id(target), block, kind }),
        epoch,
        offset,
        piece,
        ..Default::default()
    }
}
