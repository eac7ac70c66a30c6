"use strict";
// The list of traces, and one of them: phases, waterfall with the critical path, logs. Texts come from programs and
// models: they are set as text, never as markup.

const $ = (id) => document.getElementById(id);
const REFRESH_MS = 2000;
// Fixed, so that a role and a phase look the same in every trace.
const ROLES = { client: "#7a5af8", api: "#1f6feb", worker: "#1a7f37", gateway: "#b35900", daemon: "#c2255c", web: "#ae3ec9", "model-sim": "#0c8599" };
const PHASES = {
  accept: "#1f6feb", held: "#b08968", enqueue: "#748ffc", pickup: "#4dabf7", context: "#12b886", model_first_token: "#0c8599", model_stream: "#66d9e8",
  approval_wait: "#fab005", tool_route: "#e8590c", tool_run: "#c2255c", tool_return: "#f783ac", persist: "#7950f2", fanout: "#868e96", retry: "#b3261e",
};
// What a newer sender calls a phase or a role is drawn, too.
const OTHER = "#868e96";

let chosen = "";
let shown = "";
const open = new Set();

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") element.className = value;
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

const ms = (us) => (us / 1000).toFixed(us < 10000 ? 2 : 1);
const role = (service) => service.replace(/^reliant-/, "");
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

async function ask(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

function line(trace) {
  const at = new Date(trace.start_us / 1000).toLocaleTimeString();
  const facts = [`${ms(trace.duration_us)} ms`, plural(trace.spans, "span")];
  const button = make("button", { type: "button", "aria-current": String(trace.trace_id === chosen), onclick: () => choose(trace.trace_id) },
    make("b", {}, `${at}  ${trace.name}`), make("span", {}, `  ${facts.join(", ")}`));
  if (trace.error) button.append(make("span", { class: "bad" }, "  error"));
  if (trace.orphans) button.append(make("span", { class: "bad" }, `  ${plural(trace.orphans, "orphan")}`));
  button.append(make("small", {}, trace.trace_id));
  return make("li", {}, button);
}

async function list() {
  const query = new URLSearchParams({ search: $("search").value.trim(), all: String($("all").checked) });
  const traces = await ask(`api/traces?${query}`);
  const focused = document.activeElement?.closest?.("#list li");
  const place = focused ? [...$("list").children].indexOf(focused) : -1;
  $("list").replaceChildren(...traces.map(line));
  if (place >= 0) $("list").children[place]?.querySelector("button").focus();
  $("empty").hidden = traces.length > 0;
  const status = await ask("api/status");
  const lost = status.dropped ? `, ${status.dropped} dropped` : "";
  $("status").textContent = `${plural(status.traces, "trace")}, ${plural(status.spans, "span")} kept${lost}`;
  return traces;
}

function drawPhases(phases) {
  const total = phases.reduce((sum, [, seconds]) => sum + seconds, 0);
  $("phases-title").hidden = $("phases").hidden = $("phase-table").hidden = total === 0;
  const share = (seconds) => `${((100 * seconds) / total).toFixed(1)} %`;
  $("phases").replaceChildren(...phases.map(([name, seconds]) => {
    const part = make("div", { title: `${name}: ${(seconds * 1000).toFixed(1)} ms` });
    part.style.width = `${(100 * seconds) / total}%`;
    part.style.background = PHASES[name] ?? OTHER;
    return part;
  }));
  $("phases").setAttribute("aria-label", phases.map(([name, seconds]) => `${name} ${share(seconds)}`).join(", "));
  const rows = phases.map(([name, seconds]) => {
    const swatch = make("span", { class: "swatch" });
    swatch.style.background = PHASES[name] ?? OTHER;
    return make("tr", {}, make("td", {}, swatch, name), make("td", { class: "number" }, `${(seconds * 1000).toFixed(1)} ms`), make("td", { class: "number" }, share(seconds)));
  });
  rows.push(make("tr", {}, make("td", {}, make("b", {}, "sum")), make("td", { class: "number" }, make("b", {}, `${(total * 1000).toFixed(1)} ms`)), make("td")));
  $("phase-table").tBodies[0].replaceChildren(...rows);
}

function detail(span) {
  const pairs = [["kind", span.kind], ["process", span.instance], ["span id", span.span_id], ["parent", span.parent_id || "none"]];
  for (const link of span.links) pairs.push(["link", `${link.trace_id} ${link.span_id}`]);
  for (const [key, value] of Object.entries(span.attributes)) pairs.push([key, typeof value === "string" ? value : JSON.stringify(value)]);
  const words = pairs.flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, value)]);
  return make("tr", { class: "detail" }, make("td", { colspan: "5" }, make("dl", {}, ...words)));
}

