// The model menu: every model of the server with its state, to choose from.

import { words } from "./models.js";

const GAP = 6; // px between the button and the menu
const EDGE = 8; // px between the menu and the window's right edge

export class Menu {
  #button;
  #list;
  #rows = new Map(); // name of the model -> its row, kept so that the focus stays where it is
  #onchoose;

  /** `onchoose(model)` is called with the model that was clicked, even if it is the one that paints already. */
  constructor(button, list, onchoose) {
    this.#button = button;
    this.#list = list;
    this.#onchoose = onchoose;
    list.addEventListener("toggle", ({ newState }) => {
      button.setAttribute("aria-expanded", newState === "open");
      if (newState !== "open") return;
      this.#place();
      list.querySelector("[aria-current=true]")?.focus();
    });
    addEventListener("resize", () => list.hidePopover());
  }

  draw(models, current) {
    for (const [name, { row }] of this.#rows) {
      if (models.some((model) => model.name === name)) continue;
      row.remove();
      this.#rows.delete(name);
    }
    for (const model of models) {
      const { row, facts, state, bar } = this.#rows.get(model.name) ?? this.#add(model.name);
      row.onclick = () => {
        this.#list.hidePopover();
        this.#onchoose(model);
      };
      row.dataset.state = model.state;
      row.setAttribute("aria-current", model.name === current?.name);
      facts.textContent = `${model.size} px · ${model.steps} ${model.steps === 1 ? "step" : "steps"} · ${model.licence}`;
      state.textContent = model.state === "failed" ? `${words(model)}. Choose it to try again.` : words(model);
      bar.hidden = model.state !== "loading";
      bar.value = model.progress;
    }
    if (!current) return;
    this.#button.dataset.state = current.state;
    this.#button.querySelector(".name").textContent = current.name;
    this.#button.title = `${current.name}: ${words(current)}`;
  }

  #add(name) {
    const row = Object.assign(document.createElement("button"), { type: "button" });
    const title = Object.assign(document.createElement("b"), { textContent: name });
    const facts = document.createElement("small");
    const state = document.createElement("span");
    const bar = Object.assign(document.createElement("progress"), { max: 1 });
    bar.setAttribute("aria-hidden", true); // the words beside it say the same
    row.append(title, facts, state, bar);
    this.#list.append(row);
    const parts = { row, facts, state, bar };
    this.#rows.set(name, parts);
    return parts;
  }

  #place() {
    const { left, bottom } = this.#button.getBoundingClientRect();
    const rightmost = innerWidth - this.#list.offsetWidth - EDGE;
    this.#list.style.left = `${Math.max(EDGE, Math.min(left, rightmost))}px`;
    this.#list.style.top = `${bottom + GAP}px`;
  }
}
