//! Writes a chat's updates to a terminal as they come. Knows what it has printed, so that committed text only adds
//! what live text lacked, and a restarted attempt says so. Of a long output the first lines are shown and the newest ones;
//! what is left out is counted, with the way to see it.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io::Write,
};

use reliant_client::{ChatView, ClientUpdate, text_of};
use reliant_types::pb;

/// Longest shown form of a call's arguments and of an output line.
const SHOWN_CHARS_MAX: usize = 400;
/// Output lines of one call that are shown as they come; of those behind them the last ones are shown at its end.
const FIRST_LINES_MAX: usize = 30;
const LAST_LINES_MAX: usize = 10;
/// A line that does not end is held so far; what comes then is counted.
const PARTIAL_MAX_BYTES: usize = 4 * SHOWN_CHARS_MAX;
const PARTIAL_WHOLE_MAX_BYTES: usize = 1024 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Plain,
    Dim,
    Bold,
    Red,
    Green,
    Yellow,
}

#[derive(Debug, Default)]
struct ToolShown {
    /// Whole lines that came.
    lines: usize,
    /// The newest of those that are not shown yet.
    last: VecDeque<String>,
    partial: Vec<u8>,
    /// Bytes of that line that are not held.
    dropped: usize,
    bytes: i64,
    status: i32,
}

/// What the caller may have to act on.
#[derive(Debug, Clone, PartialEq)]
pub enum Seen {
    Nothing,
    TurnEnded(Box<pb::Turn>),
}

pub struct Renderer<W> {
    out: W,
    colour: bool,
    /// Printed bytes of a message's block, and the epoch they belong to.
    printed: HashMap<(String, i32), (i64, i64)>,
    tools: HashMap<String, ToolShown>,
    tool_names: HashMap<String, String>,
    /// Messages that the person typed here: the terminal shows them already.
    typed: HashSet<String>,
    /// Messages up to this place in the chat were seen.
    last_ordinal: i32,
    /// Nothing is left out.
    full: bool,
    at_line_start: bool,
    in_thinking: bool,
    /// It was said that the model is asked again.
    asked_again: bool,
}

impl<W: Write> Renderer<W> {
    pub fn new(out: W, colour: bool) -> Self {
        Self {
            out,
            colour,
            printed: HashMap::new(),
            tools: HashMap::new(),
            tool_names: HashMap::new(),
            typed: HashSet::new(),
            last_ordinal: 0,
            full: false,
            at_line_start: true,
            in_thinking: false,
            asked_again: false,
        }
    }

    /// Shows arguments and outputs whole.
    pub fn full(self, full: bool) -> Self {
        Self { full, ..self }
    }

    /// The person typed this message here.
    pub fn typed(&mut self, message: Option<&pb::Message>) {
        self.typed.extend(message.map(|message| message.id.clone()));
    }

