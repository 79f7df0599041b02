// A connection that nothing is sent through for longer than the server waits:
//   CLIENT=v1|v0 FAL_LOCAL=http://... node --require fal-local.cjs idle.mjs

import assert from "node:assert/strict";
import { test } from "node:test";

import { adapt } from "./surfaces.mjs";

const name = process.env.CLIENT;
const { default: module } = await import({ v1: "@fal-ai/client", v0: "fal-v0" }[name]);
const client = adapt(name, module);

const frames = [];
let onEnd = () => {};
const Socket = globalThis.WebSocket;
globalThis.WebSocket = class WebSocket extends Socket {
  constructor(url, protocols) {
    super(url, protocols);
    this.addEventListener("message", ({ data }) => frames.push(data));
    this.addEventListener("close", ({ code }) => onEnd(code));
  }
};

test("an idle connection ends without an error, and the next message opens another", { timeout: 60_000 }, async () => {
  const { send, result, close, pending } = client.connect();
  for (const request_id of ["one", "two"]) {
    const ended = new Promise((resolve) => (onEnd = resolve));
    send({ request_id });
    assert.equal((await result()).request_id, request_id);
    assert.equal(await ended, 1000);
    const { type, error } = JSON.parse(frames.at(-1));
    assert.deepEqual([type, error], ["x-fal-error", "TIMEOUT"]);
    assert.equal(pending(), 0, "the program was told of an error");
  }
  close();
});
