import assert from "node:assert/strict";
import test from "node:test";
import { create } from "@bufbuild/protobuf";
import { MessageSchema, ToolCallSchema, ToolCallStatus, TurnSchema, TurnStatus } from "../gen/reliant/v1/common_pb.js";
import {
  type ChatEvent,
  ChatEventSchema,
  ChatSnapshotSchema,
  type Delta,
  DeltaSchema,
  StreamKind,
} from "../gen/reliant/v1/updates_pb.js";
import { EARLY_MAX_BYTES, GrowingText, SHOWN_MAX_CHARS } from "../src/text.js";
import { ChatView, SequenceJump } from "../src/view.js";

const bytes = (text: string) => new TextEncoder().encode(text);
type Kind = NonNullable<Parameters<typeof create<typeof ChatEventSchema>>[1]>["kind"];

const event = (seq: number, kind: Kind): ChatEvent => create(ChatEventSchema, { chatId: "c", seq: BigInt(seq), kind });
const started = (seq: number, epoch: number) =>
  event(seq, { case: "messageStarted", value: { messageId: "m", turnId: "t", epoch: BigInt(epoch) } });
const delta = (epoch: number, offset: number, text: string, kind = StreamKind.TEXT, target = "m", block = 0): Delta =>
  create(DeltaSchema, {
    chatId: "c",
    block: { targetId: target, block, kind },
    epoch: BigInt(epoch),
    offset: BigInt(offset),
    piece: bytes(text),
  });
const liveText = (view: ChatView) => view.live.get("m")?.blocks.get(0)?.text.text;

test("events are applied once, and a jump is refused", () => {
  const view = new ChatView("c");
  assert.equal(view.applyEvent(started(1, 1)), true);
  assert.equal(view.applyEvent(started(1, 1)), false);
  assert.throws(() => view.applyEvent(started(3, 1)), SequenceJump);
  assert.equal(view.seq, 1n);
});

test("pieces overlap, repeat, come early, and are in order in the end", () => {
  const view = new ChatView("c");
  view.applyDelta(delta(1, 0, "Hé"));
  assert.equal(liveText(view), undefined);
  view.applyEvent(started(1, 1));
  assert.equal(liveText(view), "Hé");
  view.applyDelta(delta(1, 7, "end"));
  assert.equal(liveText(view), "Hé");
  view.applyDelta(delta(1, 1, "éllo "));
  assert.equal(liveText(view), "Héllo end");
  view.applyDelta(delta(1, 0, "Héllo "));
  assert.equal(liveText(view), "Héllo end");
});

test("a newer epoch starts the text anew, an older one is void", () => {
  const view = new ChatView("c");
  view.applyEvent(started(1, 1));
  view.applyDelta(delta(1, 0, "first"));
  view.applyDelta(delta(2, 0, "second"));
  assert.equal(liveText(view), "first");
  view.applyEvent(started(2, 2));
  assert.equal(liveText(view), "second");
  view.applyDelta(delta(1, 5, " late"));
  assert.equal(liveText(view), "second");
});

test("a committed message takes the place of its live text", () => {
  const view = new ChatView("c");
  view.applyEvent(started(1, 1));
  view.applyDelta(delta(1, 0, "hel"));
  view.applyEvent(event(2, { case: "messageCommitted", value: create(MessageSchema, { id: "m", ordinal: 2 }) }));
  assert.equal(view.live.size, 0);
  assert.equal(view.applyDelta(delta(1, 3, "lo")), false);
  assert.equal(view.messages.size, 1);
});

test("a cancelled turn takes its live text with it", () => {
  const view = new ChatView("c");
  view.applyEvent(started(1, 1));
  view.applyEvent(event(2, { case: "turnChanged", value: create(TurnSchema, { id: "t", status: TurnStatus.CANCELLED }) }));
  assert.equal(view.live.size, 0);
  assert.equal(view.openTurn(), undefined);
});

