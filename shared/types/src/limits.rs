//! Every limit, with its unit in its name. A limit that an operator may change is a default here and a config key there.

use std::time::Duration;

/// A message's text.
pub const MESSAGE_TEXT_MAX_BYTES: usize = 1024 * 1024;
/// One gRPC message, either way. Above [`MESSAGE_TEXT_MAX_BYTES`], so that a text too long is refused by its own rule.
pub const GRPC_MESSAGE_MAX_BYTES: usize = 4 * 1024 * 1024;
pub const CLIENT_MESSAGE_ID_MAX_CHARS: usize = 128;
pub const TITLE_MAX_CHARS: usize = 200;
/// Turns of one chat that wait behind the running one.
pub const CHAT_QUEUED_TURNS_MAX: i64 = 100;
/// Turns of one user that are not at their end.
pub const USER_OPEN_TURNS_MAX: i64 = 2000;
/// Chats one Subscribe stream follows.
pub const SUBSCRIBE_CHATS_MAX: usize = 500;
/// Subscribe streams of one user on one api replica.
pub const USER_STREAMS_MAX: usize = 200;
/// Stored events replayed one by one to a viewer that resumes; past that it gets a snapshot.
pub const RESUME_EVENTS_MAX: i64 = 1000;
/// Messages in a snapshot.
pub const SNAPSHOT_MESSAGES_MAX: i64 = 100;
/// Updates that wait for one viewer; past that deltas are dropped and refilled.
pub const VIEWER_QUEUE_MAX: usize = 1024;
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(10);
/// A client that heard nothing for so long opens a new stream.
pub const HEARTBEAT_DEADLINE: Duration = Duration::from_secs(25);

/// Model rounds of one turn.
pub const TURN_ROUNDS_MAX: i32 = 100;
/// A turn's own working time; it stands still while a person or a daemon is awaited.
pub const TURN_DEADLINE: Duration = Duration::from_secs(60 * 60);
/// Tool calls in one model message. OpenAI's format takes no more of them back.
pub const MESSAGE_TOOL_CALLS_MAX: usize = 128;
/// A tool call's arguments.
pub const TOOL_INPUT_MAX_BYTES: usize = 1024 * 1024;
/// What a model reads of a tool's output: head and tail.
pub const TOOL_RESULT_MAX_BYTES: usize = 48 * 1024;
/// Output of one call kept on the daemon; past that the middle is not kept.
pub const TOOL_OUTPUT_KEEP_MAX_BYTES: u64 = 64 * 1024 * 1024;
pub const TOOL_TIMEOUT: Duration = Duration::from_secs(120);
pub const TOOL_TIMEOUT_MAX: Duration = Duration::from_secs(60 * 60);
/// How long past its timeout a sent call waits for a daemon that is away; then its outcome is unknown.
pub const TOOL_AWAY_MAX: Duration = Duration::from_secs(2 * 60 * 60);
/// A dispatch that the daemon has not confirmed is sent again after so long.
pub const REDISPATCH_AFTER: Duration = Duration::from_secs(5);
/// A call that its daemon had no room for is sent again after so long, then after twice that, up to the maximum.
pub const REFUSED_AGAIN_MIN: Duration = Duration::from_millis(500);
pub const REFUSED_AGAIN_MAX: Duration = Duration::from_secs(10);
/// A call that runs this much past its timeout is asked for again: its daemon re-attaches or offers the result.
pub const REATTACH_AFTER: Duration = Duration::from_secs(30);
/// Messages of a chat that one model call reads at most, before the model's window shortens them further.
pub const HISTORY_MESSAGES_MAX: i64 = 1000;
/// Tools one daemon declares; further ones are refused with a sentence.
pub const DAEMON_TOOLS_MAX: usize = 1024;
/// Calls that run at one time on one daemon.
pub const DAEMON_RUNNING_CALLS_MAX: usize = 256;
/// Streams one gateway holds.
pub const GATEWAY_DAEMONS_MAX: usize = 20_000;
/// Requests to one daemon whose answer is awaited.
pub const GATEWAY_PENDING_MAX: usize = 1024;
pub const LEASE_DURATION: Duration = Duration::from_secs(10);
pub const LEASE_RENEW_INTERVAL: Duration = Duration::from_secs(3);

/// Text a model may write in one message.
pub const MODEL_TEXT_MAX_BYTES: usize = 8 * 1024 * 1024;
/// No byte from the provider for so long: the attempt is tried again.
pub const MODEL_STALL: Duration = Duration::from_secs(60);
/// The first piece of text leaves at once, later ones are gathered up to this time or size.
pub const DELTA_GATHER: Duration = Duration::from_millis(4);
pub const DELTA_GATHER_MAX_BYTES: usize = 4096;
/// A producer holds the text of a message this long after its commit, for refills.
pub const PREFIX_HOLD: Duration = Duration::from_secs(5);
/// A producer says how much there is this often, so that a lost last delta is noticed.
pub const LENGTH_INTERVAL: Duration = Duration::from_secs(1);

/// Messages one NATS subscription buffers; the library's own default is 65,536.
pub const NATS_SUBSCRIPTION_MAX: usize = 1024;
/// NATS' own default limit for a message; larger payloads are split before they are published.
pub const NATS_PAYLOAD_MAX_BYTES: usize = 1024 * 1024;
pub const NATS_REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
