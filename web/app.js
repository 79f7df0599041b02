// The page: ties the sketch, the words and the settings to the connection, and the answers to the result.

import { Connection } from "./connection.js";
import { Drawer, download } from "./drawer.js";
import { Example } from "./example.js";
import { bindKeys } from "./keys.js";
import { Meter } from "./meter.js";
import { Models } from "./models.js";
import { Pace } from "./pace.js";
import { fill as fillPalette } from "./palette.js";
import { Pen } from "./pen.js";
import { Request } from "./request.js";
import { Result } from "./result.js";
import { Sketch } from "./sketch.js";
import { describe, duration } from "./status.js";
import { DrawingStore, settings } from "./store.js";

const PROMPTS = [
  ["Sunset lake", "sunset over a lake with mountains"],
  ["Winter night", "a snowy forest at night with a moon"],
  ["Desert house", "desert at day with a house"],
  ["Dawn by the sea", "dawn by the sea, clouds"],
  ["Green hills", "green hills and a house on a sunny day"],
  ["Starry peaks", "snowy mountains, starry night, a lake"],
];
const DEFAULTS = { mode: "draw", prompt: PROMPTS[0][1], strength: 50, steps: 4, seed: 7, locked: true, color: "#3f86d6", size: 38 };
const DEFAULT_SIDE = 256; // of the embedded model, until the server says otherwise
const SEEDS = 2 ** 32; // how many the server knows
const RETRYABLE = ["overloaded", "rate_limited", "engine_lost", "unavailable", "model_loading", "out_of_memory"];
const FIRST_RETRY = 500; // ms after a failed picture
const LAST_RETRY = 8000; // ms
const SPOKEN_EVERY = 5000; // ms between words for a screen reader

const $ = (selector) => document.querySelector(selector);
const chosen = (name) => $(`input[name=${name}]:checked`).value;

const state = { ...DEFAULTS, ...settings.load() };
const side = () => models.current?.size || DEFAULT_SIDE;
let previousColor = "#ffdf20";
let trouble = null;
let retries = 0; // since the last answer
let shownKey = null;
let spokenAt = 0;

// What is sent

function compose() {
  if (!started || trouble?.waiting || (models.current && !models.ready)) return null;
  return { key: request.key, message: () => request.message() };
}

// What comes back

async function answered(answer, { number, note, latency, depth }) {
  pace.answered(note.key);
  trouble = null;
  retries = 0;
  if (latency !== null) meter.add(latency, depth);
  try {
    if (await result.show(answer, number)) shownKey = note.key;
  } catch {
    trouble = { code: "unreadable", reason: "" };
  }
  document.documentElement.dataset.shown = result.shown;
  example.go();
  if (!state.locked) $("#seed").value = answer.seed;
  const steps = answer.num_inference_steps;
  $("#ran").textContent = steps === state.steps ? `${steps} ${steps === 1 ? "step" : "steps"}` : `${steps} of ${state.steps} steps`;
  drawStatus();
  const now = performance.now();
  if (now - spokenAt > SPOKEN_EVERY) {
    spokenAt = now;
    $("#live").textContent = latency === null ? "New picture" : `New picture, ${duration(latency)}`;
  }
}

function failed(error, note) {
  if (error.code === "superseded" || error.code === "cancelled") {
    pace.pump();
    return;
  }
  if (error.code === "model_loading") models.watch();
  const waits = trouble?.waiting;
  trouble = { ...error, waiting: RETRYABLE.includes(error.code) };
  if (!trouble.waiting) {
    if (note) pace.answered(note.key);
  } else if (!waits) {
    const longest = Math.min(LAST_RETRY, FIRST_RETRY * 2 ** retries);
    retries += 1;
    setTimeout(() => {
      if (trouble) trouble.waiting = false;
      pace.again();
    }, longest * (0.5 + Math.random() / 2));
  }
  drawStatus();
}

// What is seen

const meter = new Meter();
let statusTimer = 0;

