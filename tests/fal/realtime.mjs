// One of the platform's JavaScript clients over WebSockets, against a live server:
//   CLIENT=v1|v0|v06 FAL_LOCAL=http://... node --require fal-local.cjs realtime.mjs
// Nothing here sleeps: every test waits for events, and what must not come is shown by what comes instead.

import assert from "node:assert/strict";
import { test } from "node:test";

import { SMALL, adapt, bytesOf, isJpeg } from "./surfaces.mjs";

const PATIENCE = 60_000; // ms, for one test

const name = process.env.CLIENT;
const always = { timeout: PATIENCE };
const only = (condition, words) => ({ timeout: PATIENCE, skip: condition ? false : words });
const isText = name === "v06"; // it sends and reads JSON text alone

const opened = []; // the address of every socket, the frames that came, and the codes of closes
const frames = [];
const closes = [];
let onClose = () => {};
const Socket = globalThis.WebSocket;
globalThis.WebSocket = class WebSocket extends Socket {
  constructor(url, protocols) {
    super(url, protocols);
    opened.push(String(url));
    this.addEventListener("message", ({ data }) => frames.push(data));
    this.addEventListener("close", ({ code }) => {
      closes.push(code);
      onClose();
    });
  }
};

const asked = []; // the path of every request
const fetchAnywhere = globalThis.fetch;
globalThis.fetch = (url, options) => {
  asked.push(new URL(url).pathname);
  return fetchAnywhere(url, options);
};
// v1 takes the global fetch as it is when it is loaded.
const { default: module } = await import({ v1: "@fal-ai/client", v0: "fal-v0", v06: "fal-v06" }[name]);
const client = adapt(name, module);

const tokens = () => asked.filter((path) => path === "/tokens/").length;

function connect(t, options, app) {
  const connection = client.connect(options, app);
  t.after(() => connection.close());
  return connection;
}

/** The bytes of an answer's picture, in whichever form this client reads. */
function pictureOf({ images: [image] }) {
  if (isText) assert.equal(image.content, undefined);
  return isText ? bytesOf(image.url) : image.content;
}

function dataUri(bytes) {
  return `data:image/jpeg;base64,${Buffer.from(bytes).toString("base64")}`;
}

test("a picture comes, with what was asked for", always, async (t) => {
  const { send, result } = connect(t);
  send({ request_id: "one" });
  const answer = await result();
  const [image] = answer.images;
  assert.ok(isJpeg(pictureOf(answer)), "no JPEG");
  assert.deepEqual([answer.images.length, image.width, image.height, image.content_type], [1, 64, 64, "image/jpeg"]);
  const { seed, prompt, request_id, num_inference_steps, timings } = answer;
  assert.deepEqual([seed, prompt, request_id, num_inference_steps], [42, SMALL.prompt, "one", 1]);
  assert.ok(timings.total > 0);
  assert.equal(typeof frames.at(-1), isText ? "string" : "object");
  assert.ok(!isText || !("status" in answer));
});

test("a request_id is the client's own", always, async (t) => {
  const { send, result } = connect(t);
  send({});
  const { request_id } = await result();
  if (name === "v1") assert.equal(request_id, undefined);
  else assert.match(request_id, /^[0-9a-f-]{36}$/); // these two make one up
});

test("of a burst, the newest is answered, and last", always, async (t) => {
  const { send, result } = connect(t);
  send({ request_id: "0" }); // until its answer the client itself keeps only the newest message
  assert.equal((await result()).request_id, "0");
  for (let id = 1; id <= 20; id += 1) send({ request_id: `${id}` });
  const ids = [];
  while (ids.at(-1) !== 20) ids.push(Number((await result()).request_id));
  assert.deepEqual(ids, ids.toSorted((a, b) => a - b));
  send({ request_id: "21" });
  assert.equal((await result()).request_id, "21", "an older picture came after the newest");
});

test("with maxBuffering, none of a burst is dropped", only(!isText, "v0.6 has none"), async (t) => {
  const { send, result } = connect(t, { maxBuffering: 8 });
  send({ request_id: "0" });
  await result();
  for (let id = 1; id <= 6; id += 1) send({ request_id: `${id}` });
  for (let id = 1; id <= 6; id += 1) assert.equal((await result()).request_id, `${id}`);
});

test("a sketch goes in as bytes or as a data URI", always, async (t) => {
  const { send, result } = connect(t);
  send({});
  const sketch = pictureOf(await result());
  send({ image_url: dataUri(sketch), strength: 0.5, sync_mode: true });
  const [fromUri] = (await result()).images;
  assert.equal(fromUri.content, undefined);
  if (isText) return assert.ok(isJpeg(bytesOf(fromUri.url)));
  send({ image_bytes: sketch, strength: 0.5 });
  const fromBytes = pictureOf(await result());
  assert.ok(isJpeg(fromBytes));
  assert.ok(Buffer.from(bytesOf(fromUri.url)).equals(Buffer.from(fromBytes)), "one sketch and seed, two pictures");
});

test("JSON text is answered in JSON text", only(name === "v1", "the older two have one codec"), async (t) => {
  const { send, result } = connect(t, { encodeMessage: (fields) => JSON.stringify(fields) });
  send({ request_id: "text" });
  const { images, request_id } = await result();
  assert.ok(isJpeg(bytesOf(images[0].url)));
  assert.equal(request_id, "text");
  assert.equal(typeof frames.at(-1), "string");
});

