import assert from "node:assert/strict";
import test from "node:test";
import { create } from "@bufbuild/protobuf";
import { timestampFromMs } from "@bufbuild/protobuf/wkt";
import { ToolCallSchema, ToolCallStatus, TurnSchema, TurnStatus, UnknownCause } from "../gen/reliant/v1/common_pb.js";
import { MessageStartedSchema } from "../gen/reliant/v1/updates_pb.js";
import { bounded, callWords, duration, gist, pretty, prose, restartWords, ROWS_MAX, turnWords, visible } from "../src/words.js";

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

test("hidden and reordering characters are shown", () => {
  assert.equal(visible("rm \u202ex\u2066"), "rm ⟨U+202E⟩x⟨U+2066⟩");
  for (const hidden of [0x200b, 0xfeff, 0xe0041, 0xfe0f, 0xe0100, 0x1b, 0x0d, 0xad, 0x85]) {
    assert.equal(visible(String.fromCodePoint(hidden)), `⟨U+${hidden.toString(16).toUpperCase().padStart(4, "0")}⟩`);
  }
  const plain = 'echo "äöü 漢字 🙂"\n\tnext';
  assert.equal(visible(plain), plain);
});

test("a question keeps the beginning and the end of a long text in sight", () => {
  const { text, leftOut } = bounded(`first${"\n".repeat(1000)}last`);
  const rows = text.split("\n");
  assert.equal(leftOut, 1001 - ROWS_MAX);
  assert.equal(rows.length, ROWS_MAX + 1);
  assert.equal(rows[0], "first");
  assert.equal(rows.at(-1), "last");
  assert.deepEqual(bounded("one\n\ntwo"), { text: "one\n\ntwo", leftOut: 0 });
  assert.equal(bounded("x".repeat(250)).text.split("\n").length, 3);
});
