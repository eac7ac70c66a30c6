// One flow through the real page in a real browser: signs in by the link, sees text stream, sees a shell call succeed.
//
// Usage: node smoke.mjs SIGN_IN_URL [MESSAGE [SCREENSHOT_DIR]]
// MESSAGE asks for a shell call during which whoever starts this kills the daemon; its card must say what is known of it.
// Empty: that step is left out.
// Ends with 0 when everything was as expected; else says what was not, and saves a picture of it.

import { inBrowser } from "./browser.mjs";

const [url, interrupted = "", pictures = "target/browser"] = process.argv.slice(2);
if (!url) {
  console.error("usage: node smoke.mjs SIGN_IN_URL [MESSAGE [SCREENSHOT_DIR]]");
  process.exit(2);
}

async function send(page, text) {
  await page.locator("#text").fill(text);
  await page.locator("#send").click();
  await page.locator("article.mine", { hasText: text }).last().waitFor();
}

await inBrowser(pictures, async (page, check) => {
  await check("the link signs in and leaves no code in the address", async () => {
    await page.goto(url);
    await page.locator("#app").waitFor({ state: "visible" });
    if (page.url().includes("code=")) throw new Error("the address still holds the code");
  });
  await check("a link does not replace a session that its person keeps", async () => {
    const held = () => page.evaluate(() => sessionStorage.getItem("reliant.access_token"));
    const before = await held();
    for (const leave of [() => page.locator("#switch button[value=stay]").click(), () => page.keyboard.press("Escape")]) {
      await page.evaluate(() => (location.hash = "#code=of-somebody-else"));
      await page.locator("#switch[open]").waitFor();
      await leave();
      await page.locator("#switch:not([open])").waitFor({ state: "attached" });
      if (page.url().includes("code=")) throw new Error("the address still holds the code");
    }
    if (!before || (await held()) !== before) throw new Error("the session was replaced");
  });
  await check("a new chat opens", async () => {
    await page.locator("#new-chat").click();
    await page.locator("#chats [aria-current=true]").waitFor();
    // So that the shell call needs nobody's approval; the asking way is shown at the end.
    await page.locator("#mode:enabled").selectOption("2");
  });
  await check("an answer streams in", async () => {
    // Watches from inside: a live message that grew at least once was streamed, not delivered whole.
    await page.evaluate(() => {
      window.lengths = new Set();
      new MutationObserver(() => {
        const live = document.querySelector("article.live > .prose");
        if (live?.textContent) window.lengths.add(live.textContent.length);
      }).observe(document.getElementById("transcript"), { childList: true, subtree: true, characterData: true });
    });
    await send(page, "hello");
    await page.locator("article.theirs:not(.live) > .prose").first().waitFor();
    const lengths = await page.evaluate(() => window.lengths.size);
    if (lengths < 2) throw new Error(`the text was seen at ${lengths} lengths before it was complete`);
    await page.locator("#cancel").waitFor({ state: "hidden" });
  });
  await page.screenshot({ path: `${pictures}/1-text.png` });
  await check("a shell call succeeds", async () => {
    await send(page, "run a shell command");
    await page.locator('.tool[data-tool="shell"][data-status="succeeded"]').first().waitFor();
    await page.locator("#cancel").waitFor({ state: "hidden" });
  });
  await page.screenshot({ path: `${pictures}/2-tool.png` });
  if (interrupted) {
    await check("a call whose daemon dies says that its outcome is unknown, and why", async () => {
      await send(page, interrupted);
      const card = page.locator('.tool[data-tool="shell"][data-status="outcome_unknown"]');
      await card.locator(".status", { hasText: "the daemon or the tool's server died while it ran" }).waitFor();
      await page.locator("#cancel").waitFor({ state: "hidden" });
    });
    await page.screenshot({ path: `${pictures}/2-unknown.png` });
  }
  await check("a reload shows the same chat", async () => {
    const before = await page.locator("#transcript article").count();
    await page.reload();
    await page.locator('.tool[data-status="succeeded"]').first().waitFor();
    const after = await page.locator("#transcript article").count();
    if (after !== before) throw new Error(`${before} messages before, ${after} after`);
  });
  await check("a call that must be asked for is approved", async () => {
    await page.locator("#mode:enabled").selectOption("1");
    await send(page, "run a shell command");
    await page.locator(".approval button.main").last().click();
    await page.locator('.tool[data-tool="shell"][data-status="succeeded"]').nth(1).waitFor();
  });
  await page.emulateMedia({ colorScheme: "dark" });
  await page.screenshot({ path: `${pictures}/3-dark.png` });
});
