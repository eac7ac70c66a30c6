//! One attempt of one round: context, stream, commit.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use reliant_models::{BlockKind, ModelError, ModelRequest, ModelStream, ToolSpec, fit_history};
use reliant_runtime::Backoff;
use reliant_store::{Attempt, CommitOutcome, Committed, Lead, NewAssistant, NewBlock, NewCall, Notice};
use reliant_telemetry::{TraceContext, chain, metrics::Phase};
use reliant_types::{Code, Failure, ToolCallId, limits, pb, timestamp};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    answer::{Answer, Change},
    engine::{Engine, EngineError, between},
    history,
    live::{LiveKey, Push},
    offers::Offer,
    prompt::{Machine, PromptFacts, system_prompt},
    tools,
};

/// A tool's schema that is broken JSON is offered without one.
const ANY_OBJECT: &str = r#"{"type":"object"}"#;

/// A provider that cannot answer is asked again within the attempt for so long.
const QUICK_RETRIES: Duration = Duration::from_millis(1500);
const COMMIT_RETRY_MIN: Duration = Duration::from_millis(50);
const COMMIT_RETRY_MAX: Duration = Duration::from_secs(2);
const HISTORY_CUT: &str =
    "This chat is very long, so the model reads only its newer messages. The chat itself is kept whole.";

pub enum End {
    /// With the calls to send, one wave behind the other, where none of them waits for a person.
    Committed {
        waves: Vec<Vec<ToolCallId>>,
    },
    /// Somebody else has the turn, or it was cancelled.
    Lost,
    /// Pieces were seen, then the provider broke off: again, under a new fence.
    Broken(ModelError),
    /// The provider cannot answer now, and not within moments.
    Away(ModelError),
    Failed(Failure),
    Deadline,
}

/// How long the parts of an attempt took, by this worker's clock.
struct Times {
    context: Duration,
    first_token: Duration,
    stream: Duration,
}

/// `began`: when the round was about to be claimed.
pub async fn run(
    engine: &Arc<Engine>,
    attempt: Attempt,
    began: Instant,
    stop: &CancellationToken,
    deadline: Instant,
) -> Result<End, EngineError> {
    let cancel = engine.cancels.register(attempt.turn);
    let key = LiveKey { chat: attempt.chat, user: attempt.user, message: attempt.message, epoch: attempt.fence };
    engine.live.open(&key);
    let void = DropLive { engine, key: &key, keep: false };
    let offer = engine.offers.of(&engine.store, &attempt).await?;
    let streamed = tokio::select! {
        biased;
        () = cancel.token.cancelled() => return Ok(End::Lost),
        () = stop.cancelled() => return Err(EngineError::Stopped),
        () = tokio::time::sleep_until(deadline) => return Ok(End::Deadline),
        streamed = answer(engine, &attempt, &offer, began, &key, deadline) => streamed?,
    };
    let (answer, times) = match streamed {
        Ok(answer) => answer,
        Err(end) => return Ok(end),
    };
    let suspect = Suspect::enter(engine, &attempt).await?;
    let message = message(engine, &attempt, &offer, answer);
    suspect.leave().await?;
    commit(engine, attempt, message, times, void, stop, deadline).await
}

/// The text of an attempt that is not committed is void, however the attempt ends.
struct DropLive<'a> {
    engine: &'a Engine,
    key: &'a LiveKey,
    keep: bool,
}

impl Drop for DropLive<'_> {
    fn drop(&mut self) {
        if self.keep {
            self.engine.live.committed(self.key);
        } else {
            self.engine.live.drop_attempt(self.key);
        }
    }
}

