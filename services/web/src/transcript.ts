// A chat's messages and tool cards on the page, drawn from a ChatView. Keeps no state of its own beyond the nodes.

import { type Approval, type ContentBlock, type Message, Role } from "../gen/reliant/v1/common_pb.js";
import { StreamKind } from "../gen/reliant/v1/updates_pb.js";
import { el, place, setText } from "./dom.js";
import { ToolCard } from "./toolcard.js";
import type { ChatView, LiveMessage } from "./view.js";
import { earlierWords, prose, restartWords, turnWords } from "./words.js";

/** Nearer to the end than this, the reader is taken along. */
const STICKY_PX = 90;

export interface Decide {
  (approval: Approval, approve: boolean, forSession: boolean): Promise<void>;
}

interface Item {
  node: HTMLElement;
  /** What it was drawn from; drawn anew when that changed. */
  source: unknown;
}

export class Transcript {
  #root: HTMLElement;
  #decide: Decide;
  #items = new Map<string, Item>();
  #cards = new Map<string, ToolCard>();
  /** The place of the first message that was drawn. */
  #first = 0;
  #more = el("button", { type: "button" }, "Show earlier messages");
  #earlierWords = el("span", { class: "soft" });
  #earlier = el("div", { class: "earlier" }, this.#earlierWords, this.#more);

  /** `more` brings older messages. */
  constructor(root: HTMLElement, decide: Decide, more: () => void) {
    this.#root = root;
    this.#decide = decide;
    this.#more.addEventListener("click", more);
  }

  clear(): void {
    this.#items.clear();
    this.#cards.clear();
    this.#first = 0;
    this.#root.replaceChildren();
  }

