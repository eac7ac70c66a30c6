//! Making a conversation fit a model's window, and mending what a provider would refuse. What is stored stays whole; only
//! the copy that the model reads is shortened.
//!
//! Promises: every tool call keeps its result and every result its call; the first and the latest message of the person
//! and the newest tool round stay. While any older turn is left, the current one is complete: a model that does not see what
//! it did does it again. What is cut grows in steps of a quarter of the window, so that within a turn each prompt is the
//! one before it with what has come since, and the provider's cache keeps working.

use reliant_telemetry::metrics::MODEL_SHORTENED;

use crate::{ChatMessage, ChatRole, ModelRequest, Part, ResolvedModel};

/// Tokens are guessed high: source code and JSON have some three bytes per token, prose four.
const TOKENS_PER_BYTE: f64 = 1.0 / 3.0;
/// No text has more; a provider that counts more counts something else.
const TOKENS_PER_BYTE_MAX: f64 = 1.5;
const TOKENS_PER_BYTE_MIN: f64 = 0.2;
/// Part of the prompt's room that is left free, since the count is a guess.
const MARGIN: f64 = 0.05;
const MESSAGE_BYTES: usize = 16;
const PART_BYTES: usize = 48;
/// An image counts as so much text.
const IMAGE_BYTES: usize = 4800;
/// Results this short are not worth a note in their place.
const SHORTEN_MIN_BYTES: usize = 256;
/// The first message, when nothing else is left to cut.
const FIRST_MESSAGE_MIN_BYTES: usize = 2048;
const INPUT_MIN_BYTES: usize = 1024;
/// The note that stands for messages that were left out, whatever their number.
const NOTE_MAX_BYTES: usize = PART_BYTES + 96;

/// What the provider counted for the prompt that led to an earlier answer of this chat; it makes the guess better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CountedPrompt {
    /// So many of the request's messages were in that prompt.
    pub messages: usize,
    pub tokens: i64,
}

/// What was done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FitReport {
    /// Guessed.
    pub tokens_before: u64,
    pub tokens_after: u64,
    /// Tool results replaced by a note or cut.
    pub shortened_results: usize,
    pub dropped_messages: usize,
    /// Long inputs of tool calls, and the first message, if they were cut too.
    pub shortened_others: usize,
    /// Calls that got a result, and results without a call that went.
    pub mended: usize,
    /// Not even the least that can be sent fits.
    pub too_large: bool,
}

impl FitReport {
    pub fn shortened(&self) -> bool {
        self.shortened_results + self.dropped_messages + self.shortened_others > 0
    }

    /// For the chat, where something was left out.
    pub fn notice(&self) -> Option<String> {
        let plural = |count: usize, one: &str, many: &str| match count {
            0 => None,
            1 => Some(format!("1 {one}")),
            _ => Some(format!("{count} {many}")),
        };
        let parts: Vec<String> = [
            plural(self.shortened_results, "tool result was shortened", "tool results were shortened"),
            plural(self.dropped_messages, "message was left out", "messages were left out"),
            plural(self.shortened_others, "long text was cut", "long texts were cut"),
        ]
        .into_iter()
        .flatten()
        .collect();
        (!parts.is_empty()).then(|| {
            let what = parts.join(", ");
            format!("The conversation has outgrown the model's window, so the model reads less of it: {what}, oldest first. The chat itself is kept whole.")
        })
    }
}

/// Shortens `request.messages` to what `model` takes beside the answer that is asked for. Mends them first. `counted`:
/// the provider's counts for earlier prompts, oldest first.
pub fn fit_history(request: &mut ModelRequest, model: &ResolvedModel, counted: &[CountedPrompt]) -> FitReport {
    let mended = mend_history(&mut request.messages);
    let tools: usize = request
        .tools
        .iter()
        .map(|tool| PART_BYTES + tool.name.len() + tool.description.len() + tool.input_schema.to_string().len())
        .sum();
    let fixed = request.system.len() + tools;
    let room = f64::from(model.prompt_tokens(request.max_output_tokens)) * (1.0 - MARGIN);
    let tokens_per_byte = rate(&request.messages, fixed, room, counted);
    let report = fit(&mut request.messages, fixed, (room / tokens_per_byte) as usize);
    let tokens = |bytes: u64| (bytes as f64 * tokens_per_byte).ceil() as u64;
    let report = FitReport {
        tokens_before: tokens(report.tokens_before),
        tokens_after: tokens(report.tokens_after),
        mended,
        ..report
    };
    if report.shortened() {
        MODEL_SHORTENED.inc();
    }
    report
}

