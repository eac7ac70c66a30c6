import assert from "node:assert/strict";
import test from "node:test";
import { create } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { SubscribeRequestSchema, SubscribeResponseSchema } from "../gen/reliant/v1/updates_pb.js";
import { shown } from "../src/errors.js";
import { backoff, BACKOFF_MAX_MS, follow } from "../src/follow.js";
import { codeOf } from "../src/session.js";

const heartbeat = create(SubscribeResponseSchema, { update: { case: "heartbeat", value: {} } });

test("a cut stream is opened again, with the cursors of that time", async () => {
  const stop = new AbortController();
  const asked: bigint[] = [];
  const waits: number[] = [];
  let seq = 0n;
  await follow({
    signal: stop.signal,
    request: () => create(SubscribeRequestSchema, { chats: [{ chatId: "c", afterSeq: seq }] }),
    async *open(request) {
      asked.push(request.chats[0]!.afterSeq);
      if (asked.length === 4) stop.abort();
      yield heartbeat;
      throw new ConnectError("away", Code.Unavailable);
    },
    update: () => void (seq += 5n),
    status: () => {},
    random: () => 1,
    now: () => 0,
    sleep: async (ms) => void waits.push(ms),
  });
  assert.deepEqual(asked, [0n, 5n, 10n, 15n]);
  assert.deepEqual(waits, [500, 1000, 2000]);
});

test("silence is taken for death", async () => {
  const stop = new AbortController();
  let opened = 0;
  await follow({
    signal: stop.signal,
    request: () => create(SubscribeRequestSchema),
    async *open(_request, signal) {
      opened += 1;
      yield heartbeat;
      if (opened === 2) return stop.abort();
      await new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
    },
    update: () => {},
    status: () => {},
    silenceMs: 5,
    sleep: async () => {},
  });
  assert.equal(opened, 2);
});

test("without a good token it ends and says so", async () => {
  const kinds: string[] = [];
  await follow({
    signal: new AbortController().signal,
    request: () => create(SubscribeRequestSchema),
    async *open() {
      throw new ConnectError("Your sign-in has expired.", Code.Unauthenticated);
    },
    update: () => {},
    status: (status) => void kinds.push(status.kind),
  });
  assert.deepEqual(kinds, ["connecting", "ended"]);
});

test("the back-off is bounded", () => {
  assert.equal(backoff(1, 0), 250);
  for (let failures = 1; failures < 100; failures++) assert.ok(backoff(failures, 1) <= BACKOFF_MAX_MS);
});

test("an error shows the reason of its details", () => {
  const error = new ConnectError("No such chat.", Code.NotFound);
  const reason = new TextEncoder().encode("DAEMON_AWAY");
  error.details.push({ type: "google.rpc.ErrorInfo", value: new Uint8Array([10, reason.length, ...reason, 18, 1, 97]) });
  assert.equal(shown(error).code, "DAEMON_AWAY");
  assert.equal(shown(new ConnectError("no", Code.NotFound)).code, "NOT_FOUND");
  assert.equal(shown(new TypeError("Failed to fetch")).retryable, true);
});

test("a code is read from a link or by itself", () => {
  assert.equal(codeOf("http://127.0.0.1:7440/#code=ab_c-1"), "ab_c-1");
  assert.equal(codeOf(" ab_c-1 "), "ab_c-1");
  assert.equal(codeOf("not a code"), undefined);
});
