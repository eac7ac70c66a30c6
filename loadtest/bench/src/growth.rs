//! What a turn costs more the longer its chat is, and what is written for it.
//!
//! The longer a prompt is, the more must be serialised and sent; that is inherent and not to be in the figure. So the
//! model of these chats takes a prompt of some turns only ([`MODEL`]): from the fifth turn on a prompt is at that limit,
//! and the bytes that leave the worker are the same at turn 5 as at turn 500. `prompt_tokens_at_5` and `..._at_500`, which
//! the simulator counts, show it. What remains is what depends on the chat's length alone.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use reliant_client::ChatSession;
use reliant_harness::Rig;
use reliant_load::Samples;
use tokio::time::{Duration, Instant};

use crate::{
    Bench,
    progress::Progress,
    report::Report,
    temporal_http::HttpApi,
    turns::{PATIENCE, SHELL, cpu_by_role, session},
};

/// The shell's turn again, under a name that has limits of its own.
const MODEL: &str = "sim/tool?tool=shell&args=%7B%22command%22%3A%22true%22%7D";
/// Tokens of the longest prompt: system prompt, tools, and some three messages of [`TEXT_BYTES`].
const PROMPT_MAX_TOKENS: u32 = 6000;
/// Of a person's message.
const TEXT_BYTES: usize = 4000;
const CHATS: usize = 4;
const LONG: usize = 500;
const LONG_PATIENCE: Duration = Duration::from_secs(300);
const PROGRESS_TURNS: usize = 50;
/// Long and new chats are measured by turns, so that whatever else the machine does falls on both alike.
const ROUNDS: usize = 12;
/// Of each chat in a round.
const MEASURED: usize = 6;
/// Of a new chat before it is measured: its workflow is started, and its prompt is at its limit.
const NEW: usize = 4;
/// Of a chat whose history and rows are counted.
const COUNTED: usize = 20;
/// What turn_500_over_5 is made of: who works for each turn on behalf of the chat.
const GROWING: [&str; 3] = ["worker", "postgres", "temporal"];

/// More TOML for all roles.
pub fn config() -> String {
    format!(
        "[[models.models]]\nid = '{MODEL}'\ncontext_window = {}\nmax_input_tokens = {PROMPT_MAX_TOKENS}\n\n",
        4 * PROMPT_MAX_TOKENS
    )
}

pub async fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let progress = Progress::start("growth: rows and events of small turns are counted");
    counted(bench, report).await?;

    let text = "x".repeat(TEXT_BYTES);
    let mut long = chats(bench, MODEL, CHATS).await?;
    let (deadline, mut turns) = (Instant::now() + LONG_PATIENCE, 0);
    // Half of the measured ones before the mark, half behind.
    let first = LONG - ROUNDS * (MEASURED + 1) / 2;
    while turns < first {
        progress.set(&format!("growth: {CHATS} chats have had {turns} turns of {LONG}"));
        let some = PROGRESS_TURNS.min(first - turns);
        each_has(&mut long, some, &text).await?;
        turns += some;
        ensure!(Instant::now() < deadline, "{CHATS} chats had only {turns} turns after {LONG_PATIENCE:?}");
    }
    let (mut at_5, mut at_500) = (Cost::default(), Cost::default());
    for round in 1..=ROUNDS {
        progress.set(&format!("growth: round {round} of {ROUNDS}"));
        let mut new = chats(bench, MODEL, CHATS).await?;
        each_has(&mut new, NEW, &text).await?;
        at_5.add(bench, &mut new, &text).await?;
        // Its workflow may have ended meanwhile.
        each_has(&mut long, 1, &text).await?;
        at_500.add(bench, &mut long, &text).await?;
    }
    for (name, cost) in [("5", &at_5), ("500", &at_500)] {
        for (role, ms) in &cost.cpu_ms {
            report.set(&format!("cpu_ms_at_{name}_{role}"), ms / cost.turns as f64);
        }
        report.set(&format!("prompt_tokens_at_{name}"), cost.prompt_tokens());
    }
    report.set("turn_500_over_5", at_500.growing_ms() / at_5.growing_ms());
    Ok(())
}

async fn chats(bench: &Bench, model: &str, count: usize) -> Result<Vec<ChatSession>> {
    let mut chats = Vec::with_capacity(count);
    for _ in 0..count {
        chats.push(session(bench, model).await?);
    }
    Ok(chats)
}

