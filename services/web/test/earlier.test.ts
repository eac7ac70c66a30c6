import assert from "node:assert/strict";
import test from "node:test";
import { create } from "@bufbuild/protobuf";
import { type Message, MessageSchema, Role, TurnSchema, TurnStatus } from "../gen/reliant/v1/common_pb.js";
import { ChatEventSchema, ChatSnapshotSchema } from "../gen/reliant/v1/updates_pb.js";
import { Earlier, PAGES_MAX } from "../src/earlier.js";
import { ChatView } from "../src/view.js";
import { cutWords, earlierWords } from "../src/words.js";

/** As the server has them in its answers. */
const SNAPSHOT_MAX = 100;

interface Said {
  turn: string;
  role: Role;
}

/** A turn of so many rounds: its message, then an answer and its results each. */
function turn(id: string, rounds: number): Said[] {
  const said: Said[] = [{ turn: id, role: Role.USER }];
  for (let round = 0; round < rounds; round++) said.push({ turn: id, role: Role.ASSISTANT }, { turn: id, role: Role.TOOL });
  return said;
}

class Server {
  messages: Message[] = [];
  reads = 0;
  #open: string[] = [];

  say(said: Said[], open = false): void {
    for (const { turn, role } of said) {
      const ordinal = this.messages.length + 1;
      const results = [{ position: 0, block: { case: "toolResult" as const, value: { toolCallId: `c${ordinal}`, content: `out ${ordinal}` } } }];
      const blocks = role === Role.TOOL ? results : [];
      this.messages.push(create(MessageSchema, { id: `m${ordinal}`, ordinal, turnId: turn, role, blocks }));
    }
    if (open) this.#open.push(said[0]!.turn);
  }

  snapshot(logEpoch = 1n) {
    const turns = this.#open.map((id) => {
      const messageId = this.messages.find((message) => message.turnId === id)!.id;
      return create(TurnSchema, { id, messageId, status: TurnStatus.RUNNING });
    });
    return create(ChatSnapshotSchema, { seq: BigInt(this.messages.length), logEpoch, messages: this.messages.slice(-SNAPSHOT_MAX), turns });
  }

  read = async (_chat: string, before: number, size: number): Promise<Message[] | undefined> => {
    this.reads += 1;
    return this.messages.filter((message) => message.ordinal < before).slice(-size);
  };
}

function isWithoutHoles(view: ChatView): void {
  view.ordered().forEach((message, at) => assert.equal(message.ordinal, view.first() + at));
}

test("the beginning of a long turn is read by itself, and not what is older", async () => {
  for (const waiting of [0, 1, 100]) {
    const server = new Server();
    server.say(turn("1 old", 500));
    server.say(turn("2 now", 150), true);
    for (let n = 0; n < waiting; n++) server.say(turn(`3 later ${n}`, 0), true);
    const view = new ChatView("c");
    view.applySnapshot(server.snapshot());
    assert.equal(view.presentBegins(), false);
    let drawn = 0;
    await new Earlier(server.read, () => drawn++).present(view);
    assert.equal(view.presentBegins(), true);
    assert.ok(view.earlier() > 0 && drawn > 0, "what is older is left to a click");
    isWithoutHoles(view);
    assert.equal(view.results.get(`c${view.ordered().find((message) => message.role === Role.TOOL)!.ordinal}`)?.content.slice(0, 3), "out");
  }
});

test("a newest turn that has ended is there from its beginning as well", async () => {
  const server = new Server();
  server.say(turn("1 old", 3));
  server.say(turn("2 long", 80));
  const view = new ChatView("c");
  view.applySnapshot(server.snapshot());
  assert.equal(view.presentBegins(), false);
  await new Earlier(server.read, () => undefined).present(view);
  assert.equal(view.presentBegins(), true);
});

test("what fits needs no reading", async () => {
  const server = new Server();
  server.say(turn("1 old", 300));
  server.say(turn("2 now", 20), true);
  const view = new ChatView("c");
  view.applySnapshot(server.snapshot());
  await new Earlier(server.read, () => undefined).present(view);
  assert.equal(server.reads, 0);
  assert.equal(view.earlier(), server.messages.length - SNAPSHOT_MAX);
});

test("a click brings a page, one at a time, down to the first message", async () => {
  const server = new Server();
  server.say(turn("1 old", 300));
  const view = new ChatView("c");
  view.applySnapshot(server.snapshot());
  const earlier = new Earlier(server.read, () => undefined);
  const both = [earlier.more(view), earlier.more(view)];
  assert.equal(earlier.reading(view), true);
  await Promise.all(both);
  assert.equal(server.reads, 1);
  for (let clicks = 0; view.earlier() > 0; clicks++) {
    assert.ok(clicks < 10);
    await earlier.more(view);
    isWithoutHoles(view);
  }
  assert.equal(view.messages.size, server.messages.length);
  await earlier.more(view);
  assert.equal(earlier.reading(view), false);
});

test("reading ends where it fails, and where it does not end", async () => {
  const server = new Server();
  server.say(turn("2 now", 150), true);
  const view = new ChatView("c");
  view.applySnapshot(server.snapshot());
  await new Earlier(async () => undefined, () => undefined).present(view);
  assert.equal(view.presentBegins(), false);
  let reads = 0;
  const one = (chat: string, before: number) => {
    reads += 1;
    return server.read(chat, before, 1);
  };
  await new Earlier(one, () => undefined).present(view);
  assert.equal(reads, PAGES_MAX);
});

test("a snapshot keeps older pages, unless messages in between are not known or the log is another one", () => {
  const server = new Server();
  server.say(turn("1 old", 100));
  const view = new ChatView("c");
  view.applySnapshot(server.snapshot());
  assert.equal(view.addEarlier(server.messages.slice(0, 50)), false, "it would leave a hole");
  assert.equal(view.addEarlier(server.messages.slice(0, -SNAPSHOT_MAX)), true);
  assert.equal(view.earlier(), 0);
  server.say(turn("2 next", 20));
  view.applySnapshot(server.snapshot());
  assert.equal(view.earlier(), 0);
  isWithoutHoles(view);
  server.say(turn("3 many", 100));
  view.applySnapshot(server.snapshot());
  assert.equal(view.first(), server.messages.length - SNAPSHOT_MAX + 1);
  view.addEarlier(server.messages.slice(0, -SNAPSHOT_MAX));
  view.applySnapshot(server.snapshot(2n));
  assert.equal(view.first(), server.messages.length - SNAPSHOT_MAX + 1);
});

test("results of rounds that ended are known by their call", () => {
  const view = new ChatView("c");
  const blocks = [{ position: 0, block: { case: "toolResult" as const, value: { toolCallId: "k", content: "out", isError: true } } }];
  const value = create(MessageSchema, { id: "m", ordinal: 1, role: Role.TOOL, blocks });
  view.applyEvent(create(ChatEventSchema, { seq: 1n, kind: { case: "messageCommitted", value } }));
  assert.deepEqual([view.results.get("k")?.content, view.results.get("k")?.isError], ["out", true]);
});

test("what is left out is said", () => {
  assert.equal(earlierWords(0, true), "");
  assert.equal(earlierWords(1, true), "1 earlier message is not shown.");
  assert.match(earlierWords(1234, false), /^1,234 earlier messages are not shown, the beginning of this turn/);
  assert.equal(cutWords(0, true), "");
  assert.match(cutWords(5000, true), /^\(5,000 characters .* the result below/);
  assert.match(cutWords(5000, false), /will begin/);
});
