// What the browser test runs inside a page: the recipes, and pages in the shape of the platform's demonstrations.
// Each of these calls its client as the demonstration does, and shows what comes in an <img>.

import * as v1 from "@fal-ai/client";
import { encode } from "@msgpack/msgpack";
import * as v0 from "fal-v0";
import * as v06 from "fal-v06";

import { follow } from "./recipes.mjs";
import { adapt, check, smoke } from "./surfaces.mjs";

const MODULES = { v1, v0, v06 };
const SIDE = 512;

window.smoke = (name, recipe, server) => smoke(...follow(recipe, name, MODULES[name], server));

/** The bytes of realtime answers by v1, as hex, for whoever saw the frames too. */
window.contents = async (count) => {
  const { send, result, close } = adapt("v1", v1).connect();
  const seen = [];
  for (let seed = 0; seed < count; seed += 1) {
    send({ seed });
    const [{ content }] = (await result()).images;
    check(content.constructor === Uint8Array, `${content?.constructor?.name} is no Uint8Array`);
    seen.push(Array.from(content, (byte) => byte.toString(16).padStart(2, "0")).join(""));
  }
  close();
  return seen;
};

function sketch(turn) {
  const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
  const context = canvas.getContext("2d");
  context.fillStyle = "#8ac";
  context.fillRect(0, 0, SIDE, SIDE);
  context.fillStyle = "#e53";
  context.fillRect(40 + (turn % 200), 120, 200, 240);
  return canvas;
}

async function bytesOf(canvas, type, quality) {
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, type, quality));
  return new Uint8Array(await blob.arrayBuffer());
}

/** Show a picture as a page does; it has been decoded when this ends. */
async function show(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  check(image.naturalWidth === SIDE && image.naturalHeight === SIDE, `${image.naturalWidth}x${image.naturalHeight}`);
  document.body.replaceChildren(image);
}

const blobUrl = (bytes, type) => URL.createObjectURL(new Blob([bytes], { type }));

/** A page whose `send` is called for a new sketch until `enough` pictures are shown; how many sketches that took. */
function play(enough, connect, send) {
  return new Promise((resolve, reject) => {
    let [shown, turns] = [0, 0];
    const connection = connect({
      onError: reject,
      onPicture: async (url) => {
        try {
          await show(url);
          shown += 1;
        } catch (error) {
          reject(error);
        }
      },
    });
    const turn = async () => {
      if (shown >= enough) {
        connection.close();
        return resolve(turns);
      }
      const wait = await send(connection, (turns += 1));
      setTimeout(turn, wait);
    };
    turn();
  });
}

window.pages = {
  /** A drawing program on v0.6: JSON text, data: URIs, and answers matched by request_id. */
  "draw-fast": () => {
    const waiting = new Map();
    return play(
      3,
      ({ onPicture, onError }) =>
        v06.realtime.connect("110602490-lcm-sd15-i2i", {
          connectionKey: "fal-realtime-example",
          clientOnly: false,
          throttleInterval: 0,
          onError,
          onResult: (result) => {
            check(result.images[0].url, `no picture: ${JSON.stringify(result)}`);
            waiting.get(result.request_id)?.();
            onPicture(result.images[0].url);
          },
        }),
      async (connection, turn) => {
        const request_id = crypto.randomUUID();
        const answered = new Promise((resolve) => waiting.set(request_id, resolve));
        connection.send({
          request_id,
          prompt: "a house hd award-winning impressive",
          image_url: sketch(turn).toDataURL("image/jpeg", 0.5),
          sync_mode: true,
          strength: 0.65,
          seed: 42,
          enable_safety_checks: false,
        });
        await answered;
        return 0;
      },
    );
  },

  /** A camera on v1: bytes every 16 ms, whatever comes back, and nothing to match answers by. */
  "camera-turbo": () =>
    play(
      3,
      ({ onPicture, onError }) =>
        v1.fal.realtime.connect("fal-ai/fast-turbo-diffusion/image-to-image", {
          connectionKey: "camera-turbo-demo",
          throttleInterval: 0,
          onError,
          onResult: (result) => onPicture(blobUrl(result.images[0].content, "image/jpeg")),
        }),
      async (connection, turn) => {
        connection.send({
          prompt: "a picture of a lake, elegant, in a suit",
          image_bytes: await bytesOf(sketch(turn), "image/jpeg", 0.7),
          num_inference_steps: 3,
          strength: 0.6,
          guidance_scale: 1,
          seed: 6252023,
        });
        return 16;
      },
    ),

  /** A sketch pad on v1, throttled: WebP in, and a model's name that nobody here knows. */
  realtime: () =>
    play(
      3,
      ({ onPicture, onError }) =>
        v1.fal.realtime.connect("fal-ai/fast-lcm-diffusion/image-to-image", {
          connectionKey: "realtime-demo",
          throttleInterval: 128,
          onError,
          onResult: (result) => onPicture(blobUrl(result.images[0].content, "image/png")),
        }),
      async (connection, turn) => {
        connection.send({
          prompt: "masterpiece, sunset over a lake",
          image_bytes: await bytesOf(sketch(turn), "image/webp"),
          model_name: "runwayml/stable-diffusion-v1-5",
          image_size: "square",
          num_inference_steps: 4,
          seed: 6252023,
        });
        return 100;
      },
    ),

  /** The sketch pad of the first days, on v0.6. */
  "realtime of 2023": () =>
    play(
      3,
      ({ onPicture, onError }) =>
        v06.realtime.connect("110602490-shared-lcm-test", {
          connectionKey: "realtime-2023",
          onError,
          onResult: (result) => onPicture(result.images[0].url),
        }),
      async (connection, turn) => {
        const image_url = sketch(turn).toDataURL("image/jpeg", 0.5);
        connection.send({ prompt: "a moon in the night sky", image_url, sync_mode: true, seed: 6252023 });
        return 100;
      },
    ),

  /** The camera of the first days: it encodes its messages itself, and reads the picture beside `images`. */
  "camera of 2023": () =>
    play(
      3,
      ({ onPicture, onError }) =>
        v0.realtime.connect("110602490-sd-turbo-real-time-high-fps-msgpack", {
          connectionKey: "camera-2023",
          throttleInterval: 0,
          onError,
          onResult: (result) => onPicture(blobUrl(result.image, "image/jpeg")),
        }),
      async (connection, turn) => {
        const image = await bytesOf(sketch(turn), "image/jpeg", 0.5);
        connection.send(
          encode({ prompt: "a lake", image, num_inference_steps: 3, strength: 0.44, guidance_scale: 1, seed: 6252023 }),
        );
        return 16;
      },
    ),
};
