// Brings the messages that a snapshot leaves out: by itself up to the beginning of the turn at work, else when asked.

import type { Message } from "../gen/reliant/v1/common_pb.js";
import type { ChatView } from "./view.js";

/** Messages of one page; a page is also cut by its bytes. */
export const PAGE_MESSAGES = 200;
/** Pages read without being asked for: more than the longest turn has. */
export const PAGES_MAX = 16;

export interface ReadPage {
  (chatId: string, beforeOrdinal: number, pageSize: number): Promise<Message[] | undefined>;
}

export class Earlier {
  #read: ReadPage;
  #changed: () => void;
  #reading = new Set<ChatView>();

  /** `read` answers undefined where it failed and said so; `changed` is called when a page came or none does. */
  constructor(read: ReadPage, changed: () => void) {
    this.#read = read;
    this.#changed = changed;
  }

  reading(view: ChatView): boolean {
    return this.#reading.has(view);
  }

  /** After a snapshot: nothing of the present stays out while older things, or what waits behind it, are on the page. */
  async present(view: ChatView): Promise<void> {
    await this.#once(view, async () => {
      for (let page = 0; page < PAGES_MAX && !view.presentBegins() && view.earlier() > 0; page++) {
        if (!(await this.#page(view))) return;
      }
    });
  }

  /** One page more. */
  async more(view: ChatView): Promise<void> {
    await this.#once(view, async () => {
      if (view.earlier() > 0) await this.#page(view);
    });
  }

  async #once(view: ChatView, work: () => Promise<void>): Promise<void> {
    if (this.#reading.has(view)) return;
    this.#reading.add(view);
    try {
      await work();
    } finally {
      this.#reading.delete(view);
      this.#changed();
    }
  }

  async #page(view: ChatView): Promise<boolean> {
    const before = view.first();
    const messages = await this.#read(view.chatId, before, PAGE_MESSAGES);
    if (!messages?.length) return false;
    // A snapshot came meanwhile and begins elsewhere: the page is read again from there.
    const added = view.first() !== before || view.addEarlier(messages);
    this.#changed();
    return added;
  }
}
