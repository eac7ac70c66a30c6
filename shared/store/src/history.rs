//! What a model reads of a chat: the messages of its turn and those before it, in the order of turns, without notices.
//!
//! A stored message never changes, so that whoever read a chat before reads only what has come since. Where the messages are
//! more than one call reads, the beginning moves in steps: a provider's cache of the prompt lives from a beginning that
//! stays the same over many turns.

use std::sync::Arc;

use reliant_types::{ChatId, boxed, limits, pb};

use crate::{
    Attempt, Result, Store,
    pages::{newest_for_model, newest_since},
    rows::MessageRow,
};

/// Read at one time: what one call reads at most, and what may be queued behind its turn.
const READ_MAX: i64 = limits::HISTORY_MESSAGES_MAX + limits::CHAT_QUEUED_TURNS_MAX + 1;
/// Kept: a transcript that grew past it is read anew.
const KEEP_MAX: usize = 2 * READ_MAX as usize;
/// What a message costs in memory beside its content, about.
const MESSAGE_BYTES: usize = 512;

/// Oldest first.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    pub messages: Vec<Arc<pb::Message>>,
    /// Older messages exist that are not among them.
    pub cut: bool,
}

#[derive(Debug, Clone)]
struct Kept {
    turn: i32,
    bytes: usize,
    message: Arc<pb::Message>,
}

impl Kept {
    /// The place in the order of turns.
    fn place(&self) -> (i32, i32) {
        (self.turn, self.message.ordinal)
    }
}

/// The newest messages of a chat, all of those that stand behind the first of them in the order of turns. The worker keeps
/// it between the rounds of a chat.
#[derive(Debug)]
pub struct Transcript {
    /// In the order of turns.
    messages: Vec<Kept>,
    /// Nothing is older than the first of them.
    whole: bool,
    /// Later ones in the order of arrival are not here.
    upto: i32,
}

impl Store {
    /// `known`: what was read of this chat before, here or not at all. Given back with what has come since, where that is
    /// worth keeping.
    #[boxed]
    pub async fn history(&self, attempt: &Attempt, known: Option<Transcript>) -> Result<(History, Option<Transcript>)> {
        let (chat, turn, last) = (attempt.chat, attempt.ordinal, attempt.last_ordinal);
        // One that knows more than Postgres is of a time that Postgres has lost.
        let known = known.filter(|known| known.upto <= last && known.messages.len() < KEEP_MAX);
        let known = match known {
            Some(known) if known.upto == last => Some(known),
            Some(known) => self.run("history_since", async || self.grown(chat, &known).await).await?,
            None => None,
        };
        if let Some(known) = known
            && let Some(history) = known.of_turn(turn)
        {
            return Ok((history, Some(known)));
        }
        let read = self.run("history", async || self.transcript(attempt, i32::MAX).await).await?;
        if let Some(history) = read.of_turn(turn) {
            return Ok((history, Some(read)));
        }
        // So much is queued behind this turn that nothing was left of it.
        let read = self.run("history", async || self.transcript(attempt, turn).await).await?;
        Ok((read.newest(&read.messages), None))
    }

    async fn transcript(&self, attempt: &Attempt, turn: i32) -> Result<Transcript> {
        let rows = newest_for_model(&self.pool, attempt.chat.0, turn, READ_MAX, limits::HISTORY_MAX_BYTES).await?;
        // Nothing in a chat is older than its first message.
        let whole = rows.last().is_none_or(|oldest| oldest.ordinal == 1);
        // Messages become visible in their order, and those up to the claim were there before it.
        let upto = rows.iter().map(|row| row.ordinal).max().unwrap_or_default().max(attempt.last_ordinal);
        Ok(Transcript { messages: rows.iter().rev().map(kept).collect::<Result<_>>()?, whole, upto })
    }

    /// None: so much has come that it is read anew.
    async fn grown(&self, chat: ChatId, known: &Transcript) -> Result<Option<Transcript>> {
        let rows = newest_since(&self.pool, chat.0, known.upto, READ_MAX, limits::HISTORY_MAX_BYTES).await?;
        let (Some(newest), Some(oldest)) = (rows.first(), rows.last()) else { return Ok(None) };
        if oldest.ordinal != known.upto + 1 {
            return Ok(None);
        }
        let mut messages = known.messages.clone();
        // Notices are for people.
        for row in rows.iter().filter(|row| row.role != "notice") {
            messages.push(kept(row)?);
        }
        messages.sort_by_key(Kept::place);
        Ok(Some(Transcript { messages, whole: known.whole, upto: newest.ordinal }))
    }
}

fn kept(row: &MessageRow) -> Result<Kept> {
    let bytes = usize::try_from(row.bytes).unwrap_or_default();
    Ok(Kept { turn: row.turn_ordinal, bytes, message: Arc::new(row.to_pb()?) })
}

impl Transcript {
    /// Memory that it takes, about.
    pub fn bytes(&self) -> usize {
        self.messages.iter().map(|kept| kept.bytes + MESSAGE_BYTES).sum()
    }

