//! How a chat's events are stored: without what other rows hold and what never changes there. A message, the arguments of a
//! call and the result of one that has ended would else be stored once for each state of their turn.
//!
//! Invariant: what is read is what was published. Events of before hold all of it themselves and name no row.

use prost::Message as _;
use reliant_types::pb::{self, chat_event::Kind, feed_event::Kind as FeedKind};
use uuid::Uuid;

use crate::{Result, StoreError, rows::MessageRow};

/// The payload, and the message or the call that has the rest.
pub(crate) fn stored(event: &pb::ChatEvent) -> (Vec<u8>, Option<Uuid>) {
    let (kind, row) = match &event.kind {
        Some(Kind::MessageCommitted(message)) => {
            (Kind::MessageCommitted(pb::Message::default()), Uuid::parse_str(&message.id).ok())
        }
        Some(Kind::ToolCallChanged(changed)) => {
            let mut changed = changed.clone();
            let row = changed.tool_call.as_mut().and_then(without_content);
            (Kind::ToolCallChanged(changed), row)
        }
        Some(Kind::ApprovalChanged(approval)) => {
            let approval = pb::Approval { input_json: String::new(), ..approval.clone() };
            let row = Uuid::parse_str(&approval.tool_call_id).ok();
            (Kind::ApprovalChanged(approval), row)
        }
        _ => return (event.encode_to_vec(), None),
    };
    match row {
        // The log knows its chat.
        Some(row) => {
            let event = pb::ChatEvent { chat_id: String::new(), time: event.time, kind: Some(kind), seq: 0 };
            (event.encode_to_vec(), Some(row))
        }
        None => (event.encode_to_vec(), None),
    }
}

/// As [`stored`], of the owner's feed, which has approvals.
pub(crate) fn stored_feed(event: &pb::FeedEvent) -> (Vec<u8>, Option<Uuid>) {
    let Some(FeedKind::ApprovalChanged(approval)) = &event.kind else { return (event.encode_to_vec(), None) };
    let Ok(row) = Uuid::parse_str(&approval.tool_call_id) else { return (event.encode_to_vec(), None) };
    let approval = pb::Approval { input_json: String::new(), ..approval.clone() };
    (
        pb::FeedEvent { seq: event.seq, time: event.time, kind: Some(FeedKind::ApprovalChanged(approval)) }
            .encode_to_vec(),
        Some(row),
    )
}

fn without_content(call: &mut pb::ToolCall) -> Option<Uuid> {
    for text in [&mut call.input_json, &mut call.result, &mut call.chat_id] {
        text.clear();
    }
    let row = Uuid::parse_str(&call.id).ok()?;
    call.id.clear();
    Some(row)
}

/// What the rows that an event names hold.
pub(crate) struct Rest {
    pub row: Option<Uuid>,
    pub message: Option<MessageRow>,
    /// Of a call: its arguments and its result.
    pub call: Option<(String, String)>,
}

pub(crate) fn whole(chat: Uuid, seq: i64, payload: &[u8], rest: Rest) -> Result<pb::ChatEvent> {
    let event = pb::ChatEvent::decode(payload).map_err(|_| StoreError::Corrupt("an event"))?;
    let mut event = pb::ChatEvent { seq, ..event };
    let Some(row) = rest.row else { return Ok(event) };
    let gone = || StoreError::Corrupt("an event without its row");
    event.chat_id = chat.to_string();
    match &mut event.kind {
        Some(Kind::MessageCommitted(message)) => *message = rest.message.ok_or_else(gone)?.to_pb()?,
        Some(Kind::ToolCallChanged(changed)) => {
            let (input, result) = rest.call.ok_or_else(gone)?;
            if let Some(call) = &mut changed.tool_call {
                (call.id, call.chat_id, call.input_json) = (row.to_string(), chat.to_string(), input);
                if call.ended_at.is_some() {
                    call.result = result;
                }
            }
        }
        Some(Kind::ApprovalChanged(approval)) => approval.input_json = rest.call.ok_or_else(gone)?.0,
        _ => {}
    }
    Ok(event)
}

/// `input`: where the event names a call, the call's arguments.
pub(crate) fn whole_feed(seq: i64, payload: &[u8], input: Option<Option<String>>) -> Result<pb::FeedEvent> {
    let event = pb::FeedEvent::decode(payload).map_err(|_| StoreError::Corrupt("a feed event"))?;
    let mut event = pb::FeedEvent { seq, ..event };
    if let (Some(input), Some(FeedKind::ApprovalChanged(approval))) = (input, &mut event.kind) {
        approval.input_json = input.ok_or(StoreError::Corrupt("an event without its row"))?;
    }
    Ok(event)
}
