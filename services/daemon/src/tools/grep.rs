//! `grep`: ripgrep's own parts over the files of a root. Each file is opened beneath the root, so that a link swapped
//! in meanwhile leads nowhere.

use std::{
    fmt::Write,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use grep_matcher::Matcher;
use grep_regex::{RegexMatcher, RegexMatcherBuilder};
use grep_searcher::{BinaryDetection, Searcher, SearcherBuilder, Sink, SinkContext, SinkMatch};
use reliant_telemetry::chain;
use reliant_types::{Code, Failure, limits};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::{
    ToolError,
    list::{matcher as glob_matcher, too_large},
    stoppable::Stoppable,
    walk::walk,
};
use crate::roots::Root;

const MATCHES_DEFAULT: usize = 200;
const MATCHES_MAX: usize = 2000;
const CONTEXT_MAX: usize = 10;
const LINE_MAX_CHARS: usize = 500;
/// A line longer than this is not searched: the file is no text for people.
const HEAP_MAX_BYTES: usize = 4 * 1024 * 1024;
const REGEX_MAX_BYTES: usize = 10 * 1024 * 1024;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Args {
    pattern: String,
    #[serde(default)]
    path: String,
    glob: Option<String>,
    #[serde(default)]
    ignore_case: bool,
    #[serde(default)]
    literal: bool,
    #[serde(default)]
    context: usize,
    #[serde(default)]
    files_only: bool,
    limit: Option<usize>,
}

impl Args {
    pub fn checked(self) -> Result<Self, Failure> {
        let bad = |text: String| Failure::new(Code::ToolArgumentsInvalid, text);
        self.regex().map_err(|e| bad(format!("pattern: {e}; set literal to search for plain text")))?;
        if let Some(glob) = &self.glob {
            glob_matcher(glob).map_err(|e| bad(format!("glob: {e}")))?;
        }
        Ok(self)
    }

    fn regex(&self) -> Result<RegexMatcher, grep_regex::Error> {
        RegexMatcherBuilder::new()
            .case_insensitive(self.ignore_case)
            .fixed_strings(self.literal)
            .line_terminator(Some(b'\n'))
            .size_limit(REGEX_MAX_BYTES)
            .build(&self.pattern)
    }
}

pub fn run(args: &Args, root: &Root, cancel: &CancellationToken) -> Result<Vec<u8>, ToolError> {
    let regex = args.regex().map_err(|e| ToolError::failed(format!("pattern: {e}")))?;
    let glob =
        args.glob.as_deref().map(glob_matcher).transpose().map_err(|e| ToolError::failed(format!("glob: {e}")))?;
    let top = root.confine.existing(&root.confine.inside(&args.path)?)?;
    let context = args.context.min(CONTEXT_MAX);
    let mut searcher = SearcherBuilder::new()
        .binary_detection(BinaryDetection::quit(0))
        .line_number(true)
        .heap_limit(Some(HEAP_MAX_BYTES))
        .before_context(context)
        .after_context(context)
        .build();
    let limit = args.limit.unwrap_or(MATCHES_DEFAULT).clamp(1, MATCHES_MAX);
    let mut found = Found { text: String::new(), matches: 0, limit, files_only: args.files_only, full: false };
    // Answers whether enough was found.
    let mut search = |inside: PathBuf| {
        let below = inside.strip_prefix(&top).ok().filter(|below| !below.as_os_str().is_empty());
        if glob.as_ref().is_some_and(|glob| !glob.is_match(below.unwrap_or(&inside))) {
            return false;
        }
        let Ok(file) = root.confine.open_file(&inside) else { return false };
        let sink = FileSink { found: &mut found, path: &inside, matcher: &regex, cancel };
        if let Err(error) = searcher.search_reader(&regex, Stoppable { file, cancel }, sink) {
            tracing::debug!(error = %chain(&error), "a file was not searched");
        }
        found.full
    };
    let complete = if root.confine.open_dir(&top).is_ok() {
        walk(root, &top, cancel, |file| {
            if file.is_file && search(file.inside) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?
    } else {
        search(top.clone());
        true
    };
    if cancel.is_cancelled() {
        return Err(ToolError::Cancelled);
    }
    let Found { mut text, matches, full, .. } = found;
    if matches == 0 {
        let part = if complete { String::new() } else { format!("\n{}", too_large()) };
        return Ok(format!("nothing matches {}{part}", args.pattern).into_bytes());
    }
    if full {
        let what = if args.files_only { "files" } else { "matches" };
        let _ = writeln!(text, "[only the first {matches} {what} are shown; give a narrower pattern, path or glob]");
    }
    if !complete {
        let _ = writeln!(text, "{}", too_large());
    }
    Ok(text.into_bytes())
}

struct Found {
    text: String,
    matches: usize,
    limit: usize,
    files_only: bool,
    full: bool,
}

struct FileSink<'a> {
    found: &'a mut Found,
    path: &'a Path,
    matcher: &'a RegexMatcher,
    cancel: &'a CancellationToken,
}

impl FileSink<'_> {
    fn line(&mut self, number: Option<u64>, mark: char, bytes: &[u8]) {
        let line = String::from_utf8_lossy(bytes);
        let line = line.trim_end_matches(['\n', '\r']);
        let (path, number) = (self.path.display(), number.unwrap_or(0));
        let _ = match line.char_indices().nth(LINE_MAX_CHARS) {
            // A long line is shown from shortly before its match on.
            Some(_) => {
                let at = self.matcher.find(bytes).ok().flatten().map_or(0, |m| m.start());
                let before = String::from_utf8_lossy(&bytes[..at]).chars().count();
                let part: String = line.chars().skip(before.saturating_sub(50)).take(LINE_MAX_CHARS).collect();
                writeln!(self.found.text, "{path}{mark}{number}{mark}[…] {part} […]")
            }
            None => writeln!(self.found.text, "{path}{mark}{number}{mark}{line}"),
        };
    }
}

impl Sink for FileSink<'_> {
    type Error = std::io::Error;

    fn matched(&mut self, _: &Searcher, hit: &SinkMatch<'_>) -> Result<bool, Self::Error> {
        let room = limits::TOOL_RESULT_MAX_BYTES - 8 * 1024;
        if self.found.matches >= self.found.limit || self.found.text.len() >= room {
            self.found.full = true;
            return Ok(false);
        }
        self.found.matches += 1;
        if self.found.files_only {
            let _ = writeln!(self.found.text, "{}", self.path.display());
            return Ok(false);
        }
        self.line(hit.line_number(), ':', hit.bytes());
        Ok(!self.cancel.is_cancelled())
    }

    fn context(&mut self, _: &Searcher, around: &SinkContext<'_>) -> Result<bool, Self::Error> {
        if !self.found.files_only {
            self.line(around.line_number(), '-', around.bytes());
        }
        Ok(!self.cancel.is_cancelled())
    }

    fn context_break(&mut self, _: &Searcher) -> Result<bool, Self::Error> {
        if !self.found.files_only && !self.found.text.is_empty() {
            self.found.text.push_str("--\n");
        }
        Ok(true)
    }
}