function drawStatus() {
  if (statusTimer) return;
  statusTimer = setTimeout(() => {
    statusTimer = 0;
    const showing = result.shown > 0;
    const { tone, pill, notice, progress } = describe({ connection, model: models.current, trouble, meter, showing });
    $("#status").dataset.tone = tone;
    $("#status span").textContent = pill;
    $("#notice p").textContent = notice;
    $("#notice").hidden = !notice;
    $("#notice progress").hidden = progress === undefined;
    if (progress !== undefined) $("#notice progress").value = progress;
    $("#result").classList.toggle("empty", !showing);
    $("#reuse").hidden = $("#save").hidden = !showing;
    if ((meter.moving || connection.pending) && !document.hidden) drawStatus();
  }, 250);
}

document.addEventListener("visibilitychange", drawStatus);

function drawTools() {
  const tool = chosen("tool");
  $(".masking").hidden = tool !== "mask";
  $(".colors").hidden = tool === "mask";
  $("#board").dataset.tool = tool;
  $("#undo").disabled = !sketch.canUndo;
  $("#redo").disabled = !sketch.canRedo;
  $("#hint").hidden = !sketch.blank;
}

function drawSettings() {
  document.documentElement.dataset.mode = state.mode;
  $(`input[name=mode][value=${state.mode}]`).checked = true;
  for (const name of ["prompt", "strength", "steps", "seed", "size"]) if ($(`#${name}`).value !== String(state[name])) $(`#${name}`).value = state[name];
  $(".steps output").value = state.steps;
  let custom = true;
  for (const swatch of document.querySelectorAll("input[name=color]")) {
    swatch.checked = swatch.value === state.color;
    if (swatch.checked) custom = false;
  }
  $(".custom").classList.toggle("chosen", custom);
  if (custom) $("#picker").value = state.color;
  $("#lock").setAttribute("aria-pressed", state.locked);
  $("#lock use").setAttribute("href", state.locked ? "#i-locked" : "#i-open");
  for (const range of document.querySelectorAll("input[type=range]")) {
    range.style.setProperty("--at", `${(100 * (range.value - range.min)) / (range.max - range.min)}%`);
  }
  for (const chip of document.querySelectorAll(".chips button")) {
    chip.setAttribute("aria-pressed", chip.value === state.prompt);
  }
}

// What can be changed

function set(values) {
  Object.assign(state, values);
  settings.save(state);
  drawSettings();
  if ("mode" in values || "steps" in values) meter.reset();
  if (trouble && !trouble.waiting) trouble = null;
  pace.changed();
  drawStatus();
}

function setColor(color) {
  if (color === state.color) return;
  previousColor = state.color;
  set({ color });
  if (!["brush", "fill"].includes(chosen("tool"))) choose("tool", "brush");
}

function brush() {
  return {
    tool: chosen("tool"),
    color: state.color,
    size: 0.006 + 0.26 * (state.size / 100) ** 2,
    add: chosen("masking") === "add",
  };
}

function takeOver() {
  example.stop();
}

function choose(name, value) {
  const input = $(`input[name=${name}][value="${value}"]`);
  input.checked = true;
  input.dispatchEvent(new Event("change", { bubbles: true }));
}

async function reuse() {
  takeOver();
  await sketch.place(await result.blob("image/png"));
}

async function savePicture() {
  if (!result.answer) return;
  const words = (result.answer.prompt ?? state.prompt).toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 48).replace(/^-|-$/g, "");
  download(await result.blob("image/png"), `${words || "picture"}-${result.answer.seed}.png`);
}

// Together

fillPalette($(".colors"));
const sketch = new Sketch($("#paint"), $("#mask"), (finished) => {
  if (finished) {
    drawings.changed();
    drawTools();
  } else {
    $("#hint").hidden = true;
  }
  if (started) pace.changed();
});
const request = new Request(state, sketch, side);
const drawings = new DrawingStore(() => sketch.save());
const result = new Result($("#picture"), $("#glow"));
const example = new Example(sketch);
const models = new Models(() => {
  sketch.fit(side());
  drawStatus();
  pace.pump();
});
const scheme = location.protocol === "https:" ? "wss" : "ws";
const connection = new Connection(`${scheme}://${location.host}/fal-ai/lcm/realtime?max_buffering=1`, {
  state: drawStatus,
  open() {
    models.watch();
    pace.again();
  },
  loading: () => models.watch(),
  answer: answered,
  error: failed,
});
const pace = new Pace({ connection, compose, cost: () => meter.cost });
let started = false;

