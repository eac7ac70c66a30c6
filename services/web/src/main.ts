// The page: signs in, lists chats, follows one of them and the user's feed, and sends what the person types.

import { create } from "@bufbuild/protobuf";
import { type Approval, ApprovalScope, type Chat, type ChatMode, type Message } from "../gen/reliant/v1/common_pb.js";
import type { Daemon } from "../gen/reliant/v1/daemons_pb.js";
import { type FeedEvent, SubscribeRequestSchema, type SubscribeResponse } from "../gen/reliant/v1/updates_pb.js";
import type { PageSpan } from "../gen/reliant/v1/telemetry_pb.js";
import { api } from "./api.js";
import { byId, el, hide, place, setText } from "./dom.js";
import { Earlier } from "./earlier.js";
import { shown, type Shown } from "./errors.js";
import { follow } from "./follow.js";
import * as session from "./session.js";
import { Click } from "./trace.js";
import { Transcript } from "./transcript.js";
import { ChatView } from "./view.js";
import { duration, visible } from "./words.js";

const CHATS_LISTED = 100;

const chats = new Map<string, Chat>();
const daemons = new Map<string, Daemon>();
const feed = { seq: -1n, logEpoch: 0n };
const chatItems = new Map<string, HTMLLIElement>();
const earlier = new Earlier(readPage, draw);
const transcript = new Transcript(byId("transcript"), decide, () => {
  if (view) void earlier.more(view);
});
let view: ChatView | undefined;
let stream: AbortController | undefined;
let drawing = 0;
/** The code of a link that waits for the person's answer. */
let offer: string | undefined;
/** A message whose acceptance is not known: sent again with the same id, it is the same message. */
/** The id of a request for a chat whose answer did not come: the same again is the same chat. */
let unmade: string | undefined;
let unsent: { text: string; id: string; chatId: string; click: Click } | undefined;
/** The click whose answer is not on the page yet. */
let awaited: { turnId: string; click: Click } | undefined;

// ---- signing in

async function start(): Promise<void> {
  byId("sign-in-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const code = session.codeOf(byId<HTMLInputElement>("code").value);
    if (code) void signIn(code);
    else signInTrouble("That is neither a sign-in link nor a code.");
  });
  // Escape and the button that has the focus both keep the session.
  byId("switch").addEventListener("close", () => {
    const code = offer;
    offer = undefined;
    if (code && byId<HTMLDialogElement>("switch").returnValue === "switch") void replaceSession(code);
    byId<HTMLDialogElement>("switch").returnValue = "";
  });
  window.addEventListener("hashchange", () => {
    const code = session.takeCodeFromAddress();
    if (code) void offered(code);
  });
  const code = session.takeCodeFromAddress();
  if (session.token()) await open();
  else if (!code) showSignIn();
  if (code) await offered(code);
}

/**
 * A link that the tab was led to. It signs in a tab that has no session; a session that stands is replaced only where its
 * person says so, for whoever made the link reads what is typed under its name.
 */
async function offered(code: string): Promise<void> {
  if (!session.token()) return signIn(code);
  const dialog = byId<HTMLDialogElement>("switch");
  const who = byId("who").textContent || "You are signed in";
  setText(byId("switch-who"), visible(who));
  offer = code;
  if (!dialog.open) dialog.showModal();
}

async function signIn(code: string): Promise<void> {
  try {
    const { accessToken } = await api.identity.exchangeLoginCode({ code });
    session.keep(accessToken);
  } catch (error) {
    // A link opened twice is no reason to leave a session that stands.
    if (session.token()) return open();
    const { sentence, code: reason } = shown(error);
    showSignIn();
    signInTrouble(`${sentence} (${reason})`);
    return;
  }
  await open();
}

/** Begins the page anew under the other name; of the session before nothing stays on it. */
async function replaceSession(code: string): Promise<void> {
  try {
    const { accessToken } = await api.identity.exchangeLoginCode({ code });
    session.keep(accessToken);
  } catch (error) {
    // A link opened twice is no reason to leave a session that stands.
    setError(shown(error));
    return;
  }
  location.reload();
}

function showSignIn(): void {
  stream?.abort();
  hide(byId("app"), true);
  hide(byId("sign-in"), false);
  byId("code").focus();
}

function signInTrouble(sentence: string): void {
  setText(byId("sign-in-error"), sentence);
  hide(byId("sign-in-error"), false);
}

function signedOut(error: Shown): void {
  session.forget();
  showSignIn();
  signInTrouble(`${error.sentence} (${error.code})`);
}

// ---- the lists

async function open(): Promise<void> {
  hide(byId("sign-in"), true);
  hide(byId("sign-in-error"), true);
  hide(byId("app"), false);
  await attempt(async () => {
    const [user, models] = await Promise.all([api.identity.getCurrentUser({}), api.models.listModels({}), reload()]);
    setText(byId("who"), `Signed in as ${user.name}`);
    const select = byId<HTMLSelectElement>("model");
    select.replaceChildren(...models.models.map((model) => el("option", { value: model.id }, model.id)));
  });
  const last = chats.get(session.lastChat() ?? "") ?? [...chats.values()].sort(byChange)[0];
  if (last && !view) openChat(last.id);
  else followNow();
}

