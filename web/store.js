// The store: nothing is lost on reload. Settings lie in localStorage, the drawing in IndexedDB.

const SETTINGS = "lcm-rt.settings";

export const settings = {
  load() {
    try {
      return JSON.parse(localStorage.getItem(SETTINGS)) ?? {};
    } catch {
      return {};
    }
  },
  save(values) {
    try {
      localStorage.setItem(SETTINGS, JSON.stringify(values));
    } catch {
      // Storage is full or forbidden: the page works without.
    }
  },
};

function promise(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export class DrawingStore {
  #opened;
  #database = null;
  #content;
  #writing = false;
  #dirty = false;

  /** `content()` gives what to write. */
  constructor(content) {
    this.#content = content;
    this.#opened = this.#open();
    addEventListener("pagehide", () => this.#dirty && this.#write());
  }

  /** What is stored under `key`, or null: "current" is the drawing. */
  async load(key = "current") {
    await this.#opened;
    const store = this.#database?.transaction("drawings").objectStore("drawings");
    return (store && (await promise(store.get(key)))) ?? null;
  }

  /** Store something beside the drawing; null forgets it. */
  async keep(key, value) {
    await this.#opened;
    const store = this.#database?.transaction("drawings", "readwrite").objectStore("drawings");
    store?.put(value, key);
  }

  /** Write at once; while a write is under way, once more after it. */
  changed() {
    this.#dirty = true;
    if (!this.#writing) this.#write();
  }

  async #open() {
    try {
      const request = indexedDB.open("lcm-rt", 1);
      request.onupgradeneeded = () => request.result.createObjectStore("drawings");
      this.#database = await promise(request);
    } catch {
      // Storage is forbidden: the page works without.
    }
  }

  #write() {
    if (!this.#database) return;
    this.#dirty = false;
    this.#writing = true;
    const transaction = this.#database.transaction("drawings", "readwrite", { durability: "relaxed" });
    transaction.objectStore("drawings").put(this.#content(), "current");
    transaction.oncomplete = transaction.onabort = () => {
      this.#writing = false;
      if (this.#dirty) this.#write();
    };
    transaction.commit();
  }
}
