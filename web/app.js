// The page: ties the sketch, the words and the settings to the connection, and the answers to the result.

import { Connection } from "./connection.js";
import { Drawer, download } from "./drawer.js";
import { Example } from "./example.js";
import { bindKeys } from "./keys.js";
import { setKey, tokenQuery } from "./key.js";
import { Lora } from "./lora.js";
import { Menu } from "./menu.js";
import { Meter } from "./meter.js";
import { Models } from "./models.js";
import { Pace } from "./pace.js";
import { fill as fillPalette } from "./palette.js";
import { Panel } from "./panel.js";
import { Pen } from "./pen.js";
import { Request } from "./request.js";
import { Result } from "./result.js";
import { Sketch } from "./sketch.js";
import { describe, duration, wrongs } from "./status.js";
import { DrawingStore, settings } from "./store.js";

const PROMPTS = [
  ["Sunset lake", "sunset over a lake with mountains"],
  ["Winter night", "a snowy forest at night with a moon"],
  ["Desert house", "desert at day with a house"],
  ["Dawn by the sea", "dawn by the sea, clouds"],
  ["Green hills", "green hills and a house on a sunny day"],
  ["Starry peaks", "snowy mountains, starry night, a lake"],
];
const DEFAULTS = {
  mode: "draw",
  model: null, // the server's default
  prompt: PROMPTS[0][1],
  strength: 50,
  steps: null, // as many as the model asks for
  seed: 7,
  locked: true,
  color: "#3f86d6",
  size: 38,
  maskOnly: false,
  controlnet: false,
  lora: "",
  loraScale: 1,
  safety: true,
  previews: false,
};
const UNKNOWN = { name: "", size: 256, steps: 4, default: true }; // the embedded model, until the server says otherwise
const MOST_STEPS = 8; // of the dial, unless the model asks for more
const WORK = ["mode", "model", "steps", "maskOnly", "controlnet", "lora", "safety", "previews"]; // what a picture's time hangs on
const SEEDS = 2 ** 32; // how many the server knows
const RETRYABLE = ["overloaded", "rate_limited", "engine_lost", "unavailable", "model_loading", "out_of_memory"];
const FIRST_RETRY = 500; // ms after a failed picture
const LAST_RETRY = 8000; // ms
const SPOKEN_EVERY = 5000; // ms between words for a screen reader

const $ = (selector) => document.querySelector(selector);
const chosen = (name) => $(`input[name=${name}]:checked`).value;

const state = { ...DEFAULTS, ...settings.load() };
const model = () => models.current ?? UNKNOWN;
let previousColor = "#ffdf20";
let trouble = null;
let retries = 0; // since the last answer
let shownKey = null;
let spokenAt = 0;

// What is sent

function compose() {
  // One that is unloaded loads when it is used; who chose another model than the default waits to hear that it is there.
  if (!started || trouble?.waiting || ["loading", "failed"].includes(model().state)) return null;
  if (state.model && !models.current) return null;
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
    trouble = { code: "unreadable", reason: "", detail: [] };
  }
  document.documentElement.dataset.shown = result.shown;
  example.go();
  if (!state.locked) $("#seed").value = answer.seed;
  const steps = answer.num_inference_steps;
  $("#ran").textContent = steps === request.steps ? `${steps} ${steps === 1 ? "step" : "steps"}` : `${steps} of ${request.steps} steps`;
  drawResult();
  drawStatus();
  const now = performance.now();
  if (now - spokenAt > SPOKEN_EVERY) {
    spokenAt = now;
    const words = result.flagged ? "Picture hidden by the safety checker" : "New picture";
    $("#live").textContent = latency === null ? words : `${words}, ${duration(latency)}`;
  }
}

async function previewed(preview, number) {
  try {
    if (!(await result.show(preview, number))) return;
  } catch {
    return; // its answer comes, and tells if that cannot be read either
  }
  shownKey = null;
  drawResult();
}

