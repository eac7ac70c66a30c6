//! The one list of span names, attribute keys and wire header names. Span names are fixed; values go in attributes.
//! Protocols use OpenTelemetry's semantic names, our own things use `entity.attr`.

/// Span names.
pub mod span {
    /// A gRPC call as its server sees it. The method is in [`super::attr::RPC_METHOD`].
    pub const RPC_SERVER: &str = "rpc.server";
    pub const RPC_CLIENT: &str = "rpc.client";
    /// A message leaves for NATS; ends before the message is on the wire.
    pub const BUS_SEND: &str = "nats.send";
    /// A message from NATS is worked on.
    pub const BUS_PROCESS: &str = "nats.process";
    /// The api stored a message and its turn.
    pub const TURN_ACCEPT: &str = "turn.accept";
    /// Signal-with-start of a chat's workflow.
    pub const TURN_WAKE: &str = "turn.wake";
    pub const TURN_NEXT_STEP: &str = "turn.next_step";
    /// One fenced attempt of one model round, around its model call.
    pub const TURN_ROUND: &str = "turn.round";
    /// The calls of one round are sent.
    pub const TURN_DISPATCH: &str = "turn.dispatch";
    /// One attempt of one model round.
    pub const MODEL_CALL: &str = "chat";
    /// The simulator answers; only where its caller sent a context.
    pub const MODEL_SIM: &str = "model_sim.answer";
    pub const TOOL_DISPATCH: &str = "tool.dispatch";
    /// A frame to a daemon is enqueued on its stream.
    pub const TUNNEL_SEND: &str = "tunnel.send";
    /// A frame from a daemon is taken up.
    pub const TUNNEL_RECEIVE: &str = "tunnel.receive";
    pub const TOOL_EXECUTE: &str = "execute_tool";
    pub const TOOL_PROCESS: &str = "process.run";
    pub const TOOL_RESULT: &str = "tool.result";
    pub const CANCEL: &str = "turn.cancel";
    pub const APPROVAL: &str = "approval.decide";
    pub const UPDATE_FANOUT: &str = "update.fanout";
    pub const CLIENT_SEND: &str = "client.send_message";

    pub const ALL: &[&str] = &[
        RPC_SERVER,
        RPC_CLIENT,
        BUS_SEND,
        BUS_PROCESS,
        TURN_ACCEPT,
        TURN_WAKE,
        TURN_NEXT_STEP,
        TURN_ROUND,
        TURN_DISPATCH,
        MODEL_CALL,
        MODEL_SIM,
        TOOL_DISPATCH,
        TUNNEL_SEND,
        TUNNEL_RECEIVE,
        TOOL_EXECUTE,
        TOOL_PROCESS,
        TOOL_RESULT,
        CANCEL,
        APPROVAL,
        UPDATE_FANOUT,
        CLIENT_SEND,
    ];
}

/// Attribute keys.
pub mod attr {
    pub const RPC_SYSTEM: &str = "rpc.system.name";
    pub const RPC_METHOD: &str = "rpc.method";
    pub const RPC_STATUS: &str = "rpc.response.status_code";
    pub const MESSAGING_SYSTEM: &str = "messaging.system";
    pub const MESSAGING_OPERATION: &str = "messaging.operation.name";
    pub const MESSAGING_TEMPLATE: &str = "messaging.destination.template";
    pub const MESSAGING_DESTINATION: &str = "messaging.destination.name";
    pub const GEN_AI_OPERATION: &str = "gen_ai.operation.name";
    pub const GEN_AI_PROVIDER: &str = "gen_ai.provider.name";
    pub const GEN_AI_MODEL: &str = "gen_ai.request.model";
    pub const GEN_AI_INPUT_TOKENS: &str = "gen_ai.usage.input_tokens";
    pub const GEN_AI_OUTPUT_TOKENS: &str = "gen_ai.usage.output_tokens";
    pub const GEN_AI_TOOL_NAME: &str = "gen_ai.tool.name";
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
