//! Every limit, with its unit in its name. A limit that an operator may change is a default here and a config key there.

use std::time::Duration;

/// A message's text.
pub const MESSAGE_TEXT_MAX_BYTES: usize = 1024 * 1024;
/// One gRPC message, either way: what gRPC's libraries in all languages decode unless they are told otherwise, so that a
/// foreign client needs no setting. Above [`MESSAGE_TEXT_MAX_BYTES`], so that a text too long is refused by its own rule.
pub const GRPC_MESSAGE_MAX_BYTES: usize = 4 * 1024 * 1024;
/// Content of one page of a list. A page has at least one entry, and none is larger than what is left to
/// [`GRPC_MESSAGE_MAX_BYTES`].
pub const PAGE_MAX_BYTES: usize = 5 * 1024 * 1024 / 2;
pub const CLIENT_MESSAGE_ID_MAX_CHARS: usize = 128;
pub const CLIENT_REQUEST_ID_MAX_CHARS: usize = 128;
pub const TITLE_MAX_CHARS: usize = 200;
/// Turns of one chat that wait behind the running one.
pub const CHAT_QUEUED_TURNS_MAX: i64 = 100;
/// Turns of one user that are not at their end.
pub const USER_OPEN_TURNS_MAX: i64 = 2000;
/// Model calls of one user at work at one time.
pub const USER_TURNS_AT_WORK_MAX: u32 = 500;
/// Chats one Subscribe stream follows.
pub const SUBSCRIBE_CHATS_MAX: usize = 500;
/// Subscribe streams of one user on one api replica.
pub const USER_STREAMS_MAX: usize = 200;
/// Stored events replayed one by one to a viewer that resumes; past that it gets a snapshot.
pub const RESUME_EVENTS_MAX: i64 = 1000;
/// Bytes of stored events that one read brings; what is more is read next, or replaced by a snapshot.
pub const READ_EVENTS_MAX_BYTES: usize = 4 * 1024 * 1024;
/// Messages in a snapshot.
pub const SNAPSHOT_MESSAGES_MAX: i64 = 100;
/// Their content; the newest message is there whatever its size. Older ones are read by page.
pub const SNAPSHOT_MESSAGES_MAX_BYTES: usize = 1024 * 1024;
/// Tool calls in a snapshot: those of the running round, and those that settle behind their turn.
pub const SNAPSHOT_CALLS_MAX: i64 = 384;
/// Results of calls in a snapshot, all together: each is shortened to its share.
pub const SNAPSHOT_RESULTS_MAX_BYTES: usize = 512 * 1024;
/// Arguments in a snapshot of calls that have ended, or settle behind their turn, all together.
pub const SNAPSHOT_OLD_INPUTS_MAX_BYTES: usize = 256 * 1024;
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
/// Arguments of the tool calls of one message, all together: what runs and what is approved fits a snapshot and a NATS
/// message.
pub const TOOL_INPUT_MAX_BYTES: usize = 512 * 1024;
/// A tool's name; a longer one names no tool.
pub const TOOL_NAME_MAX_BYTES: usize = 128;
/// What a model reads of a tool's output: head and tail.
pub const TOOL_RESULT_MAX_BYTES: usize = 48 * 1024;
/// What a model reads of all results of one round; where they are more, each is shortened to its share.
pub const ROUND_RESULTS_MAX_BYTES: usize = 1536 * 1024;
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
/// Their content: more than the largest windows hold.
pub const HISTORY_MAX_BYTES: usize = 8 * 1024 * 1024;
/// Tools one daemon declares; further ones are refused with a sentence.
pub const DAEMON_TOOLS_MAX: usize = 1024;
/// Calls that run at one time on one daemon.
pub const DAEMON_RUNNING_CALLS_MAX: usize = 256;
/// Streams one gateway holds.
pub const GATEWAY_DAEMONS_MAX: usize = 20_000;
/// Requests to one daemon whose answer is awaited.
pub const GATEWAY_PENDING_MAX: usize = 1024;
/// Live output of one daemon that a gateway carries, whatever the daemon believes; what is more is dropped, and refilled on
/// demand. Four calls at the full pace that our daemon gives to each.
pub const DAEMON_LIVE_MAX_BYTES_PER_SECOND: usize = 8 * 1024 * 1024;
pub const DAEMON_LIVE_BURST_BYTES: usize = 4 * 1024 * 1024;
pub const LEASE_DURATION: Duration = Duration::from_secs(10);
pub const LEASE_RENEW_INTERVAL: Duration = Duration::from_secs(3);

