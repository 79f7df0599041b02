// The result: the newest picture, finished or on its way, and no older one after it.

const GLOW_EVERY = 200; // ms

export class Result {
  #canvas;
  #context;
  #glow;
  #shown = 0;
  #newest = 0; // which message's picture is shown, and how much of it: the 3rd after half its steps is 3.5, finished 4
  #answer = null;
  #glowTimer = 0;

  constructor(canvas, glow) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#glow = glow.getContext("2d");
    this.#glow.imageSmoothingQuality = "high";
  }

  /** How many finished pictures have been shown. */
  get shown() {
    return this.#shown;
  }

  /** The answer, or the preview, whose picture is shown; null before the first. */
  get answer() {
    return this.#answer;
  }

  /** How much of the picture that is shown is done: 1 when it is finished. */
  get part() {
    return this.#answer ? partOf(this.#answer) : 1;
  }

  /** Whether the picture is hidden because the safety checker flagged it. */
  get flagged() {
    return this.#answer !== null && isFlagged(this.#answer);
  }

  /** Show the picture of `answer`, which may be a preview, to the `number`th message; false when a newer one is shown. */
  async show(answer, number) {
    const at = number + partOf(answer);
    if (at <= this.#newest) return false;
    const [{ content, content_type: type }] = answer.images;
    const bitmap = isFlagged(answer) ? null : await createImageBitmap(new Blob([content], { type }));
    const newer = at > this.#newest;
    if (newer) {
      this.#newest = at;
      this.#answer = answer;
      if (!answer.preview) this.#shown += 1;
      if (bitmap) this.#draw(bitmap);
    }
    bitmap?.close();
    return newer;
  }

  /** The picture as a Blob, in `type`. */
  blob(type) {
    return new Promise((resolve) => this.#canvas.toBlob(resolve, type, 0.95));
  }

  #draw(bitmap) {
    if (this.#canvas.width !== bitmap.width || this.#canvas.height !== bitmap.height) {
      this.#canvas.width = bitmap.width;
      this.#canvas.height = bitmap.height;
    }
    this.#context.drawImage(bitmap, 0, 0);
    this.#glowTimer ||= setTimeout(() => {
      this.#glowTimer = 0;
      this.#glow.drawImage(this.#canvas, 0, 0, this.#glow.canvas.width, this.#glow.canvas.height);
    }, GLOW_EVERY);
  }
}

function partOf({ preview, step, num_inference_steps: steps }) {
  return preview ? step / steps : 1;
}

function isFlagged({ nsfw_content_detected: flags }) {
  return flags?.[0] === true;
}
