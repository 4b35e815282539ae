// Opens a report's page in headless Chromium and says as JSON what it saw: node page.mjs CHROMIUM PAGE
import fs from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

const [, , executablePath, page] = process.argv;
const axe = fs.readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const args = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];
const views = [
  { name: "desktop light", width: 1366, height: 900, scheme: "light" },
  { name: "desktop dark", width: 1366, height: 900, scheme: "dark" },
  { name: "phone light", width: 390, height: 844, scheme: "light" },
  { name: "phone dark", width: 390, height: 844, scheme: "dark" },
];

async function look(browser, view) {
  const context = await browser.newContext({
    viewport: { width: view.width, height: view.height }, colorScheme: view.scheme,
  });
  const tab = await context.newPage();
  const errors = [], requests = [];
  tab.on("console", (message) => { if (["error", "warning"].includes(message.type())) errors.push(message.text()); });
  tab.on("pageerror", (error) => errors.push(String(error)));
  tab.on("request", (request) => { if (!/^(data:|file:)/.test(request.url())) requests.push(request.url()); });
  await tab.goto("file://" + page);
  const seen = { name: view.name, errors, requests };
  seen.wider = await tab.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  seen.keyboard = await keyboard(tab);
  seen.sorted = await sort(tab);
  seen.theme = await theme(tab);
  seen.broken = await tab.evaluate(async () => {
    document.querySelectorAll("details").forEach((one) => { one.open = true; });
    const pictures = Array.from(document.images);
    pictures.forEach((one) => { one.loading = "eager"; });
    await Promise.all(pictures.map((one) => one.decode().catch(() => null)));
    return { pictures: pictures.length, broken: pictures.filter((one) => !one.naturalWidth).length };
  });
  await tab.evaluate(axe);
  seen.violations = await tab.evaluate(async () => {
    const found = await globalThis.axe.run(document, { resultTypes: ["violations"] });
    return found.violations.map((one) => `${one.id}: ${one.nodes[0].html.slice(0, 200)}`);
  });
  seen.pwned = await tab.evaluate(() => globalThis.pwned !== undefined);
  await context.close();
  return seen;
}

// Two clicks on a column of figures: falling, then rising, what is undefined last in both.
async function sort(tab) {
  const column = 3;
  const table = tab.locator("#table-classes + .scroll table");
  const found = [];
  for (let click = 0; click < 2; click += 1) {
    await table.locator("thead th").nth(column).locator("button").click();
    found.push({
      order: await table.locator("thead th").nth(column).getAttribute("aria-sort"),
      values: await table.locator("tbody tr").evaluateAll(
        (rows, at) => rows.map((row) => row.cells[at].getAttribute("data-sort")), column,
      ),
    });
  }
  return found;
}

// The first Tab reaches the link past the contents; Enter on a column's button sorts.
async function keyboard(tab) {
  await tab.keyboard.press("Tab");
  const first = await tab.evaluate(() => document.activeElement.className);
  const head = tab.locator("#table-methods + .scroll table thead th").first();
  await head.locator("button").focus();
  await tab.keyboard.press("Enter");
  return { first, order: await head.getAttribute("aria-sort") };
}

async function theme(tab) {
  const paper = () => tab.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const found = [await paper()];
  for (let click = 0; click < 3; click += 1) {
    await tab.click("#theme");
    found.push(await paper());
  }
  return found;
}

const browser = await chromium.launch({ executablePath, args });
try {
  const seen = [];
  for (const view of views) seen.push(await look(browser, view));
  console.log(JSON.stringify(seen));
} finally {
  await browser.close();
}
