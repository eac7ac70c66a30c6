//! MCP over a child process: in a session of its own, confined as shell commands are unless the configuration names it,
//! its stderr in our log, within bounds.

use std::{collections::BTreeMap, path::Path, process::Stdio, time::Duration};

use futures::future::BoxFuture;
use reliant_telemetry::chain;
use rmcp::{ServiceExt, transport::async_rw::AsyncRwTransport};
use rustix::process::Signal;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{ChildStderr, ChildStdin, ChildStdout, Command},
    sync::watch,
};

use super::{
    content::readable,
    server::{Handler, Service},
};
use crate::tools::{
    process::{KILL_GRACE, SERVER_VAR, signal_group},
    sandbox::{Kind, Sandbox},
    tree,
};

/// One message of a server; longer ones are dropped, and their call times out.
pub const MESSAGE_MAX_BYTES: usize = 8 * 1024 * 1024;
const STDERR_LINE_MAX_BYTES: usize = 1024;
/// Lines of stderr in a minute.
const STDERR_LINES_MAX: usize = 60;
/// After its input was closed, until it is asked to end.
const END_GRACE: Duration = Duration::from_secs(1);

/// Resolves when the server's process is gone; never, for a server without one.
pub type Death = BoxFuture<'static, ()>;

/// How a daemon's servers are started.
#[derive(Debug, Clone)]
pub struct Launcher {
    pub sandbox: Sandbox,
    /// What each server carries in [`SERVER_VAR`].
    pub mark: String,
    /// Servers that run without the sandbox.
    pub unconfined: Vec<String>,
}

pub struct Child {
    pid: u32,
    dead: watch::Receiver<bool>,
    pipes: Option<(ChildStdout, ChildStdin)>,
}

impl Child {
    pub async fn spawn(
        name: &str,
        program: &str,
        args: &[String],
        env: &BTreeMap<String, String>,
        root: &Path,
        launcher: &Launcher,
    ) -> Result<Self, String> {
        let mut command = Command::new(program);
        launcher.sandbox.environment().apply(&mut command);
        command
            .args(args)
            .envs(env)
            .env(SERVER_VAR, &launcher.mark)
            .current_dir(root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let started = if launcher.unconfined.iter().any(|unconfined| unconfined == name) {
            launcher.sandbox.spawn_unconfined(command)
        } else {
            let more = readable(program, args);
            launcher.sandbox.spawn(Kind::Server, command, root, &more).await
        };
        let mut child = started.map_err(|e| format!("'{program}' cannot be started: {e}"))?;
        let pid = child.id().ok_or("its process has no pid")?;
        let pipes = child.stdout.take().zip(child.stdin.take());
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(log_stderr(name.to_owned(), stderr));
        }
        let (died, dead) = watch::channel(false);
        tokio::spawn(async move {
            let _ = child.wait().await;
            tree::forget(pid);
            died.send_replace(true);
        });
        Ok(Self { pid, dead, pipes })
    }

    pub async fn connect(&mut self, handler: Handler) -> Result<(Service, Death), String> {
        let (stdout, stdin) = self.pipes.take().ok_or("its pipes are gone")?;
        let transport = AsyncRwTransport::new_client(stdout, stdin).with_max_line_length(MESSAGE_MAX_BYTES);
        let mut early = self.dead.clone();
        let mut dead = self.dead.clone();
        let service = tokio::select! {
            service = handler.serve(transport) => service.map_err(|e| format!("it does not speak MCP: {}", short(&chain(&e))))?,
            _ = early.wait_for(|dead| *dead) => return Err("its process ended at once".into()),
        };
        let death = async move {
            let _ = dead.wait_for(|dead| *dead).await;
        };
        Ok((service, Box::pin(death)))
    }

    /// Its input is closed by now: it gets a moment, then a signal, then none.
    pub async fn end(mut self) {
        self.pipes = None;
        for (signal, patience) in [(None, END_GRACE), (Some(Signal::TERM), KILL_GRACE)] {
            if let Some(signal) = signal {
                signal_group(self.pid, signal);
            }
            let gone = tokio::time::timeout(patience, self.dead.wait_for(|dead| *dead)).await;
            if gone.is_ok() {
                break;
            }
        }
        // What it started goes with it.
        signal_group(self.pid, Signal::KILL);
        let _ = tokio::time::timeout(END_GRACE, self.dead.wait_for(|dead| *dead)).await;
    }
}

/// An error's text may hold what the server sent.
pub fn short(error: &(impl std::fmt::Display + ?Sized)) -> String {
    error.to_string().chars().filter(|c| !c.is_control()).take(300).collect()
}

async fn log_stderr(server: String, stderr: ChildStderr) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    let mut lines = 0;
    let mut since = tokio::time::Instant::now();
    loop {
        let (used, ended) = match reader.fill_buf().await {
            Ok([]) | Err(_) => return,
            Ok(bytes) => {
                let end = bytes.iter().position(|b| *b == b'\n');
                let part = &bytes[..end.unwrap_or(bytes.len())];
                let room = STDERR_LINE_MAX_BYTES - line.len();
                line.extend_from_slice(&part[..part.len().min(room)]);
                (part.len() + usize::from(end.is_some()), end.is_some())
            }
        };
        reader.consume(used);
        if !ended {
            continue;
        }
        if since.elapsed() > Duration::from_secs(60) {
            (lines, since) = (0, tokio::time::Instant::now());
        }
        lines += 1;
        if lines <= STDERR_LINES_MAX {
            let text: String = String::from_utf8_lossy(&line).chars().filter(|c| !c.is_control()).collect();
            tracing::debug!(server = %server, stderr = %text, "an MCP server says");
        }
        line.clear();
    }
}