function failed(error, note) {
  if (error.code === "superseded" || error.code === "cancelled") {
    pace.pump();
    return;
  }
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
let help = null; // what the notice's button offers: [words, action]

function drawStatus() {
  if (statusTimer) return;
  statusTimer = setTimeout(() => {
    statusTimer = 0;
    const showing = result.shown > 0;
    const { tone, pill, notice, progress } = describe({ connection, model: models.current, trouble, meter, showing });
    const fields = trouble ? wrongs(trouble) : [];
    panel.complain(lora.wrong ? [["lora_url", lora.wrong], ...fields] : fields);
    const field = fields.find(([name]) => panel.has(name))?.[0];
    $("#status").dataset.tone = tone;
    $("#status span").textContent = pill;
    $("#notice p").textContent = notice;
    $("#notice").hidden = !notice || Boolean(field && panel.open); // then it stands beside the field
    $("#notice progress").hidden = progress === undefined;
    if (progress !== undefined) $("#notice progress").value = progress;
    help = field ? ["Show the setting", () => panel.show(field)] : null;
    if (model().state === "failed") help = ["Try again", () => models.load(model().name)];
    $("#key").hidden = connection.state !== "refused";
    $("#notice button").hidden = !help;
    $("#notice button").textContent = help?.[0] ?? "";
    if ((meter.moving || connection.pending) && !document.hidden) drawStatus();
  }, 250);
}

document.addEventListener("visibilitychange", drawStatus);

function drawResult() {
  const empty = !result.answer;
  $("#result").classList.toggle("empty", empty);
  $("#result").classList.toggle("hides", result.flagged);
  $("#flagged").hidden = !result.flagged;
  $("#reuse").hidden = $("#save").hidden = empty || result.flagged;
  $("#part").hidden = result.part === 1;
  $("#part").value = result.part;
}

function drawTools() {
  const tool = chosen("tool");
  $(".masking").hidden = tool !== "mask";
  $(".colors").hidden = tool === "mask";
  $("#board").dataset.tool = tool;
  $("#undo").disabled = !sketch.canUndo;
  $("#redo").disabled = !sketch.canRedo;
  $("#hint").hidden = !sketch.blank;
  panel.draw(state, request.maskless);
}

function drawSettings() {
  document.documentElement.dataset.mode = state.mode;
  $(`input[name=mode][value=${state.mode}]`).checked = true;
  const steps = request.steps;
  $("#steps").max = Math.max(MOST_STEPS, steps, model().steps);
  for (const name of ["prompt", "strength", "steps", "seed", "size"]) {
    const value = String(name === "steps" ? steps : state[name]);
    if ($(`#${name}`).value !== value) $(`#${name}`).value = value;
  }
  $(".steps output").value = steps;
  panel.draw(state, request.maskless);
  lora.draw();
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
  if (WORK.some((name) => name in values)) meter.reset();
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
  if (!result.answer || result.flagged) return;
  takeOver();
  await sketch.place(await result.blob("image/png"));
}

async function savePicture() {
  if (!result.answer || result.flagged) return;
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
const drawings = new DrawingStore(() => sketch.save());
const lora = new Lora($("#lora"), state, { onset: set, onfile: (file) => drawings.keep("lora", file) });
const request = new Request(state, sketch, model, lora);
const result = new Result($("#picture"), $("#glow"));
const example = new Example(sketch);
const panel = new Panel($("#more"), $("#tune"), set, drawStatus);
const menu = new Menu($("#model"), $("#models"), ({ name, state: how, default: usual }) => {
  if (name !== models.current.name) {
    models.choose(name);
    set({ model: usual ? null : name, steps: null });
  }
  if (how === "failed") models.load(name);
});
const models = new Models(() => {
  sketch.fit(model().size);
  menu.draw(models.all, models.current);
  drawSettings();
  drawStatus();
  pace.pump();
});
models.choose(state.model);
const scheme = location.protocol === "https:" ? "wss" : "ws";
const address = `${scheme}://${location.host}/fal-ai/lcm/realtime?max_buffering=1`;
const connection = new Connection(async () => address + (await tokenQuery()), {
  state: drawStatus,
  open() {
    models.watch();
    pace.again();
  },
  preview: previewed,
  answer: answered,
  error: failed,
});
const pace = new Pace({ connection, compose, cost: () => meter.cost });
let started = false;

new Pen($("#board"), $("#ring"), sketch, brush, takeOver);
const drawer = new Drawer($("#drawer"), async () => {
  const fields = request.fields();
  const blobs = {};
  for (const [field, { name, blob }] of Object.entries(request.files())) blobs[field] = { name, blob: await blob };
  const seed = result.answer?.seed ?? state.seed;
  return { request: { ...fields, ...(state.locked ? {} : { seed }) }, blobs };
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
for (const name of ["strength", "size"]) {
  $(`#${name}`).addEventListener("input", (event) => set({ [name]: event.target.valueAsNumber }));
}
$("#steps").addEventListener("input", ({ target }) => {
  set({ steps: target.valueAsNumber === model().steps ? null : target.valueAsNumber });
});
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
$("#notice button").addEventListener("click", () => help?.[1]());
$("#key").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("#key input").value);
  $("#key input").value = "";
  connection.open();
});
$("#flagged button").addEventListener("click", () => set({ safety: false }));

bindKeys({
  b: () => choose("tool", "brush"),
  e: () => choose("tool", "eraser"),
  f: () => choose("tool", "fill"),
  m: () => choose("tool", "mask"),
  r: roll,
  s: savePicture,
  x: () => setColor(previousColor),
  ",": () => panel.toggle(),
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
drawResult();
connection.open();
const [stored, file] = await Promise.all(["current", "lora"].map((key) => drawings.load(key).catch(() => null)));
if (stored) await sketch.load(stored);
if (file) await lora.take(file);
started = true;
if (!stored) example.start();
drawTools();
pace.changed();
