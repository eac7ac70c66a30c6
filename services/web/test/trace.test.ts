import assert from "node:assert/strict";
import test from "node:test";
import { PageSpanKind } from "../gen/reliant/v1/telemetry_pb.js";
import { Click } from "../src/trace.js";

test("a click's spans are one trace, and their times are of one clock", () => {
  let now = 1_000_000;
  const click = new Click({ us: () => now });
  now += 2_000;
  const lost = click.call();
  now += 5_000;
  lost.end(true);
  const call = click.call();
  now += 30_000;
  call.end(false);
  const [root, first, second] = click.sent();
  assert.ok(root && first && second);
  assert.match(call.traceparent, /^00-[0-9a-f]{32}-[0-9a-f]{16}-01$/);
  assert.equal(call.traceparent, `00-${click.traceId}-${second.spanId}-01`);
  assert.notEqual(lost.traceparent, call.traceparent);
  assert.deepEqual([root.kind, root.parentSpanId, root.durationUs], [PageSpanKind.SEND, "", 37_000n]);
  assert.deepEqual([first.failed, second.failed, second.durationUs], [true, false, 30_000n]);
  assert.ok([first, second].every((span) => span.parentSpanId === root.spanId));
  now += 100_000;
  const [painted] = click.firstText();
  assert.deepEqual([painted?.kind, painted?.durationUs, painted?.startUnixUs], [PageSpanKind.FIRST_TEXT, 137_000n, 1_000_000n]);
});

test("what is kept of a message that is tried again and again is bounded", () => {
  const click = new Click();
  for (let n = 0; n < 100; n++) click.call().end(true);
  assert.ok(click.sent().length <= 16);
});
