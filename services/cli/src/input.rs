//! What a person types, or a pipe delivers, as messages and answers. Lines of a terminal are read as they come, so that
//! an answer to a question can be told from what was typed before the question was on the screen.

use std::{
    collections::VecDeque,
    io::{IsTerminal as _, Read as _, Write as _},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use reliant_types::limits::MESSAGE_TEXT_MAX_BYTES;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    termios::{QueueSelector, tcflush},
};
use tokio::sync::{Mutex, Notify};

/// A terminal hands over no more of one line; what follows is lost in the kernel.
const LINE_MAX_BYTES: usize = 4095;
const READ_BYTES: usize = 64 * 1024;
/// Entries that wait to be taken; beyond them the terminal holds what is typed.
const ENTRIES_MAX: usize = 256;
const FULL_WAIT: Duration = Duration::from_millis(20);
const PASTE_BEGIN: &[u8] = b"\x1b[200~";
const PASTE_END: &[u8] = b"\x1b[201~";
/// Asks the terminal to mark what is pasted.
const MARK_PASTES: &str = "\x1b[?2004h";
const MARK_NO_PASTES: &str = "\x1b[?2004l";
const TOO_LONG: &str =
    "a line of a terminal holds 4,095 bytes and the rest was lost, so nothing was sent; use `… | reliant chat`";
const NOT_UTF8: &str = "the line is not UTF-8, so nothing was sent; check the terminal's locale or convert the text";
const NO_LONGER_READ: &str = "the terminal could not be read any longer";

/// One entry: a line, or several where they were pasted as one.
#[derive(Debug, PartialEq)]
pub enum Typed {
    Text(String),
    /// It cannot be used, and why.
    Refused(&'static str),
}

/// Makes entries of a terminal's bytes.
#[derive(Default)]
struct Lines {
    line: Vec<u8>,
    entry: Vec<u8>,
    pasting: bool,
    too_long: bool,
}

impl Lines {
    fn feed(&mut self, bytes: &[u8]) -> Vec<Typed> {
        let mut entries = Vec::new();
        for byte in bytes {
            if *byte != b'\n' {
                self.line.push(*byte);
                continue;
            }
            let line = std::mem::take(&mut self.line);
            self.too_long |= line.len() >= LINE_MAX_BYTES;
            self.unmark(&line);
            if self.pasting {
                self.entry.push(b'\n');
            } else {
                entries.push(self.finish());
            }
        }
        entries
    }

    /// The last entry, which no newline ends.
    fn end(&mut self) -> Option<Typed> {
        let line = std::mem::take(&mut self.line);
        self.unmark(&line);
        (!self.entry.is_empty()).then(|| self.finish())
    }

    fn finish(&mut self) -> Typed {
        let entry = std::mem::take(&mut self.entry);
        self.pasting = false;
        if std::mem::take(&mut self.too_long) {
            return Typed::Refused(TOO_LONG);
        }
        String::from_utf8(entry).map_or(Typed::Refused(NOT_UTF8), Typed::Text)
    }

    /// Adds a line to the entry without the terminal's marks.
    fn unmark(&mut self, mut line: &[u8]) {
        while let Some(first) = line.first() {
            if let Some(rest) = line.strip_prefix(PASTE_BEGIN) {
                (self.pasting, line) = (true, rest);
            } else if let Some(rest) = line.strip_prefix(PASTE_END) {
                (self.pasting, line) = (false, rest);
            } else {
                self.entry.push(*first);
                line = &line[1..];
            }
        }
    }
}

/// What was read and not taken yet.
#[derive(Default)]
struct Waiting {
    lines: Lines,
    entries: VecDeque<Typed>,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    /// Held while bytes are taken from the terminal, so that [`Input::discard`] sees either none of them or their entries.
    waiting: Mutex<Waiting>,
    changed: Notify,
}

/// The terminal's entries as they come. Dropping it gives the terminal back.
pub struct Input {
    shared: Arc<Shared>,
    terminal: bool,
}

impl Input {
    /// Reads a terminal. Anything else has no entries: there is nobody to answer.
    pub fn new() -> Result<Self> {
        let terminal = std::io::stdin().is_terminal();
        let waiting = Mutex::new(Waiting { ended: !terminal, ..Waiting::default() });
        let shared = Arc::new(Shared { waiting, changed: Notify::new() });
        if terminal {
            let read = Arc::clone(&shared);
            let reader = std::thread::Builder::new().name("terminal".into());
            reader.spawn(move || read_terminal(&read)).context("no thread could be started")?;
            mark_pastes(MARK_PASTES);
        }
        Ok(Self { shared, terminal })
    }

    /// The next entry; `None`: there are no more.
    pub async fn next(&mut self) -> Option<Typed> {
        loop {
            let mut waiting = self.shared.waiting.lock().await;
            if let Some(typed) = waiting.entries.pop_front() {
                return Some(typed);
            }
            if waiting.ended {
                return None;
            }
            drop(waiting);
            self.shared.changed.notified().await;
        }
    }

