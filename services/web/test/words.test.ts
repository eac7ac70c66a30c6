import assert from "node:assert/strict";
import test from "node:test";
import { create } from "@bufbuild/protobuf";
import { timestampFromMs } from "@bufbuild/protobuf/wkt";
import { ToolCallSchema, ToolCallStatus, TurnSchema, TurnStatus, UnknownCause } from "../gen/reliant/v1/common_pb.js";
import { MessageStartedSchema } from "../gen/reliant/v1/updates_pb.js";
import { callWords, duration, gist, pretty, prose, restartWords, turnWords } from "../src/words.js";

test("prose keeps every character of its text", () => {
  assert.deepEqual(prose("a `b` c"), [
    { kind: "text", text: "a " },
    { kind: "code", text: "b" },
    { kind: "text", text: " c" },
  ]);
  assert.deepEqual(prose("x\n```rust\nfn `a`\n```\ny"), [
    { kind: "text", text: "x" },
    { kind: "fence", text: "fn `a`" },
    { kind: "text", text: "y" },
  ]);
  assert.deepEqual(prose("```\nstill writ"), [{ kind: "fence", text: "still writ" }]);
  assert.deepEqual(prose("<b>&"), [{ kind: "text", text: "<b>&" }]);
});

test("a call's state is said in words", () => {
  const call = create(ToolCallSchema, {
    status: ToolCallStatus.OUTCOME_UNKNOWN,
    unknownCause: UnknownCause.JOURNAL_LOST,
    errorCode: "OUTCOME_UNKNOWN",
  });
  assert.equal(callWords(call), "outcome unknown · the daemon's journal was lost");
  assert.equal(callWords(create(ToolCallSchema, { status: ToolCallStatus.FAILED, exitCode: 2 })), "failed · exit code 2");
});

test("a message that is started again says so", () => {
  assert.equal(restartWords(create(MessageStartedSchema, { epoch: 2n })), "");
  const again = create(MessageStartedSchema, { epoch: 2n, restarted: true });
  assert.equal(restartWords(again), "An attempt broke off; the model starts this message again.");
});

test("values are shown short", () => {
  assert.equal(gist('{"timeout":1,"command":"ls\\nrm"}'), "ls");
  assert.equal(gist('{"timezone":"UTC"}'), 'timezone: "UTC"');
  assert.equal(gist("not json"), "");
  assert.equal(pretty("not json"), "not json");
  assert.equal(duration(61_500), "1 min 2 s");
});

test("a model that is asked again says why and when", () => {
  const waitingFor = "the model provider is overloaded or failing (status 529)";
  const turn = create(TurnSchema, { status: TurnStatus.RUNNING, waitingFor, retryAt: timestampFromMs(112_000) });
  const why = "The model provider is overloaded or failing (status 529).";
  assert.equal(turnWords(turn, 100_000), `${why} Trying again in 12 s.`);
  assert.equal(turnWords(turn, 113_000), `${why} Trying again now.`);
  assert.equal(turnWords(create(TurnSchema, { status: TurnStatus.RUNNING })), "Working …");
});