/** Lists are read again whenever a stream begins: what the feed told in between may be gone. */
async function reload(): Promise<void> {
  const [listedChats, listedDaemons] = await Promise.all([api.chats.listChats({ pageSize: CHATS_LISTED }), api.daemons.listDaemons({})]);
  chats.clear();
  for (const chat of listedChats.chats) chats.set(chat.id, chat);
  daemons.clear();
  for (const daemon of listedDaemons.daemons) daemons.set(daemon.id, daemon);
  draw();
}

function byChange(a: Chat, b: Chat): number {
  return Number((b.updatedAt?.seconds ?? 0n) - (a.updatedAt?.seconds ?? 0n)) || (a.id < b.id ? 1 : -1);
}

function applyFeed(event: FeedEvent): void {
  if (event.seq <= feed.seq) return;
  feed.seq = event.seq;
  const { case: kind, value } = event.kind;
  if (kind === "chatChanged") {
    keepChat(value);
  } else if (kind === "daemonChanged") {
    const known = daemons.get(value.daemonId);
    if (known) known.connected = value.connected;
    else void attempt(reload);
  }
}

function keepChat(chat: Chat): void {
  if (chat.archived) chats.delete(chat.id);
  else chats.set(chat.id, chat);
}

// ---- one chat

function openChat(id: string): void {
  if (view?.chatId === id) return;
  view = new ChatView(id);
  view.chat = chats.get(id);
  session.keepChat(id);
  transcript.clear();
  setError(undefined);
  followNow();
  draw();
}

function followNow(): void {
  stream?.abort();
  stream = new AbortController();
  const { signal } = stream;
  const shownView = view;
  void follow({
    signal,
    open: (request, cut) => api.updates.subscribe(request, { signal: cut }),
    request: () =>
      create(SubscribeRequestSchema, {
        chats: shownView ? [{ chatId: shownView.chatId, afterSeq: shownView.seq, logEpoch: shownView.logEpoch }] : [],
        feed: { afterSeq: feed.seq, logEpoch: feed.logEpoch },
      }),
    update: (update) => {
      if (!signal.aborted) apply(update, shownView);
    },
    status: (status) => {
      if (signal.aborted) return;
      if (status.kind === "ended") signedOut(status.error);
      const words =
        status.kind === "waiting" ? `${status.error.sentence} (${status.error.code}) Trying again in ${duration(status.ms)}.` : "";
      if (status.kind !== "connecting") setText(byId("connection"), words);
    },
  });
}

function apply({ update }: SubscribeResponse, shownView: ChatView | undefined): void {
  switch (update.case) {
    case "event":
      // A jump throws: the stream is then opened again after what is here.
      shownView?.applyEvent(update.value);
      if (update.value.kind.case === "chatChanged") keepChat(update.value.kind.value);
      break;
    case "delta":
      if (!shownView?.applyDelta(update.value)) return;
      break;
    case "snapshot":
      shownView?.applySnapshot(update.value);
      if (shownView) void earlier.present(shownView);
      break;
    case "feedEvent":
      applyFeed(update.value);
      break;
    case "caughtUp":
      if (update.value.chatId) {
        if (shownView) shownView.logEpoch = update.value.logEpoch;
      } else {
        if (update.value.seq !== feed.seq) void attempt(reload);
        feed.seq = update.value.seq;
        feed.logEpoch = update.value.logEpoch;
      }
      break;
    default:
      return;
  }
  draw();
}

async function readPage(chatId: string, beforeOrdinal: number, pageSize: number): Promise<Message[] | undefined> {
  return (await attempt(() => api.messages.listMessages({ chatId, beforeOrdinal, pageSize })))?.messages;
}

async function newChat(): Promise<string | undefined> {
  return attempt(async () => {
    unmade ??= newId();
    const { chat } = await api.chats.createChat({ clientRequestId: unmade });
    unmade = undefined;
    if (!chat) return undefined;
    chats.set(chat.id, chat);
    openChat(chat.id);
    byId("text").focus();
    return chat.id;
  });
}

async function send(): Promise<void> {
  const input = byId<HTMLTextAreaElement>("text");
  const text = input.value;
  const click = new Click();
  if (!text.trim()) return;
  const chatId = view?.chatId ?? (await newChat());
  if (!chatId) return;
  if (unsent?.text !== text || unsent.chatId !== chatId) unsent = { text, id: newId(), chatId, click };
  const message = unsent;
  const button = byId<HTMLButtonElement>("send");
  button.disabled = true;
  const call = message.click.call();
  const headers = { traceparent: call.traceparent };
  const sent = await attempt(() => api.messages.sendMessage({ chatId, clientMessageId: message.id, text }, { headers }));
  call.end(!sent);
  button.disabled = false;
  if (!sent) return;
  unsent = undefined;
  // A try whose answer was lost may have been of another page load; then the trace is not this click's.
  if (sent.turn && sent.turn.traceId === message.click.traceId) {
    awaited = { turnId: sent.turn.id, click: message.click };
    tell(sent.turn.id, message.click, message.click.sent());
  }
  input.value = "";
  input.focus();
}

