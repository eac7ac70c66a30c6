//! What a model reads of a chat: the messages of its turn and those before it, in the order of turns, without notices.
//!
//! A stored message never changes, so that whoever read a chat before reads only what has come since. Where the messages are
//! more than one call reads, the history begins where a turn or a round begins: a tool result never comes without the
//! message that asked for it, and of a turn that is longer than what is read the person's message stays in front of its
//! newest rounds. The beginning moves in steps: a provider's cache of the prompt lives from a beginning that stays the
//! same over many turns.

use std::sync::Arc;

use reliant_types::{ChatId, boxed, limits, pb};

use crate::{
    Attempt, Result, Store,
    pages::{newest_for_model, newest_since, opening_message},
    rows::MessageRow,
};

const MESSAGES_MAX: usize = limits::HISTORY_MESSAGES_MAX as usize;
/// Read at one time: what one call reads at most, and what may be queued behind its turn.
const READ_MAX: i64 = limits::HISTORY_MESSAGES_MAX + limits::CHAT_QUEUED_TURNS_MAX + 1;
/// The content read at one time: one message more than one call reads, so that it is known that older ones do not fit.
const READ_MAX_BYTES: usize = limits::HISTORY_MAX_BYTES + LARGEST_MESSAGE_BYTES;
const LARGEST_MESSAGE_BYTES: usize = limits::MODEL_TEXT_MAX_BYTES + FRAMES_BYTES;
/// Ids and frames of a message's blocks, which its size counts as well.
const FRAMES_BYTES: usize = limits::MESSAGE_TOOL_CALLS_MAX * 256;
/// The shortest history there is: the message of a turn and its newest round. No limit on it is needed beside those on
/// what is written.
const _: () = assert!(
    limits::MESSAGE_TEXT_MAX_BYTES + limits::MODEL_TEXT_MAX_BYTES + limits::ROUND_RESULTS_MAX_BYTES + 3 * FRAMES_BYTES
        < limits::HISTORY_MAX_BYTES
);
/// Kept: a transcript that grew past it is read anew.
const KEEP_MAX: usize = 2 * READ_MAX as usize;
/// What a message costs in memory beside its content, about.
const MESSAGE_BYTES: usize = 512;
/// For the model, in front of the message of a turn of which older rounds were left out. It says no number, so that the
/// prompt begins with the same bytes while more of them are left out.
const ROUNDS_LEFT_OUT: &str = "[The first rounds behind this message were left out: they do not fit one prompt.]";

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
    /// In the order of turns.
    fn position(&self) -> (i32, i32) {
        (self.turn, self.message.ordinal)
    }

    fn begins_turn(&self) -> bool {
        self.message.role() == pb::Role::User
    }

    fn begins_round(&self) -> bool {
        self.message.role() == pb::Role::Assistant
    }
}

/// The newest messages of a chat, all of those that stand behind the first of them in the order of turns. The worker keeps
/// it between the rounds of a chat.
#[derive(Debug)]
pub struct Transcript {
    /// In the order of turns.
    messages: Vec<Kept>,
    /// The person's message of the first one's turn, where it is older than all of them.
    opening: Option<Kept>,
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
        // So much is queued behind this turn that too little was left of it.
        let read = self.run("history", async || self.transcript(attempt, turn).await).await?;
        Ok((read.newest(&read.messages), None))
    }

    async fn transcript(&self, attempt: &Attempt, turn: i32) -> Result<Transcript> {
        let rows = newest_for_model(&self.pool, attempt.chat.0, turn, READ_MAX, READ_MAX_BYTES).await?;
        // Nothing in a chat is older than its first message.
        let whole = rows.last().is_none_or(|oldest| oldest.ordinal == 1);
        // Messages become visible in their order, and those up to the claim were there before it.
        let upto = rows.iter().map(|row| row.ordinal).max().unwrap_or_default().max(attempt.last_ordinal);
        let messages: Vec<Kept> = rows.iter().rev().map(kept).collect::<Result<_>>()?;
        let opening = match messages.first() {
            Some(first) if !first.begins_turn() => {
                let row = opening_message(&self.pool, attempt.chat.0, first.turn).await?;
                row.as_ref().map(kept).transpose()?
            }
            _ => None,
        };
        Ok(Transcript { messages, opening, whole, upto })
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
        messages.sort_by_key(Kept::position);
        let (opening, upto) = (known.opening.clone(), newest.ordinal);
        Ok(Some(Transcript { messages, opening, whole: known.whole, upto }))
    }
}

fn kept(row: &MessageRow) -> Result<Kept> {
    let bytes = usize::try_from(row.bytes).unwrap_or_default();
    Ok(Kept { turn: row.turn_ordinal, bytes, message: Arc::new(row.to_pb()?) })
}

