// One of the platform's JavaScript clients over HTTP, against a live server:
//   CLIENT=v1|v0|v06 FAL_LOCAL=http://... node --require fal-local.cjs http.mjs
// Nothing here sleeps for luck: what must have happened is waited for, what must not is shown by what comes instead.

import assert from "node:assert/strict";
import { test } from "node:test";

import { SMALL, adapt, download, isJpeg } from "./surfaces.mjs";

const PATIENCE = 60_000; // ms, for one test
const HEAVY = { ...SMALL, image_size: { width: 512, height: 512 }, num_inference_steps: 50, num_images: 4 };

const name = process.env.CLIENT;
const { default: module } = await import({ v1: "@fal-ai/client", v0: "fal-v0", v06: "fal-v06" }[name]);
const client = adapt(name, module);
const { fal, app, has } = client;
const STATES = ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"];

const only = (condition, words) => ({ timeout: PATIENCE, skip: condition ? false : words });
const always = { timeout: PATIENCE };

/** Wait until a job is done; its last status. */
async function completed(requestId, options) {
  for (;;) {
    const status = await client.status(requestId, options);
    assert.ok(STATES.includes(status.status), status.status);
    if (status.status === "COMPLETED") return status;
  }
}

/** Keep the queue busy for the length of a test, so that what is submitted now stays where it is. */
async function occupy(t) {
  const ids = [];
  for (let i = 0; i < 6; i += 1) ids.push((await client.submit({ ...HEAVY, seed: i })).request_id);
  const free = () => Promise.all(ids.map((id) => client.cancel(id).catch(() => {})));
  t.after(free);
  return free;
}

async function rejection(promise) {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  assert.fail("it was not refused");
}

test("run answers with a picture by URL", always, async () => {
  const answer = await client.run(SMALL);
  assert.equal(answer.seed, 42);
  assert.deepEqual([answer.images[0].width, answer.images[0].height], [64, 64]);
  const { bytes, type } = await download(answer.images[0].url);
  assert.equal(type, "image/jpeg");
  assert.ok(isJpeg(bytes));
});

test("run tells its request's id", only(name === "v1", "told by v1 only"), async () => {
  const { requestId } = await fal.run(app, { input: SMALL });
  assert.match(requestId, /^\S+$/);
});

test("GET has the input in its query", always, async () => {
  const { prompt, seed } = SMALL;
  const answer = await client.run({ prompt, seed, num_inference_steps: 1, image_size: "square" }, { method: "get" });
  assert.deepEqual([answer.seed, answer.prompt], [seed, prompt]);
});

test("subscribe sees the states in their order, and the logs", always, async () => {
  const seen = [];
  let id;
  const answer = await client.subscribe(SMALL, {
    logs: true,
    onEnqueue: (requestId) => (id = requestId),
    onQueueUpdate: (status) => seen.push(status),
  });
  assert.ok(isJpeg((await download(answer.images[0].url)).bytes));
  if (name !== "v1") assert.match(id, /^\S+$/);
  const order = seen.map(({ status }) => STATES.indexOf(status));
  assert.ok(order.every((state, i) => state >= 0 && state >= (order[i - 1] ?? 0)), `${order}`);
  const last = seen.at(-1);
  assert.equal(last.status, "COMPLETED");
  assert.ok(Array.isArray(last.logs));
  assert.ok(last.logs.every((log) => typeof log.message === "string" && log.level && log.timestamp));
});

test("subscribe by a stream of states", only(has.stream, "v0.6 cannot"), async () => {
  const seen = [];
  const answer = await client.subscribe(SMALL, {
    mode: "streaming",
    logs: true,
    onQueueUpdate: ({ status, logs }) => seen.push({ status, logs: [...(logs ?? [])] }),
  });
  assert.equal(answer.seed, 42);
  assert.equal(seen.at(-1).status, "COMPLETED");
  // The client adds up what each event has.
  const lines = seen.at(-1).logs.map((log) => `${log.timestamp} ${log.message}`);
  assert.equal(new Set(lines).size, lines.length, "a line of the log came twice");
});

test("submit, status and result, one by one", always, async () => {
  const submitted = await client.submit(SMALL);
  assert.equal(submitted.status, "IN_QUEUE");
  assert.equal(typeof submitted.queue_position, "number");
  const id = submitted.request_id;
  for (const key of ["response_url", "status_url", "cancel_url"]) {
    assert.ok(new URL(submitted[key]).pathname.includes(id), submitted[key]);
  }
  const status = await completed(id);
  assert.equal(status.request_id, id);
  assert.ok("logs" in status);
  const answer = await client.result(id);
  assert.equal(answer.seed, 42);
  assert.deepEqual(await client.result(id), answer);
});

