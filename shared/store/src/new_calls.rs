//! The tool calls of a model's message: checked, and written with the approvals that they wait for.

use chrono::{DateTime, Utc};
use reliant_types::{
    ApprovalId, Failure, ToolCallId,
    pb::{self, chat_event::Kind, content_block::Block},
};
use uuid::Uuid;

use crate::{
    NewAssistant, NewBlock, NewCall, Result,
    chat_tx::ChatTx,
    rows::{CallRow, calls, clean},
    settle,
};

/// What would be a mistake of the caller, and would leave rows that do not fit together.
pub(crate) fn check(new: &NewAssistant) -> Result<(), Failure> {
    let uses = new.blocks.iter().filter_map(|block| match block {
        NewBlock::ToolUse { call } => Some(*call),
        NewBlock::Text { .. } | NewBlock::Thinking { .. } => None,
    });
    let mut uses: Vec<_> = uses.collect();
    uses.sort_unstable();
    if !uses.iter().copied().eq(0..new.calls.len()) {
        return Err(Failure::field("blocks", "each call stands in exactly one block"));
    }
    if new.calls.iter().enumerate().any(|(place, call)| usize::try_from(call.index) != Ok(place)) {
        return Err(Failure::field("calls", "calls are numbered from 0, in order"));
    }
    Ok(())
}

pub(crate) fn stored_block(block: &NewBlock, calls: &[NewCall], ids: &[ToolCallId]) -> Block {
    match block {
        NewBlock::Text { text } => Block::Text(pb::TextBlock { text: text.clone() }),
        NewBlock::Thinking { text, signature } => {
            Block::Thinking(pb::ThinkingBlock { text: text.clone(), signature: signature.clone() })
        }
        NewBlock::ToolUse { call } => Block::ToolUse(pb::ToolUseBlock {
            tool_call_id: ids[*call].to_string(),
            tool: clean(&calls[*call].tool),
            input_json: clean(&calls[*call].input),
        }),
    }
}

#[derive(Default)]
struct CallColumns {
    indexes: Vec<i32>,
    provider_ids: Vec<String>,
    tools: Vec<String>,
    inputs: Vec<String>,
    read_only: Vec<bool>,
    repeatable: Vec<bool>,
    statuses: Vec<String>,
    timeouts: Vec<i64>,
    results: Vec<String>,
    codes: Vec<String>,
    approvals: Vec<Option<Uuid>>,
    ended: Vec<Option<DateTime<Utc>>>,
}

