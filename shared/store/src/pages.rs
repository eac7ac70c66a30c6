//! What fits one answer. Rows are counted by their bytes before their content is read, so that a page of large rows costs
//! no more memory than one of small rows; the first row of a page is there whatever its size.

use reliant_types::{limits, pb};
use uuid::Uuid;

use crate::{Result, rows::MessageRow};

/// The newest messages of `chat` that fit, newest first, between two places in the chat and of turns up to `$turn`.
macro_rules! newest_messages {
    ($order:tt, $chat:expr, $after:expr, $before:expr, $turn:expr, $notices:expr, $count:expr, $bytes:expr) => {
        sqlx::query_as!(
            crate::rows::MessageRow,
            r#"SELECT f.id, f.chat_id, f.turn_id, f.ordinal, f.role, f.iteration, f.model, f.usage, f.stop_reason,
                      f.client_message_id, f.created_at, f.turn_ordinal, f.bytes,
                      ARRAY(SELECT b.data FROM content_blocks b WHERE b.message_id = f.id ORDER BY b.position) AS blocks
               FROM (
                   SELECT m.*, row_number() OVER w AS place, sum(m.bytes) OVER w AS total
                   FROM (
                       SELECT * FROM messages
                       WHERE chat_id = $1 AND ordinal > $2 AND ordinal < $3 AND turn_ordinal <= $4
                         AND ($5 OR role <> 'notice')
                       ORDER BY "# + $order + r#" LIMIT $6
                   ) m WINDOW w AS (ORDER BY "# + $order + r#")
               ) f
               WHERE f.place = 1 OR f.total <= $7 ORDER BY f.place"#,
            $chat,
            $after,
            $before,
            $turn,
            $notices,
            $count,
            i64::try_from($bytes).unwrap_or(i64::MAX),
        )
    };
}

/// As people read a chat: in the order of arrival. `before` 0: from the newest.
pub(crate) async fn newest_for_people(
    db: impl sqlx::PgExecutor<'_>,
    chat: Uuid,
    before: i32,
    count: i64,
    bytes: usize,
) -> Result<Vec<MessageRow>> {
    let before = if before == 0 { i32::MAX } else { before };
    Ok(newest_messages!("ordinal DESC", chat, 0, before, i32::MAX, true, count, bytes).fetch_all(db).await?)
}

/// What has come behind a place in the chat.
pub(crate) async fn newest_since(
    db: impl sqlx::PgExecutor<'_>,
    chat: Uuid,
    after: i32,
    count: i64,
    bytes: usize,
) -> Result<Vec<MessageRow>> {
    Ok(newest_messages!("ordinal DESC", chat, after, i32::MAX, i32::MAX, true, count, bytes).fetch_all(db).await?)
}

/// As the model of a turn reads it: in the order of turns up to that one, and without notices.
pub(crate) async fn newest_for_model(
    db: impl sqlx::PgExecutor<'_>,
    chat: Uuid,
    turn: i32,
    count: i64,
    bytes: usize,
) -> Result<Vec<MessageRow>> {
    let order = newest_messages!("turn_ordinal DESC, ordinal DESC", chat, 0, i32::MAX, turn, false, count, bytes);
    Ok(order.fetch_all(db).await?)
}

/// The person's message of a turn.
pub(crate) async fn opening_message(
    db: impl sqlx::PgExecutor<'_>,
    chat: Uuid,
    turn: i32,
) -> Result<Option<MessageRow>> {
    let row = sqlx::query_as!(
        MessageRow,
        r#"SELECT m.id, m.chat_id, m.turn_id, m.ordinal, m.role, m.iteration, m.model, m.usage, m.stop_reason,
                  m.client_message_id, m.created_at, m.turn_ordinal, m.bytes,
                  ARRAY(SELECT b.data FROM content_blocks b WHERE b.message_id = m.id ORDER BY b.position) AS blocks
           FROM messages m WHERE m.chat_id = $1 AND m.turn_ordinal = $2 AND m.role = 'user'
           ORDER BY m.ordinal LIMIT 1"#,
        chat,
        turn,
    );
    Ok(row.fetch_optional(db).await?)
}

/// Shortens a text to its head and tail, which are what a reader of output looks at. At most `max` bytes come out.
pub(crate) fn shortened(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let note = format!("\n… {} bytes were left out here …\n", text.len() - max);
    let half = max.saturating_sub(note.len()) / 2;
    let head = &text[..text.floor_char_boundary(half)];
    let tail = &text[text.ceil_char_boundary(text.len() - half)..];
    [head, note.as_str(), tail].concat()
}

/// Makes the calls of a snapshot fit it. Arguments of calls that run or wait are never touched: a person decides by them.
pub(crate) fn fit_calls(calls: &mut [(pb::ToolCallChanged, bool)]) {
    let with_result = calls.iter().filter(|(call, _)| has_result(call)).count();
    let share = limits::SNAPSHOT_RESULTS_MAX_BYTES / with_result.max(1);
    let mut old_inputs = 0;
    for (changed, open) in calls {
        let Some(call) = &mut changed.tool_call else { continue };
        call.result = shortened(&call.result, share);
        if !*open {
            old_inputs += call.input_json.len();
            if old_inputs > limits::SNAPSHOT_OLD_INPUTS_MAX_BYTES {
                call.input_json.clear();
            }
        }
    }
}

fn has_result(changed: &pb::ToolCallChanged) -> bool {
    changed.tool_call.as_ref().is_some_and(|call| !call.result.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_keeps_its_head_and_tail() {
        assert_eq!(shortened("short", 100), "short");
        let text = format!("head{}tail", "€".repeat(1000));
        let cut = shortened(&text, 200);
        assert!(cut.len() <= 200 && cut.starts_with("head") && cut.ends_with("tail"), "{cut}");
        assert!(cut.contains("bytes were left out"));
    }

    #[test]
    fn what_a_person_decides_by_is_whole() {
        let call = |bytes: usize, result: usize| pb::ToolCallChanged {
            tool_call: Some(pb::ToolCall {
                input_json: "i".repeat(bytes),
                result: "r".repeat(result),
                ..Default::default()
            }),
            producer: String::new(),
        };
        let big = limits::SNAPSHOT_OLD_INPUTS_MAX_BYTES;
        let mut calls = vec![(call(big * 2, 0), true), (call(big, 100), false), (call(1, big * 3), false)];
        fit_calls(&mut calls);
        let sizes: Vec<_> = calls
            .iter()
            .map(|(changed, _)| changed.tool_call.as_ref().unwrap())
            .map(|call| (call.input_json.len(), call.result.len()))
            .collect();
        assert_eq!((sizes[0], sizes[1]), ((big * 2, 0), (big, 100)));
        assert_eq!(sizes[2].0, 0);
        assert!(sizes[2].1 <= limits::SNAPSHOT_RESULTS_MAX_BYTES / 2);
    }
}
