// What states are called, and how values are shown. Pure.

import { type ToolCall, ToolCallStatus, type Turn, TurnStatus, UnknownCause } from "../gen/reliant/v1/common_pb.js";
import type { MessageStarted } from "../gen/reliant/v1/updates_pb.js";
import { timestampMs } from "@bufbuild/protobuf/wkt";
import { callEnded } from "./view.js";

/** `ToolCallStatus.SUCCEEDED` → `succeeded`; also what style sheets and tests look for. */
export function statusKey(status: ToolCallStatus): string {
  return (ToolCallStatus[status] ?? "unspecified").toLowerCase();
}

const CALL_WORDS: Record<ToolCallStatus, string> = {
  [ToolCallStatus.UNSPECIFIED]: "",
  [ToolCallStatus.PENDING]: "waiting",
  [ToolCallStatus.WAITING_APPROVAL]: "waits for you",
  [ToolCallStatus.WAITING_DAEMON]: "waits for the daemon",
  [ToolCallStatus.DISPATCHED]: "sent",
  [ToolCallStatus.RUNNING]: "running",
  [ToolCallStatus.SUCCEEDED]: "done",
  [ToolCallStatus.FAILED]: "failed",
  [ToolCallStatus.CANCELLED]: "cancelled",
  [ToolCallStatus.TIMED_OUT]: "timed out",
  [ToolCallStatus.OUTCOME_UNKNOWN]: "outcome unknown",
};

const CAUSE_WORDS: Record<UnknownCause, string> = {
  [UnknownCause.UNSPECIFIED]: "",
  [UnknownCause.PROCESS_DIED]: "the daemon or the tool's server died while it ran",
  [UnknownCause.JOURNAL_LOST]: "the daemon's journal was lost",
  [UnknownCause.DAEMON_AWAY]: "the daemon stayed away past the deadline",
};

export function callWords(call: ToolCall): string {
  const parts = [CALL_WORDS[call.status] ?? "unknown state"];
  if (call.waitingFor) parts.push(call.waitingFor);
  if (call.status === ToolCallStatus.OUTCOME_UNKNOWN) parts.push(CAUSE_WORDS[call.unknownCause] ?? "");
  if (call.exitCode !== undefined && call.exitCode !== 0) parts.push(`exit code ${call.exitCode}`);
  if (call.errorCode && call.status !== ToolCallStatus.OUTCOME_UNKNOWN) parts.push(call.errorCode);
  if (callEnded(call) && call.startedAt && call.endedAt) {
    parts.push(duration(timestampMs(call.endedAt) - timestampMs(call.startedAt)));
  }
  return parts.filter(Boolean).join(" · ");
}

/** Above the first message on the page, where there are older ones. */
export function earlierWords(earlier: number, begins: boolean): string {
  if (earlier <= 0) return "";
  const messages = earlier === 1 ? "1 earlier message is" : `${earlier.toLocaleString("en")} earlier messages are`;
  return begins ? `${messages} not shown.` : `${messages} not shown, the beginning of this turn among them.`;
}

/** Above an output whose beginning the page has let go. */
export function cutWords(cut: number, ended: boolean): string {
  if (cut <= 0) return "";
  const where = ended ? "the result below begins with them" : "the result will begin with them";
  return `(${cut.toLocaleString("en")} characters before this are not shown; ${where})`;
}

/** A line before a message that is written anew: what stood there of it is void. Empty for a first attempt. */
export function restartWords(started: MessageStarted): string {
  return started.restarted ? "An attempt broke off; the model starts this message again." : "";
}

