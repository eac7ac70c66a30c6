// What a viewer knows of one chat: a pure merge of snapshots, events and live pieces. No DOM, no network, no clock.
//
// Messages are known without holes: all from `first()` to the newest. A snapshot brings the newest ones alone; older ones are
// added by pages (see earlier.ts).
//
// Events are applied once and in the order of `seq`. A live piece waits for the event that opens its text, is dropped
// when its epoch is older, and a newer epoch starts the text anew.

import {
  type Approval,
  ApprovalStatus,
  type Chat,
  type Message,
  Role,
  type ToolCall,
  ToolCallStatus,
  type ToolResultBlock,
  type Turn,
  TurnStatus,
} from "../gen/reliant/v1/common_pb.js";
import {
  type ChatEvent,
  type ChatSnapshot,
  type Delta,
  type MessageStarted,
  StreamKind,
  type ToolCallChanged,
} from "../gen/reliant/v1/updates_pb.js";
import { GrowingText } from "./text.js";

/** Pieces kept that came before the event that opens their text. */
const UNOPENED_MAX = 512;

export interface LiveBlock {
  position: number;
  kind: StreamKind;
  /** Set while the model writes a tool call's arguments. */
  tool: string;
  text: GrowingText;
}

/** A message that a model is writing. */
export interface LiveMessage {
  started: MessageStarted;
  blocks: Map<number, LiveBlock>;
}

/** A tool call with the output that was seen live. */
export interface CallView {
  call: ToolCall;
  stdout: GrowingText;
  stderr: GrowingText;
}

/** An event came that does not follow the last one: the stream must be opened again after `seq`. */
export class SequenceJump extends Error {
  constructor(have: bigint, got: bigint) {
    super(`event ${got} came after event ${have}`);
  }
}

export class ChatView {
  readonly chatId: string;
  chat: Chat | undefined;
  /** The last event applied; -1 before anything is known. */
  seq = -1n;
  logEpoch = 0n;
  readonly messages = new Map<string, Message>();
  readonly turns = new Map<string, Turn>();
  readonly calls = new Map<string, CallView>();
  readonly approvals = new Map<string, Approval>();
  readonly live = new Map<string, LiveMessage>();
  /** What calls brought back, by call: of rounds that ended, a snapshot has their messages and not their calls. */
  readonly results = new Map<string, ToolResultBlock>();
  #unopened: Delta[] = [];

  constructor(chatId: string) {
    this.chatId = chatId;
  }

  applySnapshot(snapshot: ChatSnapshot): void {
    const older = this.#olderThan(snapshot);
    this.chat = snapshot.chat;
    this.seq = snapshot.seq;
    this.logEpoch = snapshot.logEpoch;
    for (const map of [this.messages, this.turns, this.approvals, this.results]) map.clear();
    for (const message of [...older, ...snapshot.messages]) this.#applyMessage(message);
    for (const turn of snapshot.turns) this.turns.set(turn.id, turn);
    for (const approval of snapshot.approvals) this.approvals.set(approval.id, approval);
    const calls = new Set(snapshot.toolCalls.map((changed) => changed.toolCall?.id));
    for (const id of this.calls.keys()) if (!calls.has(id)) this.calls.delete(id);
    for (const changed of snapshot.toolCalls) this.#applyCall(changed);
    const started = new Set(snapshot.started.map((one) => one.messageId));
    for (const id of this.live.keys()) if (!started.has(id)) this.live.delete(id);
    for (const one of snapshot.started) this.#applyStarted(one);
    this.#openWaiting();
  }

  /** False when it had been applied before. */
  applyEvent(event: ChatEvent): boolean {
    if (event.seq <= this.seq) return false;
    if (this.seq >= 0n && event.seq !== this.seq + 1n) throw new SequenceJump(this.seq, event.seq);
    this.seq = event.seq;
    const { case: kind, value } = event.kind;
    switch (kind) {
      case "messageCommitted":
        this.#applyMessage(value);
        this.live.delete(value.id);
        break;
      case "messageStarted":
        this.#applyStarted(value);
        break;
      case "turnChanged":
        this.turns.set(value.id, value);
        // What a turn was writing that ended, or whose model broke off and is asked again later, is not coming any more.
        if (turnEnded(value) || value.retryAt) {
          for (const [id, live] of this.live) if (live.started.turnId === value.id) this.live.delete(id);
        }
        break;
      case "toolCallChanged":
        this.#applyCall(value);
        break;
      case "approvalChanged":
        this.approvals.set(value.id, value);
        break;
      case "chatChanged":
        this.chat = value;
        break;
    }
    this.#openWaiting();
    return true;
  }

