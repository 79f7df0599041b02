// What a client of the platform can do, in Node and in pages, and one check of each: it knows no server and no recipe.

export const SMALL = {
  prompt: "sunset over a lake",
  image_size: { width: 64, height: 64 },
  num_inference_steps: 1,
  seed: 42,
};

export function check(truth, words) {
  if (!truth) throw new Error(words);
}

/** A client's package under names that all of them share, where they differ: v1, v0 or v06. */
export function adapt(name, module) {
  const fal = module.fal ?? module;
  const app = name === "v06" ? "110602490-lcm-sd15-i2i" : "fal-ai/lcm";
  const body = (answer) => (name === "v1" ? answer.data : answer);
  return {
    name,
    fal,
    app,
    has: { stream: name !== "v06", cancel: name !== "v06" },
    run: async (input, options) => body(await fal.run(app, { input, ...options })),
    subscribe: async (input, options) => body(await fal.subscribe(app, { input, pollInterval: 20, ...options })),
    submit: (input, options) => fal.queue.submit(app, { input, ...options }),
    status: (requestId, options) => fal.queue.status(app, { requestId, ...options }),
    result: async (requestId) => body(await fal.queue.result(app, { requestId })),
    cancel: (requestId) => fal.queue.cancel(app, { requestId }),
    stream: (input, options) => fal.stream(app, { input, ...options }),
    upload: (file, options) => fal.storage.upload(file, options),
    connect: (options, id = app) => connect(fal, id, options),
  };
}

/** A realtime connection whose results and errors are awaited one by one, in the order of their coming. */
function connect(fal, app, options = {}) {
  const events = [];
  let wake = () => {};
  const happen = (event) => {
    events.push(event);
    wake();
  };
  const connection = fal.realtime.connect(app, {
    throttleInterval: 0,
    onResult: (result) => happen({ result }),
    onError: (error) => happen({ error }),
    ...options,
  });
  const next = async () => {
    if (!events.length) await new Promise((resolve) => (wake = resolve));
    return events.shift();
  };
  return {
    send: (fields) => connection.send(fields instanceof Uint8Array ? fields : { ...SMALL, ...fields }),
    close: () => connection.close(),
    pending: () => events.length,
    result: async () => {
      const { result, error } = await next();
      check(result, `an error where a result was due: ${error?.message}`);
      return result;
    },
    error: async () => {
      const { result, error } = await next();
      check(error, `a result where an error was due: ${result?.request_id}`);
      return error;
    },
  };
}

export async function download(url) {
  const response = await fetch(url);
  check(response.ok, `${url}: ${response.status}`);
  return { bytes: new Uint8Array(await response.arrayBuffer()), type: response.headers.get("content-type") };
}

export function isJpeg(bytes) {
  return bytes instanceof Uint8Array && bytes[0] === 0xff && bytes[1] === 0xd8 && bytes[2] === 0xff;
}

export function same(one, other) {
  return one.length === other.length && one.every((value, i) => value === other[i]);
}

/** The bytes behind a data: URI of a JPEG. */
export function bytesOf(uri) {
  check(uri?.startsWith("data:image/jpeg;base64,"), `no data: URI of a JPEG: ${String(uri).slice(0, 40)}`);
  return Uint8Array.from(atob(uri.slice(uri.indexOf(",") + 1)), (char) => char.charCodeAt(0));
}

/** Everything once; the names of what was seen to work. `only` leaves out what a recipe does not redirect. */
export async function smoke(client, only = ["run", "subscribe", "stream", "upload", "realtime"]) {
  const seen = [];
  const picture = await download((await client.run(SMALL)).images[0].url);
  check(isJpeg(picture.bytes) && picture.type === "image/jpeg", "run gave no picture");
  seen.push("run");

  const statuses = [];
  const answer = await client.subscribe(SMALL, { onQueueUpdate: ({ status }) => statuses.push(status) });
  check(answer.seed === SMALL.seed && statuses.at(-1) === "COMPLETED", `subscribe saw ${statuses}`);
  seen.push("subscribe");

  if (only.includes("stream") && client.has.stream) {
    const events = [];
    for await (const event of await client.stream(SMALL)) events.push(event);
    check(events.at(-1).images[0].url && events.at(-1).seed === SMALL.seed, "the stream's last event was not seen");
    seen.push("stream");
  }
  if (only.includes("upload")) {
    const url = await client.upload(new Blob([picture.bytes], { type: "image/jpeg" }));
    check(same((await download(url)).bytes, picture.bytes), "an upload came back changed");
    check((await client.run({ ...SMALL, image_url: url })).images.length === 1, "an upload is no image_url");
    seen.push("upload");
  }
  if (only.includes("realtime")) {
    const { send, result, close } = client.connect();
    send({ request_id: "smoke" });
    const { images, request_id } = await result();
    check(isJpeg(images[0].content ?? bytesOf(images[0].url)), "realtime gave no picture");
    check(request_id === "smoke", `realtime answered ${request_id}`);
    close();
    seen.push("realtime");
  }
  return seen;
}
