//! `reliant demo`: the main job once, without a terminal. A mesh in a scratch directory, a scratch git project, one
//! message through the front door; then everything that was promised is looked at. Fails if anything is off.

use std::{
    io::IsTerminal as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use reliant_client::{Client, ClientConfig, ClientUpdate, From};
use reliant_devstack::StackConfig;
use reliant_types::pb;

use crate::{
    args::DemoArgs,
    render::{Renderer, Seen},
    up::{self, Plan, say},
};

const TURN_PATIENCE: Duration = Duration::from_secs(300);
const MCP_PATIENCE: Duration = Duration::from_secs(60);
const SCRIPTED: &str = "demo";

pub async fn run(args: DemoArgs) -> Result<()> {
    let scratch = std::env::temp_dir().join(format!("reliant-demo-{}", std::process::id()));
    let project = scratch.join("project");
    let tools_dir = args.tools_dir.clone().unwrap_or_else(StackConfig::default_tools_dir);
    make_project(&project, &tools_dir)?;
    say(&format!("scratch project: {}", project.display()));
    let started = Instant::now();
    let plan = Plan {
        data_dir: scratch.join("data"),
        tools_dir: Some(tools_dir),
        root: project.clone(),
        trust_mcp: true,
        usual_ports: false,
        observe: false,
        environment: Vec::new(),
        config: None,
        settings: Vec::new(),
    };
    let up = up::start(plan).await?;
    say(&format!("mesh up in {:.1} s at {}", started.elapsed().as_secs_f64(), up.running.api_url));
    let outcome = tokio::time::timeout(TURN_PATIENCE, converse(&up, &args, &project)).await;
    let logs = scratch.join("data/logs");
    up::stop(up).await;
    let outcome = outcome.unwrap_or_else(|_| Err(anyhow::anyhow!("the turn took longer than {TURN_PATIENCE:?}")));
    if outcome.is_err() || args.keep {
        say(&format!("kept for a look: {} (logs in {})", scratch.display(), logs.display()));
    } else {
        std::fs::remove_dir_all(&scratch).with_context(|| format!("could not delete {}", scratch.display()))?;
    }
    outcome
}

/// A git project with an MCP server.
fn make_project(project: &Path, tools_dir: &Path) -> Result<()> {
    std::fs::create_dir_all(project).with_context(|| format!("could not make {}", project.display()))?;
    std::fs::write(project.join("README.md"), "# A scratch project\n")?;
    std::fs::write(project.join("AGENTS.md"), "Keep changes small.\n")?;
    let server = mcp_server(tools_dir)?;
    let config =
        serde_json::json!({ "mcpServers": { "time": { "command": server, "args": ["--local-timezone", "UTC"] } } });
    std::fs::write(project.join(".mcp.json"), serde_json::to_vec_pretty(&config)?)?;
    for args in [
        &["init", "--quiet"][..],
        &["add", "."],
        &["-c", "user.name=demo", "-c", "user.email=demo@localhost", "commit", "--quiet", "-m", "start"],
    ] {
        let status =
            Command::new("git").args(args).current_dir(project).status().context("git is needed for the demo")?;
        ensure!(status.success(), "git {} failed in {}", args[0], project.display());
    }
    Ok(())
}

fn mcp_server(tools_dir: &Path) -> Result<PathBuf> {
    let path = tools_dir.join("venv/bin/mcp-server-time");
    Some(path)
        .filter(|path| path.exists())
        .with_context(|| format!("mcp-server-time is not installed in {}; run `make tools`", tools_dir.display()))
}

async fn converse(up: &up::Up, args: &DemoArgs, project: &Path) -> Result<()> {
    let scripted = args.message.is_empty();
    let text = if scripted { SCRIPTED.to_owned() } else { args.message.join(" ") };
    let client = Client::connect(ClientConfig::new(up.running.api_url.clone(), up.running.token.clone())).await?;
    wait_for_mcp(&client).await?;
    let model = if scripted { "sim/default".to_owned() } else { String::new() };
    let request =
        pb::CreateChatRequest { title: "Demo".into(), model, mode: pb::ChatMode::Auto.into(), ..Default::default() };
    let (chat, chat_row) = client.new_chat(request).await?;
    say(&format!("\nmodel {}, mode auto\n> {text}\n", chat_row.model));

    let mut session = client.open_from(chat, From::Start).await?;
    let mut renderer = Renderer::new(std::io::stdout(), std::io::stdout().is_terminal());
    let sent_at = Instant::now();
    let sent = session.send(&text).await?;
    let accepted = sent_at.elapsed();
    renderer.typed(sent.message.as_ref());
    let turn_id = sent.turn.context("the api did not say which turn this is")?.id;
    let mut first_token = None;
    let turn = loop {
        let update = session.next().await?;
        if matches!(update, ClientUpdate::Delta(_)) {
            first_token.get_or_insert_with(|| sent_at.elapsed());
        }
        match renderer.update(&update)? {
            Seen::TurnEnded(turn) if turn.id == turn_id => break turn,
            _ => {}
        }
    };
    let total = sent_at.elapsed();
    let view = session.view();
    let calls: Vec<pb::ToolCall> = view.tool_calls_of(&turn_id).into_iter().cloned().collect();
    report(&turn, &calls, accepted, first_token, total);
    let seen = session.verification();
    say(&format!(
        "stream      {} bytes live, {} holes, {} duplicates, {} reorderings, {} text mismatches",
        seen.bytes, seen.holes, seen.duplicates, seen.reorderings, seen.text_mismatches
    ));
    phases(up).await?;
    ensure!(seen.is_clean(), "the stream broke its promise");
    ensure!(turn.status() == pb::TurnStatus::Succeeded, "the turn did not succeed: {}", crate::chat::ending(&turn));
    if scripted {
        check(&calls, project)?;
        say("all as expected");
    }
    Ok(())
}

/// The scripted message has one shell call, a file written and edited, and an MCP call; each must have worked.
fn check(calls: &[pb::ToolCall], project: &Path) -> Result<()> {
    for (what, wanted) in [("shell", "shell"), ("file edit", "edit_file"), ("MCP", "mcp__")] {
        let call = calls.iter().find(|call| call.tool.starts_with(wanted));
        let call = call.with_context(|| format!("there was no {what} call"))?;
        ensure!(
            call.status() == pb::ToolCallStatus::Succeeded && !call.is_error,
            "the {what} call did not work: {} {}",
            call.status().as_str_name(),
            call.result
        );
    }
    let git = Command::new("git").args(["status", "--short"]).current_dir(project).output()?;
    let changed = String::from_utf8_lossy(&git.stdout).into_owned();
    ensure!(!changed.trim().is_empty(), "the agent's edit did not reach the project's files");
    say(&format!("git status  {}", changed.trim().replace('\n', "; ")));
    Ok(())
}

fn report(turn: &pb::Turn, calls: &[pb::ToolCall], accepted: Duration, first_token: Option<Duration>, total: Duration) {
    let ms = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1000.0);
    say("");
    say(&format!("accepted    after {}", ms(accepted)));
    say(&format!("first token after {}", first_token.map_or("–".into(), ms)));
    for call in calls {
        let run = match (&call.started_at, &call.ended_at) {
            (Some(start), Some(end)) => {
                let seconds = (end.seconds - start.seconds) as f64 + f64::from(end.nanos - start.nanos) / 1e9;
                format!("{:.1} ms", seconds * 1000.0)
            }
            _ => "–".into(),
        };
        say(&format!("tool        {} ({run})", call.tool));
    }
    say(&format!("turn        {} in {}, {} model rounds", crate::chat::ending(turn), ms(total), turn.iteration));
    say(&format!("trace id    {}", turn.trace_id));
}