test("a tool's output belongs to one run; a status change keeps it", () => {
  const view = new ChatView("c");
  const call = (seq: number, generation: number, status: ToolCallStatus) =>
    event(seq, {
      case: "toolCallChanged",
      value: { toolCall: create(ToolCallSchema, { id: "k", generation: BigInt(generation), status }) },
    });
  view.applyEvent(call(1, 1, ToolCallStatus.RUNNING));
  view.applyDelta(delta(1, 0, "out", StreamKind.STDOUT, "k"));
  view.applyDelta(delta(1, 0, "err", StreamKind.STDERR, "k", 1));
  view.applyEvent(call(2, 1, ToolCallStatus.SUCCEEDED));
  assert.equal(view.calls.get("k")?.stdout.text, "out");
  assert.equal(view.calls.get("k")?.stderr.text, "err");
  view.applyEvent(call(3, 2, ToolCallStatus.DISPATCHED));
  assert.equal(view.calls.get("k")?.stdout.text, "");
});

test("a snapshot replaces the state and keeps live text of the same epoch", () => {
  const view = new ChatView("c");
  view.applyEvent(started(1, 1));
  view.applyDelta(delta(1, 0, "kept"));
  view.applySnapshot(
    create(ChatSnapshotSchema, { seq: 9n, logEpoch: 2n, started: [{ messageId: "m", turnId: "t", epoch: 1n }] }),
  );
  assert.equal(view.seq, 9n);
  assert.equal(liveText(view), "kept");
  view.applySnapshot(create(ChatSnapshotSchema, { seq: 12n, logEpoch: 2n }));
  assert.equal(view.live.size, 0);
});

test("a snapshot that goes back is believed, and what follows it is applied", () => {
  const view = new ChatView("c");
  view.seq = 105n;
  view.logEpoch = 2n;
  view.applySnapshot(create(ChatSnapshotSchema, { seq: 5n, logEpoch: 2n }));
  assert.equal(view.seq, 5n);
  assert.equal(view.applyEvent(started(6, 1)), true);
  view.applyDelta(delta(1, 0, "heard"));
  assert.equal(liveText(view), "heard");
});

test("raw output may split a character between pieces", () => {
  const text = new GrowingText(true);
  const euro = bytes("€");
  text.add(0, euro.subarray(0, 1));
  text.add(1, euro.subarray(1));
  assert.equal(text.text, "€");
});

test("early pieces are bounded", () => {
  const text = new GrowingText(false);
  for (let at = 0; at < 4; at++) text.add(10 + at * EARLY_MAX_BYTES, new Uint8Array(EARLY_MAX_BYTES / 2).fill(97));
  text.add(0, bytes("0123456789"));
  assert.equal(text.length, 10 + EARLY_MAX_BYTES / 2);
});

test("any order and any repetition of pieces gives the same text", () => {
  let state = 1;
  const random = (below: number) => (state = (state * 48271) % 2147483647) % below;
  for (let run = 0; run < 2000; run++) {
    const whole = Array.from({ length: 1 + random(40) }, (_, at) => String.fromCharCode(97 + (at % 26))).join("");
    const pieces: [number, string][] = [];
    for (let at = 0; at < whole.length; ) {
      const length = 1 + random(7);
      // Some reach back over what came before.
      const from = Math.max(0, at - random(3));
      pieces.push([from, whole.slice(from, at + length)]);
      if (random(3) === 0) pieces.push([from, whole.slice(from, at + length)]);
      at += length;
    }
    for (let at = pieces.length - 1; at > 0; at--) {
      const other = random(at + 1);
      [pieces[at], pieces[other]] = [pieces[other]!, pieces[at]!];
    }
    const text = new GrowingText(run % 2 === 0);
    for (const [offset, piece] of pieces) text.add(offset, bytes(piece));
    assert.equal(text.text, whole);
    assert.equal(text.hasHole, false);
  }
});

test("what is let go of a long output is counted", () => {
  const text = new GrowingText(true);
  const piece = bytes("x".repeat(SHOWN_MAX_CHARS / 4));
  for (let at = 0; at < 20; at++) text.add(at * piece.length, piece);
  text.add(20 * piece.length, bytes("the end"));
  assert.equal(text.text.length + text.cut, text.length);
  assert.ok(text.cut > 0 && text.text.endsWith("the end") && text.text.length <= SHOWN_MAX_CHARS);
});
