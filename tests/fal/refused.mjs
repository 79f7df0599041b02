// A token that the server refuses: CLIENT=v1|v0 FAL_KEY=... FAL_LOCAL=... node --require fal-local.cjs refused.mjs
// The server asks for keys. The first token that the client is given is not the server's.

import assert from "node:assert/strict";
import { test } from "node:test";

import { adapt } from "./surfaces.mjs";

const name = process.env.CLIENT;

let tokens = 0;
const fetchAnywhere = globalThis.fetch;
globalThis.fetch = (url, options) => {
  if (new URL(url).pathname !== "/tokens/") return fetchAnywhere(url, options);
  tokens += 1;
  if (tokens > 1) return fetchAnywhere(url, options);
  return Promise.resolve(new Response('"nonsense"', { headers: { "content-type": "application/json" } }));
};

const ends = [];
let onEnd = () => {};
const Socket = globalThis.WebSocket;
globalThis.WebSocket = class WebSocket extends Socket {
  constructor(url, protocols) {
    super(url, protocols);
    let opened;
    let last;
    this.addEventListener("open", () => (opened = performance.now()));
    this.addEventListener("message", ({ data }) => (last = data));
    this.addEventListener("close", ({ code }) => {
      ends.push({ code, last, after: performance.now() - opened });
      onEnd();
    });
  }
};

const { default: module } = await import({ v1: "@fal-ai/client", v0: "fal-v0" }[name]);
const client = adapt(name, module);

test("a refused token is told in the socket, and the next message has a fresh one", { timeout: 60_000 }, async () => {
  const { send, result, close, pending } = client.connect();
  const ended = new Promise((resolve) => (onEnd = resolve));
  send({ request_id: "lost" });
  await ended;
  const { code, last, after } = ends[0];
  assert.equal(code, 1000);
  assert.deepEqual(JSON.parse(last), { status: "error", error: "Unauthorized" });
  assert.ok(after < 50, `it took ${after} ms`);
  assert.equal(pending(), 0, "the program was told of an error");
  send({ request_id: "found" });
  assert.equal((await result()).request_id, "found");
  assert.equal(tokens, 2);
  close();
});

test("a wrong key is refused in words", { timeout: 60_000 }, async () => {
  client.fal.config({ credentials: "not:one" });
  await assert.rejects(client.run({ prompt: "a lake" }), (error) => {
    assert.equal(error.status, 401);
    assert.ok(error.message.length > 0 && error.message !== "Unauthorized" && error.body.detail.length > 0);
    return true;
  });
});
