//! `reliant chat`: a conversation in a terminal. Live text, tool calls, approvals asked; Ctrl-C cancels the turn.

use std::{
    collections::{BTreeMap, HashSet},
    io::{IsTerminal as _, Write as _},
};

use anyhow::{Context as _, Result, bail};
use reliant_client::{ChatSession, ChatView, Client, From};
use reliant_types::{ChatId, TurnId, pb};
use tokio::signal;

use crate::{
    args::{ChatArgs, Mode},
    front,
    input::{self, Input, Typed},
    question::{self, Answer},
    render::{Renderer, Seen},
    up::say,
};

const TITLE_CHARS: usize = 60;
/// Messages read at one time where a chat is longer than its snapshot.
const PAGE_SIZE: i32 = 200;

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
    let piped = tokio::task::spawn_blocking(input::piped).await??;
    let from_pipe = piped.is_some();
    let message = input::message(&args.message, piped);
    if message.is_empty() && from_pipe {
        bail!("the input is empty, so nothing was sent; give a message or run it in a terminal");
    }
    let chat = match &args.chat {
        Some(id) => id.parse::<ChatId>()?,
        None => new_chat(&client, &args, &message).await?,
    };
    let mut renderer = Renderer::new(std::io::stdout(), std::io::stdout().is_terminal()).full(args.full);
    let from = if args.chat.is_some() { From::Start } else { From::Snapshot };
    let mut session = client.open_from(chat, from).await?;
    let mut input = Input::new()?;
    if message.is_empty() {
        renderer.notice(&format!("chat {chat}; Ctrl-D leaves, Ctrl-C cancels a turn"))?;
    }
    if args.chat.is_some() {
        show(&session, &mut renderer, args.all).await?;
        // Its turns go on in front of the person's eyes; a message then comes behind them.
        while let Some(turn) = open_turn(session.view()) {
            watch(&mut session, &mut renderer, &mut input, turn).await?;
        }
    }
    if !message.is_empty() {
        let turn = converse(&mut session, &mut renderer, &mut input, &message).await?;
        if turn.status() != pb::TurnStatus::Succeeded {
            bail!("the turn did not succeed: {}", ending(&turn));
        }
        return Ok(());
    }
    while let Some(typed) = ask(&mut input, "\n> ").await? {
        let text = match typed {
            Typed::Text(text) => text,
            Typed::Refused(why) => {
                renderer.notice(why)?;
                continue;
            }
        };
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

/// The present of a chat: the message of the turn that runs, or else of the newest one, and all that came behind it.
struct Present {
    messages: BTreeMap<i32, pb::Message>,
    /// The first one that is shown.
    begin: i32,
}

impl Present {
    fn new(view: &ChatView) -> Self {
        Self { messages: view.messages.clone(), begin: 0 }
    }

    fn first(&self) -> i32 {
        self.messages.keys().next().copied().unwrap_or_default()
    }

    /// Finds the beginning among what is known; false: older messages are needed for it.
    fn begins(&mut self, open: Option<&str>, all: bool) -> bool {
        let known = self.first() <= 1;
        let newest = self.messages.values().rev().find(|message| message.role() != pb::Role::Notice);
        let Some(turn) = open.or(newest.map(|message| message.turn_id.as_str())) else { return true };
        let opening =
            self.messages.values().find(|message| message.role() == pb::Role::User && message.turn_id == turn);
        self.begin = opening.filter(|_| !all).map_or(self.first(), |message| message.ordinal);
        known || opening.is_some() && !all
    }
}

/// Shows the newest turn from its beginning, or the whole chat; says how much of it is not shown. A snapshot may begin in
/// the middle of a long turn: what is older is then read by pages.
async fn show<W: std::io::Write>(session: &ChatSession, renderer: &mut Renderer<W>, all: bool) -> Result<()> {
    let view = session.view();
    let open = open_turn(view);
    let mut present = Present::new(view);
    while !present.begins(open.as_deref(), all) {
        let request = pb::ListMessagesRequest {
            chat_id: session.chat().to_string(),
            page_size: PAGE_SIZE,
            before_ordinal: present.first(),
        };
        let page = session.client().list_messages(request).await?;
        if page.messages.is_empty() {
            break;
        }
        present.messages.extend(page.messages.into_iter().map(|message| (message.ordinal, message)));
    }
    if present.begin > 1 {
        renderer.left_out(present.begin - 1, "are older and not shown", &session.chat().to_string())?;
    }
    renderer.catch_up(present.messages.range(present.begin..).map(|(_, message)| message), view)?;
    Ok(())
}

/// The oldest turn that is not at its end.
fn open_turn(view: &ChatView) -> Option<String> {
    let ended = |turn: &&pb::Turn| {
        use pb::TurnStatus::{Cancelled, Failed, Succeeded};
        matches!(turn.status(), Succeeded | Failed | Cancelled)
    };
    view.turns.values().find(|turn| !ended(turn)).map(|turn| turn.id.clone())
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

async fn new_chat(client: &Client, args: &ChatArgs, message: &str) -> Result<ChatId> {
    let mode = match args.mode {
        Mode::Ask => pb::ChatMode::Ask,
        Mode::Auto => pb::ChatMode::Auto,
        Mode::Plan => pb::ChatMode::Plan,
    };
    let request = pb::CreateChatRequest {
        title: title(message),
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
    renderer.typed(sent.message.as_ref());
    let turn = sent.turn.context("the api did not say which turn this is")?;
    watch(session, renderer, input, turn.id).await
}

/// Shows a turn to its end, and asks what the chat's turns ask; Ctrl-C cancels the turn, once more leaves.
async fn watch<W: std::io::Write>(
    session: &mut ChatSession,
    renderer: &mut Renderer<W>,
    input: &mut Input,
    turn_id: String,
) -> Result<pb::Turn> {
    let id: TurnId = turn_id.parse()?;
    let mut cancelled = false;
    let mut decided = HashSet::new();
    loop {
        // Also what was asked before this terminal looked, and by a turn that this one waits for.
        while let Some(approval) = open_question(&session.view().approvals, &decided) {
            decided.insert(approval.id.clone());
            match question::ask(renderer, input, &approval).await? {
                Answer::Decided { approve, scope } => {
                    let scope = scope.into();
                    let request = pb::DecideApprovalRequest { approval_id: approval.id, approve, scope };
                    session.client().decide_approval(request).await?;
                }
                Answer::Interrupted => {
                    cancel(session, approval.turn_id.parse()?, &mut cancelled).await?;
                    let of_turn = session.view().approvals.values().filter(|other| other.turn_id == approval.turn_id);
                    decided.extend(of_turn.map(|other| other.id.clone()));
                }
            }
        }
        let update = tokio::select! {
            update = session.next() => update?,
            pressed = signal::ctrl_c() => {
                pressed.context("could not listen for Ctrl-C")?;
                input.discard().await;
                cancel(session, id, &mut cancelled).await?;
                continue;
            }
        };
        match renderer.update(&update)? {
            Seen::TurnEnded(turn) if turn.id == turn_id => return Ok(*turn),
            _ => {}
        }
    }
}

/// The oldest question of a chat that waits and was not put to the person yet.
fn open_question(approvals: &BTreeMap<String, pb::Approval>, decided: &HashSet<String>) -> Option<pb::Approval> {
    let waits =
        |approval: &&pb::Approval| approval.status() == pb::ApprovalStatus::Pending && !decided.contains(&approval.id);
    approvals.values().find(waits).cloned()
}

async fn cancel(session: &ChatSession, turn: TurnId, cancelled: &mut bool) -> Result<()> {
    if std::mem::replace(cancelled, true) {
        bail!("left; the turn is cancelled on the server");
    }
    session.cancel(turn).await?;
    Ok(())
}

async fn ask(input: &mut Input, prompt: &str) -> Result<Option<Typed>> {
    eprint!("{prompt}");
    std::io::stderr().flush()?;
    tokio::select! {
        typed = input.next() => Ok(typed),
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
    use super::*;

    #[test]
    fn a_message_of_many_lines_makes_a_title_of_one() {
        assert_eq!(title("mend the\n\ttests\u{7}"), "mend the tests");
        assert_eq!(title(" \n"), "Terminal");
        assert_eq!(title(&"ä".repeat(100)).chars().count(), 60);
    }

    fn chat(messages: &[(&str, pb::Role)], from: i32) -> Present {
        let message = |at: usize, (turn, role): &(&str, pb::Role)| {
            let ordinal = from + at as i32;
            (ordinal, pb::Message { ordinal, turn_id: (*turn).into(), role: *role as i32, ..Default::default() })
        };
        let messages = messages.iter().enumerate().map(|(at, one)| message(at, one)).collect();
        Present { messages, begin: 0 }
    }

    #[test]
    fn each_open_question_of_a_chat_is_asked_once_whatever_turn_asks() {
        let asked = |id: &str, turn_id: &str, status: pb::ApprovalStatus| {
            let approval =
                pb::Approval { id: id.into(), turn_id: turn_id.into(), status: status.into(), ..Default::default() };
            (approval.id.clone(), approval)
        };
        let approvals = BTreeMap::from([
            asked("1", "first", pb::ApprovalStatus::Approved),
            asked("2", "first", pb::ApprovalStatus::Pending),
            asked("3", "second", pb::ApprovalStatus::Pending),
        ]);
        let mut decided = HashSet::new();
        let mut order = Vec::new();
        while let Some(approval) = open_question(&approvals, &decided) {
            decided.insert(approval.id.clone());
            order.push(approval.id);
        }
        assert_eq!(order, ["2", "3"]);
    }

    #[test]
    fn the_present_is_shown_from_its_beginning() {
        use pb::Role::{Assistant, Notice, Tool, User};
        let mut short = chat(&[("a", User), ("a", Assistant), ("b", User), ("b", Assistant), ("", Notice)], 1);
        assert!(short.begins(None, false));
        assert_eq!(short.begin, 3, "the newest turn");
        assert!(short.begins(Some("a"), false));
        assert_eq!(short.begin, 1, "the turn that runs, others wait behind it");
        assert!(short.begins(None, true));
        assert_eq!(short.begin, 1);

        let mut cut = chat(&[("a", Tool), ("a", Assistant), ("b", User)], 7);
        assert!(!cut.begins(Some("a"), false), "its message is older than what is here");
        assert!(cut.begins(None, false));
        assert_eq!(cut.begin, 9);
        assert!(!cut.begins(None, true), "all is wanted");
        assert!(chat(&[], 1).begins(None, false));
    }
}
