// The LoRA: the address or the file of one, and how much it counts.

const LARGEST = 20 * 2 ** 20; // bytes of a file; it travels with each message, as base64, and those may have 32 MiB

export class Lora {
  #root;
  #settings;
  #file = null; // { name, blob, uri }
  #files = 0; // that were picked, so that another file is another request
  #wrong = ""; // about a file that was not taken
  #onset;
  #onfile;

  /**
   * `settings` holds `lora`, an address, and `loraScale`; `onset(values)` is called when they are to change.
   * `onfile(file)` is called with a file that was picked, or null, to be kept for the next visit.
   */
  constructor(root, settings, { onset, onfile }) {
    this.#root = root;
    this.#settings = settings;
    this.#onset = onset;
    this.#onfile = onfile;
    // Not while it is typed: each half of an address would be fetched.
    this.#find("address").addEventListener("change", ({ target }) => this.#say("", { lora: target.value.trim() }));
    this.#find("pick").addEventListener("click", () => this.#find("file").click());
    this.#find("file").addEventListener("change", ({ target }) => this.#pick(target));
    this.#find("clear").addEventListener("click", () => this.#clear());
    this.#find("scale").addEventListener("input", ({ target }) => onset({ loraScale: target.valueAsNumber }));
  }

  /** The file that was picked as { name, blob, uri }, or null. */
  get file() {
    return this.#file;
  }

  /** What is wrong with the file that was picked last, or nothing. */
  get wrong() {
    return this.#wrong;
  }

  /** The fields of the message, without the file. */
  fields() {
    const { lora, loraScale } = this.#settings;
    if (!this.#file && !lora) return {};
    return { ...(this.#file ? {} : { lora_url: lora }), ...(loraScale === 1 ? {} : { lora_scale: loraScale }) };
  }

  /** The same for the same LoRA. */
  get key() {
    return this.#file ? this.#files : this.#settings.lora;
  }

  /** Take a `File`; or leave everything as it is, say why, and return false. */
  async take(file) {
    if (file.size > LARGEST) {
      const [size, most] = [file.size, LARGEST].map((bytes) => Math.ceil(bytes / 2 ** 20));
      this.#say(`This file has ${size} MB, and the page sends at most ${most}. Give an address instead.`);
      return false;
    }
    try {
      this.#file = { name: fileName(file.name), blob: file, uri: await readUri(file) };
    } catch {
      this.#say("This file could not be read.");
      return false;
    }
    this.#files += 1;
    this.#say("", { lora: "" });
    return true;
  }

  draw() {
    const { lora, loraScale } = this.#settings;
    const any = Boolean(this.#file || lora);
    const address = this.#find("address");
    address.readOnly = Boolean(this.#file);
    if (address !== document.activeElement || this.#file) address.value = this.#file?.name ?? lora; // not while it is typed
    this.#find("clear").hidden = !any;
    this.#find("pick").hidden = any;
    this.#find("scale").disabled = !any;
    this.#find("scale").value = loraScale;
    this.#root.querySelector("output").value = loraScale.toFixed(2);
  }

  #find(part) {
    return this.#root.querySelector(`[data-lora=${part}]`);
  }

  async #pick(input) {
    const [file] = input.files;
    input.value = ""; // the same file may be picked again
    if (!file || !(await this.take(file))) return;
    this.#onfile(file);
    this.#find("clear").focus(); // its button is gone
  }

  #clear() {
    this.#file = null;
    this.#onfile(null);
    this.#find("address").value = "";
    this.#say("", { lora: "" });
    this.#find("address").focus();
  }

  #say(wrong, values = {}) {
    this.#wrong = wrong;
    this.#onset(values);
  }
}

/** A name that needs no quotes in a shell. */
function fileName(name) {
  return name.replace(/[^\w.-]+/g, "-").replace(/^[-.]+/, "") || "lora.safetensors";
}

function readUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
