//! `shell`: a command in a session of its own, its output streamed while it runs.
//!
//! A call ends when the shell has: what it left in the background may keep the pipes open, is not waited for, and is
//! counted in the result. On timeout or cancel every process of the call is killed.

use std::{os::unix::process::ExitStatusExt, process::Stdio, time::Duration};

use reliant_types::{Code, Failure, limits, pb};
use rustix::process::Signal;
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, Command},
    time::{Instant, sleep_until},
};
use tracing::Instrument;

use super::{
    Job, Outcome,
    process::{CALL_ID_VAR, KILL_GRACE, PidFile, kill_calls, signal_group},
    sandbox::{Kind, Sandbox},
    tree::{self, Started},
};
use crate::output::{Block, Gather};

const READ_BYTES: usize = 64 * 1024;
/// After the shell's own end, for what is still in the pipes.
const PIPE_GRACE: Duration = Duration::from_millis(200);
/// After SIGKILL, until the call ends without its process.
const UNKILLABLE: Duration = Duration::from_secs(2);
const NOTE_MAX_BYTES: usize = 256;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Args {
    command: String,
    timeout_seconds: Option<u64>,
}

impl Args {
    pub fn checked(self) -> Result<Self, Failure> {
        let bad = |text: &str| Err(Failure::new(Code::ToolArgumentsInvalid, text));
        if self.command.trim().is_empty() {
            return bad("the command is empty");
        }
        if self.command.contains('\0') {
            return bad("the command holds a NUL byte");
        }
        if self.timeout_seconds == Some(0) {
            return bad("timeout_seconds must be at least 1");
        }
        Ok(self)
    }
}

fn shell() -> &'static str {
    let bash = ["/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash"];
    bash.into_iter().find(|path| std::path::Path::new(path).exists()).unwrap_or("sh")
}