async fn answer(
    engine: &Arc<Engine>,
    attempt: &Attempt,
    offer: &Offer,
    began: Instant,
    key: &LiveKey,
    deadline: Instant,
) -> Result<Result<(Answer, Times), End>, EngineError> {
    let model = match engine.models.resolve(&attempt.model) {
        Ok(model) => model,
        Err(failure) => return Ok(Err(End::Failed(failure))),
    };
    let (history, transcript) = engine.store.history(attempt, engine.transcripts.take(attempt.chat)).await?;
    if let Some(transcript) = transcript {
        engine.transcripts.put(attempt.chat, transcript);
    }
    let suspect = Suspect::enter(engine, attempt).await?;
    let (mut request, untold) = context(attempt, offer, model.max_tools);
    let (messages, counted) = history::to_model(&history.messages, &attempt.model);
    request.messages = messages;
    // What was counted with messages that are not read any more says nothing of those that are.
    let counted = if history.cut { &[][..] } else { &counted };
    let report = fit_history(&mut request, &model, counted);
    suspect.leave().await?;
    if report.too_large {
        let failure = Failure::new(
            Code::ProviderRejected,
            "the message is larger than the model's window; send less, or choose another model",
        );
        return Ok(Err(End::Failed(failure)));
    }
    // That a chat is very long is said once; what of it does not fit a window, for each turn anew.
    let cut = || (history.cut && attempt.iteration == 0).then(|| (Notice::OfChat, HISTORY_CUT.to_owned()));
    if let Some((of, notice)) = report.notice().map(|notice| (Notice::OfTurn, notice)).or_else(cut) {
        let noticed = engine.store.add_notice(attempt.turn, attempt.fence, of, &notice).await?;
        engine.tell(noticed);
    }
    // The tools are the same for all rounds of a turn, or nearly.
    if let Some(notice) = untold.filter(|_| attempt.iteration == 0) {
        let noticed = engine.store.add_notice(attempt.turn, attempt.fence, Notice::OfChat, &notice).await?;
        engine.tell(noticed);
    }
    let context = began.elapsed();

    let asked = Instant::now();
    // A blip is tried again here, where nobody need notice; what lasts for longer is waited for without holding anything.
    let patience = if attempt.retries == 0 { QUICK_RETRIES } else { Duration::ZERO };
    // Its stream is dropped with this future: nothing goes on behind a cancelled attempt.
    let mut stream = match engine.models.stream_with_retry(request, deadline.min(asked + patience)).await {
        Ok(stream) => stream,
        Err(error) if error.retryable() => return Ok(Err(End::Away(error))),
        Err(error) => return Ok(Err(End::Failed(error.failure()))),
    };
    let first_token = asked.elapsed();
    let streaming = Instant::now();
    let read = read(engine, key, &mut stream).await;
    let times = Times { context, first_token, stream: streaming.elapsed() };
    Ok(read
        .map(|answer| (answer, times))
        .map_err(|error| if error.retryable() { End::Broken(error) } else { End::Failed(error.failure()) }))
}

/// Around work on what others wrote: should it end this worker, or block it for good, the round knows why.
///
/// An attempt that replaces none is not marked: nothing speaks against it, and the mark costs two statements.
struct Suspect<'a>(Option<(&'a Engine, &'a Attempt)>);

impl<'a> Suspect<'a> {
    async fn enter(engine: &'a Engine, attempt: &'a Attempt) -> Result<Self, EngineError> {
        if !attempt.restarted {
            return Ok(Self(None));
        }
        engine.store.set_suspect(attempt.turn, attempt.fence, true).await?;
        Ok(Self(Some((engine, attempt))))
    }

    async fn leave(self) -> Result<(), EngineError> {
        let Some((engine, attempt)) = self.0 else { return Ok(()) };
        Ok(engine.store.set_suspect(attempt.turn, attempt.fence, false).await?)
    }
}

/// The request without its messages, and what is to be said of tools that are not in it.
fn context(attempt: &Attempt, offer: &Offer, max_tools: usize) -> (ModelRequest, Option<String>) {
    let mut offered = offer.tools(attempt.mode);
    let notice = tools::keep_at_most(&mut offered, max_tools);
    let machine = attempt.daemon.as_ref().map(|daemon| Machine {
        hostname: &daemon.hostname,
        os: &daemon.os,
        root: offer.root(),
    });
    let system = system_prompt(&PromptFacts {
        date: chrono::Utc::now().date_naive(),
        machine,
        tools: &offered,
        plan: attempt.mode == pb::ChatMode::Plan,
    });
    let spec = |tool: &&pb::ToolDeclaration| ToolSpec {
        name: tool.name.clone(),
        description: tool.description.clone(),
        input_schema: serde_json::from_str(&tool.input_schema_json)
            .or_else(|_| serde_json::from_str(ANY_OBJECT))
            .unwrap_or_default(),
    };
    let request = ModelRequest {
        model: attempt.model.clone(),
        system,
        messages: Vec::new(),
        tools: offered.iter().map(spec).collect(),
        max_output_tokens: 0,
    };
    (request, notice)
}