    /// Shows what was said before: these messages, and what is being written and run behind them.
    pub fn catch_up<'a>(
        &mut self,
        messages: impl IntoIterator<Item = &'a pb::Message>,
        view: &ChatView,
    ) -> std::io::Result<()> {
        for message in messages {
            self.message(message)?;
        }
        for (key, block) in view.live() {
            match block.kind {
                pb::StreamKind::Text | pb::StreamKind::Thinking => {
                    let thinking = block.kind == pb::StreamKind::Thinking;
                    self.switch(thinking)?;
                    self.write(if thinking { Style::Dim } else { Style::Plain }, &block.text())?;
                    let shown = (block.epoch, block.bytes.len() as i64);
                    self.printed.insert((key.target.clone(), key.block), shown);
                }
                pb::StreamKind::Stdout | pb::StreamKind::Stderr => self.output(&key.target, &block.bytes)?,
                _ => {}
            }
        }
        self.last_ordinal = view.messages.keys().last().copied().unwrap_or_default().max(self.last_ordinal);
        self.out.flush()
    }

    pub fn update(&mut self, update: &ClientUpdate) -> std::io::Result<Seen> {
        let seen = match update {
            ClientUpdate::Delta(delta) => {
                self.delta(delta)?;
                Seen::Nothing
            }
            ClientUpdate::Event(event) => self.event(event)?,
            ClientUpdate::Snapshot(snapshot) => {
                self.missed(snapshot)?;
                let known = self.last_ordinal;
                for message in snapshot.messages.iter().filter(|message| message.ordinal > known) {
                    self.message(message)?;
                }
                Seen::Nothing
            }
            ClientUpdate::Reconnected => {
                self.line(Style::Dim, "… reconnected")?;
                Seen::Nothing
            }
            _ => Seen::Nothing,
        };
        self.out.flush()?;
        Ok(seen)
    }

    /// A snapshot in place of events has the newest messages only.
    fn missed(&mut self, snapshot: &pb::ChatSnapshot) -> std::io::Result<()> {
        let Some(first) = snapshot.messages.first() else { return Ok(()) };
        let missed = first.ordinal - self.last_ordinal - 1;
        let chat = snapshot.chat.as_ref().map_or("", |chat| &chat.id);
        if missed > 0 { self.left_out(missed, "came meanwhile and are not shown", chat) } else { Ok(()) }
    }

    /// Says that messages are not shown, and how to see them.
    pub fn left_out(&mut self, count: i32, why: &str, chat: &str) -> std::io::Result<()> {
        let messages = if count == 1 { "1 message".to_owned() } else { format!("{count} messages") };
        self.line(Style::Dim, &format!("… {messages} {why}; `reliant chat --chat {chat} --all` shows them"))
    }

    fn event(&mut self, event: &pb::ChatEvent) -> std::io::Result<Seen> {
        use pb::chat_event::Kind;
        match &event.kind {
            Some(Kind::MessageStarted(started)) if started.restarted => {
                // Of a model that is asked again it was said already.
                if !std::mem::take(&mut self.asked_again) {
                    self.line(Style::Yellow, "… the attempt was lost; the model starts this message again")?;
                }
                self.printed.retain(|(target, _), _| *target != started.message_id);
            }
            Some(Kind::MessageCommitted(message)) => self.message(message)?,
            Some(Kind::ToolCallChanged(changed)) => {
                if let Some(call) = &changed.tool_call {
                    self.tool_call(call)?;
                }
            }
            Some(Kind::TurnChanged(turn)) => match turn.status() {
                pb::TurnStatus::Succeeded | pb::TurnStatus::Cancelled => {
                    return Ok(Seen::TurnEnded(Box::new(turn.clone())));
                }
                pb::TurnStatus::Failed => {
                    self.line(Style::Red, &format!("✗ {} ({})", turn.error_message, turn.error_code))?;
                    return Ok(Seen::TurnEnded(Box::new(turn.clone())));
                }
                pb::TurnStatus::WaitingDaemon => {
                    self.line(Style::Yellow, "… the daemon is away; the turn goes on when it is back")?;
                }
                pb::TurnStatus::Queued | pb::TurnStatus::Running
                    if !turn.waiting_for.is_empty() && turn.retry_at.is_none() =>
                {
                    self.line(Style::Yellow, &format!("… {}", turn.waiting_for))?;
                }
                pb::TurnStatus::Running if !turn.waiting_for.is_empty() => {
                    self.asked_again = true;
                    let seconds = seconds_between(event.time.as_ref(), turn.retry_at.as_ref());
                    self.line(Style::Yellow, &format!("… {}; trying again in {seconds} s", turn.waiting_for))?;
                }
                _ => {}
            },
            _ => {}
        }
        Ok(Seen::Nothing)
    }

    fn delta(&mut self, delta: &pb::Delta) -> std::io::Result<()> {
        let Some(block) = &delta.block else { return Ok(()) };
        match block.kind() {
            pb::StreamKind::Text | pb::StreamKind::Thinking => {
                let thinking = block.kind() == pb::StreamKind::Thinking;
                let key = (block.target_id.clone(), block.block);
                let (epoch, length) = self.printed.get(&key).copied().unwrap_or((delta.epoch, 0));
                if delta.epoch < epoch || delta.offset != length && delta.epoch == epoch {
                    return Ok(());
                }
                self.switch(thinking)?;
                let text = String::from_utf8_lossy(&delta.piece).into_owned();
                self.write(if thinking { Style::Dim } else { Style::Plain }, &text)?;
                self.printed.insert(key, (delta.epoch, delta.offset + delta.piece.len() as i64));
            }
            pb::StreamKind::Stdout | pb::StreamKind::Stderr => self.output(&block.target_id, &delta.piece)?,
            _ => {}
        }
        Ok(())
    }

    fn switch(&mut self, thinking: bool) -> std::io::Result<()> {
        if thinking != self.in_thinking {
            self.fresh_line()?;
            self.in_thinking = thinking;
        }
        Ok(())
    }

    fn message(&mut self, message: &pb::Message) -> std::io::Result<()> {
        self.last_ordinal = self.last_ordinal.max(message.ordinal);
        match message.role() {
            pb::Role::Notice => {
                let text = text_of(message);
                return self.line(Style::Yellow, &format!("ℹ {text}"));
            }
            pb::Role::User if self.typed.contains(&message.id) => return Ok(()),
            pb::Role::User => return self.line(Style::Bold, &format!("> {}", text_of(message))),
            pb::Role::Tool => return self.results(message),
            pb::Role::Assistant => {}
            pb::Role::Unspecified => return Ok(()),
        }
        for block in &message.blocks {
            match &block.block {
                Some(pb::content_block::Block::Text(text)) => {
                    let key = (message.id.clone(), block.position);
                    let done = self.printed.remove(&key).map_or(0, |(_, length)| length) as usize;
                    if let Some(rest) = text.text.get(done..) {
                        self.switch(false)?;
                        self.write(Style::Plain, rest)?;
                    }
                }
                Some(pb::content_block::Block::ToolUse(call)) => {
                    self.tool_names.insert(call.tool_call_id.clone(), call.tool.clone());
                    let input = self.shorten(&call.input_json, 0);
                    self.line(Style::Bold, &format!("● {} {input}", call.tool))?;
                }
                _ => {}
            }
        }
        self.fresh_line()
    }

    /// Results of calls whose end was not seen.
    fn results(&mut self, message: &pb::Message) -> std::io::Result<()> {
        for block in &message.blocks {
            let Some(pb::content_block::Block::ToolResult(result)) = &block.block else { continue };
            let shown = self.tools.entry(result.tool_call_id.clone()).or_default();
            if shown.status >= pb::ToolCallStatus::Succeeded as i32 {
                continue;
            }
            shown.status = pb::ToolCallStatus::Succeeded as i32;
            if shown.bytes == 0 {
                self.output(&result.tool_call_id, result.content.as_bytes())?;
            }
            self.end_of_output(&result.tool_call_id)?;
            let tool = self.tool_names.get(&result.tool_call_id).cloned().unwrap_or_else(|| "the call".into());
            let (style, words) =
                if result.is_error { (Style::Yellow, "✗ with an error:") } else { (Style::Green, "✓") };
            self.line(style, &format!("{words} {tool}"))?;
        }
        Ok(())
    }

    fn tool_call(&mut self, call: &pb::ToolCall) -> std::io::Result<()> {
        use pb::ToolCallStatus::{Cancelled, Failed, OutcomeUnknown, Succeeded, TimedOut};
        if !call.waiting_for.is_empty() {
            return self.line(Style::Yellow, &format!("… {} is tried again: {}", call.tool, call.waiting_for));
        }
        let before = std::mem::replace(&mut self.tools.entry(call.id.clone()).or_default().status, call.status);
        if before == call.status || !matches!(call.status(), Succeeded | Failed | Cancelled | TimedOut | OutcomeUnknown)
        {
            return Ok(());
        }
        self.end_of_output(&call.id)?;
        let shown = self.tools.get(&call.id).map_or(0, |t| t.bytes);
        if shown == 0 && !call.result.is_empty() {
            self.output(&call.id, call.result.as_bytes())?;
            self.end_of_output(&call.id)?;
        }
        let exit = call.exit_code.map_or(String::new(), |code| format!(", exit code {code}"));
        let (style, sign, word) = match call.status() {
            Succeeded if !call.is_error => (Style::Green, "✓", "done"),
            Succeeded => (Style::Yellow, "✗", "answered with an error"),
            Failed => (Style::Red, "✗", "failed"),
            Cancelled => (Style::Yellow, "✗", "cancelled"),
            TimedOut => (Style::Red, "✗", "timed out"),
            _ => return self.outcome_unknown(call),
        };
        self.line(style, &format!("{sign} {} {word}{exit}", call.tool))
    }

    /// Says it whatever was shown of the call before: its output alone would pass for all that it did.
    fn outcome_unknown(&mut self, call: &pb::ToolCall) -> std::io::Result<()> {
        self.line(Style::Red, &format!("? {} outcome unknown: {}", call.tool, cause_words(call.unknown_cause())))?;
        self.line(Style::Yellow, "  It may have run in part or in whole: look at its effects before you run it again.")
    }

    fn output(&mut self, call: &str, piece: &[u8]) -> std::io::Result<()> {
        let held_max = if self.full { PARTIAL_WHOLE_MAX_BYTES } else { PARTIAL_MAX_BYTES };
        let shown = self.tools.entry(call.to_owned()).or_default();
        shown.bytes += piece.len() as i64;
        let mut lines = Vec::new();
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            let text = part.strip_suffix(b"\n").unwrap_or(part);
            let room = held_max.saturating_sub(shown.partial.len()).min(text.len());
            shown.partial.extend_from_slice(&text[..room]);
            shown.dropped += text.len() - room;
            if part.ends_with(b"\n") {
                lines.push((std::mem::take(&mut shown.partial), std::mem::take(&mut shown.dropped)));
            }
        }
        for (line, dropped) in lines {
            self.output_line(call, &line, dropped)?;
        }
        Ok(())
    }

    fn output_line(&mut self, call: &str, line: &[u8], dropped: usize) -> std::io::Result<()> {
        let text = self.shorten(String::from_utf8_lossy(line).trim_end(), dropped);
        let full = self.full;
        let shown = self.tools.entry(call.to_owned()).or_default();
        shown.lines += 1;
        if full || shown.lines <= FIRST_LINES_MAX {
            return self.line(Style::Dim, &format!("  │ {text}"));
        }
        shown.last.push_back(text);
        if shown.last.len() > LAST_LINES_MAX {
            shown.last.pop_front();
        }
        Ok(())
    }

    fn end_of_output(&mut self, call: &str) -> std::io::Result<()> {
        let Some(shown) = self.tools.get_mut(call) else { return Ok(()) };
        let (partial, dropped) = (std::mem::take(&mut shown.partial), std::mem::take(&mut shown.dropped));
        if !partial.is_empty() {
            self.output_line(call, &partial, dropped)?;
        }
        let Some(shown) = self.tools.get_mut(call) else { return Ok(()) };
        let last = std::mem::take(&mut shown.last);
        let left_out = shown.lines.saturating_sub(FIRST_LINES_MAX + last.len());
        if left_out > 0 && !last.is_empty() {
            let lines = if left_out == 1 { "1 line was" } else { &format!("{left_out} lines were") };
            self.line(Style::Dim, &format!("  │ … {lines} left out here; `reliant chat --full` shows all …"))?;
        }
        for line in last {
            self.line(Style::Dim, &format!("  │ {line}"))?;
        }
        Ok(())
    }

    /// A line, with a count of what is left out of it: `dropped` bytes are not even here.
    fn shorten(&self, text: &str, dropped: usize) -> String {
        let longest = if self.full { usize::MAX } else { SHOWN_CHARS_MAX };
        let end = text.char_indices().nth(longest).map_or(text.len(), |(at, _)| at);
        let left_out = text.len() - end + dropped;
        if left_out == 0 {
            return text.to_owned();
        }
        format!("{}… ({left_out} more bytes)", &text[..end])
    }

    /// A line of its own, from the program and not from the model.
    pub fn notice(&mut self, text: &str) -> std::io::Result<()> {
        self.line(Style::Dim, text)?;
        self.out.flush()
    }

    fn fresh_line(&mut self) -> std::io::Result<()> {
        if !self.at_line_start {
            writeln!(self.out)?;
            self.at_line_start = true;
        }
        Ok(())
    }

    fn line(&mut self, style: Style, text: &str) -> std::io::Result<()> {
        self.fresh_line()?;
        self.write(style, text)?;
        self.fresh_line()
    }

    fn write(&mut self, style: Style, text: &str) -> std::io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let text = printable(text);
        let code = match style {
            Style::Plain => "",
            Style::Dim => "\x1b[2m",
            Style::Bold => "\x1b[1m",
            Style::Red => "\x1b[31m",
            Style::Green => "\x1b[32m",
            Style::Yellow => "\x1b[33m",
        };
        if self.colour && !code.is_empty() {
            write!(self.out, "{code}{text}\x1b[0m")?;
        } else {
            write!(self.out, "{text}")?;
        }
        self.at_line_start = text.ends_with('\n');
        Ok(())
    }
}

