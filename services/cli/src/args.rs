//! The command line. Flags win over `RELIANT_*` environment variables, which win over the TOML file.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Runs AI coding agents for many people at once; no message, token or tool call is lost.
///
/// New here? `reliant up` starts everything on this machine and prints where to go.
#[derive(Debug, Parser)]
#[command(name = "reliant", version, propagate_version = true, max_term_width = 110)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Clone, Args)]
pub struct Global {
    /// TOML file with the configuration; `reliant config` shows all keys.
    #[arg(long, global = true, env = "RELIANT_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// One configuration key, for example `--set api.listen=127.0.0.1:7440`. May be repeated.
    #[arg(long = "set", global = true, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a whole mesh on this machine: Postgres, NATS, Temporal, api, worker, gateway and a daemon for this directory.
    Up(UpArgs),
    /// Talk to an agent in this terminal. Ctrl-C cancels the turn, twice leaves.
    Chat(ChatArgs),
    /// Run one role of the platform.
    #[command(subcommand)]
    Server(ServerCommand),
    /// The agent's hands on a developer's machine.
    #[command(subcommand)]
    Daemon(DaemonCommand),
    /// Create or update the database schema.
    Migrate,
    /// Personal access tokens, for programs.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Say what is reachable, what is wrong, and what to do about it.
    Doctor(FrontDoor),
    /// Print the effective configuration as TOML, secrets redacted.
    Config,
    /// Print where a turn's time went: its trace as a tree, as seen by `reliant up --observe`.
    Trace(TraceArgs),
    /// Take traces over OTLP on this machine, keep the newest in memory, and show them as a page.
    Observe(ObserveArgs),
    /// A deterministic model server on the OpenAI and Anthropic wire formats, for tests and first steps.
    ModelSim(ModelSimArgs),
    /// Start a mesh in a scratch directory, let an agent work in it, print what happened; fails if anything is off.
    Demo(DemoArgs),
}

#[derive(Debug, Subcommand)]
pub enum ServerCommand {
    /// The stateless front: gRPC, gRPC-web and the web page.
    Api(RoleArgs),
    /// Runs Temporal workflows: model calls, tool routing, results.
    Worker(RoleArgs),
    /// Holds the daemons' streams and bridges them to NATS.
    Gateway(RoleArgs),
}

