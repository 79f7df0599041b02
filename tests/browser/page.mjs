// Drives the page in a real Chromium as a visitor would: node page.mjs URL CHROMIUM SCREENSHOT LORA BROKEN_LORA
// Prints one JSON object of what it saw, and fails when something is not as it should be.

import assert from "node:assert/strict";

import { chromium } from "playwright-core";

import { decode, encode } from "../../web/vendor/msgpack.js";

const [url, executablePath, screenshot, lora, broken] = process.argv.slice(2);
const loraName = lora.split("/").at(-1);
const PATIENCE = 60_000; // ms, for one condition

const browser = await chromium.launch({
  executablePath,
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});

/** What stands in the result pane: the mean colours of 16 x 16 fields, and how many colours there are in all. */
function readPicture() {
  const picture = document.querySelector("#picture");
  const { width, height } = picture;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  const colors = new Set();
  const fields = new Array(16 * 16 * 3).fill(0);
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const at = 4 * (y * width + x);
      const field = 3 * (16 * Math.floor((16 * y) / height) + Math.floor((16 * x) / width));
      for (let channel = 0; channel < 3; channel += 1) fields[field + channel] += (256 * data[at + channel]) / (width * height);
      colors.add((data[at] << 16) | (data[at + 1] << 8) | data[at + 2]);
    }
  }
  return { fields, colors: colors.size, width };
}

/** How far two pictures are apart: the largest difference of a field, from 0 to 255. */
function distance(one, other) {
  return Math.max(...one.fields.map((value, i) => Math.abs(value - other.fields[i])));
}

function assertSame(one, other, words) {
  assert.ok(distance(one, other) < 2, `${words}: ${distance(one, other)}`);
}

function assertDifferent(one, other, words) {
  assert.ok(distance(one, other) > 4, `${words}: ${distance(one, other)}`);
}

