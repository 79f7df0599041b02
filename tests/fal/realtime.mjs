// The platform's own JavaScript client against a live server: LCM_RT_URL=... node --import ./redirect.mjs realtime.mjs
// Nothing here sleeps: every test waits for events, and what must not come is shown by what comes instead.

import assert from "node:assert/strict";
import { test } from "node:test";

import { fal } from "@fal-ai/client";

const APP = "fal-ai/lcm";
const PATIENCE = 60_000; // ms, for one test
const SMALL = { prompt: "sunset over a lake", image_size: { width: 64, height: 64 }, seed: 42 };

let opened = 0;
const Socket = globalThis.WebSocket;
globalThis.WebSocket = class extends Socket {
  constructor(url) {
    super(url);
    opened += 1;
  }
};

/** A realtime connection whose results and errors are awaited one by one, in the order of their coming. */
function connect(t, app = APP, options = {}) {
  const events = [];
  let wake = () => {};
  const happen = (event) => {
    events.push(event);
    wake();
  };
  const connection = fal.realtime.connect(app, {
    throttleInterval: 0,
    tokenProvider: async () => "local",
    onResult: (result) => happen({ result }),
    onError: (error) => happen({ error }),
    ...options,
  });
  t.after(() => connection.close());

  const next = async () => {
    if (!events.length) await new Promise((resolve) => (wake = resolve));
    return events.shift();
  };
  return {
    send: (fields) => connection.send({ ...SMALL, ...fields }),
    result: async () => {
      const { result, error } = await next();
      assert.equal(error, undefined, error?.message);
      return result;
    },
    error: async () => {
      const { result, error } = await next();
      assert.equal(result, undefined, "a result where an error was due");
      return error;
    },
  };
}

function assertJpeg(bytes) {
  assert.ok(bytes instanceof Uint8Array, `${bytes?.constructor?.name} is no Uint8Array`);
  assert.deepEqual([...bytes.subarray(0, 3)], [0xff, 0xd8, 0xff]);
}

function dataUri(bytes) {
  return `data:image/jpeg;base64,${Buffer.from(bytes).toString("base64")}`;
}

function bytesOf(uri) {
  assert.match(uri, /^data:image\/jpeg;base64,/);
  return Buffer.from(uri.slice(uri.indexOf(",") + 1), "base64");
}

test("a picture comes as bytes, with what was asked for", { timeout: PATIENCE }, async (t) => {
  const { send, result } = connect(t);
  send({ request_id: "one" });
  const { images, seed, prompt, request_id, timings, num_inference_steps, ...rest } = await result();
  assertJpeg(images[0].content);
  assert.deepEqual([images.length, images[0].width, images[0].height], [1, 64, 64]);
  assert.deepEqual([images[0].content_type, images[0].url], ["image/jpeg", undefined]);
  assert.deepEqual([seed, prompt, request_id, num_inference_steps], [42, SMALL.prompt, "one", 4]);
  assert.ok(timings.total > 0);
  assert.equal(rest.status, undefined); // the client would drop the result
});

test("a request_id is not made up", { timeout: PATIENCE }, async (t) => {
  const { send, result } = connect(t);
  send({});
  assert.ok(!("request_id" in (await result())));
});

test("of a burst, the newest is answered, and last", { timeout: PATIENCE }, async (t) => {
  const { send, result } = connect(t);
  send({ request_id: 0 }); // until its answer the client itself keeps only the newest message
  assert.equal((await result()).request_id, 0);
  for (let id = 1; id <= 20; id += 1) send({ request_id: id });
  const ids = [];
  while (ids.at(-1) !== 20) ids.push((await result()).request_id);
  assert.deepEqual(ids, ids.toSorted((a, b) => a - b));
  send({ request_id: 21 });
  assert.equal((await result()).request_id, 21, "an older picture came after the newest");
  t.diagnostic(`answered of 1..20: ${ids.join(" ")}`);
});

test("with maxBuffering, none of a burst is dropped", { timeout: PATIENCE }, async (t) => {
  const { send, result } = connect(t, APP, { maxBuffering: 8 });
  send({ request_id: 0 });
  await result();
  for (let id = 1; id <= 6; id += 1) send({ request_id: id });
  for (let id = 1; id <= 6; id += 1) assert.equal((await result()).request_id, id);
});

test("a sketch goes in as bytes or as a data URI", { timeout: PATIENCE }, async (t) => {
  const { send, result } = connect(t);
  send({});
  const sketch = (await result()).images[0].content;

  send({ image_bytes: sketch, strength: 0.5 });
  const fromBytes = await result();
  assertJpeg(fromBytes.images[0].content);

  send({ image_url: dataUri(sketch), strength: 0.5, sync_mode: true });
  const fromUri = (await result()).images[0];
  assert.equal(fromUri.content, undefined);
  assert.ok(bytesOf(fromUri.url).equals(fromBytes.images[0].content), "the same sketch and seed, another picture");
});

test("JSON text is answered in JSON text", { timeout: PATIENCE }, async (t) => {
  const { send, result } = connect(t, APP, { encodeMessage: (fields) => JSON.stringify(fields) });
  send({ request_id: "text" });
  const { images, request_id } = await result();
  assertJpeg(bytesOf(images[0].url));
  assert.equal(request_id, "text");
});

test("a wrong message is an error with a reason, and the socket lives", { timeout: PATIENCE }, async (t) => {
  const before = opened;
  const { send, result, error } = connect(t);
  send({ strength: 7, request_id: "wrong" });
  const { status, message, body } = await error();
  assert.equal(status, 400);
  assert.match(message, /strength/);
  assert.deepEqual([body.type, body.error, body.request_id], ["x-fal-error", "invalid_input", "wrong"]);
  send({ request_id: "right" });
  assert.equal((await result()).request_id, "right");
  assert.equal(opened, before + 1);
});

test("an unknown app is an error with a reason", { timeout: PATIENCE }, async (t) => {
  const { send, error } = connect(t, "fal-ai/no-such-app");
  send({});
  const { status, message } = await error();
  assert.equal(status, 400);
  assert.match(message, /no-such-app/);
});

test("older spellings of the app mean the same", { timeout: PATIENCE }, async (t) => {
  for (const app of ["110602490-lcm-sd15-i2i", "fal-ai/fast-lcm-diffusion/image-to-image", "fal-ai/lcm/realtime"]) {
    const { send, result } = connect(t, app);
    send({ request_id: app });
    assert.equal((await result()).request_id, app);
  }
});

test("fal.run answers with a picture by URL", { timeout: PATIENCE }, async () => {
  const { data, requestId } = await fal.run(APP, { input: SMALL });
  assert.ok(requestId);
  assert.equal(data.seed, 42);
  const response = await fetch(data.images[0].url);
  assert.equal(response.headers.get("content-type"), "image/jpeg");
  assertJpeg(new Uint8Array(await response.arrayBuffer()));
});

test("fal.run names the wrong field", { timeout: PATIENCE }, async () => {
  await assert.rejects(fal.run(APP, { input: { ...SMALL, strength: 7 } }), (error) => {
    assert.equal(error.status, 422);
    assert.equal(error.getFieldErrors("strength").length, 1);
    return true;
  });
});