/// Each of the chats has so many turns, one after another; all chats at once. Gives the prompt tokens of the last round of
/// each turn.
async fn each_has(chats: &mut [ChatSession], turns: usize, text: &str) -> Result<Vec<i64>> {
    let work = chats.iter_mut().map(|chat| {
        Box::pin(async move {
            let mut prompts = Vec::with_capacity(turns);
            for _ in 0..turns {
                let turn = chat.send_and_wait(text, PATIENCE).await?;
                ensure!(turn.succeeded(), "a turn failed: {:?}", turn.turn);
                ensure!(turn.tool_calls.len() == 1, "a turn had {} calls", turn.tool_calls.len());
                prompts.extend(
                    turn.messages.iter().filter_map(|message| Some(message.usage.as_ref()?.input_tokens)).next_back(),
                );
            }
            Ok::<_, anyhow::Error>(prompts)
        })
    });
    Ok(try_join_all(work).await?.concat())
}

#[derive(Default)]
struct Cost {
    turns: usize,
    cpu_ms: BTreeMap<&'static str, f64>,
    prompts: Vec<i64>,
}

impl Cost {
    async fn add(&mut self, bench: &Bench, chats: &mut [ChatSession], text: &str) -> Result<()> {
        let before = cpu_by_role(bench).await?;
        self.prompts.extend(each_has(chats, MEASURED, text).await?);
        for ((role, before), (_, after)) in before.into_iter().zip(cpu_by_role(bench).await?) {
            *self.cpu_ms.entry(role).or_default() += after - before;
        }
        self.turns += chats.len() * MEASURED;
        Ok(())
    }

    fn prompt_tokens(&self) -> f64 {
        Samples::plain(self.prompts.iter().map(|tokens| *tokens as f64)).at(0.5)
    }

    fn growing_ms(&self) -> f64 {
        GROWING.iter().filter_map(|role| self.cpu_ms.get(role)).sum::<f64>() / self.turns as f64
    }
}

/// Turns with one call: events of Temporal's history, and bytes of our event rows over the bytes of what people, models and
/// tools wrote, as it is stored once. The ratio is of turns whose content is [`TEXT_BYTES`] and some; of turns that say next
/// to nothing the rows themselves are most, and `event_bytes_per_small_turn` says how much that is.
async fn counted(bench: &Bench, report: &mut Report) -> Result<()> {
    let (small, events) = stored(bench, "go").await?;
    report.set("temporal_events_per_turn", events);
    report.set("event_bytes_per_small_turn", small.events);
    report.set("content_bytes_per_small_turn", small.content);
    let (usual, _) = stored(bench, &"x".repeat(TEXT_BYTES)).await?;
    report.set("event_bytes_per_turn", usual.events);
    report.set("content_bytes_per_turn", usual.content);
    report.set("stored_over_content", usual.events / usual.content);
    Ok(())
}

/// Bytes per turn.
struct Stored {
    events: f64,
    content: f64,
}

/// What new chats' turns leave behind, and Temporal's events per turn.
async fn stored(bench: &Bench, text: &str) -> Result<(Stored, f64)> {
    let mut chats = chats(bench, SHELL, CHATS).await?;
    each_has(&mut chats, COUNTED, text).await?;
    let (temporal, mut events) = (HttpApi::find().await?, 0);
    for chat in &chats {
        events += temporal.history_events(chat.chat()).await?;
    }
    let turns = (CHATS * COUNTED) as f64;
    let ids: Vec<String> = chats.iter().map(|chat| format!("'{}'", chat.chat())).collect();
    let ids = ids.join(", ");
    // A row with its header, as it lies in its page; indexes are not in it.
    let rows = format!("SELECT sum(pg_column_size(e.*)) FROM events e WHERE chat_id IN ({ids})");
    let blocks = format!(
        "SELECT sum(octet_length(b.data)) FROM content_blocks b JOIN messages m ON m.id = b.message_id
         WHERE m.chat_id IN ({ids})"
    );
    let stored = Stored { events: bytes(bench, &rows).await? / turns, content: bytes(bench, &blocks).await? / turns };
    Ok((stored, events as f64 / turns))
}

async fn bytes(bench: &Bench, sql: &str) -> Result<f64> {
    let url = &bench.rig.database_url;
    let database = url.rsplit('/').next().and_then(|name| name.split('?').next()).unwrap_or_default();
    let answer = Rig::shared_servers().await?.sql(database, sql).await?;
    answer.trim().parse().with_context(|| format!("no number of bytes: {answer:?}"))
}