try {
  const context = await browser.newContext({ viewport: { width: 1280, height: 720 } });
  const page = await context.newPage();
  page.setDefaultTimeout(PATIENCE);
  const complaints = [];
  const hosts = new Set();
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("request", (request) => request.url().startsWith("http") && hosts.add(new URL(request.url()).host));
  page.on("websocket", (socket) => hosts.add(new URL(socket.url()).host));

  /** Wait until the picture that is shown is of the page's present state, and read it. */
  const settled = async () => {
    await page.waitForFunction(() => window.lcm.settled);
    return page.evaluate(readPicture);
  };
  const drag = async (...points) => {
    const board = await page.locator("#board").boundingBox();
    const [first, ...rest] = points.map(([x, y]) => [board.x + x * board.width, board.y + y * board.height]);
    await page.mouse.move(...first);
    await page.mouse.down();
    for (const point of rest) await page.mouse.move(...point, { steps: 5 });
    await page.mouse.up();
  };

  await page.goto(url);
  await page.waitForFunction(() => window.lcm?.shown > 0);
  await page.screenshot({ path: screenshot });

  await drag([0.2, 0.3], [0.5, 0.2], [0.8, 0.3]);
  const drawn = await settled();
  assert.ok(drawn.colors > 50, `the picture is blank: ${drawn.colors} colours`);

  await drag([0.2, 0.7], [0.5, 0.8], [0.8, 0.7]);
  const stroked = await settled();
  assertDifferent(stroked, drawn, "a stroke did not change the picture");

  await page.keyboard.press("Control+z");
  const undone = await settled();
  assertSame(undone, drawn, "undo did not bring the picture back");

  await page.locator("#prompt").fill("a snowy forest at night with a moon");
  const worded = await settled();
  assertDifferent(worded, undone, "other words did not change the picture");

  await page.keyboard.press("Tab"); // out of the prompt
  await page.keyboard.press("m");
  await drag([0.3, 0.5], [0.7, 0.5]);
  const masked = await settled();
  assertDifferent(masked, worded, "the mask did not change the picture");

  // What the page hears from now on; an answer is flagged while `flags` is set, as if the model had a safety checker.
  const heard = { previews: 0, answers: 0 };
  let flags = false;
  await page.routeWebSocket(/realtime/, (socket) => {
    const server = socket.connectToServer();
    server.onMessage((frame) => {
      if (typeof frame === "string") return socket.send(frame);
      const answer = decode(frame);
      heard[answer.preview ? "previews" : "answers"] += 1;
      if (flags) answer.nsfw_content_detected = [true];
      socket.send(Buffer.from(encode(answer)));
    });
  });
  await page.reload();
  await page.waitForFunction(() => window.lcm?.shown > 0);
  const reloaded = await settled();
  assert.equal(await page.locator("#prompt").inputValue(), "a snowy forest at night with a moon");
  assertSame(reloaded, masked, "a reload lost something");

  await page.getByRole("button", { name: "More settings" }).click();
  await page.getByLabel("Only inside the mask").check();
  assertDifferent(await settled(), reloaded, "painting only inside the mask did not change the picture");
  await page.getByLabel("Only inside the mask").uncheck();
  await settled();

  await page.evaluate(() => {
    const bar = document.querySelector("#part");
    window.parts = new Set();
    new MutationObserver(() => bar.hidden || window.parts.add(bar.value)).observe(bar, { attributes: true });
  });
  await page.getByLabel("Show each step").check();
  assertSame(await settled(), reloaded, "previews changed the picture");
  const parts = await page.evaluate(() => [...window.parts]);
  assert.ok(parts.length > 0 && parts.every((part) => part < 1), `no steps were shown: ${parts}`);
  assert.ok(heard.previews > 0, "no preview came");
  assert.equal(await page.evaluate(() => window.lcm.shown), heard.answers, "a preview counts as an answer");
  await page.getByLabel("Show each step").uncheck();

  await page.getByLabel("LoRA file").setInputFiles(broken);
  await page.locator("#more .wrong", { hasText: "safetensors" }).waitFor();
  await page.getByRole("button", { name: "No LoRA" }).click();
  await page.locator("#more .wrong", { hasText: "safetensors" }).waitFor({ state: "detached" }); // a mended fault is told no more
  await page.getByLabel("LoRA file").setInputFiles(lora);
  await page.waitForFunction((name) => document.querySelector("[data-lora=address]").value === name, loraName);
  assertDifferent(await settled(), reloaded, "the LoRA did not change the picture");
  await page.getByRole("button", { name: "Use in your code" }).click();
  await page.getByRole("radio", { name: "Python" }).check();
  await page.locator("#drawer code", { hasText: `base64," + b64encode(Path("${loraName}")` }).waitFor();
  await page.keyboard.press("Escape");
  await page.getByRole("button", { name: "No LoRA" }).click();
  assertSame(await settled(), reloaded, "the LoRA did not go");

  flags = true;
  await page.getByRole("button", { name: "Another seed", exact: true }).click();
  await page.locator("#flagged").waitFor();
  assert.equal(await page.locator("#picture").isVisible(), false, "a flagged picture is shown");
  flags = false;
  await page.getByRole("button", { name: "Switch the checker off" }).click();
  await page.locator("#flagged").waitFor({ state: "hidden" });
  assert.equal(await page.getByLabel("Safety checker").isChecked(), false);

  await fetch(`${url}/models/embedded/unload`, { method: "POST" });
  await page.getByRole("button", { name: "Model: embedded" }).click();
  await page.getByRole("button", { name: "loads when used" }).waitFor();
  await page.keyboard.press("Escape");
  await page.getByRole("radio", { name: "Text", exact: true }).check();
  const words = await settled();
  assert.ok(words.colors > 50, `the picture of words alone is blank: ${words.colors} colours`);
  assert.equal(await page.getByLabel("Only inside the mask").isDisabled(), true, "words alone have a mask");

  await page.getByRole("button", { name: "Use in your code" }).click();
  await page.getByRole("radio", { name: "curl" }).check();
  const code = await page.locator("#drawer code", { hasText: '"enable_safety_checks": false' }).textContent();
  assert.ok(code.includes(`${new URL(url).origin}/`), "the code does not name this server");

  const isEvents = (request) => request.url().endsWith("/models/events");
  const seen = (hidden) =>
    page.evaluate((value) => {
      Object.defineProperty(document, "hidden", { value, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }, hidden);
  await Promise.all([page.waitForEvent("requestfailed", isEvents), seen(true)]); // nobody listens in a hidden tab
  await Promise.all([page.waitForEvent("request", isEvents), seen(false)]);

  assert.deepEqual([...hosts], [new URL(url).host], "the page asked other hosts");
  assert.deepEqual(complaints, []);
  const shown = await page.evaluate(() => window.lcm.shown);
  console.log(JSON.stringify({ shown, width: words.width, state: await page.evaluate(() => window.lcm.state) }));
} finally {
  await browser.close();
}