/// Writes the calls and the approvals they wait for. Where none of them will ever run, the round is complete.
pub(crate) async fn insert_calls(tx: &mut ChatTx, new: &NewAssistant, ids: &[ToolCallId]) -> Result<()> {
    let (now, chat) = (tx.now, tx.chat.clone());
    let asks = new.calls.iter().any(|call| call.needs_approval && call.refused.is_none());
    let let_through = if asks {
        sqlx::query_scalar!(
            "SELECT DISTINCT tool FROM approvals WHERE chat_id = $1 AND status = 'approved' AND scope = 'session'",
            chat.id
        )
        .fetch_all(tx.conn())
        .await?
    } else {
        Vec::new()
    };
    let mut columns = CallColumns::default();
    for call in &new.calls {
        let tool = clean(&call.tool);
        let asked = call.refused.is_none() && call.needs_approval && !let_through.contains(&tool);
        let status = match &call.refused {
            Some(_) => "failed",
            None if asked => "waiting_approval",
            None => "pending",
        };
        columns.indexes.push(call.index);
        columns.provider_ids.push(clean(&call.provider_id));
        columns.tools.push(tool);
        columns.inputs.push(clean(&call.input));
        columns.read_only.push(call.read_only);
        columns.repeatable.push(call.repeatable);
        columns.statuses.push(status.to_owned());
        columns.timeouts.push(i64::try_from(call.timeout.as_millis()).unwrap_or(i64::MAX / 1000));
        columns.results.push(call.refused.as_ref().map(|refused| clean(&refused.message)).unwrap_or_default());
        columns.codes.push(call.refused.as_ref().map_or("", |refused| refused.code.as_str()).to_owned());
        columns.approvals.push(asked.then(|| ApprovalId::new().0));
        columns.ended.push(call.refused.as_ref().map(|_| now));
    }
    let raw: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
    sqlx::query!(
        r#"WITH u AS (
               SELECT * FROM UNNEST($6::uuid[], $7::int[], $8::text[], $9::text[], $10::text[], $11::bool[], $12::bool[],
                                    $13::text[], $14::bigint[], $15::text[], $16::text[], $17::timestamptz[], $18::uuid[])
                   AS u (id, index, provider_id, tool, input, read_only, repeatable, status, timeout_ms, result, error_code,
                         ended_at, approval)
           ), k AS (
               INSERT INTO tool_calls (id, chat_id, turn_id, user_id, message_id, iteration, index, provider_id, tool, input,
                                       read_only, repeatable, status, timeout_ms, result, is_error, error_code, ended_at,
                                       created_at)
               SELECT id, $1, $2, $3, $4, $19, index, provider_id, tool, input, read_only, repeatable, status, timeout_ms,
                      result, error_code <> '', error_code, ended_at, $5
               FROM u
           )
           INSERT INTO approvals (id, chat_id, turn_id, user_id, tool_call_id, tool, status, created_at)
           SELECT approval, $1, $2, $3, id, tool, 'pending', $5 FROM u WHERE approval IS NOT NULL"#,
        chat.id,
        new.turn.0,
        chat.user_id,
        new.message.0,
        now,
        &raw,
        &columns.indexes,
        &columns.provider_ids,
        &columns.tools,
        &columns.inputs,
        &columns.read_only,
        &columns.repeatable,
        &columns.statuses,
        &columns.timeouts,
        &columns.results,
        &columns.codes,
        &columns.ended as &[Option<DateTime<Utc>>],
        &columns.approvals as &[Option<Uuid>],
        new.iteration,
    )
    .execute(tx.conn())
    .await?;
    let rows = calls!(SELECT "WHERE c.turn_id = $1 AND c.iteration = $2 ORDER BY c.index", new.turn.0, new.iteration)
        .fetch_all(tx.conn())
        .await?;
    for (row, approval) in rows.iter().zip(&columns.approvals) {
        tx.event(Kind::ToolCallChanged(row.changed()));
        if let Some(id) = approval {
            tx.approval_changed(asked(row, *id, now));
        }
    }
    settle::close_round(tx, &rows);
    Ok(())
}

fn asked(call: &CallRow, id: Uuid, now: DateTime<Utc>) -> pb::Approval {
    pb::Approval {
        id: id.to_string(),
        chat_id: call.chat_id.to_string(),
        turn_id: call.turn_id.to_string(),
        tool_call_id: call.id.to_string(),
        tool: call.tool.clone(),
        input_json: call.input.clone(),
        status: pb::ApprovalStatus::Pending as i32,
        scope: pb::ApprovalScope::Once as i32,
        created_at: Some(reliant_types::timestamp(now)),
        decided_at: None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use reliant_types::{MessageId, TurnId};

    use super::*;

    fn call(index: i32) -> NewCall {
        NewCall {
            index,
            provider_id: "p".into(),
            tool: "shell".into(),
            input: "{}".into(),
            read_only: false,
            repeatable: false,
            needs_approval: false,
            timeout: Duration::from_secs(1),
            refused: None,
        }
    }

    #[test]
    fn calls_and_blocks_belong_together() {
        let new = |blocks: Vec<NewBlock>, calls: Vec<NewCall>| NewAssistant {
            turn: TurnId::new(),
            fence: 1,
            message: MessageId::new(),
            iteration: 0,
            model: "m".into(),
            blocks,
            stop_reason: pb::StopReason::ToolUse,
            usage: pb::Usage::default(),
            calls,
        };
        let of = |call| NewBlock::ToolUse { call };
        assert!(check(&new(vec![of(1), of(0)], vec![call(0), call(1)])).is_ok());
        assert!(check(&new(vec![of(0)], vec![])).is_err());
        assert!(check(&new(vec![of(0), of(0)], vec![call(0), call(1)])).is_err());
        assert!(check(&new(vec![], vec![call(0)])).is_err());
        assert!(check(&new(vec![of(0)], vec![call(1)])).is_err());
    }
}
