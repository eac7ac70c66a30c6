// The page's part of a turn's trace: the click, the call, the first painted piece. The page tells the api of its spans, as
// it has no other way to a collector; what cannot be told is let go.

import { create } from "@bufbuild/protobuf";
import { type PageSpan, PageSpanKind, PageSpanSchema } from "../gen/reliant/v1/telemetry_pb.js";

/** The api takes 16 spans at a time; a click that was tried more often keeps its first calls. */
const CALLS_MAX = 8;

/** Unix microseconds: the wall clock is read once a page, and what passes is measured by a clock that never jumps. */
export interface Clock {
  us(): number;
}

export const pageClock: Clock = { us: () => Math.round((performance.timeOrigin + performance.now()) * 1000) };

/** One message's way, from the click on. Tries of the same message are calls of the same click. */
export class Click {
  readonly traceId = hex(16);
  readonly #root = hex(8);
  readonly #clock: Clock;
  readonly #begun: number;
  readonly #calls: PageSpan[] = [];

  constructor(clock: Clock = pageClock) {
    this.#clock = clock;
    this.#begun = clock.us();
  }

  /** A SendMessage begins. Gives its `traceparent`, and what ends it. */
  call(): { traceparent: string; end: (failed: boolean) => void } {
    const spanId = hex(8);
    const begun = this.#clock.us();
    const end = (failed: boolean) => {
      if (this.#calls.length < CALLS_MAX) this.#calls.push(this.#span(PageSpanKind.CALL, spanId, this.#root, begun, failed));
    };
    // The flag says "sampled"; the api decides for itself.
    return { traceparent: `00-${this.traceId}-${spanId}-01`, end };
  }

  /** Once the message is accepted. */
  sent(): PageSpan[] {
    return [this.#span(PageSpanKind.SEND, this.#root, "", this.#begun, false), ...this.#calls];
  }

  /** Once the first piece of the answer is painted. */
  firstText(): PageSpan[] {
    return [this.#span(PageSpanKind.FIRST_TEXT, hex(8), this.#root, this.#begun, false)];
  }

  now(): bigint {
    return BigInt(this.#clock.us());
  }

  #span(kind: PageSpanKind, spanId: string, parentSpanId: string, begun: number, failed: boolean): PageSpan {
    return create(PageSpanSchema, {
      kind,
      spanId,
      parentSpanId,
      startUnixUs: BigInt(begun),
      durationUs: BigInt(Math.max(0, this.#clock.us() - begun)),
      failed,
    });
  }
}

/** Random, and never all zeros, which W3C forbids. */
function hex(bytes: number): string {
  const random = crypto.getRandomValues(new Uint8Array(bytes));
  if (random.every((byte) => byte === 0)) random[0] = 1;
  return [...random].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