/// Reads the stream to its end; what comes goes to viewers on the way.
async fn read(engine: &Arc<Engine>, key: &LiveKey, stream: &mut ModelStream) -> Result<Answer, ModelError> {
    let mut answer = Answer::default();
    let trace = TraceContext::incoming();
    let publish = || engine.publisher.deltas(key.user, key.chat, engine.live.take(key), &trace);
    let mut due: Option<Instant> = None;
    loop {
        let event = tokio::select! {
            biased;
            () = async { tokio::time::sleep_until(due.unwrap_or_else(Instant::now)).await }, if due.is_some() => {
                publish();
                due = None;
                continue;
            }
            event = stream.next() => event,
        };
        let event = match event {
            Some(event) => event?,
            None => break,
        };
        match answer.apply(event) {
            Change::Opened { position, kind, tool } => {
                if position >= limits::MESSAGE_TOOL_CALLS_MAX * 2 {
                    return Err(ModelError::TooLarge { what: "too many blocks".to_owned() });
                }
                engine.live.block(key, position, kind, &tool);
            }
            Change::Grew { position, piece } => match engine.live.push(key, position, &piece) {
                Push::Now => {
                    publish();
                    due = None;
                }
                Push::After(wait) => due = due.or_else(|| Some(Instant::now() + wait)),
                Push::TooLarge => return Err(ModelError::TooLarge { what: "too much text".to_owned() }),
            },
            Change::None => {}
        }
        if answer.is_too_large() {
            return Err(ModelError::TooLarge { what: "too much text".to_owned() });
        }
    }
    publish();
    if answer.stop.is_none() {
        return Err(ModelError::CutStream);
    }
    Ok(answer)
}

async fn commit(
    engine: &Arc<Engine>,
    attempt: Attempt,
    message: NewAssistant,
    times: Times,
    mut void: DropLive<'_>,
    stop: &CancellationToken,
    deadline: Instant,
) -> Result<End, EngineError> {
    let mut backoff = Backoff::new(COMMIT_RETRY_MIN, COMMIT_RETRY_MAX);
    // The answer is paid for and shown: while Postgres is away it is kept rather than made again.
    let committed = loop {
        let asked = Instant::now();
        match engine.store.commit_message(message.clone()).await {
            Ok(committed) => {
                measure(engine, &attempt, &times, &committed, asked.elapsed());
                break committed;
            }
            Err(error) if error.is_retryable() && Instant::now() < deadline => {
                tracing::warn!(error = %chain(&error), turn.id = %message.turn, "a message was not committed; trying again");
            }
            // What cannot be stored now cannot be stored later, and asking the model again costs.
            Err(error) if !error.is_retryable() => {
                tracing::error!(error = %chain(&error), turn.id = %message.turn, "a message cannot be stored");
                return Ok(End::Failed(error.into()));
            }
            Err(error) => return Err(error.into()),
        }
        tokio::select! {
            () = backoff.wait() => {}
            () = stop.cancelled() => return Err(EngineError::Stopped),
        }
    };
    let fenced = matches!(committed.value, CommitOutcome::Fenced);
    void.keep = !fenced;
    drop(void);
    let waves = waves(&committed.events);
    engine.tell_with(committed, false);
    Ok(if fenced { End::Lost } else { End::Committed { waves } })
}

/// The phases of a round count once it is stored: what was lost with an attempt that was not is its successor's pickup.
/// They add up to the time since the round before, by the database's clock.
fn measure(engine: &Engine, attempt: &Attempt, times: &Times, committed: &Committed<CommitOutcome>, commit: Duration) {
    let CommitOutcome::Committed { turn_ended } = committed.value else { return };
    let stored = committed.events.first().and_then(|event| event.time.as_ref());
    let whole = between(Some(&timestamp(attempt.claimed_at)), stored).unwrap_or_default();
    let rest = whole.saturating_sub(times.first_token + times.stream);
    // The claim's own wait is the database's already.
    let context = times.context.min(rest);
    let mut persist = rest - context;
    if turn_ended {
        // The stamp is of the transaction's begin. Only after the last one nothing else runs meanwhile.
        persist += commit;
    }
    let Lead { held, enqueue, pickup, retry, approval_wait, tool_route, tool_run, tool_return } = attempt.lead;
    let first = attempt.iteration == 0;
    engine.load.observe(if first { enqueue + pickup } else { pickup } + rest);
    let span = tracing::Span::current();
    for (phase, time, counts) in [
        (Phase::Held, held, !held.is_zero()),
        (Phase::Enqueue, enqueue, first),
        (Phase::Pickup, pickup, true),
        (Phase::Retry, retry, !retry.is_zero()),
        (Phase::ApprovalWait, approval_wait, !approval_wait.is_zero()),
        (Phase::ToolRoute, tool_route, !first),
        (Phase::ToolRun, tool_run, !first),
        (Phase::ToolReturn, tool_return, !first),
        (Phase::Context, context, true),
        (Phase::ModelFirstToken, times.first_token, true),
        (Phase::ModelStream, times.stream, true),
        (Phase::Persist, persist, true),
    ] {
        if counts {
            phase.observe(time, &span);
        }
    }
}