/// What a model may write in one message: text, thinking with its signatures, arguments of calls. Some three times what
/// models write at most, and one gRPC message has room for it twice.
pub const MODEL_TEXT_MAX_BYTES: usize = 1536 * 1024;
/// No byte from the provider for so long: the attempt is tried again.
pub const MODEL_STALL: Duration = Duration::from_secs(60);
/// The first piece of text leaves at once, later ones are gathered up to this time or size.
pub const DELTA_GATHER: Duration = Duration::from_millis(4);
pub const DELTA_GATHER_MAX_BYTES: usize = 4096;
/// A producer holds the text of a message this long after its commit, for refills.
pub const PREFIX_HOLD: Duration = Duration::from_secs(5);
/// A producer says how much there is this often, so that a lost last delta is noticed.
pub const LENGTH_INTERVAL: Duration = Duration::from_secs(1);

/// Spans that a page reports at one time.
pub const PAGE_SPANS_MAX: usize = 16;
/// A longer span, or one that began longer ago, is no page's.
pub const PAGE_SPAN_MAX: Duration = Duration::from_secs(3600);

/// Messages one NATS subscription buffers; the library's own default is 65,536.
pub const NATS_SUBSCRIPTION_MAX: usize = 1024;
/// NATS' own default limit for a message; larger payloads are split before they are published.
pub const NATS_PAYLOAD_MAX_BYTES: usize = 1024 * 1024;
pub const NATS_REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Daemons of one user that are not revoked.
pub const USER_DAEMONS_MAX: i64 = 2000;
/// Personal access tokens of one user that are good.
pub const USER_TOKENS_MAX: i64 = 200;
/// Projects of one user that are not archived.
pub const USER_PROJECTS_MAX: i64 = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    /// Ids, times and numbers of a message with its blocks, or of a tool call.
    const FRAME: usize = 1024;

    #[test]
    fn everything_fits_what_a_foreign_client_decodes() {
        let message =
            [MESSAGE_TEXT_MAX_BYTES, MODEL_TEXT_MAX_BYTES, ROUND_RESULTS_MAX_BYTES].into_iter().max().unwrap();
        let frames = 2 * MESSAGE_TOOL_CALLS_MAX * 128;
        // One entry of a page may be as large as a message; a call has its arguments and its result.
        assert!(message + frames + FRAME < GRPC_MESSAGE_MAX_BYTES);
        const { assert!(MODEL_TEXT_MAX_BYTES + TOOL_RESULT_MAX_BYTES + FRAME < GRPC_MESSAGE_MAX_BYTES) };
        const { assert!(PAGE_MAX_BYTES + 500 * FRAME < GRPC_MESSAGE_MAX_BYTES) };
        // The newest message, the arguments that run, the same in approvals, and what is shortened.
        let snapshot = message.max(SNAPSHOT_MESSAGES_MAX_BYTES)
            + 2 * TOOL_INPUT_MAX_BYTES
            + SNAPSHOT_RESULTS_MAX_BYTES
            + SNAPSHOT_OLD_INPUTS_MAX_BYTES;
        let rows = SNAPSHOT_CALLS_MAX as usize + MESSAGE_TOOL_CALLS_MAX + SNAPSHOT_MESSAGES_MAX as usize;
        let turns = CHAT_QUEUED_TURNS_MAX as usize + 1;
        assert!(snapshot + (rows + turns) * FRAME + frames < GRPC_MESSAGE_MAX_BYTES);
        const { assert!(TOOL_INPUT_MAX_BYTES + FRAME < NATS_PAYLOAD_MAX_BYTES) };
        const { assert!(ROUND_RESULTS_MAX_BYTES / MESSAGE_TOOL_CALLS_MAX >= 8 * 1024, "a share is worth reading") };
    }
}
