//! A server that keeps its promise, small enough to be believed: what it sends is legal by construction.

use reliant_types::{ChatId, pb};

use super::BlockKey;

/// Past so many missed events a viewer gets a snapshot.
const RESUME_MAX: i64 = 6;
const LOG_EPOCH: i64 = 7;

#[derive(Debug, Clone, Copy)]
pub(super) enum Op {
    /// A model attempt begins, or takes over from the one under way.
    Start,
    /// A piece for one of three blocks of the attempt; the first is thinking.
    Piece {
        block: u8,
        size: u8,
    },
    Commit,
    ToolStart,
    ToolOutput {
        stderr: bool,
        size: u8,
    },
    ToolEnd,
    EndTurn,
    Approval,
}

#[derive(Default)]
struct Attempt {
    message: String,
    iteration: i32,
    epoch: i64,
    texts: [String; 3],
}

struct Tool {
    id: String,
    generation: i64,
    output: [Vec<u8>; 2],
}

pub(super) struct SimChat {
    pub(super) id: ChatId,
    pub(super) log: Vec<pb::ChatEvent>,
    pub(super) messages: Vec<pb::Message>,
    turn: u32,
    turn_open: bool,
    iteration: i32,
    names: u32,
    fence: i64,
    attempt: Option<Attempt>,
    tool: Option<Tool>,
}

fn response(update: pb::subscribe_response::Update) -> pb::SubscribeResponse {
    pb::SubscribeResponse { update: Some(update) }
}

impl SimChat {
    pub(super) fn new() -> Self {
        Self {
            id: ChatId::new(),
            log: Vec::new(),
            messages: Vec::new(),
            turn: 0,
            turn_open: false,
            iteration: 0,
            names: 0,
            fence: 0,
            attempt: None,
            tool: None,
        }
    }

    pub(super) fn last_seq(&self) -> i64 {
        self.log.len() as i64
    }

    fn name(&mut self, kind: &str) -> String {
        self.names += 1;
        format!("{kind}-{}", self.names)
    }

    fn turn_id(&self) -> String {
        format!("turn-{}", self.turn)
    }

    fn event(&mut self, kind: pb::chat_event::Kind) -> pb::SubscribeResponse {
        let event =
            pb::ChatEvent { chat_id: self.id.to_string(), seq: self.last_seq() + 1, kind: Some(kind), time: None };
        self.log.push(event.clone());
        response(pb::subscribe_response::Update::Event(event))
    }

    fn turn_event(&mut self, status: pb::TurnStatus) -> pb::SubscribeResponse {
        let turn = pb::Turn { id: self.turn_id(), status: status.into(), ..Default::default() };
        self.event(pb::chat_event::Kind::TurnChanged(turn))
    }

    fn delta(
        &self,
        target: &str,
        block: i32,
        kind: pb::StreamKind,
        epoch: i64,
        offset: usize,
        piece: &[u8],
    ) -> pb::SubscribeResponse {
        response(pb::subscribe_response::Update::Delta(pb::Delta {
            chat_id: self.id.to_string(),
            block: Some(pb::BlockRef { target_id: target.to_owned(), block, kind: kind.into() }),
            epoch,
            offset: offset as i64,
            piece: piece.to_vec().into(),
            ..Default::default()
        }))
    }

    fn started(&self, attempt: &Attempt, restarted: bool) -> pb::MessageStarted {
        pb::MessageStarted {
            message_id: attempt.message.clone(),
            turn_id: self.turn_id(),
            iteration: attempt.iteration,
            epoch: attempt.epoch,
            restarted,
            ..Default::default()
        }
    }

    fn call(&self, tool: &Tool, status: pb::ToolCallStatus) -> pb::ToolCallChanged {
        let output_bytes = tool.output.iter().map(|bytes| bytes.len() as i64).sum();
        let call = pb::ToolCall {
            id: tool.id.clone(),
            turn_id: self.turn_id(),
            generation: tool.generation,
            status: status.into(),
            output_bytes: if status == pb::ToolCallStatus::Running { 0 } else { output_bytes },
            ..Default::default()
        };
        pb::ToolCallChanged { tool_call: Some(call), producer: "daemon".to_owned() }
    }