/// What the roles' own histograms say of this one turn.
async fn phases(up: &up::Up) -> Result<()> {
    let mut lines = Vec::new();
    for role in up.mesh.apis.iter().chain(&up.mesh.workers).chain(&up.mesh.gateways) {
        let Some(admin) = role.addresses().admin else { continue };
        let (_, metrics) = reliant_devstack::http_get(admin, "/metrics").await?;
        for line in metrics.lines() {
            let Some(rest) = line.strip_prefix("reliant_turn_phase_seconds_sum{phase=\"") else { continue };
            if let Some((phase, value)) = rest.split_once("\"} ")
                && let Ok(seconds) = value.parse::<f64>()
            {
                lines.push(format!("{phase} {:.1} ms", seconds * 1000.0));
            }
        }
    }
    say(&format!("phases      {}", if lines.is_empty() { "none recorded".to_owned() } else { lines.join(", ") }));
    Ok(())
}

async fn wait_for_mcp(client: &Client) -> Result<()> {
    let deadline = Instant::now() + MCP_PATIENCE;
    loop {
        let daemons = client.list_daemons(pb::ListDaemonsRequest { include_revoked: false }).await?.daemons;
        if daemons.iter().flat_map(|daemon| &daemon.tools).any(|tool| tool.name.starts_with("mcp__")) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the project's MCP server did not offer its tools within {MCP_PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