/// A model's or a tool's text must not steer the terminal: control characters other than newline and tab, and those that
/// reorder text, are shown as pictures.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\t' => c,
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => char::REPLACEMENT_CHARACTER,
            c if c.is_control() => char::REPLACEMENT_CHARACTER,
            c => c,
        })
        .collect()
}

fn cause_words(cause: pb::UnknownCause) -> &'static str {
    match cause {
        pb::UnknownCause::ProcessDied => "the daemon or the tool's server died while it ran",
        pb::UnknownCause::JournalLost => "it was sent, and the daemon's journal was lost afterwards",
        pb::UnknownCause::DaemonAway => "it was sent, and the daemon stayed away past the deadline",
        // Of a newer server.
        pb::UnknownCause::Unspecified => "it cannot be known whether it ran to its end",
    }
}

/// Whole seconds, both stamps by the database's clock.
fn seconds_between(from: Option<&prost_types::Timestamp>, to: Option<&prost_types::Timestamp>) -> i64 {
    let nanos = |at: &prost_types::Timestamp| i128::from(at.seconds) * 1_000_000_000 + i128::from(at.nanos);
    let between = from.zip(to).map_or(0, |(from, to)| nanos(to) - nanos(from));
    i64::try_from((between + 999_999_999) / 1_000_000_000).unwrap_or_default().max(0)
}

#[cfg(test)]
mod tests;
