// The panel "More settings": what the server can do beside pen, words and dials, and what it says of each field.

export class Panel {
  #root;
  #button;
  #inputs; // name of the setting -> its checkbox
  #fields; // name of the message's field -> the block that stands for it
  #onopen;

  /** `onset(values)` is called with each setting that is switched, `onopen()` when the panel comes or goes. */
  constructor(root, button, onset, onopen) {
    this.#root = root;
    this.#button = button;
    this.#onopen = onopen;
    const named = (name) => Array.from(root.querySelectorAll(`[data-${name}]`), (element) => [element.dataset[name], element]);
    this.#inputs = new Map(named("setting"));
    this.#fields = new Map(named("field"));
    for (const [name, input] of this.#inputs) input.addEventListener("change", () => onset({ [name]: input.checked }));
    button.addEventListener("click", () => this.toggle());
    root.querySelector(".close").addEventListener("click", () => this.toggle());
    root.addEventListener("keydown", ({ key }) => key === "Escape" && this.toggle());
  }

  get open() {
    return !this.#root.hidden;
  }

  toggle() {
    this.#root.hidden = this.open;
    this.#button.setAttribute("aria-expanded", this.open);
    document.documentElement.toggleAttribute("data-more", this.open);
    (this.open ? this.#root : this.#button).focus();
    this.#onopen();
  }

  /** `maskless` says why the mask's settings have no effect, or is empty. */
  draw(settings, maskless) {
    for (const [name, input] of this.#inputs) input.checked = settings[name];
    this.#root.querySelector(".masked").disabled = maskless !== "";
    this.#root.querySelector(".maskless").textContent = maskless;
    this.#root.querySelector(".maskless").hidden = maskless === "";
  }

  /** Whether a field of the message has its place here. */
  has(field) {
    return this.#fields.has(field);
  }

  /** Say what is wrong beside the fields in question: [[field, words], ...]; and of all others that nothing is. */
  complain(wrongs) {
    for (const [field, block] of this.#fields) {
      const words = wrongs.find(([name]) => name === field)?.[1] ?? "";
      const wrong = block.querySelector(".wrong");
      if (wrong.textContent === words) continue;
      wrong.textContent = words;
      wrong.hidden = !words;
      block.querySelector("input").setAttribute("aria-invalid", words !== "");
    }
  }

  /** Open, with the focus on a field. */
  show(field) {
    if (!this.open) this.toggle();
    this.#fields.get(field)?.querySelector("input").focus();
  }
}
