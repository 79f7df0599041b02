// The platform's JavaScript clients in a real Chromium: node browser.mjs CHROMIUM SERVER TLS_SERVER
// Pages of one origin reach a server of another by each recipe. Prints what worked, and fails when something does not.

import assert from "node:assert/strict";
import { createServer } from "node:http";

import { decode } from "@msgpack/msgpack";
import { build } from "esbuild";
import { chromium } from "playwright-core";

const [executablePath, server, tlsServer] = process.argv.slice(2);
const ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
const ALL = ["run", "subscribe", "stream", "upload", "realtime"];
const HTTP = ALL.slice(0, -1);
const OLDEST = ALL.filter((surface) => surface !== "stream");

const {
  outputFiles: [{ text: bundle }],
} = await build({ entryPoints: ["page.mjs"], bundle: true, write: false, format: "iife" });

const PAGES = {
  "/plain": `<script src="/bundle.js"></script>`,
  "/script": `<script src="${server}/fal-local.js"></script><script src="/bundle.js"></script>`,
  "/module": `<script type="module">import "${server}/fal-local.js"; import "/bundle.js";</script>`,
};
const site = createServer((request, response) => {
  const isBundle = request.url === "/bundle.js";
  response.setHeader("content-type", isBundle ? "text/javascript" : "text/html");
  response.end(isBundle ? bundle : `<!doctype html><link rel="icon" href="data:,">${PAGES[request.url]}`);
});
await new Promise((resolve) => site.listen(0, "127.0.0.1", resolve));
const origin = `http://127.0.0.1:${site.address().port}`;

/** A page of its own, with the hosts that it has talked to and the pictures that it was sent. */
async function open(browser, path) {
  const page = await (await browser.newContext({ ignoreHTTPSErrors: true })).newPage();
  const hosts = new Set();
  const frames = [];
  page.on("request", (request) => request.url().startsWith("http") && hosts.add(new URL(request.url()).host));
  page.on("websocket", (socket) => {
    hosts.add(new URL(socket.url()).host);
    socket.on("framereceived", ({ payload }) => frames.push(payload));
  });
  page.on("pageerror", (error) => assert.fail(`${path}: ${error}`));
  await page.goto(origin + path);
  await page.waitForFunction(() => window.smoke);
  return { page, hosts, frames };
}

const told = {};
const ours = [new URL(origin).host, new URL(server).host];

let browser = await chromium.launch({ executablePath, args: ARGS });
try {
  const recipes = [
    ["/plain", "proxy", { v1: HTTP, v0: HTTP }],
    ["/plain", "middleware", { v1: HTTP, v0: HTTP }],
    ["/plain", "socket", { v1: ALL, v0: ALL }],
    ["/script", "as-is", { v1: ALL, v0: ALL, v06: OLDEST }],
    ["/module", "as-is", { v1: ALL }],
  ];
  for (const [path, recipe, clients] of recipes) {
    for (const [name, surfaces] of Object.entries(clients)) {
      const { page, hosts } = await open(browser, path);
      const seen = await page.evaluate((words) => window.smoke(...words), [name, recipe, server]);
      assert.deepEqual(seen, surfaces, `${path} ${recipe} ${name}`);
      assert.ok([...hosts].every((host) => ours.includes(host)), `${path} ${recipe} ${name} went to ${[...hosts]}`);
      told[`${recipe} ${path} ${name}`] = seen.length;
      await page.context().close();
    }
  }

  {
    const { page, frames } = await open(browser, "/script");
    const contents = await page.evaluate(() => window.contents(5));
    const sent = frames.map((frame) => Buffer.from(decode(frame).images[0].content).toString("hex"));
    assert.deepEqual(contents, sent, "the page has other bytes than the server sent");
    assert.equal(new Set(contents).size, 5);
    await page.context().close();
  }

  const { page, hosts } = await open(browser, "/script");
  for (const name of await page.evaluate(() => Object.keys(window.pages))) {
    told[name] = await page.evaluate((name) => window.pages[name](), name);
  }
  assert.ok([...hosts].every((host) => ours.includes(host)), `the pages went to ${[...hosts]}`);
} finally {
  await browser.close();
}

// Names alone, and a browser that is told to trust whoever answers: no line of the page's is ours.
const { port } = new URL(tlsServer);
const names = ["fal.run", "*.fal.run", "rest.fal.ai", "rest.alpha.fal.ai", "v3.fal.media", "*.gateway.alpha.fal.ai"];
const rules = names.map((name) => `MAP ${name} 127.0.0.1:${port}`).join(",");
browser = await chromium.launch({
  executablePath,
  args: [...ARGS, `--host-resolver-rules=${rules}`, "--ignore-certificate-errors"],
});
try {
  for (const [name, surfaces] of Object.entries({ v1: ALL, v0: ALL, v06: OLDEST })) {
    const { page } = await open(browser, "/plain");
    const seen = await page.evaluate((words) => window.smoke(...words), [name, "as-is"]);
    assert.deepEqual(seen, surfaces, `by name: ${name}`);
    told[`names ${name}`] = seen.length;
    await page.context().close();
  }
} finally {
  await browser.close();
  site.close();
}
console.log(JSON.stringify(told));
