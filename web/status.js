// The status, in plain words: a pill that is always there, and a notice over the result when there is trouble.

import { hasKey } from "./key.js";
import { words as stateOf } from "./models.js";

const TROUBLE = {
  invalid_input: (reason) => `The server did not accept a setting. ${reason}`,
  image_load_error: (reason) => `The server could not read the drawing. ${reason}`,
  file_download_error: (reason) => `The server could not fetch a file. ${reason}`,
  overloaded: () => "The server has more to do than it takes on. Trying again.",
  rate_limited: () => "The server limits how often you may ask. Trying again.",
  engine_lost: () => "The engine stopped and is starting again. Your drawing is safe.",
  unavailable: () => "No engine can answer just now. Trying again.",
  out_of_memory: () => "The device has no memory left for this picture. Trying again.",
  generation_failed: () => "This picture could not be made. Change anything to try again.",
  unreadable: () => "An answer of the server could not be read. Change anything to try again.",
};

const FIELDS = {
  lora_url: "LoRA",
  lora_scale: "LoRA strength",
  inpaint_mask_only: "Only inside the mask",
  controlnet_inpaint: "ControlNet",
  num_inference_steps: "Steps",
  image_bytes: "Sketch",
  mask_bytes: "Mask",
};
const LONG = 700; // ms, after which a picture is worth a word

/** What the server says of single fields, in words: [[field, words], ...]; `detail` is as in its error. */
export function wrongs({ detail }) {
  return detail.filter(({ loc }) => loc.length > 1).map(({ loc, msg }) => [loc[1], `${msg[0].toUpperCase()}${msg.slice(1)}.`]);
}

/** { tone, pill, notice, progress } for the present state of things. */
export function describe({ connection, model, trouble, meter, showing }) {
  if (connection.state === "refused") {
    return { tone: "bad", pill: "not allowed", notice: hasKey() ? "The server does not know this key." : "This server asks for a key: lcm-rt keys create NAME makes one." };
  }
  if (connection.state === "waiting" || (connection.state === "connecting" && connection.retries > 0)) {
    const notice = connection.retries > 2 ? "The server does not answer. Trying again; your drawing is safe." : "";
    return { tone: "busy", pill: "reconnecting", notice };
  }
  if (model?.state === "failed") {
    return { tone: "bad", pill: "model failed", notice: `${model.name} ${stateOf(model)}` };
  }
  if (model?.state === "loading") {
    const percent = model.progress > 0 ? ` ${Math.round(100 * model.progress)} %` : "";
    const notice = `${model.name} is ${stateOf(model)}. You can draw meanwhile.`;
    return { tone: "busy", pill: `loading model${percent}`, notice, progress: model.progress };
  }
  if (trouble?.code === "model_loading") return { tone: "busy", pill: "loading model", notice: "" };
  if (trouble) {
    const say = TROUBLE[trouble.code] ?? (() => "Something went wrong in the server; its log says what.");
    const full = trouble.code === "overloaded" || trouble.code === "rate_limited";
    const fields = wrongs(trouble);
    const reason = fields.map(([field, words]) => `${FIELDS[field] ?? field}: ${words}`).join(" ") || trouble.reason;
    const pill = full ? "server full" : fields.length ? "not accepted" : "server error";
    return { tone: full ? "busy" : "bad", pill, notice: say(reason) };
  }
  if (connection.state === "connecting") return { tone: "busy", pill: "connecting", notice: "" };
  if (model && model.state !== "ready") return { tone: "busy", pill: stateOf(model), notice: "" };
  const latency = meter.p50 ? ` · ${duration(meter.p50)}` : "";
  if (connection.pending > LONG && !(meter.fps > 0)) return { tone: "busy", pill: `painting${latency}`, notice: "" };
  if (meter.moving) {
    const fps = meter.fps < 9.95 ? meter.fps.toFixed(1) : Math.round(meter.fps);
    return { tone: "live", pill: `live${meter.fps ? ` · ${fps} fps` : ""}${latency}`, notice: "" };
  }
  return { tone: "live", pill: showing ? `ready${latency}` : "ready", notice: "" };
}

export function duration(ms) {
  return ms < 950 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}