test("a job of an app with a path below it", only(name !== "v06", "v0.6 has none"), async () => {
  const { request_id: requestId } = await fal.queue.submit(`${app}/image-to-image`, { input: SMALL });
  await completed(requestId);
  assert.equal((await client.result(requestId)).seed, 42);
});

test("a job of a workflow", only(name !== "v06", "v0.6 has none"), async () => {
  const workflow = "workflows/me/lcm";
  const { request_id: requestId } = await fal.queue.submit(workflow, { input: SMALL });
  const stream = await fal.queue.streamStatus(workflow, { requestId });
  await stream.done();
  const answer = await fal.queue.result(workflow, { requestId });
  assert.equal((answer.data ?? answer).seed, 42);
});

test("the stream of states ends with COMPLETED", only(has.stream, "v0.6 cannot"), async () => {
  for (const connectionMode of ["server", "client"]) {
    const { request_id: requestId } = await client.submit(SMALL);
    const events = [];
    const stream = await fal.queue.streamStatus(app, { requestId, logs: true, connectionMode });
    stream.on("data", (event) => events.push(event.status));
    const last = await stream.done();
    assert.equal(last.status, "COMPLETED");
    assert.equal(events.at(-1), "COMPLETED");
    assert.ok(events.every((status) => STATES.includes(status)));
  }
});

test("fal.stream gives every event, the last one too", only(has.stream, "v0.6 cannot"), async () => {
  for (const connectionMode of ["server", "client"]) {
    const events = [];
    const stream = await client.stream({ ...SMALL, num_inference_steps: 4 }, { connectionMode });
    for await (const event of stream) events.push(event);
    assert.deepEqual(await stream.done(), events.at(-1));
    assert.ok(isJpeg((await download(events.at(-1).images[0].url)).bytes));
    assert.equal(events.at(-1).seed, 42);
    assert.ok(events.slice(0, -1).every((event) => event.preview));
  }
});

test("a wrong input to fal.stream is an ordinary error", only(has.stream, "v0.6 cannot"), async () => {
  const stream = await client.stream({ ...SMALL, strength: 7 });
  const error = await rejection(stream.done());
  assert.equal(error.status, 422);
  assert.equal(error.getFieldErrors("strength").length, 1);
});

test("a job that waits is cancelled, and never runs", only(has.cancel, "v0.6 cannot"), async (t) => {
  const free = await occupy(t);
  const { request_id: id } = await client.submit(SMALL);
  assert.equal((await client.status(id)).status, "IN_QUEUE");
  await client.cancel(id);
  await free();
  const { error } = await completed(id);
  assert.ok(error, "the status of a cancelled job does not say so");
  assert.equal((await rejection(client.result(id))).status, 499);
  const again = await rejection(client.cancel(id));
  assert.deepEqual([again.status, again.body.status], [400, "ALREADY_COMPLETED"]);
});

test("what does not exist is not found", only(has.cancel, "v0.6 cannot"), async () => {
  const id = "00000000-0000-4000-8000-000000000000";
  for (const ask of [client.status, client.result, client.cancel]) {
    assert.equal((await rejection(ask(id))).status, 404);
  }
  assert.equal((await rejection(client.cancel(id))).body.status, "NOT_FOUND");
});

test("a result before its time is refused", only(has.cancel, "v0.6 cannot end what it began"), async (t) => {
  await occupy(t);
  const { request_id: id } = await client.submit(SMALL);
  const error = await rejection(client.result(id));
  assert.equal(error.status, 400);
  assert.ok(error.message.length > 0);
  await client.cancel(id);
});

test("subscribe gives up after its own timeout, and cancels", only(has.cancel, "v0.6 has none"), async (t) => {
  await occupy(t);
  let id;
  const error = await rejection(
    client.subscribe(SMALL, { timeout: 500, onQueueUpdate: ({ request_id: requestId }) => (id = requestId) }),
  );
  assert.match(error.message, /timed out/);
  assert.ok((await completed(id)).error);
});

test("a deadline to begin that has passed is a 504 of the client's own", only(name === "v1", "v1 only"), async (t) => {
  const free = await occupy(t);
  const began = Date.now();
  const { request_id: id } = await client.submit(SMALL, { startTimeout: 1.1 });
  await completed(id);
  const error = await rejection(client.result(id));
  assert.deepEqual([error.status, error.isUserTimeout, error.body.error_type], [504, true, "request_timeout"]);
  assert.ok(Date.now() - began < 10_000, "the client tried again");
  await free();
});