    /// What a viewer that follows live is sent.
    pub(super) fn step(&mut self, op: Op) -> Vec<pb::SubscribeResponse> {
        let mut sent = Vec::new();
        match op {
            Op::Start => {
                if !self.turn_open {
                    self.turn += 1;
                    self.turn_open = true;
                    sent.push(self.turn_event(pb::TurnStatus::Running));
                }
                self.fence += 1;
                let before = self.attempt.take();
                let restarted = before.is_some();
                let (message, iteration) = match before {
                    Some(before) => (before.message, before.iteration),
                    None => {
                        self.iteration += 1;
                        (self.name("message"), self.iteration)
                    }
                };
                let attempt = Attempt { message, iteration, epoch: self.fence, ..Attempt::default() };
                let started = self.started(&attempt, restarted);
                self.attempt = Some(attempt);
                sent.push(self.event(pb::chat_event::Kind::MessageStarted(started)));
            }
            Op::Piece { block, size } => {
                if let Some(mut attempt) = self.attempt.take() {
                    let at = usize::from(block % 3);
                    let offset = attempt.texts[at].len();
                    // Characters of two bytes, so that a split one would show.
                    let piece: String =
                        (0..=size % 5).map(|n| char::from(b'\xe0' + (self.names as u8 + n) % 16)).collect();
                    attempt.texts[at].push_str(&piece);
                    let kind = text_kind(at);
                    sent.push(self.delta(&attempt.message, at as i32, kind, attempt.epoch, offset, piece.as_bytes()));
                    self.attempt = Some(attempt);
                }
            }
            Op::Commit => {
                if let Some(attempt) = self.attempt.take() {
                    let message = self.message(&attempt);
                    self.messages.push(message.clone());
                    sent.push(self.event(pb::chat_event::Kind::MessageCommitted(message)));
                }
            }
            Op::ToolStart => {
                if self.tool.is_none() {
                    self.fence += 1;
                    let tool = Tool { id: self.name("call"), generation: self.fence, output: Default::default() };
                    let changed = self.call(&tool, pb::ToolCallStatus::Running);
                    self.tool = Some(tool);
                    sent.push(self.event(pb::chat_event::Kind::ToolCallChanged(changed)));
                }
            }
            Op::ToolOutput { stderr, size } => {
                if let Some(mut tool) = self.tool.take() {
                    let at = usize::from(stderr);
                    let offset = tool.output[at].len();
                    let piece = vec![0xff - size % 7; usize::from(size % 5) + 1];
                    tool.output[at].extend_from_slice(&piece);
                    sent.push(self.delta(&tool.id, at as i32, output_kind(at), tool.generation, offset, &piece));
                    self.tool = Some(tool);
                }
            }
            Op::ToolEnd => {
                if let Some(tool) = self.tool.take() {
                    let changed = self.call(&tool, pb::ToolCallStatus::Succeeded);
                    sent.push(self.event(pb::chat_event::Kind::ToolCallChanged(changed)));
                }
            }
            Op::EndTurn => {
                if std::mem::take(&mut self.turn_open) {
                    sent.push(self.turn_event(pb::TurnStatus::Cancelled));
                    if let Some(attempt) = self.attempt.take() {
                        // Its producer did not hear of it yet.
                        let offset = attempt.texts[1].len();
                        sent.push(self.delta(&attempt.message, 1, text_kind(1), attempt.epoch, offset, b"late"));
                    }
                }
            }
            Op::Approval => {
                let approval = pb::Approval { id: self.name("approval"), ..Default::default() };
                sent.push(self.event(pb::chat_event::Kind::ApprovalChanged(approval)));
            }
        }
        sent
    }