fn command(args: &Args, job: &Job, sandbox: &Sandbox) -> Command {
    let mut command = Command::new(shell());
    sandbox.environment().apply(&mut command);
    command
        .arg("-c")
        .arg(&args.command)
        .current_dir(job.root.path())
        .env(CALL_ID_VAR, job.call.to_string())
        .env("RELIANT_TURN_ID", &job.turn_id)
        .env("RELIANT_ITERATION", job.iteration.to_string())
        .env("RELIANT_CALL_INDEX", job.index.to_string())
        .env("TERM", "dumb")
        .env("PAGER", "cat")
        .env("GIT_PAGER", "cat")
        .env("GIT_TERMINAL_PROMPT", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if !job.traceparent.is_empty() {
        command.env("TRACEPARENT", &job.traceparent);
    }
    command
}

pub async fn run(args: Args, job: Job, sandbox: &Sandbox) -> Outcome {
    let timeout = args.timeout_seconds.map_or(limits::TOOL_TIMEOUT, Duration::from_secs).min(job.timeout);
    let span = tracing::info_span!(
        reliant_telemetry::names::span::TOOL_PROCESS,
        process.executable.name = shell().rsplit('/').next(),
        process.pid = tracing::field::Empty,
        process.exit.code = tracing::field::Empty,
        error.type = tracing::field::Empty,
        otel.status_code = tracing::field::Empty,
    );
    async {
        let mut child = match sandbox.spawn(Kind::Shell, command(&args, &job, sandbox), job.root.path(), &[]).await {
            Ok(child) => child,
            Err(e) => return Outcome::failed(Code::ToolFailed, format!("the shell could not be started: {e}")),
        };
        let Some(pid) = child.id() else { return Outcome::failed(Code::Internal, "the shell has no pid") };
        tracing::Span::current().record("process.pid", pid);
        let leader = tree::started(pid).unwrap_or(Started { pid, at: u64::MAX });
        let pid_file = PidFile::write(&job.running_dir, job.call, pid);
        let mut gather = Gather::new(job.hub.clone(), job.output.clone());
        let mut end = pump(&mut child, pid, &mut gather, timeout, &job).await;
        end.left = settle(leader, &job, end.stop.is_some()).await;
        if end.status.is_some() {
            tree::forget(pid);
        }
        if let Ok(pid_file) = pid_file
            && end.left > 0
        {
            pid_file.keep();
        }
        gather.flush();
        gather.lengths();
        say_end(&end);
        outcome(end, &gather, timeout)
    }
    .instrument(span)
    .await
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Stop {
    Cancelled,
    TimedOut,
}

struct End {
    stop: Option<Stop>,
    status: Option<std::process::ExitStatus>,
    /// Processes of the call that are alive.
    left: usize,
}

/// Kills what a stopped call started, or counts what an ended one left running.
async fn settle(leader: Started, job: &Job, stopped: bool) -> usize {
    let (dir, call) = (job.running_dir.clone(), job.call);
    let settled = tokio::task::spawn_blocking(move || {
        if stopped {
            let left = tree::kill(call, Some(leader));
            // Processes that had left the shell before it became their parent carry the call's mark.
            kill_calls(&dir, &[call]);
            left
        } else {
            tree::left_behind(call, leader)
        }
    });
    settled.await.unwrap_or(0)
}

/// Tells the process's span how it ended.
fn say_end(end: &End) {
    let span = tracing::Span::current();
    let exit = end.status.and_then(|status| status.code());
    if let Some(exit) = exit {
        span.record("process.exit.code", exit);
    }
    let error = match end.stop {
        Some(Stop::Cancelled) => "cancelled",
        Some(Stop::TimedOut) => "timed_out",
        None if exit == Some(0) => return,
        None if exit.is_some() => "exit_code",
        None => "signal",
    };
    span.record("error.type", error);
    span.record("otel.status_code", "ERROR");
}

/// `None` at the end of a pipe, or where it fails.
async fn read(pipe: &mut Option<impl AsyncRead + Unpin>, buffer: &mut [u8]) -> usize {
    match pipe {
        Some(open) => match open.read(buffer).await {
            Ok(0) | Err(_) => {
                *pipe = None;
                0
            }
            Ok(n) => n,
        },
        None => std::future::pending().await,
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

async fn pump(child: &mut Child, pid: u32, gather: &mut Gather, timeout: Duration, job: &Job) -> End {
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let (mut out, mut err) = (vec![0; READ_BYTES], vec![0; READ_BYTES]);
    let mut lengths = tokio::time::interval_at(Instant::now() + limits::LENGTH_INTERVAL, limits::LENGTH_INTERVAL);
    let deadline = Instant::now() + timeout;
    let mut end = End { stop: None, status: None, left: 0 };
    // The shell has ended: no longer than this for the pipes. It was asked to end: no longer than this until the kill.
    let (mut grace, mut kill_at) = (None, None);
    loop {
        if end.status.is_some() && stdout.is_none() && stderr.is_none() {
            break;
        }
        let flush_at = gather.due_in().map(|d| Instant::now() + d);
        tokio::select! {
            n = read(&mut stdout, &mut out) => if n > 0 { gather.push(Block::Stdout, &out[..n]) },
            n = read(&mut stderr, &mut err) => if n > 0 { gather.push(Block::Stderr, &err[..n]) },
            () = at(flush_at) => gather.flush(),
            _ = lengths.tick() => gather.lengths(),
            status = child.wait(), if end.status.is_none() => {
                end.status = Some(status.unwrap_or_else(|_| std::process::ExitStatus::from_raw(0)));
                grace = Some(Instant::now() + PIPE_GRACE);
                if end.stop.is_some() {
                    signal_group(pid, Signal::KILL);
                }
            }
            () = at(grace) => break,
            () = job.cancel.cancelled(), if end.stop.is_none() && end.status.is_none() => {
                end.stop = Some(Stop::Cancelled);
                signal_group(pid, Signal::TERM);
                kill_at = Some(Instant::now() + KILL_GRACE);
            }
            () = sleep_until(deadline), if end.stop.is_none() && end.status.is_none() => {
                end.stop = Some(Stop::TimedOut);
                signal_group(pid, Signal::TERM);
                kill_at = Some(Instant::now() + KILL_GRACE);
            }
            () = at(kill_at) => {
                kill_at = None;
                signal_group(pid, Signal::KILL);
                // A process that the kernel holds cannot be waited for.
                grace = Some(Instant::now() + UNKILLABLE);
            }
        }
    }
    end
}

fn outcome(end: End, gather: &Gather, timeout: Duration) -> Outcome {
    let mut content = gather.output().shown(limits::TOOL_RESULT_MAX_BYTES - NOTE_MAX_BYTES);
    let code = end.status.and_then(|s| s.code());
    let signal = end.status.and_then(|s| s.signal());
    let killed = match end.left {
        0 => "the command and all it started were killed".to_owned(),
        left => format!("{left} of its processes could not be killed and may still run"),
    };
    let mut note: String = match (end.stop, code, signal) {
        (Some(Stop::Cancelled), ..) => format!("[cancelled; {killed}]"),
        (Some(Stop::TimedOut), ..) => format!("[timed out after {} s; {killed}]", timeout.as_secs_f32()),
        (None, Some(0), _) if content.is_empty() => "(no output)".into(),
        (None, Some(0), _) => String::new(),
        (None, Some(code), _) => format!("[exit code {code}]"),
        (None, None, Some(signal)) => format!("[killed by signal {signal}]"),
        (None, None, None) => "[ended in an unknown way]".into(),
    };
    if end.stop.is_none() && end.left > 0 {
        let (count, verb) =
            if end.left == 1 { ("1 process".to_owned(), "runs") } else { (format!("{} processes", end.left), "run") };
        let gap = if note.is_empty() { "" } else { "\n" };
        note = format!("{note}{gap}[{count} of it still {verb} in the background, until the daemon stops]");
    }
    if !note.is_empty() {
        if !content.is_empty() && content.last() != Some(&b'\n') {
            content.push(b'\n');
        }
        content.extend_from_slice(note.as_bytes());
    }
    let outcome = match end.stop {
        Some(Stop::Cancelled) => Outcome::cancelled(content),
        Some(Stop::TimedOut) => Outcome::timed_out(content),
        None if code == Some(0) => Outcome::succeeded(content),
        None => Outcome { status: pb::ToolCallStatus::Failed, is_error: true, ..Outcome::succeeded(content) },
    };
    // A killed process has no code of its own; shells report 128 + signal.
    let exit_code = code.or(signal.map(|s| 128 + s));
    Outcome { exit_code, output_bytes: gather.output().total(), ..outcome }
}