test("hints, priorities and lifecycles are taken", only(name === "v1", "only v1 has them"), async () => {
  const answer = await client.subscribe(SMALL, {
    priority: "low",
    hint: "lora:a",
    startTimeout: 30,
    headers: { "X-Custom": "1" },
    storageSettings: { expiresIn: "1h" },
  });
  assert.equal(answer.seed, 42);
});

test("a wrong field is named", always, async () => {
  for (const fields of [{ strength: 7 }, { prompt: 5 }]) {
    const error = await rejection(client.run({ ...SMALL, ...fields }));
    assert.ok(error instanceof module.ValidationError);
    assert.equal(error.status, 422);
    assert.equal(error.fieldErrors.length, 1);
    assert.ok(error.message.length > 0 && error.message !== "Unprocessable Entity");
    const [{ loc, msg, type }] = error.fieldErrors;
    assert.ok(loc.at(0) === "body" && msg.length && type.length);
    if (name !== "v06") assert.deepEqual(error.getFieldErrors(loc.at(-1)), error.fieldErrors);
  }
});

test("a wrong field of a job is named", always, async () => {
  const error = await rejection(client.subscribe({ ...SMALL, strength: 7 }));
  assert.equal(error.status, 422);
  assert.deepEqual(error.fieldErrors.map(({ loc }) => loc.at(-1)), ["strength"]);
});

test("an unknown app is not found", always, async () => {
  const unknown = name === "v06" ? "110602490-no-such-app" : "fal-ai/no-such-app";
  for (const ask of [fal.run, fal.queue.submit]) {
    const error = await rejection(ask(unknown, { input: SMALL }));
    assert.equal(error.status, 404);
    assert.match(error.message, /no-such-app/);
  }
});

test("a picture that cannot be read is told", always, async () => {
  const { images } = await client.run(SMALL);
  const nowhere = images[0].url.replace(/[^/]+$/, "nothing.png");
  const error = await rejection(client.run({ ...SMALL, image_url: nowhere }));
  assert.equal(error.status, 422);
  assert.deepEqual(error.fieldErrors[0].loc, ["body", "image_url"]);
});

test("an upload comes back as it went", always, async () => {
  const bytes = Uint8Array.from({ length: 100_003 }, (_, i) => i * 7);
  for (const file of [
    new Blob([bytes], { type: "application/x-thing" }),
    new File([bytes], "a b.bin", { type: "application/octet-stream" }),
    new File([bytes], "../ü/%2e%2e/ \"x\";\u202e.png?#", { type: "image/png" }),
    new Blob([bytes]),
  ]) {
    const url = await client.upload(file);
    const answer = await download(url);
    assert.ok(Buffer.from(answer.bytes).equals(Buffer.from(bytes)));
    if (file.type === "image/png") assert.equal(answer.type, "image/png");
  }
});

test("a lifecycle is taken", only(name === "v1", "only v1 has one"), async () => {
  const lifecycle = { expiresIn: "1d", initialAcl: { default: "allow" } };
  const url = await client.upload(new Blob(["words"], { type: "text/plain" }), { lifecycle });
  assert.equal(Buffer.from((await download(url)).bytes).toString(), "words");
});

test("an upload, or a blob in the input, is a picture to start from", always, async () => {
  const { bytes } = await download((await client.run(SMALL)).images[0].url);
  const blob = new Blob([bytes], { type: "image/jpeg" });
  const url = await client.upload(blob);
  const fields = { ...SMALL, strength: 0.5, format: "png", sync_mode: true };
  const byUrl = await client.run({ ...fields, image_url: url });
  const byBlob = await client.run({ ...fields, image_url: blob });
  assert.equal(byUrl.images[0].url, byBlob.images[0].url);
  const without = await client.run(fields);
  assert.notEqual(byUrl.images[0].url, without.images[0].url);
});

test("an upload in many parts", { ...only(name === "v1", "only v1 can"), skip: !process.env.LARGE }, async () => {
  const bytes = Buffer.alloc(91 * 2 ** 20);
  for (let at = 0; at < bytes.length; at += 4096) bytes.writeUInt32LE(at, at);
  const url = await client.upload(new File([bytes], "large.bin"));
  assert.ok(Buffer.from((await download(url)).bytes).equals(bytes));
});
