//! `read_file`: lines of a text file, numbered, within what a model may read.

use std::{
    fmt::Write,
    io::{BufRead, BufReader, Read},
};

use reliant_types::limits;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::{
    ToolError,
    files::{ChatFiles, FileKey, Stamp},
    stoppable::Stoppable,
};
use crate::roots::Root;

const LINES_DEFAULT: usize = 2000;
const LINE_MAX_BYTES: usize = 2000;
/// Looked at to tell text from anything else.
const SNIFF_BYTES: u64 = 8 * 1024;
/// Kept free for the last line, which says what follows.
const NOTE_BYTES: usize = 200;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Args {
    path: String,
    offset: Option<usize>,
    limit: Option<usize>,
}

/// A NUL byte is in no text.
pub fn is_binary(bytes: &[u8]) -> bool {
    bytes.contains(&0)
}

pub fn run(args: &Args, root: &Root, files: &ChatFiles, cancel: &CancellationToken) -> Result<Vec<u8>, ToolError> {
    let io = |e: std::io::Error| match cancel.is_cancelled() {
        true => ToolError::Cancelled,
        false => ToolError::failed(format!("'{}' cannot be read: {e}", args.path)),
    };
    let inside = root.confine.inside(&args.path)?;
    let file = root.confine.open_file(&inside)?;
    // From before the first byte: what is written meanwhile counts as unseen.
    let stamp = Stamp::of_file(&file).map_err(io)?;
    let size = file.metadata().map_err(io)?.len();
    let mut sniffed = Vec::new();
    (&file).take(SNIFF_BYTES).read_to_end(&mut sniffed).map_err(io)?;
    if is_binary(&sniffed) {
        return Err(ToolError::failed(format!(
            "'{}' is a binary file of {size} bytes; look at it with a shell command such as xxd or file",
            args.path
        )));
    }
    files.record(FileKey::existing(root, &inside)?, stamp);
    if size == 0 {
        return Ok(b"(the file is empty)".to_vec());
    }
    let mut reader = BufReader::new(std::io::Cursor::new(sniffed).chain(Stoppable { file, cancel }));
    let first = args.offset.unwrap_or(1).max(1);
    let limit = args.limit.unwrap_or(LINES_DEFAULT).max(1);
    let mut text = String::new();
    let mut number = 0;
    while let Some(line) = next_line(&mut reader).map_err(io)? {
        number += 1;
        if number < first {
            continue;
        }
        if number - first >= limit || text.len() + line.len() + NOTE_BYTES > limits::TOOL_RESULT_MAX_BYTES {
            let _ = write!(text, "[more lines follow; go on with offset {number}]");
            return Ok(text.into_bytes());
        }
        let _ = writeln!(text, "{number:>6}\t{line}");
    }
    if text.is_empty() {
        return Err(ToolError::failed(format!("'{}' has {number} lines; offset {first} is behind its end", args.path)));
    }
    Ok(text.into_bytes())
}

/// A line of any length, its end left out past a limit. Memory stays bounded however long it is.
fn next_line(reader: &mut impl BufRead) -> std::io::Result<Option<String>> {
    let mut line = Vec::new();
    let mut length = 0;
    loop {
        let available = reader.fill_buf()?;
        if available.is_empty() {
            if length == 0 {
                return Ok(None);
            }
            break;
        }
        let newline = available.iter().position(|b| *b == b'\n');
        let part = &available[..newline.unwrap_or(available.len())];
        let room = (LINE_MAX_BYTES + 4).saturating_sub(line.len());
        line.extend_from_slice(&part[..part.len().min(room)]);
        length += part.len();
        let used = part.len() + usize::from(newline.is_some());
        reader.consume(used);
        if newline.is_some() {
            break;
        }
        // An empty part without a newline cannot be: the buffer was not empty.
    }
    if length == 0 {
        return Ok(Some(String::new()));
    }
    if length > LINE_MAX_BYTES {
        let text = String::from_utf8_lossy(&line[..LINE_MAX_BYTES]);
        return Ok(Some(format!("{} [… {} bytes more]", text.trim_end_matches('\u{fffd}'), length - LINE_MAX_BYTES)));
    }
    Ok(Some(String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned()))
}
