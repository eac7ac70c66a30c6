//! `edit_file`: replaces an exact piece of a file. When the piece is missing or not unique, the answer says what to do.

use std::io::Read;

use reliant_types::{Code, Failure};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::{
    ToolError,
    files::{ChatFiles, FileKey, Stamp},
    read::is_binary,
    write::replace,
};
use crate::roots::Root;

const FILE_MAX_BYTES: u64 = 16 * 1024 * 1024;
/// Lines named when a piece is not unique.
const NAMED_LINES: usize = 10;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Args {
    path: String,
    old_string: String,
    new_string: String,
    #[serde(default)]
    replace_all: bool,
}

impl Args {
    pub fn checked(self) -> Result<Self, Failure> {
        let bad = |text: &str| Err(Failure::new(Code::ToolArgumentsInvalid, text));
        if self.old_string.is_empty() {
            return bad("old_string is empty; to write a whole file use write_file");
        }
        if self.old_string == self.new_string {
            return bad("old_string and new_string are the same; nothing would change");
        }
        Ok(self)
    }
}

pub fn run(args: &Args, root: &Root, files: &ChatFiles, cancel: &CancellationToken) -> Result<Vec<u8>, ToolError> {
    let inside = root.confine.inside(&args.path)?;
    // Before a place is made for it: a file that is not there gets no directories.
    drop(root.confine.open_file(&inside)?);
    let place = root.confine.place(&inside)?;
    let key = FileKey::of(&place)?;
    let _held = files.hold(&key, cancel)?;
    let file = root.confine.open_file(&inside)?;
    let unreadable = |e: std::io::Error| ToolError::failed(format!("'{}' cannot be read: {e}", args.path));
    let before = Stamp::of_file(&file).map_err(unreadable)?;
    let mut content = Vec::new();
    file.take(FILE_MAX_BYTES + 1).read_to_end(&mut content).map_err(unreadable)?;
    if content.len() as u64 > FILE_MAX_BYTES {
        return Err(ToolError::failed(format!("'{}' is larger than 16 MiB; edit it with a shell command", args.path)));
    }
    if is_binary(&content) {
        return Err(ToolError::failed(format!("'{}' is a binary file; edit it with a shell command", args.path)));
    }
    let text = String::from_utf8(content).map_err(|_| {
        ToolError::failed(format!("'{}' is not UTF-8; edit it with a shell command such as sed", args.path))
    })?;
    let places: Vec<usize> = text.match_indices(&args.old_string).map(|(at, _)| at).collect();
    let lines: Vec<usize> = places.iter().map(|at| text[..*at].matches('\n').count() + 1).take(NAMED_LINES).collect();
    match places.len() {
        0 => return Err(ToolError::failed(not_found(args, &text))),
        1 => {}
        _ if args.replace_all => {}
        count => {
            let named = lines.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let more = if count > NAMED_LINES { ", …" } else { "" };
            return Err(ToolError::failed(format!(
                "old_string occurs {count} times in '{}' (lines {named}{more}); give more of the text around the one you \
                 mean, or set replace_all",
                args.path
            )));
        }
    }
    let edited = text.replace(&args.old_string, &args.new_string);
    let (_, after) = replace(&place, &inside, edited.as_bytes(), cancel)?;
    // What others changed elsewhere in the file stays unseen.
    if files.last(&key) == Some(before) {
        files.record(key, after);
    }
    let count = places.len();
    let first = lines[0];
    Ok(match count {
        1 => format!("edited {} at line {first}", inside.display()),
        _ => format!("edited {} at {count} places, the first at line {first}", inside.display()),
    }
    .into_bytes())
}

/// Says what is nearly there, for the usual slips: white space, line ends, line numbers taken along.
fn not_found(args: &Args, text: &str) -> String {
    let squeeze = |s: &str| s.split_whitespace().collect::<Vec<_>>().join(" ");
    let hint = if text.contains("\r\n") && !args.old_string.contains('\r') && args.old_string.contains('\n') {
        "the file has Windows line ends (\\r\\n); give them in old_string too"
    } else if squeeze(text).contains(&squeeze(&args.old_string)) {
        "it is there with other white space; give the white space exactly as the file has it"
    } else {
        "read the file again and give the piece exactly as it stands there, without line numbers"
    };
    format!("old_string does not occur in '{}'; {hint}", args.path)
}
