//! The viewer of the property test: it believes nothing.

use std::collections::HashMap;

use bytes::Bytes;
use prost::Message as _;
use reliant_types::pb::{self, chat_event::Kind, subscribe_response::Update};

/// A strict client: any hole, repetition or piece out of place is a failure.
#[derive(Default)]
pub struct Client {
    pub seq: i64,
    pub open: HashMap<String, (i64, HashMap<i32, String>)>,
    pub caught_up: bool,
}

impl Client {
    pub fn receive(&mut self, update: Bytes, log: &[pb::ChatEvent]) {
        match pb::SubscribeResponse::decode(update).unwrap().update.unwrap() {
            Update::Snapshot(snapshot) => {
                self.seq = snapshot.seq;
                self.open.clear();
                for started in snapshot.started {
                    self.open.insert(started.message_id, (started.epoch, HashMap::new()));
                }
                for call in snapshot.tool_calls.into_iter().filter_map(|changed| changed.tool_call) {
                    self.open.insert(call.id, (call.generation, HashMap::new()));
                }
            }
            Update::Event(event) => {
                assert_eq!(event.seq, self.seq + 1, "an event is missing or repeated");
                assert_eq!(event, log[self.seq as usize]);
                self.seq = event.seq;
                self.apply(event, log);
            }
            Update::Delta(delta) => {
                let block = delta.block.unwrap();
                let (epoch, blocks) = self.open.get_mut(&block.target_id).expect("a piece of nothing that is open");
                assert_eq!(delta.epoch, *epoch, "a piece of another epoch");
                let text = blocks.entry(block.block).or_default();
                assert_eq!(delta.offset, text.len() as i64, "a hole or a repetition");
                text.push_str(std::str::from_utf8(&delta.piece).unwrap());
            }
            Update::CaughtUp(caught_up) => {
                assert!(!std::mem::replace(&mut self.caught_up, true), "said twice");
                assert_eq!(caught_up.seq, self.seq);
            }
            other => panic!("{other:?}"),
        }
    }

    pub fn apply(&mut self, event: pb::ChatEvent, log: &[pb::ChatEvent]) {
        match event.kind.unwrap() {
            Kind::MessageStarted(started) => {
                self.close_turn(&started.turn_id, log);
                self.open.insert(started.message_id, (started.epoch, HashMap::new()));
            }
            Kind::MessageCommitted(message) => self.close_turn(&message.turn_id, log),
            Kind::TurnChanged(turn) => self.close_turn(&turn.id, log),
            Kind::ToolCallChanged(changed) => {
                let call = changed.tool_call.unwrap();
                if call.status == pb::ToolCallStatus::Succeeded as i32 {
                    self.open.remove(&call.id);
                } else if self.open.get(&call.id).is_none_or(|(epoch, _)| *epoch != call.generation) {
                    self.open.insert(call.id, (call.generation, HashMap::new()));
                }
            }
            _ => {}
        }
    }

    fn close_turn(&mut self, turn: &str, log: &[pb::ChatEvent]) {
        for event in log {
            if let Some(Kind::MessageStarted(started)) = &event.kind
                && started.turn_id == turn
            {
                self.open.remove(&started.message_id);
            }
        }
    }
}
