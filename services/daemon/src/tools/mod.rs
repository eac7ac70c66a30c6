//! The tools a daemon offers, by name. A call is prepared first (name, root, arguments: anything wrong is refused
//! before a record is written) and run later.

mod edit;
pub mod environment;
#[cfg(test)]
mod escape;
pub mod files;
mod grep;
mod list;
pub mod process;
mod read;
mod rules;
pub mod sandbox;
mod schema;
mod shell;
mod stoppable;
pub mod tree;
mod walk;
mod write;

#[cfg(test)]
pub mod tests;

use std::{path::PathBuf, sync::Arc, time::Duration};

use reliant_types::{Code, Failure, ToolCallId, limits, pb};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::{
    confine::ConfineError,
    mcp::{Mcp, McpCall},
    output::{Block, CallOutput, Gather, HeadTail, LiveHub},
    roots::Root,
};
use files::Files;
use sandbox::Sandbox;

/// How a call came to its end.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub status: pb::ToolCallStatus,
    pub cause: pb::UnknownCause,
    /// What the model reads.
    pub content: Vec<u8>,
    pub is_error: bool,
    pub exit_code: Option<i32>,
    /// Set where the platform, not the tool, ended the call.
    pub code: Option<Code>,
    pub output_bytes: u64,
}

impl Outcome {
    fn new(status: pb::ToolCallStatus, content: Vec<u8>) -> Self {
        Self {
            status,
            cause: pb::UnknownCause::Unspecified,
            output_bytes: content.len() as u64,
            content: HeadTail::of(&content, limits::TOOL_RESULT_MAX_BYTES),
            is_error: status != pb::ToolCallStatus::Succeeded,
            exit_code: None,
            code: None,
        }
    }

    pub fn succeeded(content: impl Into<Vec<u8>>) -> Self {
        Self::new(pb::ToolCallStatus::Succeeded, content.into())
    }

    pub fn failed(code: Code, text: impl Into<String>) -> Self {
        Self { code: Some(code), ..Self::new(pb::ToolCallStatus::Failed, text.into().into_bytes()) }
    }

    pub fn cancelled(content: impl Into<Vec<u8>>) -> Self {
        Self { code: Some(Code::Cancelled), ..Self::new(pb::ToolCallStatus::Cancelled, content.into()) }
    }

    pub fn timed_out(content: impl Into<Vec<u8>>) -> Self {
        Self { code: Some(Code::ToolTimedOut), ..Self::new(pb::ToolCallStatus::TimedOut, content.into()) }
    }

    /// The process that ran the call died, and whether the call ran to its end cannot be known.
    pub fn process_died(text: impl Into<String>) -> Self {
        Self {
            cause: pb::UnknownCause::ProcessDied,
            code: Some(Code::OutcomeUnknown),
            ..Self::new(pb::ToolCallStatus::OutcomeUnknown, text.into().into_bytes())
        }
    }
}

/// A tool's own error: a sentence for the model, with the way out.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    #[error(transparent)]
    Confine(#[from] ConfineError),
    #[error("{0}")]
    Failed(String),
    #[error("the call was cancelled")]
    Cancelled,
}

impl ToolError {
    pub fn failed(text: impl Into<String>) -> Self {
        Self::Failed(text.into())
    }
}

impl From<ToolError> for Outcome {
    fn from(error: ToolError) -> Self {
        let code = match &error {
            ToolError::Confine(ConfineError::Outside { .. }) => Code::PathOutsideRoot,
            ToolError::Confine(_) | ToolError::Failed(_) => Code::ToolFailed,
            ToolError::Cancelled => return Self::cancelled(error.to_string()),
        };
        Self::failed(code, error.to_string())
    }
}

/// Where and under what a call runs.
pub struct Job {
    pub call: ToolCallId,
    pub turn_id: String,
    pub iteration: i32,
    pub index: i32,
    pub root: Arc<Root>,
    pub timeout: Duration,
    pub cancel: CancellationToken,
    pub output: Arc<CallOutput>,
    pub hub: Arc<LiveHub>,
    pub traceparent: String,
    /// Holds a file with the pid of each running process.
    pub running_dir: PathBuf,
}

/// A call whose name and arguments were found good.
#[derive(Debug)]
pub enum Prepared {
    Shell(shell::Args),
    ReadFile(read::Args),
    WriteFile(write::Args),
    EditFile(edit::Args),
    ListDir(list::ListArgs),
    Glob(list::GlobArgs),
    Grep(grep::Args),
    Mcp(McpCall),
    /// Does nothing, for measurements.
    Noop,
}

pub struct Toolbox {
    pub mcp: Arc<Mcp>,
    pub files: Arc<Files>,
    pub sandbox: Sandbox,
    pub bench_tools: bool,
}

/// Our own read-only tools: they may run again, and plan mode offers them.
pub fn is_read_only(tool: &str) -> bool {
    matches!(tool, "read_file" | "list_dir" | "glob" | "grep")
}

fn arguments<T: DeserializeOwned>(tool: &str, input: Value) -> Result<T, Failure> {
    serde_json::from_value(input).map_err(|e| {
        Failure::new(
            Code::ToolArgumentsInvalid,
            format!("the arguments do not fit {tool}: {e}; give a JSON object as the tool's schema says"),
        )
    })
}

