//! `reliant chat`: a conversation in a terminal. Live text, tool calls, approvals asked; Ctrl-C cancels the turn.

use std::io::{IsTerminal as _, Write as _};

use anyhow::{Context as _, Result, bail};
use reliant_client::{ChatSession, Client, From};
use reliant_types::{ChatId, TurnId, pb};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines, Stdin},
    signal,
};

use crate::{
    args::{ChatArgs, Mode},
    front,
    render::{Renderer, Seen},
    up::say,
};

const TITLE_CHARS: usize = 60;

/// Lines of the terminal; `None` ends the conversation.
type Input = Lines<BufReader<Stdin>>;

pub async fn run(args: ChatArgs) -> Result<()> {
    let guard = front::telemetry(&args.front)?;
    let outcome = Box::pin(talk(args)).await;
    guard.shutdown();
    outcome
}

async fn talk(args: ChatArgs) -> Result<()> {
    let client = front::connect(&args.front).await?;
    if args.models {
        return models(&client).await;
    }
    let chat = match &args.chat {
        Some(id) => id.parse::<ChatId>()?,
        None => new_chat(&client, &args).await?,
    };
    let mut renderer = Renderer::new(std::io::stdout(), std::io::stdout().is_terminal());
    let from = if args.chat.is_some() { From::Start } else { From::Snapshot };
    let mut session = client.open_from(chat, from).await?;
    let mut input = BufReader::new(tokio::io::stdin()).lines();
    if !args.message.is_empty() {
        let turn = converse(&mut session, &mut renderer, &mut input, &args.message.join(" ")).await?;
        if turn.status() != pb::TurnStatus::Succeeded {
            bail!("the turn did not succeed: {}", ending(&turn));
        }
        return Ok(());
    }
    renderer.notice(&format!("chat {chat}; Ctrl-D leaves, Ctrl-C cancels a turn"))?;
    while let Some(text) = ask(&mut input, "\n> ").await? {
        if text.trim().is_empty() {
            continue;
        }
        let turn = converse(&mut session, &mut renderer, &mut input, &text).await?;
        if turn.status() == pb::TurnStatus::Cancelled {
            renderer.notice("cancelled")?;
        }
    }
    Ok(())
}

async fn models(client: &Client) -> Result<()> {
    for model in client.list_models(pb::ListModelsRequest {}).await?.models {
        let mark = if model.default { " (default)" } else { "" };
        say(&format!("{:<44} {:>9} tokens{mark}", model.id, model.context_window));
    }
    Ok(())
}

/// A chat's title: the beginning of its first message, in one line.
fn title(message: &str) -> String {
    let plain: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let words: Vec<&str> = plain.split_whitespace().collect();
    if words.is_empty() { "Terminal".into() } else { words.join(" ").chars().take(TITLE_CHARS).collect() }
}

async fn new_chat(client: &Client, args: &ChatArgs) -> Result<ChatId> {
    let mode = match args.mode {
        Mode::Ask => pb::ChatMode::Ask,
        Mode::Auto => pb::ChatMode::Auto,
        Mode::Plan => pb::ChatMode::Plan,
    };
    let request = pb::CreateChatRequest {
        title: title(&args.message.join(" ")),
        daemon_id: front::daemon_id(client, args.daemon.as_deref()).await?,
        model: args.model.clone().unwrap_or_default(),
        mode: mode.into(),
        ..Default::default()
    };
    let (id, chat) = client.new_chat(request).await?;
    if chat.daemon_id.is_empty() {
        eprintln!(
            "no daemon is registered: the model has no tools (`reliant daemon register`, `reliant daemon start`)"
        );
    }
    Ok(id)
}

/// Sends a message and shows its turn to the end.
async fn converse<W: std::io::Write>(
    session: &mut ChatSession,
    renderer: &mut Renderer<W>,
    input: &mut Input,
    text: &str,
) -> Result<pb::Turn> {
    let sent = session.send(text).await?;
    let turn_id = sent.turn.context("the api did not say which turn this is")?.id;
    let id: TurnId = turn_id.parse()?;
    let mut cancelled = false;
    loop {
        let update = tokio::select! {
            update = session.next() => update?,
            pressed = signal::ctrl_c() => {
                pressed.context("could not listen for Ctrl-C")?;
                if cancelled {
                    bail!("left; the turn is cancelled on the server");
                }
                cancelled = true;
                session.cancel(id).await?;
                continue;
            }
        };
        match renderer.update(&update)? {
            Seen::ApprovalAsked(approval) if approval.turn_id == turn_id => {
                decide(session.client(), renderer, input, &approval).await?;
            }
            Seen::TurnEnded(turn) if turn.id == turn_id => return Ok(turn),
            _ => {}
        }
    }
}

async fn decide<W: std::io::Write>(
    client: &Client,
    renderer: &mut Renderer<W>,
    input: &mut Input,
    approval: &pb::Approval,
) -> Result<()> {
    renderer.notice(&format!("The agent wants to run {}: {}", approval.tool, approval.input_json))?;
    let (approve, scope) = loop {
        let answer = ask(input, "  [y] once   [a] always in this chat   [n] no  > ").await?;
        match answer.as_deref().map(str::trim) {
            Some("y" | "yes") => break (true, pb::ApprovalScope::Once),
            Some("a" | "always") => break (true, pb::ApprovalScope::Session),
            // The end of the input is nobody there to approve.
            Some("n" | "no") | None => break (false, pb::ApprovalScope::Once),
            Some(_) => renderer.notice("  please answer y, a or n")?,
        }
    };
    let request = pb::DecideApprovalRequest { approval_id: approval.id.clone(), approve, scope: scope.into() };
    client.decide_approval(request).await?;
    Ok(())
}

async fn ask(input: &mut Input, prompt: &str) -> Result<Option<String>> {
    eprint!("{prompt}");
    std::io::stderr().flush()?;
    tokio::select! {
        line = input.next_line() => Ok(line?),
        pressed = signal::ctrl_c() => {
            pressed?;
            eprintln!();
            Ok(None)
        }
    }
}

/// Why a turn ended, in a few words.
pub fn ending(turn: &pb::Turn) -> String {
    match turn.status() {
        pb::TurnStatus::Failed => format!("{} ({})", turn.error_message, turn.error_code),
        pb::TurnStatus::Cancelled => "cancelled".into(),
        pb::TurnStatus::Succeeded => "succeeded".into(),
        other => other.as_str_name().to_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::title;

    #[test]
    fn a_message_of_many_lines_makes_a_title_of_one() {
        assert_eq!(title("mend the\n\ttests\u{7}"), "mend the tests");
        assert_eq!(title(" \n"), "Terminal");
        assert_eq!(title(&"ä".repeat(100)).chars().count(), 60);
    }
}
