// What every flow through a real browser shares: it is found, started, listened to, and a picture is kept of what failed.

import { existsSync, mkdirSync } from "node:fs";
import { chromium } from "playwright-core";

const DEADLINE_MS = 30_000;
const BROWSERS = [process.env.RELIANT_CHROMIUM, "/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

// Ends the process with 0 when everything was as expected; else says what was not. A complaint of the browser about an
// address for which `isMissing` holds is part of the flow.
export async function inBrowser(pictures, flow, isMissing = () => false) {
  const executablePath = BROWSERS.find((path) => path && existsSync(path));
  if (!executablePath) {
    console.error("no Chromium was found; run `make tools`, or set RELIANT_CHROMIUM to one");
    process.exit(2);
  }
  mkdirSync(pictures, { recursive: true });
  const browser = await chromium.launch({ executablePath, headless: true, args: FLAGS });
  const context = await browser.newContext({ viewport: { width: 1180, height: 860 } });
  const page = await context.newPage();
  page.setDefaultTimeout(DEADLINE_MS);
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(`the page threw: ${error.message}`));
  page.on("console", (line) => {
    // The browser's own words for a refused policy, a missing file or an uncaught error.
    if (line.type() === "error" && !isMissing(line.location().url)) complaints.push(`the console says: ${line.text()}`);
  });
  let step = "opening the page";
  const check = async (name, work) => {
    step = name;
    const begun = performance.now();
    await work();
    console.log(`ok  ${name} (${Math.round(performance.now() - begun)} ms)`);
  };
  try {
    await flow(page, check);
    if (complaints.length > 0) throw new Error(complaints.join("\n"));
    console.log(`the browser saw everything; pictures are in ${pictures}`);
  } catch (error) {
    await page.screenshot({ path: `${pictures}/failed.png` }).catch(() => {});
    console.error(`FAILED at: ${step}\n${error.message}`);
    for (const complaint of complaints) console.error(complaint);
    console.error(`a picture is in ${pictures}/failed.png`);
    process.exitCode = 1;
  } finally {
    await browser.close();
  }
}