export function duration(ms: number): string {
  if (ms < 1000) return `${Math.max(0, Math.round(ms))} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  return `${Math.floor(ms / 60_000)} min ${Math.round((ms % 60_000) / 1000)} s`;
}

/** A sentence about a turn that is under way or went wrong; empty where there is nothing to say. */
export function turnWords(turn: Turn, now = Date.now()): string {
  switch (turn.status) {
    case TurnStatus.QUEUED:
      return turn.waitingFor ? `Queued: ${turn.waitingFor}.` : "Queued.";
    case TurnStatus.RUNNING:
      if (turn.waitingFor && !turn.retryAt) return `Waits: ${turn.waitingFor}.`;
      if (turn.waitingFor) return retryWords(turn.waitingFor, turn.retryAt ? timestampMs(turn.retryAt) - now : 0);
      return "Working …";
    case TurnStatus.WAITING_APPROVAL:
      return "Waits for your decision.";
    case TurnStatus.WAITING_DAEMON:
      return "Waits for the daemon to come back.";
    case TurnStatus.FAILED:
      return `${turn.errorMessage || "The turn failed."} (${turn.errorCode || "INTERNAL"})`;
    case TurnStatus.CANCELLED:
      return "Cancelled.";
    default:
      return "";
  }
}

function retryWords(why: string, ms: number): string {
  const seconds = Math.ceil(ms / 1000);
  const when = seconds > 90 ? `in ${Math.round(seconds / 60)} min` : seconds > 0 ? `in ${seconds} s` : "now";
  return `${why.charAt(0).toUpperCase()}${why.slice(1)}. Trying again ${when}.`;
}

/** The one argument that tells most; the tools' own names for it. */
export function gist(inputJson: string): string {
  const input = parse(inputJson);
  if (typeof input !== "object" || input === null) return "";
  const values = input as Record<string, unknown>;
  for (const name of ["command", "path", "pattern", "query", "url"]) {
    if (typeof values[name] === "string") return values[name].split("\n")[0] ?? "";
  }
  const first = Object.entries(values)[0];
  return first ? `${first[0]}: ${JSON.stringify(first[1])}` : "";
}

export function pretty(inputJson: string): string {
  const input = parse(inputJson);
  return input === undefined ? inputJson : JSON.stringify(input, null, 2);
}

/**
 * A text with each character that a screen hides, or that reorders what stands around it, in the form `⟨U+202E⟩`. Newlines
 * and tabs stay. For what a person approves.
 */
export function visible(text: string): string {
  return text.replace(HIDDEN, (c) => `⟨U+${(c.codePointAt(0) ?? 0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

// Controls, format characters with the tags, separators of lines, variation selectors, letters without a shape.
const HIDDEN =
  /(?![\n\t])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Variation_Selector}\u034f\u115f\u1160\u17b4\u17b5\u2065\u2800\u3164\uffa0\ufff0-\ufff8\u{e0000}-\u{e0fff}]/gu;

/** Rows of a question's arguments on the page at first. */
export const ROWS_MAX = 15;
const ROW_CHARS = 100;

/**
 * A text in rows of a bounded width. Of more than `ROWS_MAX` the first and the last are shown around a count of those left
 * out, so that no newline pushes another part out of sight.
 */
export function bounded(text: string): { text: string; leftOut: number } {
  const rows = visible(text).split("\n").flatMap(inRows);
  const leftOut = rows.length - ROWS_MAX;
  if (leftOut <= 0) return { text: rows.join("\n"), leftOut: 0 };
  const last = ROWS_MAX / 3;
  const lines = leftOut === 1 ? "1 more line" : `${leftOut.toLocaleString("en")} more lines`;
  return { text: [...rows.slice(0, ROWS_MAX - last), `… ${lines} …`, ...rows.slice(-last)].join("\n"), leftOut };
}

function inRows(line: string): string[] {
  const chars = [...line];
  const rows: string[] = [];
  for (let at = 0; at < chars.length || at === 0; at += ROW_CHARS) rows.push(chars.slice(at, at + ROW_CHARS).join(""));
  return rows;
}

function parse(json: string): unknown {
  try {
    return JSON.parse(json);
  } catch {
    return undefined;
  }
}

export type Prose = { kind: "text" | "code" | "fence"; text: string };

/** Code fences and `code` in a model's text; nothing else of Markdown is interpreted. */
export function prose(text: string): Prose[] {
  const parts: Prose[] = [];
  // A fence that is still being written counts as one.
  const fence = /(?:^|\n)```[^\n]*\n([\s\S]*?)(?:\n```(?=\n|$)\n?|$)/g;
  let at = 0;
  for (const match of text.matchAll(fence)) {
    inline(text.slice(at, match.index), parts);
    parts.push({ kind: "fence", text: match[1] ?? "" });
    at = match.index + match[0].length;
  }
  inline(text.slice(at), parts);
  return parts;
}

function inline(text: string, parts: Prose[]): void {
  let at = 0;
  for (const match of text.matchAll(/`([^`\n]+)`/g)) {
    if (match.index > at) parts.push({ kind: "text", text: text.slice(at, match.index) });
    parts.push({ kind: "code", text: match[1] ?? "" });
    at = match.index + match[0].length;
  }
  if (at < text.length) parts.push({ kind: "text", text: text.slice(at) });
}