function drawSpans(trace) {
  const begin = Math.min(...trace.spans.map((span) => span.start_us));
  const whole = Math.max(1, Math.max(...trace.spans.map((span) => span.end_us)) - begin);
  const rows = [];
  for (const span of trace.spans) {
    const bar = make("div", { class: "bar" });
    bar.style.left = `${(100 * (span.start_us - begin)) / whole}%`;
    bar.style.width = `${(100 * (span.end_us - span.start_us)) / whole}%`;
    bar.style.setProperty("--role", ROLES[role(span.service)] ?? OTHER);
    const name = make("td", { class: "name", title: span.name }, span.name);
    name.style.paddingLeft = `${0.4 + span.depth * 0.9}rem`;
    if (span.error) name.append(make("span", { class: "bad" }, " error"));
    if (span.orphan) name.append(make("span", { class: "bad" }, " orphan"));
    if (span.links.length) name.append(make("span", { class: "hint" }, ` (${plural(span.links.length, "link")})`));
    const toggle = () => {
      if (open.has(span.span_id)) open.delete(span.span_id); else open.add(span.span_id);
      drawSpans(trace);
      document.querySelector(`[data-span="${span.span_id}"]`)?.focus();
    };
    const isOpen = open.has(span.span_id);
    rows.push(make("tr", {
      class: `span${span.critical ? " critical" : ""}${isOpen ? " open" : ""}`, tabindex: "0", "aria-expanded": String(isOpen), "data-span": span.span_id,
      onclick: toggle, onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(); } },
    }, name, make("td", {}, role(span.service)), make("td", { class: "number" }, ms(span.start_us - begin)),
      make("td", { class: "number" }, ms(span.end_us - span.start_us)), make("td", {}, make("div", { class: "track" }, bar))));
    if (isOpen) rows.push(detail(span));
  }
  $("spans").tBodies[0].replaceChildren(...rows);
}

function drawLogs(logs) {
  $("logs-title").hidden = logs.length === 0;
  $("logs").replaceChildren(...logs.map((log) => {
    const at = new Date(log.time_us / 1000).toISOString().slice(11, 23);
    const rest = Object.entries(log.attributes).map(([key, value]) => `${key}=${typeof value === "string" ? value : JSON.stringify(value)}`).join(" ");
    return make("li", { class: log.level === "ERROR" ? "bad" : "" }, `${at} ${log.level} ${role(log.service)}: ${log.message} ${rest}`);
  }));
}

async function draw() {
  if (!chosen) return;
  let trace;
  try {
    trace = await ask(`api/traces/${encodeURIComponent(chosen)}`);
  } catch (error) {
    // Nothing of the one shown before may stand under this one's name.
    shown = "";
    $("trace").hidden = false;
    $("title").textContent = chosen;
    $("facts").textContent = error.message;
    drawPhases([]);
    $("spans").tBodies[0].replaceChildren();
    drawLogs([]);
    return;
  }
  const state = `${trace.trace_id} ${trace.spans.length} ${trace.logs.length}`;
  if (state === shown || trace.spans.length === 0) return;
  shown = state;
  $("trace").hidden = false;
  $("title").textContent = trace.trace_id;
  const begin = Math.min(...trace.spans.map((span) => span.start_us));
  const end = Math.max(...trace.spans.map((span) => span.end_us));
  const processes = new Set(trace.spans.map((span) => span.instance)).size;
  const chats = new Set(trace.spans.map((span) => span.attributes["chat.id"]).filter(Boolean));
  $("facts").textContent = [new Date(begin / 1000).toLocaleString(), `${ms(end - begin)} ms`, plural(trace.spans.length, "span"),
    plural(processes, "process").replace("processs", "processes"), ...[...chats].map((chat) => `chat ${chat}`)].join(", ");
  drawPhases(trace.phases);
  drawSpans(trace);
  drawLogs(trace.logs);
}

function choose(id) {
  chosen = id;
  open.clear();
  location.hash = id;
  refresh().then(() => $("trace").focus({ preventScroll: true }));
}

async function refresh() {
  try {
    const traces = await list();
    if (!chosen && traces.length) chosen = traces[0].trace_id;
    await draw();
  } catch {
    $("status").textContent = "The receiver does not answer; is `reliant up --observe` still running?";
  }
}

$("find").addEventListener("submit", (event) => { event.preventDefault(); refresh(); });
$("search").addEventListener("input", refresh);
$("all").addEventListener("change", refresh);
addEventListener("hashchange", () => { if (location.hash.slice(1) !== chosen) choose(location.hash.slice(1)); });
chosen = location.hash.slice(1);
refresh();
setInterval(refresh, REFRESH_MS);