new Pen($("#board"), $("#ring"), sketch, brush, takeOver);
const drawer = new Drawer($("#drawer"), async () => {
  const pictures = request.pictures();
  for (const picture of Object.values(pictures)) picture.blob = await picture.blob;
  const seed = result.answer?.seed ?? state.seed;
  return { request: { ...request.fields(), ...(state.locked ? {} : { seed }) }, blobs: pictures };
});

for (const [name, prompt] of PROMPTS) {
  const chip = Object.assign(document.createElement("button"), { type: "button", textContent: name, title: prompt, value: prompt });
  chip.addEventListener("click", () => set({ prompt }));
  $(".chips").append(chip);
}

for (const input of document.querySelectorAll("input[name=mode]")) {
  input.addEventListener("change", () => set({ mode: chosen("mode") }));
}
for (const input of document.querySelectorAll("input[name=tool], input[name=masking]")) input.addEventListener("change", drawTools);
for (const input of document.querySelectorAll("input[name=color]")) {
  input.addEventListener("change", () => setColor(input.value));
}
for (const name of ["input", "click"]) $("#picker").addEventListener(name, () => setColor($("#picker").value));
$("#prompt").addEventListener("input", (event) => set({ prompt: event.target.value }));
for (const name of ["strength", "steps", "size"]) {
  $(`#${name}`).addEventListener("input", (event) => set({ [name]: event.target.valueAsNumber }));
}
$("#seed").addEventListener("input", (event) => {
  const seed = Number.parseInt(event.target.value, 10);
  if (seed >= 0 && seed < SEEDS) set({ seed, locked: true });
});
$("#seed").addEventListener("change", drawSettings);
const roll = () => set({ seed: Math.floor(Math.random() * 10_000), locked: true });
$("#dice").addEventListener("click", roll);
$("#lock").addEventListener("click", () => {
  const seed = result.answer?.seed ?? state.seed;
  set(state.locked ? { locked: false } : { locked: true, seed });
});
$("#undo").addEventListener("click", () => (takeOver(), sketch.undo()));
$("#redo").addEventListener("click", () => (takeOver(), sketch.redo()));
$("#clear").addEventListener("click", () => (takeOver(), sketch.clear()));
$("#unmask").addEventListener("click", () => sketch.clear("mask"));
$("#reuse").addEventListener("click", reuse);
$("#save").addEventListener("click", savePicture);
$("#code").addEventListener("click", () => drawer.open());

bindKeys({
  b: () => choose("tool", "brush"),
  e: () => choose("tool", "eraser"),
  f: () => choose("tool", "fill"),
  m: () => choose("tool", "mask"),
  r: roll,
  s: savePicture,
  x: () => setColor(previousColor),
  "[": () => set({ size: Math.max(0, state.size - 6) }),
  "]": () => set({ size: Math.min(100, state.size + 6) }),
  "ctrl+z": () => (takeOver(), sketch.undo()),
  "ctrl+shift+z": () => (takeOver(), sketch.redo()),
  "ctrl+y": () => (takeOver(), sketch.redo()),
});

/** Small facts about the page, to read from outside. */
window.lcm = Object.freeze({
  get shown() {
    return result.shown;
  },
  get state() {
    return $("#status span").textContent;
  },
  /** Whether the picture that is shown is of the page's present state. */
  get settled() {
    return started && !example.running && !sketch.drawing && shownKey === request.key;
  },
});

drawSettings();
drawTools();
connection.open();
const stored = await drawings.load().catch(() => null);
if (stored) await sketch.load(stored);
started = true;
if (!stored) example.start();
drawTools();
pace.changed();