test("codecs take turns on one socket", only(name === "v1", "the older two have one codec"), async (t) => {
  const before = opened.length;
  const connectionKey = "codecs";
  let text = false;
  const encodeMessage = (fields) => (text ? JSON.stringify(fields) : module.encode?.(fields));
  const { encode } = await import("@msgpack/msgpack");
  const { send, result } = connect(t, { connectionKey, encodeMessage: (f) => encodeMessage(f) ?? encode(f) });
  for (text of [false, true, false, true]) {
    send({ request_id: "turn" });
    const [image] = (await result()).images;
    assert.equal(typeof frames.at(-1) === "string", text);
    assert.equal("content" in image, !text);
  }
  assert.equal(opened.length, before + 1);
});

test("a wrong message is an error with a reason, and the socket lives", always, async (t) => {
  const before = opened.length;
  const { send, result, error } = connect(t);
  send({ request_id: "first" });
  await result();
  send({ strength: 7, request_id: "wrong" });
  if (isText) {
    const told = await result(); // v0.6 knows no error frames, and hands them to the program
    assert.deepEqual([told.type, told.error, told.request_id], ["x-fal-error", "invalid_input", "wrong"]);
  } else {
    const { status, message, body } = await error();
    assert.equal(status, 400);
    assert.match(message, /strength/);
    assert.deepEqual([body.type, body.error, body.request_id], ["x-fal-error", "invalid_input", "wrong"]);
    assert.equal(typeof frames.at(-1), "string", "a control frame is text, also where answers are not");
  }
  send({ image_url: "data:image/jpeg;base64,!!", request_id: "picture" });
  const told = isText ? await result() : (await error()).body;
  assert.deepEqual([told.error, told.request_id], ["image_load_error", "picture"]);
  send({ request_id: "right" });
  assert.equal((await result()).request_id, "right");
  assert.equal(opened.length, before + 1);
});

test("a frame that cannot be read is an error, and the socket lives", only(!isText, "v0.6 sends text"), async (t) => {
  const { send, result, error } = connect(t);
  send({ request_id: "first" });
  await result();
  send(Uint8Array.of(0xc1));
  assert.equal((await error()).status, 400);
  send({ request_id: "right" });
  assert.equal((await result()).request_id, "right");
});

test("what JavaScript makes of values is read", only(!isText, "v0.6 sends JSON"), async (t) => {
  const { send, result } = connect(t);
  send({
    request_id: "odd",
    guidance_scale: 1,
    strength: 1,
    negative_prompt: null,
    format: undefined,
    image_bytes: new ArrayBuffer(8),
    seed: 2 ** 40,
    unknown: { at: new Date(0), not: Number.NaN, list: new Float32Array(2) },
  });
  const { seed, request_id } = await result();
  assert.deepEqual([seed, request_id], [2 ** 40, "odd"]);
});

test("an unknown app is an error with a reason", always, async (t) => {
  const unknown = isText ? "110602490-no-such-app" : "fal-ai/no-such-app";
  const { send, error, result } = connect(t, {}, unknown);
  send({});
  const told = isText ? await result() : (await error()).body;
  assert.match(told.reason, /no-such-app/);
});

test("other spellings of the app mean the same", always, async (t) => {
  const spellings = isText
    ? ["110602490-shared-lcm-test", "110602490-sd-turbo-real-time-high-fps-msgpack"]
    : ["110602490-lcm-sd15-i2i", "fal-ai/fast-lcm-diffusion/image-to-image", "fal-ai/lcm/realtime", "workflows/me/lcm"];
  for (const app of spellings) {
    const { send, result } = connect(t, {}, app);
    send({ request_id: app });
    assert.equal((await result()).request_id, app);
  }
});

test("a token is asked for once per socket, and a close is followed by a new one", always, async (t) => {
  const [before, sockets] = [tokens(), opened.length];
  const { send, result, error, close, pending } = connect(t, {}, isText ? "110602490-lcm" : undefined);
  send({ request_id: "one" });
  await result();
  send({ request_id: "two" });
  await result();
  assert.deepEqual([tokens() - before, opened.length - sockets], [1, 1]);
  assert.match(opened.at(-1), /fal_jwt_token=[\w.-]+/);
  if (isText) return; // its close() does nothing
  const closed = new Promise((resolve) => (onClose = resolve)); // v0 loses what is sent before that
  close();
  await closed;
  if (pending()) assert.equal((await error()).status, closes.at(-1)); // 1005: they give no code, and tell of it
  send({ request_id: "three" });
  assert.equal((await result()).request_id, "three");
  assert.equal(opened.length - sockets, 2);
  assert.equal(tokens() - before, name === "v1" ? 2 : 1); // v0 keeps its token
});

test("two sockets of one program are two clients", always, async (t) => {
  const [one, two] = [connect(t), connect(t)];
  for (const [connection, seed] of [[one, 1], [two, 2]]) connection.send({ seed });
  assert.deepEqual([(await one.result()).seed, (await two.result()).seed], [1, 2]);
});
