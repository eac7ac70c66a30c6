// Keeps one update stream open: resumes where it was cut, waits longer after each failure, and takes silence for death.

import type { SubscribeRequest, SubscribeResponse } from "../gen/reliant/v1/updates_pb.js";
import { shown, type Shown } from "./errors.js";

/** The server sends a heartbeat every 10 s. */
export const SILENCE_MS = 25_000;
export const BACKOFF_MIN_MS = 500;
export const BACKOFF_MAX_MS = 15_000;
/** Only a stream that lived this long makes the next wait short again. */
export const LASTING_MS = 5_000;

export interface FollowOptions {
  open(request: SubscribeRequest, signal: AbortSignal): AsyncIterable<SubscribeResponse>;
  /** Asked anew for each stream: the cursors move. */
  request(): SubscribeRequest;
  update(update: SubscribeResponse): void;
  status(status: { kind: "connecting" } | { kind: "live" } | { kind: "waiting"; error: Shown; ms: number } | { kind: "ended"; error: Shown }): void;
  signal: AbortSignal;
  random?: () => number;
  now?: () => number;
  sleep?: (ms: number, signal: AbortSignal) => Promise<void>;
  silenceMs?: number;
}

/** Returns when `signal` is aborted, or when trying again is of no use. */
export async function follow(options: FollowOptions): Promise<void> {
  const { signal, status, random = Math.random, now = Date.now, sleep = wait, silenceMs = SILENCE_MS } = options;
  let failures = 0;
  while (!signal.aborted) {
    status({ kind: "connecting" });
    const begun = now();
    const attempt = new AbortController();
    const cut = () => attempt.abort();
    signal.addEventListener("abort", cut);
    let timer: ReturnType<typeof setTimeout> | undefined;
    const heard = () => {
      clearTimeout(timer);
      timer = setTimeout(() => attempt.abort(new Error("the server was silent")), silenceMs);
    };
    let error: unknown = new Error("The stream ended.");
    try {
      heard();
      let first = true;
      for await (const update of options.open(options.request(), attempt.signal)) {
        heard();
        if (first) status({ kind: "live" });
        first = false;
        options.update(update);
      }
    } catch (caught) {
      error = caught;
    } finally {
      clearTimeout(timer);
      signal.removeEventListener("abort", cut);
      attempt.abort();
    }
    if (signal.aborted) return;
    const sentence = shown(error);
    if (sentence.signedOut) {
      status({ kind: "ended", error: sentence });
      return;
    }
    failures = now() - begun >= LASTING_MS ? 1 : failures + 1;
    const ms = backoff(failures, random());
    status({ kind: "waiting", error: sentence, ms });
    await sleep(ms, signal);
  }
}

/** Doubles from half a second to 15 s; half of it is chance, so that clients do not return all at once. */
export function backoff(failures: number, chance: number): number {
  const most = Math.min(BACKOFF_MAX_MS, BACKOFF_MIN_MS * 2 ** Math.min(failures - 1, 10));
  return Math.round(most / 2 + (most / 2) * chance);
}

function wait(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(done, ms);
    function done() {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    }
    signal.addEventListener("abort", done);
  });
}
