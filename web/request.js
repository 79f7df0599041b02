// The request: what the page asks for now, as the fields of a message and the pictures that go with it.

const SEEDS = 2 ** 31;

export class Request {
  #settings;
  #sketch;
  #side;
  #canvas = document.createElement("canvas");
  #context = this.#canvas.getContext("2d", { willReadFrequently: true });

  /** `side()` is the side of the model's pictures in pixels. */
  constructor(settings, sketch, side) {
    this.#settings = settings;
    this.#sketch = sketch;
    this.#side = side;
  }

  /** Whether words alone make the picture: by choice, or because nothing is drawn. */
  get wordsOnly() {
    return this.#settings.mode === "text" || this.#sketch.blank;
  }

  /** The same for the same request; a free seed does not make it another. */
  get key() {
    const { prompt, strength, steps, seed, locked } = this.#settings;
    const drawn = this.wordsOnly ? [] : [strength, this.#sketch.version];
    return JSON.stringify([prompt, steps, locked ? seed : "free", this.#side(), ...drawn]);
  }

  fields() {
    const { prompt, strength, steps, seed, locked } = this.#settings;
    return {
      prompt,
      seed: locked ? seed : Math.floor(Math.random() * SEEDS),
      num_inference_steps: steps,
      ...(this.wordsOnly ? { image_size: { width: this.#side(), height: this.#side() } } : { strength: strength / 100 }),
    };
  }

  /** The pictures as { field: { name, blob } }, where `blob` is a promise; they are copied before this returns. */
  pictures() {
    if (this.wordsOnly) return {};
    if (this.#canvas.width !== this.#side()) this.#canvas.width = this.#canvas.height = this.#side();
    this.#sketch.copyPaint(this.#context);
    const files = { image_bytes: { name: "sketch.jpg", blob: encode(this.#canvas, "image/jpeg", 0.9) } };
    if (this.#sketch.masked) {
      this.#sketch.copyMask(this.#context);
      files.mask_bytes = { name: "mask.png", blob: encode(this.#canvas, "image/png") };
    }
    return files;
  }

  /** The whole message of now. */
  async message() {
    const message = this.fields();
    for (const [field, { blob }] of Object.entries(this.pictures())) {
      message[field] = new Uint8Array(await (await blob).arrayBuffer());
    }
    return message;
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