impl Toolbox {
    /// Our own tools, and those of the MCP servers that are up.
    pub fn declarations(&self) -> Vec<pb::ToolDeclaration> {
        let mut tools = schema::own(&self.sandbox, self.bench_tools);
        let room = limits::DAEMON_TOOLS_MAX - tools.len();
        tools.extend(self.mcp.declarations(room));
        tools
    }

    pub fn prepare(&self, root: &Root, tool: &str, input_json: &str) -> Result<Prepared, Failure> {
        if input_json.len() > limits::TOOL_INPUT_MAX_BYTES {
            let max = limits::TOOL_INPUT_MAX_BYTES;
            return Err(Failure::new(Code::ToolArgumentsInvalid, format!("the arguments are longer than {max} bytes")));
        }
        let text = if input_json.trim().is_empty() { "{}" } else { input_json };
        let input: Value = serde_json::from_str(text).map_err(|e| {
            Failure::new(Code::ToolArgumentsInvalid, format!("the arguments of {tool} are not JSON: {e}"))
        })?;
        Ok(match tool {
            "shell" => Prepared::Shell(arguments::<shell::Args>(tool, input)?.checked()?),
            "read_file" => Prepared::ReadFile(arguments(tool, input)?),
            "write_file" => Prepared::WriteFile(arguments(tool, input)?),
            "edit_file" => Prepared::EditFile(arguments::<edit::Args>(tool, input)?.checked()?),
            "list_dir" => Prepared::ListDir(arguments(tool, input)?),
            "glob" => Prepared::Glob(arguments::<list::GlobArgs>(tool, input)?.checked()?),
            "grep" => Prepared::Grep(arguments::<grep::Args>(tool, input)?.checked()?),
            "noop" if self.bench_tools => Prepared::Noop,
            _ => match self.mcp.prepare(&root.id, tool, input)? {
                Some(call) => Prepared::Mcp(call),
                None => {
                    return Err(Failure::new(Code::ToolUnknown, format!("this daemon offers no tool named '{tool}'")));
                }
            },
        })
    }

    pub async fn run(&self, prepared: Prepared, job: Job) -> Outcome {
        let files = self.files.of_chat(&job.output.chat_id);
        match prepared {
            Prepared::Noop => Outcome::succeeded("ok"),
            Prepared::Shell(args) => shell::run(args, job, &self.sandbox).await,
            Prepared::Mcp(call) => self.mcp.call(call, job).await,
            Prepared::ReadFile(args) => blocking(job, move |root, cancel| read::run(&args, root, &files, cancel)).await,
            Prepared::WriteFile(args) => {
                blocking(job, move |root, cancel| write::run(&args, root, &files, cancel)).await
            }
            Prepared::EditFile(args) => blocking(job, move |root, cancel| edit::run(&args, root, &files, cancel)).await,
            Prepared::ListDir(args) => blocking(job, move |root, cancel| list::list_dir(&args, root, cancel)).await,
            Prepared::Glob(args) => blocking(job, move |root, cancel| list::glob(&args, root, cancel)).await,
            Prepared::Grep(args) => blocking(job, move |root, cancel| grep::run(&args, root, cancel)).await,
        }
    }
}

/// Runs a file tool off the reactor. It ends by itself soon after a cancel, so its true end is what is recorded; only
/// a file system that hangs is given up on.
async fn blocking(
    job: Job,
    run: impl FnOnce(&Root, &CancellationToken) -> Result<Vec<u8>, ToolError> + Send + 'static,
) -> Outcome {
    const GIVE_UP: Duration = Duration::from_secs(2);
    let stop = job.cancel.child_token();
    let root = job.root.clone();
    let token = stop.clone();
    let mut task = tokio::task::spawn_blocking(move || run(&root, &token));
    let mut timed_out = false;
    tokio::select! {
        done = &mut task => return settle(done, &job, false),
        () = job.cancel.cancelled() => {}
        () = tokio::time::sleep(job.timeout) => timed_out = true,
    }
    stop.cancel();
    match tokio::time::timeout(GIVE_UP, task).await {
        Ok(done) => settle(done, &job, timed_out),
        Err(_) if timed_out => {
            Outcome::timed_out(format!("timed out after {:?}; the file system does not answer", job.timeout))
        }
        Err(_) => Outcome::cancelled("cancelled; the file system does not answer"),
    }
}

fn settle(done: Result<Result<Vec<u8>, ToolError>, tokio::task::JoinError>, job: &Job, timed_out: bool) -> Outcome {
    match done {
        Ok(Ok(content)) => {
            // What the model does not get can be read from here.
            Gather::new(job.hub.clone(), job.output.clone()).push(Block::Stdout, &content);
            Outcome::succeeded(content)
        }
        Ok(Err(ToolError::Cancelled)) if timed_out => Outcome::timed_out(format!("timed out after {:?}", job.timeout)),
        Ok(Err(error)) => error.into(),
        Err(panic) => Outcome::failed(Code::Internal, format!("the tool failed by a fault of the daemon: {panic}")),
    }
}