#[derive(Debug, Clone, Args)]
pub struct RoleArgs {
    /// Write the bound addresses to this file as JSON once they are known (for port 0).
    #[arg(long, value_name = "FILE")]
    pub address_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub struct UpArgs {
    /// Where servers keep their data between runs [default: ~/.local/share/reliant].
    #[arg(long, env = "RELIANT_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Directory the daemon offers to the agent.
    #[arg(long, default_value = ".", value_name = "DIR")]
    pub root: PathBuf,
    /// Delete all data of the mesh first.
    #[arg(long)]
    pub reset: bool,
    /// Trust the MCP servers that `.mcp.json` of the root names.
    #[arg(long)]
    pub trust_mcp: bool,
    /// Where temporal-server and nats-server were installed [default: found by `make tools`].
    #[arg(long, env = "RELIANT_TOOLS_DIR", value_name = "DIR")]
    pub tools_dir: Option<PathBuf>,
    /// Take all traces, and show them as a page: where each turn's time went.
    #[arg(long)]
    pub observe: bool,
}

#[derive(Debug, Clone, Args)]
pub struct TraceArgs {
    /// A trace id, a chat id, or the beginning of one [default: the newest turn].
    #[arg(value_name = "ID")]
    pub id: Option<String>,
    /// The receiver's address [default: that of `reliant up --observe`].
    #[arg(long, env = "RELIANT_OBSERVE_URL", value_name = "URL")]
    pub url: Option<String>,
    /// Data directory of `reliant up` [default: ~/.local/share/reliant].
    #[arg(long, env = "RELIANT_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub struct ObserveArgs {
    /// One address of this machine for OTLP and for the page.
    #[arg(long, default_value = "127.0.0.1:7446")]
    pub listen: std::net::SocketAddr,
}

/// Which api to talk to, and as whom. Without flags: the mesh that `reliant up` started here.
#[derive(Debug, Clone, Args)]
pub struct FrontDoor {
    /// The api's address, for example http://127.0.0.1:7440.
    #[arg(long, env = "RELIANT_API_URL", value_name = "URL")]
    pub api: Option<String>,
    /// A personal access token.
    #[arg(long, env = "RELIANT_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub token: Option<String>,
    /// Data directory of `reliant up` [default: ~/.local/share/reliant].
    #[arg(long, env = "RELIANT_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Ask before each call that may change something.
    Ask,
    /// Run calls without asking.
    Auto,
    /// Read only.
    Plan,
}

#[derive(Debug, Clone, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub front: FrontDoor,
    /// Continue this chat instead of starting one: its newest turn is shown, and followed where it still runs.
    #[arg(long, value_name = "CHAT_ID")]
    pub chat: Option<String>,
    /// With --chat: show the chat from its beginning.
    #[arg(long, requires = "chat")]
    pub all: bool,
    /// Show arguments and outputs of tools whole; else long ones are cut in their middle.
    #[arg(long)]
    pub full: bool,
    /// Model, as `reliant chat --models` lists them.
    #[arg(long)]
    pub model: Option<String>,
    #[arg(long, value_enum, default_value = "ask")]
    pub mode: Mode,
    /// Daemon id or name; default: the only one.
    #[arg(long)]
    pub daemon: Option<String>,
    /// List the models and leave.
    #[arg(long)]
    pub models: bool,
    /// Send this message, print the turn, and leave. Without it the terminal stays open for a conversation.
    pub message: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum DaemonCommand {
    /// Make an identity for this machine and store its token.
    Register(DaemonRegisterArgs),
    /// Dial out to a gateway and run tools until stopped.
    Start(DaemonStartArgs),
    /// Say whether the daemon runs and is connected.
    Status(DaemonState),
    /// Stop the daemon; running calls are ended and recorded.
    Stop(DaemonState),
    /// Print the daemon's log.
    Logs(DaemonLogsArgs),
    /// Let the MCP servers of a root's `.mcp.json` start.
    Trust(DaemonTrustArgs),
}

#[derive(Debug, Clone, Args)]
pub struct DaemonState {
    /// Journal, outputs and status of the daemon [default: ~/.local/share/reliant/daemon].
    #[arg(long, env = "RELIANT_DAEMON_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub struct DaemonRegisterArgs {
    #[command(flatten)]
    pub front: FrontDoor,
    #[command(flatten)]
    pub state: DaemonState,
    /// Name of this machine [default: its host name].
    #[arg(long)]
    pub name: Option<String>,
    /// Give an existing daemon of that name a new token.
    #[arg(long)]
    pub replace: bool,
}

#[derive(Debug, Clone, Args)]
pub struct DaemonStartArgs {
    #[command(flatten)]
    pub state: DaemonState,
    /// The gateway's address [default: as configured, http://127.0.0.1:7442].
    #[arg(long, value_name = "URL")]
    pub gateway: Option<String>,
    /// Directory to offer, as NAME=DIR or DIR. May be repeated [default: the current directory].
    #[arg(long, value_name = "NAME=DIR")]
    pub root: Vec<String>,
    /// Do not confine shell commands with Landlock.
    #[arg(long)]
    pub no_landlock: bool,
    /// Offer a root that holds your home directory, the whole system or the daemon's state.
    #[arg(long)]
    pub allow_home: bool,
    /// Put an unusable journal aside and begin a new one; calls that ran under the old one become OUTCOME_UNKNOWN.
    #[arg(long)]
    pub reset_journal: bool,
}

#[derive(Debug, Clone, Args)]
pub struct DaemonLogsArgs {
    #[command(flatten)]
    pub state: DaemonState,
    /// Lines from the end.
    #[arg(long, short = 'n', default_value_t = 100)]
    pub lines: usize,
    /// Keep printing as the log grows.
    #[arg(long, short = 'f')]
    pub follow: bool,
}

#[derive(Debug, Clone, Args)]
pub struct DaemonTrustArgs {
    #[command(flatten)]
    pub state: DaemonState,
    /// The root whose `.mcp.json` is meant.
    #[arg(default_value = ".")]
    pub root: PathBuf,
    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
    /// Only this server; default: all of the file.
    #[arg(long)]
    pub server: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token; its secret is shown once.
    Create {
        #[command(flatten)]
        front: FrontDoor,
        /// What the token is for.
        name: String,
        /// Days until it expires, 1 to 365.
        #[arg(long, default_value_t = 90)]
        days: i32,
    },
    /// List tokens.
    List {
        #[command(flatten)]
        front: FrontDoor,
    },
    /// Make a token void within a second.
    Revoke {
        #[command(flatten)]
        front: FrontDoor,
        /// As `reliant token list` shows it.
        token_id: String,
    },
}

#[derive(Debug, Clone, Args)]
pub struct ModelSimArgs {
    #[arg(long, default_value = "127.0.0.1:7445")]
    pub listen: std::net::SocketAddr,
    /// Write the bound address to this file as JSON.
    #[arg(long, value_name = "FILE")]
    pub address_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// Keep the scratch directory and say where it is.
    #[arg(long)]
    pub keep: bool,
    #[arg(long, env = "RELIANT_TOOLS_DIR", value_name = "DIR")]
    pub tools_dir: Option<PathBuf>,
    /// Your own message in place of the scripted one; with a provider's key in the environment it is a real run.
    pub message: Vec<String>,
}
