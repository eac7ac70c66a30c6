//! The one list of span names, attribute keys and wire header names. Span names are fixed; values go in attributes.
//! Protocols use OpenTelemetry's semantic names, our own things use `entity.attr`.

/// Span names. Where a convention wants a value in the name (a method, a model, a tool, a subject), it is the word here
/// followed by a blank and that value; RPCs have their method's name alone.
pub mod span {
    /// A gRPC call as its server sees it. The method is in [`super::attr::RPC_METHOD`], and is the exported name.
    pub const RPC_SERVER: &str = "rpc.server";
    pub const RPC_CLIENT: &str = "rpc.client";
    /// A call came without a trace; its trace begins here.
    pub const RPC_EDGE: &str = "rpc.edge";
    /// A message leaves for NATS; ends before the message is on the wire. Exported as `publish {subject template}` or
    /// `request {subject template}`.
    pub const BUS_SEND: &str = "nats.send";
    pub const BUS_PUBLISH: &str = "publish";
    pub const BUS_REQUEST: &str = "request";
    /// A message from NATS is worked on: `process {subject template}`.
    pub const BUS_PROCESS: &str = "process";
    /// A transaction of the store: `db {name}`.
    pub const DB: &str = "db";
    /// The api is about to store a message and its turn. The turn's row keeps this span's context.
    pub const TURN_ACCEPT: &str = "turn.accept";
    /// Signal-with-start of a chat's workflow.
    pub const TURN_WAKE: &str = "turn.wake";
    /// The call to Temporal that carries a wake.
    pub const TEMPORAL_WAKE: &str = "temporal.api.workflowservice.v1.WorkflowService/SignalWithStartWorkflowExecution";
    pub const TURN_NEXT_STEP: &str = "turn.next_step";
    /// The activity that does what a chat needs. The rounds stand beside it: what it began must not hang on it.
    pub const TURN_BURST: &str = "turn.burst";
    /// A worker takes a model round up; a later attempt of the same round links to it.
    pub const TURN_CLAIM: &str = "turn.claim";
    /// One fenced attempt of one model round, around its model call.
    pub const TURN_ROUND: &str = "turn.round";
    /// The calls of one round are sent.
    pub const TURN_DISPATCH: &str = "turn.dispatch";
    /// One request to a provider: `chat {model}`.
    pub const MODEL_CALL: &str = "chat";
    /// A request leaves for a provider that is told of the trace.
    pub const MODEL_SEND: &str = "model.send";
    /// The simulator answers; only where its caller sent a context.
    pub const MODEL_SIM: &str = "model_sim.answer";
    pub const TOOL_DISPATCH: &str = "tool.dispatch";
    /// A call that takes longer is stored as running.
    pub const TOOL_RUNNING: &str = "tool.running";
    /// A frame to a daemon is enqueued on its stream.
    pub const TUNNEL_SEND: &str = "tunnel.send";
    /// A frame of a stream is taken up, on either side.
    pub const TUNNEL_RECEIVE: &str = "tunnel.receive";
    /// A tool runs on a daemon: `execute_tool {tool}`.
    pub const TOOL_EXECUTE: &str = "execute_tool";
    /// What a command finds as TRACEPARENT, and an MCP server in `_meta`.
    pub const TOOL_SEND: &str = "tool.send";
    pub const TOOL_PROCESS: &str = "process.run";
    pub const TOOL_RESULT: &str = "tool.result";
    pub const CANCEL: &str = "turn.cancel";
    pub const APPROVAL: &str = "approval.decide";
    /// An api replica gives a chat's events to its viewers.
    pub const UPDATE_FANOUT: &str = "update.fanout";
    /// From a person's click, or a terminal's Enter, until the message is accepted.
    pub const CLIENT_SEND: &str = "client.send_message";
    /// From the click until the first piece of the answer was painted, by the page's clock alone.
    pub const CLIENT_FIRST_TEXT: &str = "client.first_text";

