// The pen: pointer events on the board become strokes, fills and mask marks.

const PEN_FLOOR = 0.05; // of the pressure, so that a hovering tip still leaves a mark

export class Pen {
  #board;
  #sketch;
  #ring;
  #tool; // () => { tool, color, size, add }
  #pointer = null;

  /** `ontouch` is called before the first mark of each touch. */
  constructor(board, ring, sketch, tool, ontouch) {
    this.#board = board;
    this.#ring = ring;
    this.#sketch = sketch;
    this.#tool = tool;
    board.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || this.#pointer !== null) return;
      event.preventDefault();
      document.activeElement?.blur?.();
      ontouch();
      this.#down(event);
    });
    board.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
      board.addEventListener(name, (event) => this.#up(event));
    }
    board.addEventListener("pointerleave", () => {
      if (this.#pointer === null) ring.hidden = true;
    });
    board.addEventListener("contextmenu", (event) => event.preventDefault());
  }

  #down(event) {
    const { tool, color, size, add } = this.#tool();
    const [x, y, pressure] = this.#point(event);
    if (tool === "fill") {
      this.#sketch.fill(x, y, color);
      return;
    }
    this.#pointer = event.pointerId;
    this.#board.setPointerCapture(event.pointerId);
    this.#sketch.begin({
      layer: tool === "mask" ? "mask" : "paint",
      color: tool === "eraser" ? "#ffffff" : color,
      size,
      erase: tool === "mask" && !add,
    });
    this.#sketch.extend([[x, y, pressure]]);
  }

  #move(event) {
    this.showRing(event);
    if (event.pointerId !== this.#pointer) return;
    const events = event.getCoalescedEvents?.() ?? [];
    this.#sketch.extend((events.length ? events : [event]).map((each) => this.#point(each)));
  }

  #up(event) {
    if (event.pointerId !== this.#pointer) return;
    this.#pointer = null;
    this.#sketch.end();
  }

  /** The ring that shows how large the brush is. */
  showRing(event) {
    const { tool, size } = this.#tool();
    const bounds = this.#board.getBoundingClientRect();
    const diameter = Math.max(4, size * bounds.width);
    this.#ring.hidden = event.pointerType === "touch" || tool === "fill";
    this.#ring.style.width = this.#ring.style.height = `${diameter}px`;
    this.#ring.style.transform =
      `translate(${event.clientX - bounds.left - diameter / 2}px, ${event.clientY - bounds.top - diameter / 2}px)`;
  }

  #point(event) {
    const bounds = this.#board.getBoundingClientRect();
    const pressure = event.pointerType === "pen" ? Math.max(PEN_FLOOR, event.pressure) : 1;
    return [(event.clientX - bounds.left) / bounds.width, (event.clientY - bounds.top) / bounds.height, pressure];
  }
}
