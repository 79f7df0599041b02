// The drawer "Use in your code".

import { snippet } from "./snippets.js";

export class Drawer {
  #dialog;
  #code;
  #files;
  #present;

  /** `present()` is the request of now: { request, blobs }, where `blobs` maps a field to { name, blob }. */
  constructor(dialog, present) {
    this.#dialog = dialog;
    this.#present = present;
    this.#code = dialog.querySelector("code");
    this.#files = dialog.querySelector(".files");
    for (const tab of dialog.querySelectorAll("input[name=language]")) tab.addEventListener("change", () => this.#fill());
    dialog.querySelector(".close").addEventListener("click", () => dialog.close());
    dialog.querySelector(".copy").addEventListener("click", (event) => this.#copy(event.currentTarget));
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }

  async open() {
    this.#dialog.showModal();
    await this.#fill();
  }

  async #fill() {
    const { request, blobs } = await this.#present();
    const language = this.#dialog.querySelector("input[name=language]:checked").value;
    const names = Object.fromEntries(Object.entries(blobs).map(([field, { name }]) => [field, name]));
    this.#code.textContent = snippet(language, request, names);
    this.#files.replaceChildren(
      ...Object.values(blobs).map(({ name, blob }) => {
        const button = Object.assign(document.createElement("button"), { type: "button", textContent: name });
        button.addEventListener("click", () => download(blob, name));
        return button;
      }),
    );
    this.#files.parentElement.hidden = !Object.keys(blobs).length;
  }

  async #copy(button) {
    const words = button.textContent;
    try {
      await navigator.clipboard.writeText(this.#code.textContent);
    } catch {
      // No clipboard on plain HTTP: select the text, and use the old way.
      getSelection().selectAllChildren(this.#code);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = words), 1500);
  }
}

export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
