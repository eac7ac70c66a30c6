//! Writes a chat's updates to a terminal as they come. Knows what it has printed, so that committed text only adds
//! what live text lacked, and a restarted attempt says so.

use std::{collections::HashMap, io::Write};

use reliant_client::{ClientUpdate, text_of};
use reliant_types::pb;

/// Longest shown form of a call's arguments and of an output line.
const SHOWN_CHARS_MAX: usize = 400;
/// Output lines shown of one call; the rest is counted.
const SHOWN_OUTPUT_LINES_MAX: usize = 40;

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
    lines: usize,
    partial: Vec<u8>,
    bytes: i64,
    status: i32,
}

/// What the caller may have to act on.
#[derive(Debug, Clone, PartialEq)]
pub enum Seen {
    Nothing,
    ApprovalAsked(pb::Approval),
    TurnEnded(pb::Turn),
}

pub struct Renderer<W> {
    out: W,
    colour: bool,
    /// Printed bytes of a message's block, and the epoch they belong to.
    printed: HashMap<(String, i32), (i64, i64)>,
    tools: HashMap<String, ToolShown>,
    tool_names: HashMap<String, String>,
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
            at_line_start: true,
            in_thinking: false,
            asked_again: false,
        }
    }

    pub fn update(&mut self, update: &ClientUpdate) -> std::io::Result<Seen> {
        let seen = match update {
            ClientUpdate::Delta(delta) => {
                self.delta(delta)?;
                Seen::Nothing
            }
            ClientUpdate::Event(event) => self.event(event)?,
            ClientUpdate::Snapshot(snapshot) => {
                for message in &snapshot.messages {
                    self.message(message)?;
                }
                let pending = snapshot.approvals.iter().find(|a| a.status() == pb::ApprovalStatus::Pending);
                pending.map_or(Seen::Nothing, |approval| Seen::ApprovalAsked(approval.clone()))
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
            Some(Kind::ApprovalChanged(approval)) if approval.status() == pb::ApprovalStatus::Pending => {
                return Ok(Seen::ApprovalAsked(approval.clone()));
            }
            Some(Kind::TurnChanged(turn)) => match turn.status() {
                pb::TurnStatus::Succeeded | pb::TurnStatus::Cancelled => return Ok(Seen::TurnEnded(turn.clone())),
                pb::TurnStatus::Failed => {
                    self.line(Style::Red, &format!("✗ {} ({})", turn.error_message, turn.error_code))?;
                    return Ok(Seen::TurnEnded(turn.clone()));
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
        match message.role() {
            pb::Role::Notice => {
                let text = text_of(message);
                return self.line(Style::Yellow, &format!("ℹ {text}"));
            }
            pb::Role::Assistant => {}
            _ => return Ok(()),
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
                    self.line(Style::Bold, &format!("● {} {}", call.tool, shorten(&call.input_json)))?;
                }
                _ => {}
            }
        }
        self.fresh_line()
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
        let shown = self.tools.entry(call.to_owned()).or_default();
        shown.bytes += piece.len() as i64;
        shown.partial.extend_from_slice(piece);
        let mut lines = Vec::new();
        while let Some(end) = shown.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = shown.partial.drain(..=end).collect();
            shown.lines += 1;
            if shown.lines <= SHOWN_OUTPUT_LINES_MAX {
                lines.push(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
        }
        // A line without an end must not grow for ever.
        if shown.partial.len() > 4 * SHOWN_CHARS_MAX {
            shown.partial.truncate(SHOWN_CHARS_MAX);
        }
        for line in lines {
            self.line(Style::Dim, &format!("  │ {}", shorten(&line)))?;
        }
        Ok(())
    }

    fn end_of_output(&mut self, call: &str) -> std::io::Result<()> {
        let Some(shown) = self.tools.get_mut(call) else { return Ok(()) };
        let partial = String::from_utf8_lossy(&std::mem::take(&mut shown.partial)).into_owned();
        let hidden = shown.lines.saturating_sub(SHOWN_OUTPUT_LINES_MAX);
        if !partial.is_empty() && hidden == 0 {
            self.line(Style::Dim, &format!("  │ {}", shorten(&partial)))?;
        }
        if hidden > 0 {
            self.line(Style::Dim, &format!("  │ … {hidden} more lines"))?;
        }
        Ok(())
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

/// A model's or a tool's text must not steer the terminal: control characters other than newline and tab are shown as
/// pictures.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\t' => c,
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

fn shorten(text: &str) -> String {
    let mut short: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(offset: i64, epoch: i64, piece: &str) -> ClientUpdate {
        let block = pb::BlockRef { target_id: "m".into(), block: 0, kind: pb::StreamKind::Text as i32 };
        let delta = pb::Delta {
            block: Some(block),
            epoch,
            offset,
            piece: piece.as_bytes().to_vec().into(),
            ..Default::default()
        };
        ClientUpdate::Delta(delta)
    }

    fn committed(text: &str) -> ClientUpdate {
        let block = pb::content_block::Block::Text(pb::TextBlock { text: text.into() });
        let message = pb::Message {
            id: "m".into(),
            role: pb::Role::Assistant as i32,
            blocks: vec![pb::ContentBlock { position: 0, block: Some(block) }],
            ..Default::default()
        };
        let kind = pb::chat_event::Kind::MessageCommitted(message);
        ClientUpdate::Event(pb::ChatEvent { kind: Some(kind), ..Default::default() })
    }

    fn shown(updates: &[ClientUpdate]) -> String {
        let mut out = Vec::new();
        let mut renderer = Renderer::new(&mut out, false);
        for update in updates {
            renderer.update(update).expect("a vector takes all");
        }
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn live_text_and_its_commit_show_the_text_once() {
        assert_eq!(shown(&[delta(0, 1, "Hel"), delta(3, 1, "lo"), committed("Hello, you")]), "Hello, you\n");
        assert_eq!(shown(&[committed("Hello")]), "Hello\n");
    }

    #[test]
    fn a_model_that_is_asked_again_is_told_once() {
        let stamp = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let event =
            |kind| ClientUpdate::Event(pb::ChatEvent { kind: Some(kind), time: stamp(100), ..Default::default() });
        let turn = pb::Turn {
            status: pb::TurnStatus::Running as i32,
            waiting_for: "the model provider is overloaded or failing (status 529)".into(),
            retry_at: stamp(112),
            ..Default::default()
        };
        let waits = event(pb::chat_event::Kind::TurnChanged(turn));
        let again = pb::MessageStarted { message_id: "m".into(), restarted: true, ..Default::default() };
        let again = event(pb::chat_event::Kind::MessageStarted(again));
        let text = "… the model provider is overloaded or failing (status 529); trying again in 12 s\n";
        assert_eq!(shown(&[waits, again.clone()]), text);
        assert!(shown(&[again]).contains("the attempt was lost"));
    }

    /// What is shown of a call that printed `output` and whose outcome then could not be known.
    fn unknown_after(output: &str, cause: pb::UnknownCause) -> String {
        let call = pb::ToolCall {
            id: "m".into(),
            tool: "shell".into(),
            status: pb::ToolCallStatus::OutcomeUnknown as i32,
            unknown_cause: cause as i32,
            ..Default::default()
        };
        let block = pb::BlockRef { target_id: "m".into(), block: 0, kind: pb::StreamKind::Stdout as i32 };
        let piece = output.as_bytes().to_vec().into();
        let output = ClientUpdate::Delta(pb::Delta { block: Some(block), piece, ..Default::default() });
        let changed = pb::ToolCallChanged { tool_call: Some(call), ..Default::default() };
        let kind = Some(pb::chat_event::Kind::ToolCallChanged(changed));
        shown(&[output, ClientUpdate::Event(pb::ChatEvent { kind, ..Default::default() })])
    }

    fn check_unknown(cause: pb::UnknownCause, words: &str) {
        let advice = "look at its effects before you run it again.\n";
        for output in ["", "half of it\n"] {
            let shown = unknown_after(output, cause);
            assert!(shown.contains(&format!("? shell outcome unknown: {words}\n")), "{cause:?}: {shown}");
            assert!(shown.ends_with(advice) && shown.contains(output.trim()), "{cause:?}: {shown}");
        }
    }

    #[test]
    fn a_process_that_died_is_told_as_the_cause() {
        check_unknown(pb::UnknownCause::ProcessDied, "the daemon or the tool's server died while it ran");
    }

    #[test]
    fn a_lost_journal_is_told_as_the_cause() {
        check_unknown(pb::UnknownCause::JournalLost, "it was sent, and the daemon's journal was lost afterwards");
    }

    #[test]
    fn a_daemon_that_stayed_away_is_told_as_the_cause() {
        check_unknown(pb::UnknownCause::DaemonAway, "it was sent, and the daemon stayed away past the deadline");
    }

    #[test]
    fn a_cause_that_is_not_known_here_is_not_guessed() {
        check_unknown(pb::UnknownCause::Unspecified, "it cannot be known whether it ran to its end");
    }

    #[test]
    fn repeated_and_outdated_pieces_are_left_out() {
        assert_eq!(shown(&[delta(0, 2, "a"), delta(0, 2, "a"), delta(1, 1, "old"), delta(1, 2, "b")]), "ab");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert!(!shown(&[delta(0, 1, "\x1b[2J")]).contains('\x1b'));
    }
}
