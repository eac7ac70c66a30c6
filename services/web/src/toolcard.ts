// One tool call: its name, arguments, live output, state, and the question whether it may run.

import type { Approval, ToolResultBlock } from "../gen/reliant/v1/common_pb.js";
import { el, hide, setText } from "./dom.js";
import type { Decide } from "./transcript.js";
import { type CallView, callEnded } from "./view.js";
import { bounded, callWords, cutWords, gist, pretty, statusKey, visible } from "./words.js";

export class ToolCard {
  readonly node: HTMLElement;
  #decide: Decide;
  #status = el("span", { class: "status", role: "status" });
  #arguments: HTMLDetailsElement;
  #stdout = el("pre", { class: "stdout", "aria-label": "Output" });
  #stderr = el("pre", { class: "stderr", "aria-label": "Error output" });
  #result = el("pre", { class: "result", "aria-label": "Result" });
  #approval = el("div", { class: "approval" });
  #asked: string | undefined;

  constructor(tool: string, inputJson: string, decide: Decide) {
    this.#decide = decide;
    this.#arguments = el("details", {}, el("summary", {}, "Arguments"), el("pre", {}, visible(pretty(inputJson))));
    const words = el("span", { class: "gist" }, visible(gist(inputJson)));
    const head = el("div", { class: "head" }, el("span", { class: "name" }, visible(tool)), words, this.#status);
    const body = el("div", { class: "body" }, this.#arguments, this.#stdout, this.#stderr, this.#result);
    this.node = el("section", { class: "tool", "data-tool": tool, "aria-label": `Tool ${tool}` }, head, body, this.#approval);
    for (const part of [this.#stdout, this.#stderr, this.#result, this.#approval]) hide(part, true);
  }

  /** `result`: as it stands in the message of the call's round, once that is over. */
  draw({ call, stdout, stderr }: CallView, approval: Approval | undefined, result: ToolResultBlock | undefined): void {
    const ended = callEnded(call);
    this.node.setAttribute("data-status", statusKey(call.status));
    setText(this.#status, callWords(call));
    showOutput(this.#stdout, stdout.text, cutWords(stdout.cut, ended));
    showOutput(this.#stderr, stderr.text, cutWords(stderr.cut, ended));
    // What the model reads; where the output itself is on the page whole, it says nothing new.
    const whole = (stdout.length > 0 || stderr.length > 0) && stdout.cut + stderr.cut === 0;
    // A snapshot shortens a call's result, a message does not.
    const content = result && result.content.length > call.result.length ? result.content : call.result;
    this.#show(ended && content !== "" && (!whole || call.isError) ? content : "");
    this.#ask(approval);
  }

  /** A call of an earlier round, of which its result alone is known. */
  drawResult(result: ToolResultBlock): void {
    this.node.setAttribute("data-status", result.isError ? "failed" : "succeeded");
    setText(this.#status, result.isError ? "ended with an error" : "done");
    this.#show(result.content);
  }

  #show(result: string): void {
    hide(this.#result, result === "");
    if (result !== "") setText(this.#result, result);
  }

  #ask(approval: Approval | undefined): void {
    if (this.#asked === approval?.id) return;
    this.#asked = approval?.id;
    hide(this.#approval, !approval);
    if (!approval) {
      this.#approval.replaceChildren();
      return;
    }
    const button = (words: string, kind: string, approve: boolean, forSession: boolean) => {
      const node = el("button", { type: "button", class: kind }, words);
      node.addEventListener("click", async () => {
        const buttons = [...this.#approval.querySelectorAll("button")];
        for (const one of buttons) one.disabled = true;
        try {
          await this.#decide(approval, approve, forSession);
        } finally {
          for (const one of buttons) one.disabled = false;
        }
      });
      return node;
    };
    this.#approval.replaceChildren(
      el("p", {}, `May ${visible(approval.tool)} run on your machine?`),
      ...asked(approval),
      button("Approve once", "main", true, false),
      button("Approve for this chat", "", true, true),
      button("Deny", "", false, false),
    );
  }
}

/** What is asked about, short enough to be seen with its end; the whole of it at a press. */
function asked(approval: Approval): HTMLElement[] {
  const whole = pretty(approval.inputJson);
  const { text, leftOut } = bounded(whole);
  const shown = el("pre", { class: "asked" }, text);
  if (leftOut === 0) return [shown];
  const more = el("button", { type: "button" }, "Show all");
  more.addEventListener("click", () => {
    setText(shown, visible(whole));
    more.remove();
  });
  return [shown, more];
}

function showOutput(node: HTMLElement, text: string, cut: string): void {
  hide(node, text === "");
  if (text === "") return;
  const stick = node.scrollHeight - node.scrollTop - node.clientHeight < 40;
  setText(node, cut ? `${cut}\n${text}` : text);
  if (stick) node.scrollTop = node.scrollHeight;
}
