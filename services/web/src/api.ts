// The generated clients over gRPC-web, on the origin that served this page.

import { createClient, type Interceptor } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";
import { ApprovalService } from "../gen/reliant/v1/approvals_pb.js";
import { ChatService } from "../gen/reliant/v1/chats_pb.js";
import { DaemonService } from "../gen/reliant/v1/daemons_pb.js";
import { IdentityService } from "../gen/reliant/v1/identity_pb.js";
import { MessageService } from "../gen/reliant/v1/messages_pb.js";
import { ModelService } from "../gen/reliant/v1/models_pb.js";
import { TelemetryService } from "../gen/reliant/v1/telemetry_pb.js";
import { TurnService } from "../gen/reliant/v1/turns_pb.js";
import { UpdateService } from "../gen/reliant/v1/updates_pb.js";
import { token } from "./session.js";

const UNARY_TIMEOUT_MS = 15_000;

const bearer: Interceptor = (next) => (request) => {
  const held = token();
  if (held) request.header.set("authorization", `Bearer ${held}`);
  return next(request);
};

// Streams have their own deadline (see follow.ts); a default timeout would cut them.
const unary = createGrpcWebTransport({ baseUrl: location.origin, interceptors: [bearer], defaultTimeoutMs: UNARY_TIMEOUT_MS });
const streaming = createGrpcWebTransport({ baseUrl: location.origin, interceptors: [bearer] });

export const api = {
  approvals: createClient(ApprovalService, unary),
  chats: createClient(ChatService, unary),
  daemons: createClient(DaemonService, unary),
  identity: createClient(IdentityService, unary),
  messages: createClient(MessageService, unary),
  models: createClient(ModelService, unary),
  telemetry: createClient(TelemetryService, unary),
  turns: createClient(TurnService, unary),
  updates: createClient(UpdateService, streaming),
};