impl Transcript {
    /// Memory that it takes, about.
    pub fn bytes(&self) -> usize {
        self.opening.iter().chain(&self.messages).map(|kept| kept.bytes + MESSAGE_BYTES).sum()
    }

    /// For tests of what keeps transcripts.
    pub fn of_bytes(bytes: usize) -> Self {
        let kept = Kept { turn: 1, bytes: bytes - MESSAGE_BYTES, message: Arc::default() };
        Self { messages: vec![kept], opening: None, whole: true, upto: 1 }
    }

    /// None: older messages than the ones that are here are wanted.
    fn of_turn(&self, turn: i32) -> Option<History> {
        let end = self.messages.partition_point(|kept| kept.turn <= turn);
        let read = &self.messages[..end];
        let all_fit = read.len() <= MESSAGES_MAX && bytes_of(read) <= limits::HISTORY_MAX_BYTES;
        (self.whole || !all_fit).then(|| self.newest(read))
    }

    /// `read`: the first of our messages, up to the last one of the turn that reads.
    fn newest(&self, read: &[Kept]) -> History {
        let begin = self.beginning(read);
        let opening = self.opening_of(read, begin);
        let mut messages: Vec<_> = read[begin..].iter().map(|kept| kept.message.clone()).collect();
        if let Some(opening) = opening {
            messages.insert(0, Arc::new(with_note(&opening.message)));
        }
        History { messages, cut: begin > 0 || !self.whole }
    }

    /// Where the history of `read` begins: at the first message where all of them are read; else at a turn, or at a round,
    /// whose turn's message is then put in front. It lies in the first quarter of what would fit: the turn with
    /// the roundest number in binary, or where no turn begins there the roundest round, which stays the same while newer
    /// messages push the older ones out.
    fn beginning(&self, read: &[Kept]) -> usize {
        let mut left_bytes = bytes_of(read);
        if self.whole && read.len() <= MESSAGES_MAX && left_bytes <= limits::HISTORY_MAX_BYTES {
            return 0;
        }
        // Where a history may begin, oldest first.
        let mut boundaries = Vec::new();
        for (at, kept) in read.iter().enumerate() {
            if kept.begins_turn() || kept.begins_round() {
                boundaries.push(Boundary {
                    at,
                    turn: kept.begins_turn(),
                    messages: read.len() - at,
                    bytes: left_bytes,
                });
            }
            left_bytes -= kept.bytes;
        }
        let first = boundaries.iter().position(|boundary| {
            let opening = self.opening_of(read, boundary.at);
            boundary.messages + usize::from(opening.is_some()) <= MESSAGES_MAX
                && boundary.bytes + opening.map_or(0, |opening| opening.bytes) <= limits::HISTORY_MAX_BYTES
        });
        // Not even the newest round fits: it is read all the same, or the newest message, where there is nothing else.
        let Some(first) = first else {
            return boundaries.last().map_or(read.len().saturating_sub(1), |boundary| boundary.at);
        };
        let (messages, bytes) = (boundaries[first].messages, boundaries[first].bytes);
        let quarter = boundaries[first..]
            .iter()
            .take_while(|boundary| 4 * boundary.messages >= 3 * messages && 4 * boundary.bytes >= 3 * bytes);
        let roundest = |boundary: &&Boundary| {
            let kept = &read[boundary.at];
            let number = if boundary.turn { kept.turn } else { kept.message.iteration };
            (boundary.turn, number.trailing_zeros())
        };
        quarter.max_by_key(roundest).map_or(boundaries[first].at, |boundary| boundary.at)
    }

    /// The message of the turn in whose middle this is.
    fn opening_of<'a>(&'a self, read: &'a [Kept], at: usize) -> Option<&'a Kept> {
        let turn = read.get(at).filter(|kept| !kept.begins_turn())?.turn;
        let from = read.partition_point(|kept| kept.turn < turn);
        read.get(from).filter(|kept| kept.begins_turn()).or(self.opening.as_ref().filter(|kept| kept.turn == turn))
    }
}

/// Where a history may begin.
struct Boundary {
    at: usize,
    /// Else a round.
    turn: bool,
    /// What would be read from here on.
    messages: usize,
    bytes: usize,
}

fn bytes_of(messages: &[Kept]) -> usize {
    messages.iter().map(|kept| kept.bytes).sum()
}

/// The message of a turn whose first rounds the model does not see, and a word that it is so.
fn with_note(opening: &pb::Message) -> pb::Message {
    let mut message = opening.clone();
    let note = pb::content_block::Block::Text(pb::TextBlock { text: ROUNDS_LEFT_OUT.into() });
    message.blocks.insert(0, pb::ContentBlock { position: 0, block: Some(note) });
    message
}

#[cfg(test)]
mod tests;
