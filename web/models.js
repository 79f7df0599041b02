// What the server says of its models: which one answers, its size, and how far its loading is.

const POLL = 700; // ms, while the model is loading

export class Models {
  #onchange;
  #timer = 0;
  #asking = false;
  #current = null;

  constructor(onchange) {
    this.#onchange = onchange;
    document.addEventListener("visibilitychange", () => !document.hidden && !this.ready && this.watch());
  }

  /** The default model: { name, size, state, stage, progress }, or null before the first answer. */
  get current() {
    return this.#current;
  }

  get ready() {
    return this.#current?.state === "ready";
  }

  /** Ask now, and again until the model is ready. */
  async watch() {
    clearTimeout(this.#timer);
    if (this.#asking) return;
    this.#asking = true;
    try {
      const response = await fetch("/models", { headers: { accept: "application/json" }, cache: "no-store" });
      const { models = [] } = response.ok ? await response.json() : {};
      this.#current = models.find((model) => model.default) ?? models[0] ?? this.#current;
    } catch {
      // The socket's state tells that the server is away.
    } finally {
      this.#asking = false;
    }
    this.#onchange();
    if (!this.ready && !document.hidden) this.#timer = setTimeout(() => this.watch(), POLL);
  }
}