    /// Forgets all that was typed until now; true: there was something.
    pub async fn discard(&mut self) -> bool {
        let mut waiting = self.shared.waiting.lock().await;
        let lines = std::mem::take(&mut waiting.lines);
        if self.terminal {
            // A terminal that cannot be flushed is one that hung up; its end is found by the reader.
            let _ = tcflush(std::io::stdin(), QueueSelector::IFlush);
        }
        let found = !waiting.entries.is_empty() || !lines.line.is_empty() || !lines.entry.is_empty();
        waiting.entries.clear();
        found
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        if self.terminal {
            mark_pastes(MARK_NO_PASTES);
        }
    }
}

fn mark_pastes(sequence: &str) {
    let mut terminal = std::io::stderr();
    if terminal.is_terminal() {
        // Without marks a paste of many lines is many messages, as before.
        let _ = terminal.write_all(sequence.as_bytes()).and_then(|()| terminal.flush());
    }
}

fn read_terminal(shared: &Shared) {
    let mut bytes = vec![0; READ_BYTES];
    loop {
        if !readable(None) {
            continue;
        }
        let mut waiting = shared.waiting.blocking_lock();
        if waiting.entries.len() >= ENTRIES_MAX {
            drop(waiting);
            std::thread::park_timeout(FULL_WAIT);
            continue;
        }
        // What was there may have been flushed meanwhile; a read would then wait with the lock held.
        if !readable(Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            continue;
        }
        let typed = match rustix::io::read(std::io::stdin(), &mut bytes[..]) {
            Err(rustix::io::Errno::INTR) => continue,
            Ok(count) if count > 0 => waiting.lines.feed(&bytes[..count]),
            ended => {
                waiting.ended = true;
                if ended.is_ok() {
                    waiting.lines.end().into_iter().collect()
                } else {
                    vec![Typed::Refused(NO_LONGER_READ)]
                }
            }
        };
        waiting.entries.extend(typed);
        shared.changed.notify_one();
        if waiting.ended {
            return;
        }
    }
}

fn readable(patience: Option<&Timespec>) -> bool {
    let stdin = std::io::stdin();
    let mut watched = [PollFd::new(&stdin, PollFlags::IN)];
    match poll(&mut watched, patience) {
        Ok(ready) => ready > 0,
        // The read says what is wrong.
        Err(error) => error != rustix::io::Errno::INTR,
    }
}

/// All of a pipe or a file as one text; `None` for a terminal.
pub fn piped() -> Result<Option<String>> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    stdin.lock().take(MESSAGE_TEXT_MAX_BYTES as u64 + 1).read_to_end(&mut bytes).context("the input cannot be read")?;
    if bytes.len() > MESSAGE_TEXT_MAX_BYTES {
        bail!("the input is longer than {MESSAGE_TEXT_MAX_BYTES} bytes, which is the most of one message; shorten it");
    }
    let text = String::from_utf8(bytes).context("the input is not UTF-8, so nothing was sent; convert it first")?;
    Ok(Some(text))
}

/// A message of what was given as arguments and what came through a pipe.
pub fn message(arguments: &[String], piped: Option<String>) -> String {
    let piped = piped.unwrap_or_default();
    let parts = [arguments.join(" "), piped.trim_end_matches('\n').to_owned()];
    parts.into_iter().filter(|part| !part.trim().is_empty()).collect::<Vec<_>>().join("\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Typed {
        Typed::Text(text.into())
    }

    #[test]
    fn a_marked_paste_is_one_entry_without_its_marks() {
        let mut lines = Lines::default();
        assert_eq!(lines.feed(b"plain\nsee \x1b[200~line A\nline B\n"), [text("plain")]);
        assert_eq!(
            lines.feed(b"line C\x1b[201~ please\nnext\n"),
            [text("see line A\nline B\nline C please"), text("next")]
        );
        assert_eq!(lines.feed(b"last"), []);
        assert_eq!(lines.end(), Some(text("last")));
        assert_eq!(lines.end(), None);
    }

    #[test]
    fn a_line_that_is_cut_or_no_text_is_refused_and_the_next_one_is_not() {
        let mut lines = Lines::default();
        let cut = [vec![b'x'; LINE_MAX_BYTES], b"\nok\n".to_vec()].concat();
        assert_eq!(lines.feed(&cut), [Typed::Refused(TOO_LONG), text("ok")]);
        assert_eq!(lines.feed(b"\xff\xfe\nok\n"), [Typed::Refused(NOT_UTF8), text("ok")]);
    }

    #[test]
    fn a_pipe_is_one_message_and_comes_after_the_arguments() {
        assert_eq!(message(&[], Some("a\nb\n".into())), "a\nb");
        assert_eq!(message(&["review".into(), "this".into()], Some("a\nb".into())), "review this\n\na\nb");
        assert_eq!(message(&["review".into()], Some(String::new())), "review");
        assert_eq!(message(&[], None), "");
    }

    #[tokio::test]
    async fn what_was_typed_before_a_question_is_forgotten() {
        let shared = Arc::new(Shared::default());
        let mut input = Input { shared: Arc::clone(&shared), terminal: false };
        let read = async |bytes: &[u8]| {
            let mut waiting = shared.waiting.lock().await;
            let typed = waiting.lines.feed(bytes);
            waiting.entries.extend(typed);
        };
        read(b"y\nhalf a li").await;
        assert!(input.discard().await);
        read(b"n\n").await;
        assert_eq!(input.next().await, Some(text("n")));
        assert!(!input.discard().await);
    }
}