    pub const ALL: &[&str] = &[
        RPC_SERVER,
        RPC_CLIENT,
        RPC_EDGE,
        BUS_SEND,
        BUS_PUBLISH,
        BUS_REQUEST,
        BUS_PROCESS,
        DB,
        TURN_ACCEPT,
        TURN_WAKE,
        TEMPORAL_WAKE,
        TURN_NEXT_STEP,
        TURN_BURST,
        TURN_CLAIM,
        TURN_ROUND,
        TURN_DISPATCH,
        MODEL_CALL,
        MODEL_SEND,
        MODEL_SIM,
        TOOL_DISPATCH,
        TOOL_RUNNING,
        TUNNEL_SEND,
        TUNNEL_RECEIVE,
        TOOL_EXECUTE,
        TOOL_SEND,
        TOOL_PROCESS,
        TOOL_RESULT,
        CANCEL,
        APPROVAL,
        UPDATE_FANOUT,
        CLIENT_SEND,
        CLIENT_FIRST_TEXT,
    ];

    /// Spans whose context another process gets. They are short, have ended by then, and are exported at once.
    const HOPS: &[&str] = &[
        RPC_EDGE,
        BUS_PUBLISH,
        BUS_REQUEST,
        TURN_ACCEPT,
        TURN_WAKE,
        TURN_CLAIM,
        MODEL_SEND,
        TOOL_DISPATCH,
        TUNNEL_SEND,
        TUNNEL_RECEIVE,
        TOOL_SEND,
        TOOL_RESULT,
        CANCEL,
    ];

    /// The declared word of an exported name.
    fn word(name: &str) -> &str {
        name.split_once(' ').map_or(name, |(word, _)| word)
    }

    pub fn leaves_the_process(name: &str) -> bool {
        HOPS.contains(&word(name))
    }

    /// Whether an exported name is of the list, or an RPC's.
    pub fn is_declared(name: &str) -> bool {
        let method = name.split_once('/').is_some_and(|(service, method)| {
            (service.starts_with("reliant.v1.") || service.starts_with("grpc.")) && !method.contains('/')
        });
        method || ALL.contains(&word(name))
    }
}

/// Attribute keys.
pub mod attr {
    pub const RPC_SYSTEM: &str = "rpc.system.name";
    pub const RPC_METHOD: &str = "rpc.method";
    pub const RPC_STATUS: &str = "rpc.response.status_code";
    pub const MESSAGING_SYSTEM: &str = "messaging.system";
    pub const MESSAGING_OPERATION: &str = "messaging.operation.name";
    pub const MESSAGING_OPERATION_TYPE: &str = "messaging.operation.type";
    pub const MESSAGING_TEMPLATE: &str = "messaging.destination.template";
    pub const MESSAGING_DESTINATION: &str = "messaging.destination.name";
    pub const GEN_AI_OPERATION: &str = "gen_ai.operation.name";
    pub const GEN_AI_PROVIDER: &str = "gen_ai.provider.name";
    pub const GEN_AI_MODEL: &str = "gen_ai.request.model";
    pub const GEN_AI_INPUT_TOKENS: &str = "gen_ai.usage.input_tokens";
    pub const GEN_AI_OUTPUT_TOKENS: &str = "gen_ai.usage.output_tokens";
    pub const GEN_AI_TOOL_NAME: &str = "gen_ai.tool.name";
    pub const GEN_AI_TOOL_CALL_ID: &str = "gen_ai.tool.call.id";
    pub const GEN_AI_CACHE_READ_TOKENS: &str = "gen_ai.usage.cache_read.input_tokens";
    pub const GEN_AI_FINISH_REASONS: &str = "gen_ai.response.finish_reasons";
    /// Seconds.
    pub const GEN_AI_FIRST_CHUNK: &str = "gen_ai.response.time_to_first_chunk";
    pub const SERVER_ADDRESS: &str = "server.address";
    pub const ERROR_TYPE: &str = "error.type";
    pub const USER_ID: &str = "user.id";
    pub const CHAT_ID: &str = "chat.id";
    pub const TURN_ID: &str = "turn.id";
    pub const TURN_ITERATION: &str = "turn.iteration";
    pub const TURN_FENCE: &str = "turn.fence";
    pub const MESSAGE_ID: &str = "message.id";
    pub const TOOL_CALL_ID: &str = "tool.call_id";
    pub const TOOL_GENERATION: &str = "tool.generation";
    pub const TOOL_STATUS: &str = "tool.status";
    pub const DAEMON_ID: &str = "daemon.id";
    pub const DAEMON_INSTANCE: &str = "daemon.instance";
    pub const GATEWAY_ID: &str = "gateway.id";
    pub const FRAME: &str = "tunnel.frame";
    /// Update streams that an api replica gives an event to.
    pub const VIEWERS: &str = "viewers";
    pub const PROCESS_PID: &str = "process.pid";
    pub const PROCESS_EXECUTABLE: &str = "process.executable.name";
    pub const PROCESS_EXIT_CODE: &str = "process.exit.code";
    /// Which attempt of an activity this is, from 1.
    pub const ACTIVITY_ATTEMPT: &str = "activity.attempt";
    pub const DB_SYSTEM: &str = "db.system.name";
    /// The name of the store's transaction.
    pub const DB_OPERATION: &str = "db.operation.name";