/// Tokens per byte: what the provider counted for the newest prompt that was surely sent whole, or more where a later one,
/// of which some may have been cut, had more. Once a chat is cut this can only grow, and the cut stays where it is.
fn rate(messages: &[ChatMessage], fixed: usize, room: f64, counted: &[CountedPrompt]) -> f64 {
    let (mut bytes, mut summed, mut rate) = (fixed, 0, None);
    for prompt in counted.iter().filter(|prompt| prompt.tokens > 0 && prompt.messages <= messages.len()) {
        bytes += messages[summed.min(prompt.messages)..prompt.messages].iter().map(message_bytes).sum::<usize>();
        summed = summed.max(prompt.messages);
        if bytes < 1024 {
            continue;
        }
        let found = (prompt.tokens as f64 / bytes as f64).clamp(TOKENS_PER_BYTE_MIN, TOKENS_PER_BYTE_MAX);
        let surely_whole = bytes as f64 * TOKENS_PER_BYTE_MAX <= room;
        rate = if surely_whole { Some(found) } else { Some(found.max(rate.unwrap_or(TOKENS_PER_BYTE))) };
    }
    rate.unwrap_or(TOKENS_PER_BYTE)
}

/// Gives every call without a result one that says so, and takes out results without a call; says how many. A turn that
/// was cancelled between a call and its result leaves such gaps, and providers refuse them.
pub fn mend_history(messages: &mut Vec<ChatMessage>) -> usize {
    let mut mended = 0;
    let mut rest = std::mem::take(messages).into_iter().peekable();
    while let Some(message) = rest.next() {
        match message.role {
            ChatRole::User => messages.push(message),
            ChatRole::Tool => mended += message.parts.len(),
            ChatRole::Assistant => {
                let mut open: Vec<String> = calls(&message).map(str::to_owned).collect();
                messages.push(message);
                let mut results = Vec::new();
                while let Some(tool) = rest.next_if(|next| next.role == ChatRole::Tool) {
                    for part in tool.parts {
                        let at = match &part {
                            Part::ToolResult { provider_id, .. } => open.iter().position(|id| id == provider_id),
                            _ => None,
                        };
                        match at {
                            Some(at) => {
                                open.remove(at);
                                results.push(part);
                            }
                            None => mended += 1,
                        }
                    }
                }
                mended += open.len();
                results.extend(open.into_iter().map(|provider_id| Part::ToolResult {
                    provider_id,
                    content: "There is no result: the call was cancelled or given up.".into(),
                    is_error: true,
                }));
                if !results.is_empty() {
                    messages.push(ChatMessage::tool(results));
                }
            }
        }
    }
    mended
}

fn calls(message: &ChatMessage) -> impl Iterator<Item = &str> {
    message.parts.iter().filter_map(|part| match part {
        Part::ToolUse { provider_id, .. } => Some(provider_id.as_str()),
        _ => None,
    })
}

fn part_bytes(part: &Part) -> usize {
    PART_BYTES
        + match part {
            Part::Text(text) => text.len(),
            Part::Thinking { text, signature } => text.len() + signature.len(),
            Part::ToolUse { name, input_json, .. } => name.len() + input_json.len(),
            Part::ToolResult { content, .. } => content.len(),
            Part::Image { .. } => IMAGE_BYTES,
        }
}

fn message_bytes(message: &ChatMessage) -> usize {
    MESSAGE_BYTES + message.parts.iter().map(part_bytes).sum::<usize>()
}

/// The work of [`fit_history`], in bytes; the report's tokens are bytes here. Messages are mended already.
fn fit(messages: &mut Vec<ChatMessage>, fixed: usize, budget: usize) -> FitReport {
    let mut report = FitReport::default();
    let size = |messages: &[ChatMessage]| fixed + messages.iter().map(message_bytes).sum::<usize>();
    let before = size(messages);
    report.tokens_before = before as u64;
    if before > budget {
        let quantum = (budget / 4).max(1);
        let target = before.saturating_sub((before - budget).div_ceil(quantum) * quantum);
        Cutter { messages, total: before, report: &mut report }.cut(budget, target);
    }
    let after = size(messages);
    report.tokens_after = after as u64;
    report.too_large = after > budget;
    report
}