    fn message(&self, attempt: &Attempt) -> pb::Message {
        use pb::content_block::Block;
        let blocks = attempt.texts.iter().enumerate().map(|(at, text)| {
            let block = match at {
                0 => Block::Thinking(pb::ThinkingBlock { text: text.clone(), signature: String::new() }),
                _ => Block::Text(pb::TextBlock { text: text.clone() }),
            };
            pb::ContentBlock { position: at as i32, block: Some(block) }
        });
        pb::Message {
            id: attempt.message.clone(),
            turn_id: self.turn_id(),
            iteration: attempt.iteration,
            ordinal: self.messages.len() as i32 + 1,
            role: pb::Role::Assistant.into(),
            blocks: blocks.collect(),
            ..Default::default()
        }
    }

    /// What a viewer that comes back is sent: events or a snapshot, then live texts from their beginning.
    pub(super) fn resume(&self, cursor: &pb::ChatCursor) -> Vec<pb::SubscribeResponse> {
        use pb::subscribe_response::Update;
        let mut sent = Vec::new();
        let after = cursor.after_seq;
        if after < 0 || self.last_seq() - after > RESUME_MAX && after > 0 {
            sent.push(response(Update::Snapshot(self.snapshot())));
        } else {
            let missed = self.log.iter().filter(|event| event.seq > after);
            sent.extend(missed.map(|event| response(Update::Event(event.clone()))));
        }
        let (chat_id, seq) = (self.id.to_string(), self.last_seq());
        sent.push(response(Update::CaughtUp(pb::CaughtUp { chat_id, seq, log_epoch: LOG_EPOCH })));
        for (key, epoch, kind, bytes) in self.live() {
            let middle =
                (0..=bytes.len() / 2).rev().find(|at| kind_is_raw(kind) || is_boundary(&bytes, *at)).unwrap_or(0);
            for (offset, piece) in [(0, &bytes[..middle]), (middle, &bytes[middle..])] {
                if !piece.is_empty() {
                    sent.push(self.delta(&key.target, key.block, kind, epoch, offset, piece));
                }
            }
        }
        sent
    }

    fn snapshot(&self) -> pb::ChatSnapshot {
        pb::ChatSnapshot {
            chat: Some(pb::Chat { id: self.id.to_string(), ..Default::default() }),
            seq: self.last_seq(),
            log_epoch: LOG_EPOCH,
            messages: self.messages.clone(),
            tool_calls: self.tool.iter().map(|tool| self.call(tool, pb::ToolCallStatus::Running)).collect(),
            started: self.attempt.iter().map(|attempt| self.started(attempt, false)).collect(),
            ..Default::default()
        }
    }

    /// All texts that are growing now and are not empty.
    pub(super) fn live(&self) -> Vec<(BlockKey, i64, pb::StreamKind, Vec<u8>)> {
        let mut live = Vec::new();
        let mut put = |target: &str, block: usize, epoch, kind, bytes: &[u8]| {
            if !bytes.is_empty() {
                live.push((BlockKey { target: target.to_owned(), block: block as i32 }, epoch, kind, bytes.to_vec()));
            }
        };
        if let Some(attempt) = &self.attempt {
            for (at, text) in attempt.texts.iter().enumerate() {
                put(&attempt.message, at, attempt.epoch, text_kind(at), text.as_bytes());
            }
        }
        if let Some(tool) = &self.tool {
            for (at, bytes) in tool.output.iter().enumerate() {
                put(&tool.id, at, tool.generation, output_kind(at), bytes);
            }
        }
        live
    }
}

fn text_kind(block: usize) -> pb::StreamKind {
    if block == 0 { pb::StreamKind::Thinking } else { pb::StreamKind::Text }
}

fn output_kind(block: usize) -> pb::StreamKind {
    if block == 0 { pb::StreamKind::Stdout } else { pb::StreamKind::Stderr }
}

fn kind_is_raw(kind: pb::StreamKind) -> bool {
    matches!(kind, pb::StreamKind::Stdout | pb::StreamKind::Stderr)
}

fn is_boundary(bytes: &[u8], at: usize) -> bool {
    std::str::from_utf8(&bytes[..at]).is_ok()
}
