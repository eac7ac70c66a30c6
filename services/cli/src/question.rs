//! The question whether a call may run. It shows the call so that nothing of it is hidden, and takes only an answer that
//! was typed after the question was on the screen.

use std::io::Write;

use anyhow::{Context as _, Result};
use reliant_types::{pb, visible};
use tokio::signal;

use crate::{
    input::{Input, Typed},
    render::Renderer,
};

/// A narrow terminal shows such a row in two.
const ROW_CHARS: usize = 100;
/// Rows of a call's arguments that fit a screen together with the question.
const ROWS_MAX: usize = 15;
const PROMPT: &str = "  [y] once   [a] always in this chat   [n] no  > ";

#[derive(Debug, PartialEq)]
pub enum Answer {
    Decided {
        approve: bool,
        scope: pb::ApprovalScope,
    },
    /// Ctrl-C: the person wants the turn to end.
    Interrupted,
}

enum Word {
    Answer(Answer),
    ShowAll,
    Other,
}

pub async fn ask<W: Write>(renderer: &mut Renderer<W>, input: &mut Input, approval: &pb::Approval) -> Result<Answer> {
    let (rows, _) = bounded(&approval.input_json, ROW_CHARS, ROWS_MAX);
    show(renderer, approval, &rows)?;
    loop {
        if input.discard().await {
            renderer.notice("  (what was typed before the question was discarded)")?;
        }
        eprint!("{PROMPT}");
        std::io::stderr().flush()?;
        let typed = tokio::select! {
            typed = input.next() => typed,
            pressed = signal::ctrl_c() => {
                pressed.context("could not listen for Ctrl-C")?;
                eprintln!();
                return Ok(Answer::Interrupted);
            }
        };
        match typed {
            None => {
                renderer.notice("  denied: the input has ended, so nobody can answer")?;
                return Ok(denied());
            }
            Some(Typed::Refused(why)) => renderer.notice(&format!("  {why}"))?,
            Some(Typed::Text(text)) => match word(&text) {
                Word::Answer(answer) => return Ok(answer),
                Word::ShowAll => show(renderer, approval, &bounded(&approval.input_json, ROW_CHARS, usize::MAX).0)?,
                Word::Other => renderer.notice("  please answer y, a or n; v shows the whole call")?,
            },
        }
    }
}

fn show<W: Write>(renderer: &mut Renderer<W>, approval: &pb::Approval, rows: &[String]) -> Result<()> {
    renderer.notice(&format!("The agent wants to run {}:", visible(&approval.tool).replace('\n', "⏎")))?;
    for row in rows {
        renderer.notice(&format!("  │ {row}"))?;
    }
    Ok(())
}

fn word(text: &str) -> Word {
    let approved = |scope| Word::Answer(Answer::Decided { approve: true, scope });
    match text.trim() {
        "y" | "yes" => approved(pb::ApprovalScope::Once),
        "a" | "always" => approved(pb::ApprovalScope::Session),
        "n" | "no" => Word::Answer(denied()),
        "v" => Word::ShowAll,
        _ => Word::Other,
    }
}

fn denied() -> Answer {
    Answer::Decided { approve: false, scope: pb::ApprovalScope::Once }
}

/// A text in rows of a bounded width, so that no newline and no long line pushes another part off the screen. Of more
/// than `rows_max` rows the first and the last are shown around a count of those left out; `true`: some are left out.
fn bounded(text: &str, width: usize, rows_max: usize) -> (Vec<String>, bool) {
    let shown = visible(text);
    let mut rows = Vec::new();
    for line in shown.split('\n') {
        let chars: Vec<char> = line.chars().collect();
        if chars.is_empty() {
            rows.push(String::new());
        }
        rows.extend(chars.chunks(width.max(1)).map(|row| row.iter().collect::<String>()));
    }
    if rows.len() <= rows_max {
        return (rows, false);
    }
    let last = rows_max / 3;
    let first = rows_max - last;
    let left_out = rows.len() - rows_max;
    let tail = rows.split_off(rows.len() - last);
    rows.truncate(first);
    rows.push(format!("… {left_out} more lines; press v to see all …"));
    rows.extend(tail);
    (rows, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_keeps_its_beginning_and_its_end_on_the_screen() {
        let text = format!("first{}last", "\n".repeat(1000));
        let (rows, cut) = bounded(&text, 80, 9);
        assert!(cut);
        assert_eq!(rows.len(), 10);
        assert_eq!(rows[0], "first");
        assert_eq!(rows[6], "… 992 more lines; press v to see all …");
        assert_eq!(rows[9], "last");
        assert_eq!(bounded(&"x".repeat(200), 80, 9).0.len(), 3);
        assert_eq!(bounded("one\ntwo", 80, 9), (vec!["one".into(), "two".into()], false));
    }
}