/// The calls born in a commit, in the order in which they take effect: those that change nothing go side by side, each
/// other one by itself. None where one of them waits for a person.
fn waves(events: &[pb::ChatEvent]) -> Vec<Vec<ToolCallId>> {
    let mut waves: Vec<Vec<ToolCallId>> = Vec::new();
    let mut side_by_side = false;
    for event in events {
        let Some(pb::chat_event::Kind::ToolCallChanged(changed)) = &event.kind else { continue };
        let Some(call) = &changed.tool_call else { continue };
        match (call.status(), call.id.parse()) {
            (pb::ToolCallStatus::Pending, Ok(id)) => match waves.last_mut() {
                Some(wave) if side_by_side && call.read_only => wave.push(id),
                _ => {
                    side_by_side = call.read_only;
                    waves.push(vec![id]);
                }
            },
            (pb::ToolCallStatus::WaitingApproval, _) => return Vec::new(),
            _ => {}
        }
    }
    waves
}

fn message(engine: &Engine, attempt: &Attempt, offer: &Offer, answer: Answer) -> NewAssistant {
    let (blocks, calls) = judge(engine, attempt, offer, answer.blocks);
    NewAssistant {
        turn: attempt.turn,
        fence: attempt.fence,
        message: attempt.message,
        iteration: attempt.iteration,
        model: attempt.model.clone(),
        blocks,
        stop_reason: answer.stop.unwrap_or(pb::StopReason::EndTurn),
        usage: answer.usage.unwrap_or_default(),
        calls,
    }
}

/// Splits the answer into what is stored as text and what is stored as calls, and judges the calls.
fn judge(
    engine: &Engine,
    attempt: &Attempt,
    offer: &Offer,
    blocks: Vec<crate::answer::Growing>,
) -> (Vec<NewBlock>, Vec<NewCall>) {
    let declared = offer.tools(pb::ChatMode::Auto);
    let mut stored = Vec::with_capacity(blocks.len());
    let mut calls = Vec::new();
    let mut inputs = 0;
    for block in blocks {
        match block.kind {
            BlockKind::Text => stored.push(NewBlock::Text { text: block.text }),
            BlockKind::Thinking => stored.push(NewBlock::Thinking { text: block.text, signature: block.signature }),
            BlockKind::ToolUse { provider_id, name } => {
                let mut verdict = crate::tools::judge(engine.tool_timeout, &declared, attempt.mode, &name, &block.text);
                if calls.len() >= limits::MESSAGE_TOOL_CALLS_MAX {
                    let text = format!(
                        "more than {} calls at once; make the rest in the next round",
                        limits::MESSAGE_TOOL_CALLS_MAX
                    );
                    verdict.refused = Some(Failure::new(Code::ToolNotAllowed, text));
                }
                if verdict.refused.is_none() {
                    inputs += block.text.len();
                    if inputs > limits::TOOL_INPUT_MAX_BYTES {
                        let text = format!(
                            "the arguments of all calls of one message are more than {} KiB; make the rest in the next round",
                            limits::TOOL_INPUT_MAX_BYTES / 1024
                        );
                        verdict.refused = Some(Failure::new(Code::ToolArgumentsInvalid, text));
                    }
                }
                verdict.needs_approval &= verdict.refused.is_none();
                stored.push(NewBlock::ToolUse { call: calls.len() });
                calls.push(NewCall {
                    index: calls.len() as i32,
                    provider_id,
                    tool: name,
                    input: if block.text.trim().is_empty() { "{}".to_owned() } else { block.text },
                    read_only: verdict.read_only,
                    repeatable: verdict.read_only,
                    needs_approval: verdict.needs_approval,
                    timeout: verdict.timeout,
                    refused: verdict.refused,
                });
            }
        }
    }
    (stored, calls)
}
