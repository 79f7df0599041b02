// What the server says of its models, as it happens: which there are, how far each is, and which one paints here.

import { keyHeaders } from "./key.js";

export class Models {
  #onchange;
  #source = null;
  #all = [];
  #chosen = null;

  constructor(onchange) {
    this.#onchange = onchange;
    document.addEventListener("visibilitychange", () => this.watch());
    this.watch();
  }

  /** All models: { name, state, stage, progress, size, steps, licence, default, error }; empty before the first word. */
  get all() {
    return this.#all;
  }

  /** The model that was chosen, where it is served, else the server's default; null before the first word. */
  get current() {
    return this.#all.find(({ name }) => name === this.#chosen) ?? this.#all.find((model) => model.default) ?? null;
  }

  choose(name) {
    this.#chosen = name;
    if (this.#all.length) this.#onchange();
  }

  /** Listen while the page is seen; again is harmless. */
  watch() {
    if (document.hidden || this.#source?.readyState === EventSource.CLOSED) {
      this.#source?.close();
      this.#source = null;
    }
    if (document.hidden || this.#source) return;
    this.#source = new EventSource("/models/events");
    this.#source.addEventListener("models", ({ data }) => this.#hear(JSON.parse(data)));
  }

  /** Have a model loaded. One that failed tells its failure to the first who asks, and is tried again for the next. */
  async load(name) {
    const ask = () => fetch(`/models/${encodeURIComponent(name)}/load`, { method: "POST", headers: keyHeaders() });
    try {
      if (!(await ask()).ok) await ask();
    } catch {
      // The socket's state tells that the server is away.
    }
  }

  #hear(models) {
    for (const model of models) {
      // The server tells a failure once; it is true until the model is tried again.
      if (model.state === "failed") model.error ??= this.#all.find(({ name }) => name === model.name)?.error ?? null;
    }
    this.#all = models;
    this.#onchange();
  }
}

/** How far a model is, in words. */
export function words({ state, stage, progress, error }) {
  if (state === "loading") {
    const percent = progress > 0 ? ` ${Math.round(100 * progress)} %` : "";
    return stage && stage !== "start" ? `loading: ${stage}${percent}` : `loading${percent}`;
  }
  if (state === "failed") return `failed: ${error ?? "the server's log says why"}`;
  return { ready: "ready", unloaded: "loads when used", unloading: "being unloaded" }[state] ?? state;
}
