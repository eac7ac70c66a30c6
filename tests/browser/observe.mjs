// One turn on the page of the trace receiver, in a real browser: found by its ids, drawn whole, its phases summed up.
//
// Usage: node observe.mjs RECEIVER_URL TRACE_ID CHAT_ID [SCREENSHOT_DIR]
// The receiver holds that trace whole, and no other trace of that chat. Ends with 0 when everything was as expected; else
// says what was not, and saves a picture of it.

import { inBrowser } from "./browser.mjs";

// Each row and the sum are rounded to a tenth of a millisecond.
const ROUNDING_MS = 0.05;
// A bar's place is in percent of the track.
const ROUNDING_PERCENT = 0.01;
// No trace has this id; the browser says itself that it is not there.
const NOWHERE = "f".repeat(32);

const [url, trace, chat, pictures = "target/browser"] = process.argv.slice(2);
if (!url || !trace || !chat) {
  console.error("usage: node observe.mjs RECEIVER_URL TRACE_ID CHAT_ID [SCREENSHOT_DIR]");
  process.exit(2);
}

function expect(holds, otherwise) {
  if (!holds) throw new Error(otherwise);
}

// Waits until the list is this trace alone.
async function find(page, words) {
  await page.locator("#search").fill(words);
  await page.waitForFunction((trace) => {
    const ids = [...document.querySelectorAll("#list small")].map((small) => small.textContent);
    return ids.length === 1 && ids[0] === trace;
  }, trace);
}

async function rows(page) {
  return page.locator("#spans tr.span").evaluateAll((rows) => rows.map((row) => {
    const { left, width, height } = row.querySelector(".bar").getBoundingClientRect();
    const track = row.querySelector(".track").getBoundingClientRect();
    const style = row.querySelector(".bar").style;
    return {
      name: row.querySelector(".name").textContent,
      role: row.cells[1].textContent,
      critical: row.classList.contains("critical"),
      colour: style.getPropertyValue("--role"),
      ground: getComputedStyle(row.querySelector(".bar")).backgroundColor,
      from: parseFloat(style.left),
      to: parseFloat(style.left) + parseFloat(style.width),
      isSeen: left >= track.left - 1 && width > 0 && height > 0,
    };
  }));
}

await inBrowser(pictures, async (page, check) => {
  await check("a row is there", async () => {
    await page.goto(url);
    await page.locator("#list button").first().waitFor();
    expect(!(await page.locator("#empty").isVisible()), "traces are listed and said to be none");
  });
  await check("it is found by the beginning of its trace id", () => find(page, trace.slice(0, 12)));
  await check("nothing is found by what no trace is called", async () => {
    await page.locator("#search").fill("zzzz");
    await page.locator("#empty").waitFor({ state: "visible" });
    expect((await page.locator("#list button").count()) === 0, "rows are left of another search");
  });
  await check("it is found by its chat's id", () => find(page, chat));
  await check("it opens", async () => {
    await page.locator("#list button").click();
    await page.waitForFunction((trace) => document.getElementById("title").textContent === trace, trace);
    await page.locator("#list [aria-current=true]").waitFor();
    const facts = await page.locator("#facts").textContent();
    expect(facts.includes(`chat ${chat}`) && facts.includes("processes"), `its facts are: ${facts}`);
    expect(page.url().endsWith(`#${trace}`), `the address is ${page.url()}`);
  });
  await check("each span has a bar in its time and in its role's colour", async () => {
    const all = await rows(page);
    expect(all.length > 10, `only ${all.length} spans of a turn with a tool call`);
    for (const row of all) {
      expect(row.isSeen && row.from >= 0 && row.to <= 100 + ROUNDING_PERCENT, `no bar in its track: ${JSON.stringify(row)}`);
    }
    const roles = new Map(all.map((row) => [row.role, row.colour]));
    for (const role of ["client", "api", "worker", "gateway", "daemon", "model-sim"]) expect(roles.has(role), `no span of ${role}`);
    expect(new Set(roles.values()).size === roles.size, `roles look alike: ${JSON.stringify([...roles])}`);
    expect(Math.max(...all.map((row) => row.to)) > 99, "the last span does not end where the trace does");
  });
  await check("the critical path goes from the first span to the end, and not through all", async () => {
    const all = await rows(page);
    const critical = all.filter((row) => row.critical);
    expect(all[0].critical, `the root '${all[0].name}' is not on it`);
    expect(critical.length > 5 && critical.length < all.length, `${critical.length} of ${all.length} spans are on it`);
    expect(critical.some((row) => row.name.startsWith("execute_tool")), "the tool is not on it");
    expect(Math.max(...critical.map((row) => row.to)) > 99, "it stops before the end");
    const empty = "rgba(0, 0, 0, 0)";
    for (const row of all) expect(row.critical === (row.ground !== empty), `filled or hollow? ${JSON.stringify(row)}`);
  });
  await check("the phases make their sum, each in a colour", async () => {
    const table = await page.locator("#phase-table tr").evaluateAll((rows) => rows.map((row) => ({
      name: row.cells[0].textContent,
      ms: parseFloat(row.cells[1].textContent),
      colour: row.querySelector(".swatch")?.style.background,
    })));
    const sum = table.pop();
    expect(sum.name === "sum" && table.length > 5, `the table is ${JSON.stringify(table)}`);
    const total = table.reduce((total, row) => total + row.ms, 0);
    expect(Math.abs(total - sum.ms) <= ROUNDING_MS * (table.length + 1), `they make ${total} ms, the sum says ${sum.ms}`);
    expect(table.every((row) => row.colour) && new Set(table.map((row) => row.colour)).size === table.length, `phases look alike: ${JSON.stringify(table)}`);
    const parts = await page.locator("#phases > div").evaluateAll((parts) => parts.reduce((width, part) => width + parseFloat(part.style.width), 0));
    expect(Math.abs(parts - 100) < 0.1, `the bar of phases is ${parts} % full`);
    expect(table.some((row) => row.name === "tool_run"), "no time of the tool");
  });
  await page.screenshot({ path: `${pictures}/observe-1-trace.png`, fullPage: true });
  await check("a span shows its attributes, by mouse and by key", async () => {
    const tool = page.locator("#spans tr.span", { hasText: "execute_tool" }).first();
    await tool.click();
    await page.locator("#spans tr.detail dt", { hasText: "tool.call_id" }).waitFor();
    await page.keyboard.press("Enter");
    await page.locator("#spans tr.detail").waitFor({ state: "detached" });
  });
  await check("a link opens it, and what is not here has nothing of it", async () => {
    await page.goto("about:blank");
    await page.goto(`${url}/#${trace}`);
    await page.locator("#spans tr.span").first().waitFor();
    await page.evaluate((id) => { location.hash = id; }, NOWHERE);
    await page.locator("#facts", { hasText: "not here" }).waitFor();
    expect((await page.locator("#spans tr.span").count()) === 0, "spans of another trace are left");
    await page.evaluate((id) => { location.hash = id; }, trace);
    await page.locator("#spans tr.span").first().waitFor();
    expect((await page.locator("#title").textContent()) === trace, "the trace stands under another's name");
  });
  await page.emulateMedia({ colorScheme: "dark" });
  await page.screenshot({ path: `${pictures}/observe-2-dark.png`, fullPage: true });
}, (address) => address.endsWith(NOWHERE));