  /** `reading`: older messages are on their way. */
  draw(view: ChatView, reading: boolean): void {
    const stick = this.#root.scrollHeight - this.#root.scrollTop - this.#root.clientHeight < STICKY_PX;
    const first = view.first();
    const anchor = !stick && first < this.#first ? this.#anchor() : undefined;
    this.#first = first;
    const nodes: HTMLElement[] = [];
    const words = earlierWords(view.earlier(), view.presentBegins());
    if (words) {
      setText(this.#earlierWords, reading ? "Reading earlier messages …" : words);
      this.#more.disabled = reading;
      nodes.push(this.#earlier);
    }
    const turns = new Map([...view.turns.values()].map((turn) => [turn.id, turn]));
    const messages = view.ordered();
    // Messages of a queued turn may stand between those of the running one.
    const last = new Map(messages.map((message) => [message.turnId, message.id]));
    for (const message of messages) {
      // Tool results are shown in their cards.
      if (message.role !== Role.TOOL) nodes.push(this.#message(view, message));
      const turn = turns.get(message.turnId);
      if (turn && last.get(turn.id) === message.id) {
        for (const live of view.live.values()) if (live.started.turnId === turn.id) nodes.push(...this.#writing(live));
        const words = turnWords(turn);
        const writing = [...view.live.values()].some((live) => live.started.turnId === turn.id && live.blocks.size > 0);
        if (words && !writing) nodes.push(this.#note(`turn ${turn.id}`, words));
      }
    }
    for (const [id, card] of this.#cards) drawCard(view, id, card);
    place(this.#root, nodes);
    for (const [key, item] of this.#items) if (!item.node.isConnected) this.#items.delete(key);
    for (const [id, card] of this.#cards) if (!card.node.isConnected) this.#cards.delete(id);
    if (stick) this.#root.scrollTop = this.#root.scrollHeight;
    else anchor?.();
  }

  /** What the reader looks at stays where it is when older messages come in above it: to be called when they are in. */
  #anchor(): (() => void) | undefined {
    const top = this.#root.getBoundingClientRect().top;
    const rect = (node: Element) => node.getBoundingClientRect();
    const node = [...this.#root.children].find((child) => child !== this.#earlier && rect(child).bottom > top);
    if (!node) return undefined;
    const before = rect(node).top;
    // The browser's own anchoring rests at the very top, and would come on top of this elsewhere.
    this.#root.style.overflowAnchor = "none";
    requestAnimationFrame(() => requestAnimationFrame(() => (this.#root.style.overflowAnchor = "")));
    return () => (this.#root.scrollTop += rect(node).top - before);
  }

  #message(view: ChatView, message: Message): HTMLElement {
    const known = this.#items.get(message.id);
    if (known?.source === message) return known.node;
    const kind = message.role === Role.USER ? "mine" : message.role === Role.NOTICE ? "notice" : "theirs";
    const node = el("article", { class: `message ${kind}`, "data-message": message.id });
    node.setAttribute("aria-label", kind === "mine" ? "You" : kind === "notice" ? "Notice" : message.model || "Assistant");
    for (const block of message.blocks) node.append(...this.#block(view, block));
    this.#items.set(message.id, { node, source: message });
    return node;
  }

  #block(view: ChatView, { block }: ContentBlock): Node[] {
    switch (block.case) {
      case "text":
        return [proseNode(block.value.text)];
      case "thinking":
        return block.value.text ? [thinkingNode(block.value.text, "Thought")] : [];
      case "toolUse": {
        const id = block.value.toolCallId;
        const card = this.#cards.get(id) ?? new ToolCard(block.value.tool, block.value.inputJson, this.#decide);
        this.#cards.set(id, card);
        drawCard(view, id, card);
        return [card.node];
      }
      case "image":
        return [el("p", { class: "soft" }, `(an image, ${block.value.mediaType})`)];
      default:
        return [];
    }
  }

  #writing(live: LiveMessage): HTMLElement[] {
    const again = restartWords(live.started);
    const message = this.#live(live);
    return again ? [this.#note(`restart ${live.started.messageId}`, again), message] : [message];
  }

  #live(live: LiveMessage): HTMLElement {
    const id = live.started.messageId;
    let item = this.#items.get(id);
    if (!item || item.source !== live) {
      item = { node: el("article", { class: "message theirs live", "data-message": id, "aria-busy": "true" }), source: live };
      this.#items.set(id, item);
    }
    const blocks = [...live.blocks.values()].sort((a, b) => a.position - b.position);
    const nodes = blocks.map((block, at) => {
      const old = item.node.children[at];
      const node = old?.getAttribute("data-kind") === String(block.kind) ? old : liveNode(block.kind, block.tool);
      node.classList.toggle("caret", at === blocks.length - 1 && block.kind === StreamKind.TEXT);
      setText(node.querySelector("[data-text]") ?? node, block.text.text);
      return node;
    });
    place(item.node, nodes);
    return item.node;
  }

  #note(key: string, words: string): HTMLElement {
    const item = this.#items.get(key) ?? { node: el("p", { class: "message notice" }), source: key };
    setText(item.node, words);
    this.#items.set(key, item);
    return item.node;
  }
}

function drawCard(view: ChatView, id: string, card: ToolCard): void {
  const call = view.calls.get(id);
  const result = view.results.get(id);
  if (call) card.draw(call, view.pendingApproval(id), result);
  else if (result) card.drawResult(result);
}

function liveNode(kind: StreamKind, tool: string): Element {
  const mark = { "data-kind": String(kind) };
  if (kind === StreamKind.THINKING) return thinkingNode("", "Thinking …", mark);
  if (kind === StreamKind.TOOL_INPUT) {
    const head = el("div", { class: "head" }, el("span", { class: "name" }, tool), el("span", { class: "status" }, "is being written"));
    return el("section", { class: "tool", ...mark }, head, el("div", { class: "body" }, el("pre", { "data-text": "" })));
  }
  return el("div", { class: "prose", ...mark });
}

function thinkingNode(text: string, summary: string, mark: Record<string, string> = {}): Element {
  return el("details", { class: "thinking", ...mark }, el("summary", {}, summary), el("div", { class: "prose", "data-text": "" }, text));
}

function proseNode(text: string): HTMLElement {
  const node = el("div", { class: "prose" });
  for (const part of prose(text)) {
    if (part.kind === "text") node.append(part.text);
    else if (part.kind === "code") node.append(el("code", {}, part.text));
    else node.append(el("pre", {}, part.text));
  }
  return node;
}
