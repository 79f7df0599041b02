// The result: the newest picture, and no older one after it.

const GLOW_EVERY = 200; // ms

export class Result {
  #canvas;
  #context;
  #glow;
  #shown = 0;
  #newest = 0;
  #answer = null;
  #glowTimer = 0;

  constructor(canvas, glow) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#glow = glow.getContext("2d");
    this.#glow.imageSmoothingQuality = "high";
  }

  /** How many pictures have been shown. */
  get shown() {
    return this.#shown;
  }

  /** The answer whose picture is shown. */
  get answer() {
    return this.#answer;
  }

  /** Show the picture of `answer`, the `number`th message; false when a newer one is shown. */
  async show(answer, number) {
    if (number <= this.#newest) return false;
    const [{ content, content_type: type }] = answer.images;
    const bitmap = await createImageBitmap(new Blob([content], { type }));
    const newer = number > this.#newest;
    if (newer) {
      this.#newest = number;
      this.#answer = answer;
      this.#shown += 1;
      this.#draw(bitmap);
    }
    bitmap.close();
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