struct Cutter<'a> {
    messages: &'a mut Vec<ChatMessage>,
    total: usize,
    report: &'a mut FitReport,
}

impl Cutter<'_> {
    fn cut(&mut self, budget: usize, target: usize) {
        self.drop_old_thinking();
        self.note_results(0..self.latest_user(), target);
        self.drop_turns(target);
        // No older turn is left: from here on it is the current one.
        self.note_results(self.latest_user()..self.newest_round(), target);
        self.drop_rounds(target);
        // From here on the model loses what it works on: no more than must be.
        self.cap_new_results(budget);
        self.cut_new_calls(budget);
        self.cut_first(budget);
    }

    fn first_user(&self) -> usize {
        self.messages.iter().position(|message| message.role == ChatRole::User).unwrap_or(0)
    }

    fn latest_user(&self) -> usize {
        self.messages.iter().rposition(|message| message.role == ChatRole::User).unwrap_or(0)
    }

    /// Where the newest tool round begins: the model has not seen its results yet.
    fn newest_round(&self) -> usize {
        match self.messages.last() {
            Some(message) if message.role == ChatRole::Tool => {
                self.messages.iter().rposition(|message| message.role == ChatRole::Assistant).unwrap_or(0)
            }
            _ => self.messages.len(),
        }
    }

    /// Replaces a part and keeps the sum right.
    fn replace(&mut self, message: usize, part: usize, new: Part) {
        let old = std::mem::replace(&mut self.messages[message].parts[part], new);
        self.total -= part_bytes(&old);
        self.total += part_bytes(&self.messages[message].parts[part]);
    }

    fn drop_range(&mut self, range: std::ops::Range<usize>) {
        self.report.dropped_messages += range.len();
        self.total -= self.messages.drain(range).map(|message| message_bytes(&message)).sum::<usize>();
    }

    /// Drops pieces of `from..end` that each begin with a message of `role`, until what is left is no more than `target`.
    /// All at once: a long chat loses nearly everything, and each drop moves what stands behind it.
    fn drop_until(&mut self, from: usize, end: usize, role: ChatRole, target: usize) {
        let (mut left, mut at) = (self.total, from);
        while left > target && at < end {
            let next = self.messages[at + 1..end].iter().position(|message| message.role == role);
            let next = next.map_or(end, |next| at + 1 + next);
            left -= self.messages[at..next].iter().map(message_bytes).sum::<usize>();
            at = next;
        }
        self.drop_range(from..at.max(from));
    }

    /// Providers do not read the thinking of earlier turns; nothing is lost.
    fn drop_old_thinking(&mut self) {
        let latest = self.latest_user();
        for message in &mut self.messages[..latest] {
            let before = message_bytes(message);
            message.parts.retain(|part| !matches!(part, Part::Thinking { .. }));
            self.total -= before - message_bytes(message);
        }
    }

    /// Puts notes in the place of long results, oldest first.
    fn note_results(&mut self, messages: std::ops::Range<usize>, target: usize) {
        for at in messages {
            for part in 0..self.messages[at].parts.len() {
                if self.total <= target {
                    return;
                }
                if let Part::ToolResult { provider_id, content, is_error } = &self.messages[at].parts[part]
                    && content.len() >= SHORTEN_MIN_BYTES
                {
                    let content = format!("[{} bytes of output, left out to fit the model's window]", content.len());
                    let new = Part::ToolResult { provider_id: provider_id.clone(), content, is_error: *is_error };
                    self.replace(at, part, new);
                    self.report.shortened_results += 1;
                }
            }
        }
    }

    /// Whole turns, oldest first; of the first one its message stays.
    fn drop_turns(&mut self, target: usize) {
        if self.total <= target {
            return;
        }
        // The note that stands for what goes counts as well: it must not be what makes the next cut necessary.
        let target = target.saturating_sub(NOTE_MAX_BYTES);
        let dropped = self.report.dropped_messages;
        let first = self.first_user();
        if first > 0 {
            self.drop_range(0..first);
        }
        // What follows the first message up to the next one of the person, then turn after turn.
        self.drop_until(1, self.latest_user(), ChatRole::User, target);
        self.note(0, dropped);
    }

    /// Rounds of the latest turn, oldest first.
    fn drop_rounds(&mut self, target: usize) {
        if self.total <= target {
            return;
        }
        let target = target.saturating_sub(NOTE_MAX_BYTES);
        let dropped = self.report.dropped_messages;
        let latest = self.latest_user();
        self.drop_until(latest + 1, self.newest_round(), ChatRole::Assistant, target);
        self.note(latest, dropped);
    }

    /// Tells the model what it does not see. Before the person's text, so that the text stays last.
    fn note(&mut self, at: usize, dropped_before: usize) {
        let count = self.report.dropped_messages - dropped_before;
        if count > 0 && self.messages.get(at).is_some_and(|message| message.role == ChatRole::User) {
            let note = Part::Text(format!("[{count} messages after this one were left out to fit the model's window]"));
            self.total += part_bytes(&note);
            self.messages[at].parts.insert(0, note);
        }
    }

    /// The newest results, evenly: each keeps its head and its tail.
    fn cap_new_results(&mut self, budget: usize) {
        let from = self.newest_round();
        let mut cut = std::collections::BTreeSet::new();
        for cap in [16_384, 8192, 4096, 2048, 1024, 512] {
            for at in from..self.messages.len() {
                for part in 0..self.messages[at].parts.len() {
                    if self.total <= budget {
                        break;
                    }
                    if let Part::ToolResult { provider_id, content, is_error } = &self.messages[at].parts[part]
                        && content.len() > cap + 128
                    {
                        let content = head_and_tail(content, cap);
                        let new = Part::ToolResult { provider_id: provider_id.clone(), content, is_error: *is_error };
                        self.replace(at, part, new);
                        cut.insert((at, part));
                    }
                }
            }
        }
        self.report.shortened_results += cut.len();
    }

    fn cut_new_calls(&mut self, budget: usize) {
        for at in self.newest_round()..self.messages.len() {
            for part in (0..self.messages[at].parts.len()).rev() {
                if self.total <= budget {
                    return;
                }
                match &self.messages[at].parts[part] {
                    Part::ToolUse { provider_id, name, input_json } if input_json.len() > INPUT_MIN_BYTES => {
                        let input_json = format!("{{\"left_out_bytes\":{}}}", input_json.len());
                        let new = Part::ToolUse { provider_id: provider_id.clone(), name: name.clone(), input_json };
                        self.replace(at, part, new);
                        self.report.shortened_others += 1;
                    }
                    Part::Thinking { .. } => {
                        self.total -= part_bytes(&self.messages[at].parts.remove(part));
                    }
                    Part::Text(text) if text.len() > INPUT_MIN_BYTES => {
                        let new = Part::Text(head_and_tail(text, INPUT_MIN_BYTES - 128));
                        self.replace(at, part, new);
                        self.report.shortened_others += 1;
                    }
                    _ => {}
                }
            }
        }
    }

    /// An old giant of a message must not end a chat for good.
    fn cut_first(&mut self, budget: usize) {
        let first = self.first_user();
        if first == self.latest_user() {
            return;
        }
        for part in 0..self.messages[first].parts.len() {
            if self.total <= budget {
                return;
            }
            if let Part::Text(text) = &self.messages[first].parts[part]
                && text.len() > FIRST_MESSAGE_MIN_BYTES
            {
                let new = Part::Text(head_and_tail(text, FIRST_MESSAGE_MIN_BYTES - 128));
                self.replace(first, part, new);
                self.report.shortened_others += 1;
            }
        }
    }
}

/// `keep` bytes of the text at most, with a note in between that is shorter than 128 bytes.
fn head_and_tail(text: &str, keep: usize) -> String {
    let head = text.floor_char_boundary(keep * 2 / 3);
    let tail = text.ceil_char_boundary(text.len() - keep / 3);
    let left_out = tail - head;
    format!("{}\n[… {left_out} bytes left out to fit the model's window …]\n{}", &text[..head], &text[tail..])
}

#[cfg(test)]
mod tests;
