// The request: what the page asks for now, as the fields of a message and the files that go with it.

const SEEDS = 2 ** 31;

export class Request {
  #settings;
  #sketch;
  #model;
  #lora;
  #canvas = document.createElement("canvas");
  #context = this.#canvas.getContext("2d", { willReadFrequently: true });

  /** `model()` is the model that is to paint: { name, size, steps, default }. */
  constructor(settings, sketch, model, lora) {
    this.#settings = settings;
    this.#sketch = sketch;
    this.#model = model;
    this.#lora = lora;
  }

  /** Whether words alone make the picture: by choice, or because nothing is drawn. */
  get wordsOnly() {
    return this.#settings.mode === "text" || this.#sketch.blank;
  }

  /** Why there is no mask to paint in, in words; empty when there is one. */
  get maskless() {
    if (this.#settings.mode === "text") return "Words alone have no mask: choose Draw.";
    if (!this.#sketch.masked) return "Paint a mask first (M).";
    return this.#sketch.blank ? "Draw something under the mask first." : "";
  }

  /** The steps to run: the model's own number, unless another was chosen. */
  get steps() {
    return this.#settings.steps ?? this.#model().steps;
  }

  /** The same for the same request; a free seed does not make it another. */
  get key() {
    const fields = { ...this.fields(), ...(this.#settings.locked ? {} : { seed: "free" }) };
    return JSON.stringify([fields, this.#lora.key, this.#side, this.wordsOnly ? null : this.#sketch.version]);
  }

  /** What differs from the server's defaults, and what the dials say. */
  fields() {
    const { prompt, strength, seed, locked, maskOnly, controlnet, safety, previews } = this.#settings;
    const { name, default: usual } = this.#model();
    const masked = !this.maskless;
    return {
      ...(usual ? {} : { model: name }),
      prompt,
      seed: locked ? seed : Math.floor(Math.random() * SEEDS),
      num_inference_steps: this.steps,
      ...(this.wordsOnly ? { image_size: { width: this.#side, height: this.#side } } : { strength: strength / 100 }),
      ...(masked && maskOnly ? { inpaint_mask_only: true } : {}),
      ...(masked && controlnet ? { controlnet_inpaint: true } : {}),
      ...this.#lora.fields(),
      ...(safety ? {} : { enable_safety_checks: false }),
      ...(previews ? { previews: true } : {}),
    };
  }

  /** The files as { field: { name, blob } }, where `blob` may be a promise; the pictures are copied before this returns. */
  files() {
    const files = this.#lora.file ? { lora_url: this.#lora.file } : {};
    if (this.wordsOnly) return files;
    if (this.#canvas.width !== this.#side) this.#canvas.width = this.#canvas.height = this.#side;
    this.#sketch.copyPaint(this.#context);
    files.image_bytes = { name: "sketch.jpg", blob: encode(this.#canvas, "image/jpeg", 0.9) };
    if (this.#sketch.masked) {
      this.#sketch.copyMask(this.#context);
      files.mask_bytes = { name: "mask.png", blob: encode(this.#canvas, "image/png") };
    }
    return files;
  }

  /** The whole message of now. */
  async message() {
    const message = this.fields();
    for (const [field, { blob, uri }] of Object.entries(this.files())) {
      message[field] = uri ?? new Uint8Array(await (await blob).arrayBuffer());
    }
    return message;
  }

  get #side() {
    return this.#model().size;
  }
}

/** Encode a copy of `canvas`; an OffscreenCanvas does so at once, where a canvas's toBlob may wait for an idle moment. */
function encode(canvas, type, quality) {
  const { width, height } = canvas;
  const offscreen = typeof OffscreenCanvas !== "undefined";
  const copy = offscreen ? new OffscreenCanvas(width, height) : Object.assign(document.createElement("canvas"), { width, height });
  copy.getContext("2d", { willReadFrequently: true }).drawImage(canvas, 0, 0);
  return offscreen ? copy.convertToBlob({ type, quality }) : new Promise((resolve) => copy.toBlob(resolve, type, quality));
}