/** Hands the page's spans to the api. What fails is let go: a trace is not worth a person's attention. */
function tell(turnId: string, click: Click, spans: PageSpan[]): void {
  api.telemetry.reportPageSpans({ turnId, spans, nowUnixUs: click.now() }).catch(() => undefined);
}

/** After a drawing: whether the answer's first piece is on the page now. */
function toldFirstText(shownView: ChatView): void {
  if (!awaited || !shownView.hasAnswer(awaited.turnId)) return;
  const { turnId, click } = awaited;
  awaited = undefined;
  // The next frame begins when this one is on the screen.
  requestAnimationFrame(() => tell(turnId, click, click.firstText()));
}

/** `crypto.randomUUID` exists on secure origins only; a console on plain http has none. */
function newId(): string {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function decide(approval: Approval, approve: boolean, forSession: boolean): Promise<void> {
  const scope = forSession ? ApprovalScope.SESSION : ApprovalScope.ONCE;
  await attempt(() => api.approvals.decideApproval({ approvalId: approval.id, approve, scope }));
}

// ---- drawing

/** Runs a call; an error becomes a sentence, and nothing is thrown. */
async function attempt<T>(work: () => Promise<T>): Promise<T | undefined> {
  try {
    const result = await work();
    setError(undefined);
    return result;
  } catch (error) {
    const what = shown(error);
    if (what.signedOut) signedOut(what);
    else setError(what);
    return undefined;
  }
}

function setError(error: Shown | undefined): void {
  const node = byId("error");
  hide(node, !error);
  setText(node, error ? `${error.sentence} (${error.code})` : "");
}

/** At most once a frame, however many pieces came. A hidden tab gets no frames, and needs none. */
function draw(): void {
  if (drawing) return;
  drawing = requestAnimationFrame(() => {
    drawing = 0;
    drawChats();
    drawHeader();
    if (!view) return;
    transcript.draw(view, earlier.reading(view));
    toldFirstText(view);
  });
}

function drawChats(): void {
  const nodes = [...chats.values()].sort(byChange).map((chat) => {
    let item = chatItems.get(chat.id);
    if (!item) {
      const button = el("button", { type: "button" });
      button.addEventListener("click", () => openChat(chat.id));
      item = el("li", {}, button);
      chatItems.set(chat.id, item);
    }
    const button = item.firstElementChild as HTMLButtonElement;
    setText(button, chat.title || "New chat");
    button.setAttribute("aria-current", String(chat.id === view?.chatId));
    return item;
  });
  place(byId("chats"), nodes);
  const lines = [...daemons.values()].map((daemon) =>
    el("p", {}, el("span", { class: daemon.connected ? "dot on" : "dot" }), `${daemon.name}${daemon.connected ? "" : " (away)"}`),
  );
  byId("daemons").replaceChildren(...(lines.length ? lines : [el("p", {}, "No daemon yet.")]));
}

function drawHeader(): void {
  const chat = view?.chat;
  setText(byId("title"), chat ? chat.title || "New chat" : "No chat open");
  document.title = chat?.title ? `${chat.title} – reliant` : "reliant";
  const model = byId<HTMLSelectElement>("model");
  const mode = byId<HTMLSelectElement>("mode");
  model.disabled = mode.disabled = !chat;
  if (chat) {
    if (![...model.options].some((option) => option.value === chat.model)) model.append(el("option", { value: chat.model }, chat.model));
    if (document.activeElement !== model) model.value = chat.model;
    if (document.activeElement !== mode) mode.value = String(chat.mode || 1);
  }
  const daemon = chat ? daemons.get(chat.daemonId) : undefined;
  const dot = el("span", { class: daemon?.connected ? "dot on" : "dot" });
  const words = daemon ? `${daemon.name}${daemon.connected ? "" : " (away)"}` : "no daemon, so no tools";
  byId("daemon").replaceChildren(...(chat ? [dot, words] : []));
  hide(byId("cancel"), !view?.openTurn());
}

function configure(change: { model?: string; mode?: ChatMode }): void {
  const chatId = view?.chatId;
  if (chatId) void attempt(() => api.chats.configureChat({ chatId, ...change }));
}

byId("new-chat").addEventListener("click", () => void newChat());
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  void send();
});
byId("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    void send();
  }
});
byId("cancel").addEventListener("click", () => {
  const turn = view?.openTurn();
  if (turn) void attempt(() => api.turns.cancelTurn({ turnId: turn.id }));
});
byId<HTMLSelectElement>("model").addEventListener("change", (event) => configure({ model: (event.target as HTMLSelectElement).value }));
byId<HTMLSelectElement>("mode").addEventListener("change", (event) =>
  configure({ mode: Number((event.target as HTMLSelectElement).value) as ChatMode }),
);

void start();