    pub const ALL: &[&str] = &[
        RPC_SYSTEM,
        RPC_METHOD,
        RPC_STATUS,
        MESSAGING_SYSTEM,
        MESSAGING_OPERATION,
        MESSAGING_OPERATION_TYPE,
        MESSAGING_TEMPLATE,
        MESSAGING_DESTINATION,
        GEN_AI_OPERATION,
        GEN_AI_PROVIDER,
        GEN_AI_MODEL,
        GEN_AI_INPUT_TOKENS,
        GEN_AI_OUTPUT_TOKENS,
        GEN_AI_TOOL_NAME,
        GEN_AI_TOOL_CALL_ID,
        GEN_AI_CACHE_READ_TOKENS,
        GEN_AI_FINISH_REASONS,
        GEN_AI_FIRST_CHUNK,
        SERVER_ADDRESS,
        ERROR_TYPE,
        USER_ID,
        CHAT_ID,
        TURN_ID,
        TURN_ITERATION,
        TURN_FENCE,
        MESSAGE_ID,
        TOOL_CALL_ID,
        TOOL_GENERATION,
        TOOL_STATUS,
        DAEMON_ID,
        DAEMON_INSTANCE,
        GATEWAY_ID,
        FRAME,
        VIEWERS,
        PROCESS_PID,
        PROCESS_EXECUTABLE,
        PROCESS_EXIT_CODE,
        ACTIVITY_ATTEMPT,
        DB_SYSTEM,
        DB_OPERATION,
    ];

    /// Whether an exported attribute is of the list.
    pub fn is_declared(key: &str) -> bool {
        ALL.contains(&key) || crate::metrics::Phase::ALL.iter().any(|name| phase(*name) == key)
    }

    /// Seconds of one of a turn's phases, on the span that knows them.
    pub const fn phase(phase: crate::metrics::Phase) -> &'static str {
        use crate::metrics::Phase;
        match phase {
            Phase::Accept => "turn.phase.accept",
            Phase::Held => "turn.phase.held",
            Phase::Enqueue => "turn.phase.enqueue",
            Phase::Pickup => "turn.phase.pickup",
            Phase::Retry => "turn.phase.retry",
            Phase::Context => "turn.phase.context",
            Phase::ModelFirstToken => "turn.phase.model_first_token",
            Phase::ModelStream => "turn.phase.model_stream",
            Phase::ApprovalWait => "turn.phase.approval_wait",
            Phase::ToolRoute => "turn.phase.tool_route",
            Phase::ToolRun => "turn.phase.tool_run",
            Phase::ToolReturn => "turn.phase.tool_return",
            Phase::Persist => "turn.phase.persist",
            Phase::Fanout => "turn.phase.fanout",
        }
    }
}

/// Header names of W3C trace context; the same in HTTP, gRPC, NATS and Temporal.
pub const TRACEPARENT: &str = "traceparent";
pub const TRACESTATE: &str = "tracestate";

#[cfg(test)]
mod tests {
    #[test]
    fn span_names_are_distinct() {
        let mut names = super::span::ALL.to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), super::span::ALL.len());
    }
}