    /// For tests of what keeps transcripts.
    pub fn of_bytes(bytes: usize) -> Self {
        let kept = Kept { turn: 1, bytes: bytes - MESSAGE_BYTES, message: Arc::default() };
        Self { messages: vec![kept], whole: true, upto: 1 }
    }

    /// None: older messages than the ones that are here are wanted.
    fn of_turn(&self, turn: i32) -> Option<History> {
        let end = self.messages.partition_point(|kept| kept.turn <= turn);
        let mine = &self.messages[..end];
        let all_fit = fitting(mine) == mine.len();
        (self.whole || !all_fit).then(|| self.newest(mine))
    }

    fn newest(&self, messages: &[Kept]) -> History {
        let fit = fitting(messages);
        let cut = fit < messages.len() || !self.whole;
        let mut messages = &messages[messages.len() - fit..];
        if cut {
            messages = &messages[beginning(messages)..];
        }
        History { messages: messages.iter().map(|kept| kept.message.clone()).collect(), cut }
    }
}

/// How many of the newest messages one call reads. The newest is read whatever its size.
fn fitting(messages: &[Kept]) -> usize {
    let mut bytes = 0;
    let newest = messages.iter().rev().take(limits::HISTORY_MESSAGES_MAX as usize).enumerate();
    newest
        .take_while(|(place, kept)| {
            bytes += kept.bytes;
            *place == 0 || bytes <= limits::HISTORY_MAX_BYTES
        })
        .count()
}

/// Where the older messages were left out, what is left begins with a person's message: in its first quarter that of the
/// turn with the roundest number in binary, which stays the same while newer messages push the older ones out.
fn beginning(messages: &[Kept]) -> usize {
    let persons = || messages.iter().enumerate().filter(|(_, kept)| kept.message.role() == pb::Role::User);
    let quarter = persons().take_while(|(place, _)| *place <= messages.len() / 4);
    let roundest = quarter.max_by_key(|(_, kept)| kept.turn.trailing_zeros());
    roundest.or_else(|| persons().next()).map_or(0, |(place, _)| place)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `turns` turns of a question and an answer, all of `bytes`.
    fn transcript(turns: i32, bytes: usize) -> Transcript {
        let message = |turn: i32, place: i32| {
            let role = if place == 0 { pb::Role::User } else { pb::Role::Assistant };
            let message = pb::Message { ordinal: 2 * turn - 1 + place, role: role as i32, ..Default::default() };
            Kept { turn, bytes, message: Arc::new(message) }
        };
        let messages = (1..=turns).flat_map(|turn| [message(turn, 0), message(turn, 1)]).collect();
        Transcript { messages, whole: true, upto: 2 * turns }
    }

    fn first(history: &History) -> i32 {
        history.messages[0].ordinal
    }

    #[test]
    fn a_short_chat_is_read_whole() {
        let history = transcript(10, 10).of_turn(7).unwrap();
        assert_eq!((history.messages.len(), history.cut), (14, false));
        assert_eq!(transcript(0, 0).of_turn(1), Some(History::default()));
    }

    #[test]
    fn the_beginning_of_a_long_chat_stays_for_many_turns() {
        let max = limits::HISTORY_MESSAGES_MAX as usize;
        for bytes in [10, limits::HISTORY_MAX_BYTES / 200] {
            let (mut before, mut moves, mut least) = (1, 0, usize::MAX);
            let all = transcript(3000, bytes);
            for turn in 1..=3000 {
                let history = all.of_turn(turn).unwrap();
                let total: usize = history.messages.len() * bytes;
                assert!(history.messages.len() <= max && total <= limits::HISTORY_MAX_BYTES);
                assert_eq!(history.messages[0].role(), pb::Role::User);
                if history.cut {
                    least = least.min(history.messages.len());
                }
                assert!(first(&history) >= before, "it never goes back");
                moves += i32::from(first(&history) != before);
                before = first(&history);
            }
            let window = max.min(200);
            assert!(least >= window * 3 / 4 - 1, "{least}");
            // A message or two a turn pushed out one by one would be some 2,900 moves.
            assert!(moves < 3000 / (window as i32 / 16), "{moves} moves of {bytes} bytes each");
        }
    }

    #[test]
    fn one_giant_is_read_alone_and_a_turn_without_room_from_its_middle() {
        let mut all = transcript(3, 10);
        all.messages[5].bytes = 2 * limits::HISTORY_MAX_BYTES;
        let history = all.of_turn(3).unwrap();
        assert_eq!((first(&history), history.messages.len(), history.cut), (6, 1, true));
    }

    #[test]
    fn what_is_not_known_is_asked_for() {
        let mut part = transcript(100, 10);
        part.whole = false;
        assert_eq!(part.of_turn(100), None);
        let mut enough = transcript(600, 10);
        enough.whole = false;
        assert!(enough.of_turn(600).is_some());
        assert_eq!(enough.of_turn(400), None, "too little is left before that turn");
    }
}