  /** True when something visible changed. */
  applyDelta(delta: Delta): boolean {
    const block = delta.block;
    if (!block || this.messages.has(block.targetId)) return false;
    const live = this.live.get(block.targetId);
    const epoch = live?.started.epoch ?? this.calls.get(block.targetId)?.call.generation;
    if (epoch === undefined || delta.epoch > epoch) {
      // The oldest go first: they are the likeliest to be void, and a refill brings them again.
      if (this.#unopened.push(delta) > UNOPENED_MAX) this.#unopened.shift();
      return false;
    }
    if (delta.epoch < epoch) return false;
    const offset = Number(delta.offset);
    if (live) return growing(live, delta).text.add(offset, delta.piece);
    const call = this.calls.get(block.targetId);
    if (!call) return false;
    return (block.kind === StreamKind.STDERR ? call.stderr : call.stdout).add(offset, delta.piece);
  }

  /** Adds a page of older messages, up to the first one that is known; anything else would leave a hole. */
  addEarlier(messages: Message[]): boolean {
    const newest = messages.reduce((most, message) => Math.max(most, message.ordinal), 0);
    if (newest !== this.first() - 1) return false;
    for (const message of messages) this.#applyMessage(message);
    return true;
  }

  /** The place in the chat of the first message that is known; 1 where nothing is older. */
  first(): number {
    let first = Infinity;
    for (const message of this.messages.values()) first = Math.min(first, message.ordinal);
    return first === Infinity ? 1 : first;
  }

  /** How many messages are older than those known. */
  earlier(): number {
    return this.first() - 1;
  }

  /** Whether the message is known that asked for the turn at work, or where none is, for the newest one. */
  presentBegins(): boolean {
    const open = this.openTurn();
    if (open) return this.messages.has(open.messageId);
    const newest = this.ordered().filter((message) => message.role !== Role.NOTICE).at(-1);
    if (!newest || newest.role === Role.USER) return true;
    return [...this.messages.values()].some((message) => message.turnId === newest.turnId && message.role === Role.USER);
  }

  /** Messages in the chat's order. */
  ordered(): Message[] {
    return [...this.messages.values()].sort((a, b) => a.ordinal - b.ordinal);
  }

  /** The turn that is not at its end; the oldest, where others wait behind it. */
  openTurn(): Turn | undefined {
    return [...this.turns.values()].filter((turn) => !turnEnded(turn)).sort((a, b) => (a.id < b.id ? -1 : 1))[0];
  }

  /** Whether a piece of the turn's answer, or a whole message of it, is known. */
  hasAnswer(turnId: string): boolean {
    const written = [...this.live.values()].some(
      (live) => live.started.turnId === turnId && [...live.blocks.values()].some((block) => block.text.text !== ""),
    );
    return written || [...this.messages.values()].some((message) => message.turnId === turnId && message.role === Role.ASSISTANT);
  }

  pendingApproval(callId: string): Approval | undefined {
    return [...this.approvals.values()].find(
      (approval) => approval.toolCallId === callId && approval.status === ApprovalStatus.PENDING,
    );
  }

  #applyMessage(message: Message): void {
    this.messages.set(message.id, message);
    for (const { block } of message.blocks) if (block.case === "toolResult") this.results.set(block.value.toolCallId, block.value);
  }

  /** What stays of older pages: nothing where the log is another one, or where messages in between are not known. */
  #olderThan(snapshot: ChatSnapshot): Message[] {
    const begin = snapshot.messages[0]?.ordinal ?? 1;
    const older = this.ordered().filter((message) => message.ordinal < begin);
    const same = this.logEpoch === snapshot.logEpoch && this.seq <= snapshot.seq;
    return same && older.at(-1)?.ordinal === begin - 1 ? older : [];
  }

  #applyStarted(started: MessageStarted): void {
    const known = this.live.get(started.messageId);
    if (known && known.started.epoch >= started.epoch) return;
    if (this.messages.has(started.messageId)) return;
    this.live.set(started.messageId, { started, blocks: new Map() });
  }

  #applyCall({ toolCall }: ToolCallChanged): void {
    if (!toolCall) return;
    const known = this.calls.get(toolCall.id);
    if (known && known.call.generation === toolCall.generation) {
      known.call = toolCall;
      return;
    }
    this.calls.set(toolCall.id, { call: toolCall, stdout: new GrowingText(true), stderr: new GrowingText(true) });
  }

  #openWaiting(): void {
    const waiting = this.#unopened;
    this.#unopened = [];
    for (const delta of waiting) this.applyDelta(delta);
  }
}

function growing(live: LiveMessage, delta: Delta): LiveBlock {
  const position = delta.block?.block ?? 0;
  let block = live.blocks.get(position);
  if (!block) {
    block = { position, kind: delta.block?.kind ?? StreamKind.TEXT, tool: delta.tool, text: new GrowingText(false) };
    live.blocks.set(position, block);
  }
  return block;
}

export function turnEnded(turn: Turn): boolean {
  return [TurnStatus.SUCCEEDED, TurnStatus.FAILED, TurnStatus.CANCELLED].includes(turn.status);
}

export function callEnded(call: ToolCall): boolean {
  return call.status >= ToolCallStatus.SUCCEEDED;
}
