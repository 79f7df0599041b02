// The drawing and its mask: a list of marks, a cursor in it for undo, and the two canvases that show it.

import { PAPER, Stroke, paint } from "./brush.js";

export const MASK_COLOR = "#ff3d6e";
const SIDE = 512; // pixels of the canvases, at least; what is sent is scaled to the model's own size
const CHECKPOINT_EVERY = 16; // marks
const CHECKPOINTS = 8; // kept; one is 2 MiB at 512 px

export class Sketch {
  #layers; // { paint, mask }: 2D contexts
  #marks = [];
  #cursor = 0;
  #checkpoints = []; // { at, layers }, oldest first
  #stroke = null;
  #mark = null;
  #masked = false;
  #version = 0;
  #onchange;

  /** `onchange(finished)` is called for every visible change; `finished` is false while a stroke is under way. */
  constructor(paintCanvas, maskCanvas, onchange) {
    this.#layers = { paint: readable(paintCanvas), mask: readable(maskCanvas) };
    this.#onchange = onchange;
    this.#resize(SIDE);
  }

  /** Grows with each visible change. */
  get version() {
    return this.#version;
  }

  /** Whether the mask has any pixel. */
  get masked() {
    return this.#masked;
  }

  get canUndo() {
    return this.#cursor > 0;
  }

  get canRedo() {
    return this.#cursor < this.#marks.length;
  }

  get drawing() {
    return this.#stroke !== null;
  }

  /** Whether nothing is drawn since the paper was clean; a mask alone is no drawing. */
  get blank() {
    if (this.#mark?.layer === "paint") return false;
    for (let i = this.#cursor - 1; i >= 0; i -= 1) {
      const { kind, layer } = this.#marks[i];
      if (layer !== "mask") return kind === "clear";
    }
    return true;
  }

  begin({ layer, color, size, erase = false }) {
    this.end();
    this.#mark = { kind: "stroke", layer, color: layer === "mask" ? MASK_COLOR : color, size, erase, points: [] };
    this.#stroke = new Stroke(this.#layers[layer], this.#mark);
  }

  /** `points` is a list of [x, y, pressure], each from 0 to 1. */
  extend(points) {
    if (!this.#stroke) return;
    for (const point of points) {
      const [x, y, pressure] = point.map(Math.fround); // as they are stored, so that a redrawn stroke is the same
      this.#mark.points.push(x, y, pressure);
      this.#stroke.add(x, y, pressure);
    }
    if (this.#mark.layer === "mask" && !this.#mark.erase) this.#masked = true;
    this.#changed(false);
  }

  end() {
    if (!this.#stroke) return;
    const mark = this.#mark;
    this.#stroke = this.#mark = null;
    if (!mark.points.length) return;
    mark.points = new Float32Array(mark.points);
    this.#keep(mark);
  }

  fill(x, y, color) {
    this.#add({ kind: "fill", layer: "paint", color, x, y });
  }

  clear(layer = "both") {
    this.#add({ kind: "clear", layer });
  }

  /** Put a picture in place of the drawing. */
  async place(picture) {
    const bitmap = await createImageBitmap(picture);
    this.#add({ kind: "image", layer: "paint", picture, bitmap });
  }

  undo() {
    if (this.#stroke) this.end();
    if (this.canUndo) this.#goTo(this.#cursor - 1);
  }

  redo() {
    if (this.canRedo) this.#goTo(this.#cursor + 1);
  }

  /** The marks as plain data, for the store. */
  save() {
    return { marks: this.#marks.map(({ bitmap, ...mark }) => mark), cursor: this.#cursor };
  }

  async load({ marks, cursor }) {
    for (const mark of marks) {
      if (mark.kind === "image") mark.bitmap = await createImageBitmap(mark.picture);
    }
    this.#marks = marks;
    this.#checkpoints = [];
    this.#blank();
    this.#cursor = 0;
    this.#goTo(Math.min(cursor, marks.length));
  }

  /** Draw the sketch onto another context, as large as that is. */
  copyPaint(context) {
    const { width, height } = context.canvas;
    context.imageSmoothingQuality = "high";
    context.globalCompositeOperation = "copy";
    context.drawImage(this.#layers.paint.canvas, 0, 0, width, height);
  }

  /** Draw the mask onto another context: white where the picture is to be filled, black elsewhere. */
  copyMask(context) {
    const { width, height } = context.canvas;
    context.globalCompositeOperation = "copy";
    context.drawImage(this.#layers.mask.canvas, 0, 0, width, height);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
  }

  /** Have at least the resolution that the model paints in. */
  fit(side) {
    const wanted = Math.max(SIDE, side);
    if (wanted === this.#layers.paint.canvas.width) return;
    this.end();
    this.#resize(wanted);
    const cursor = this.#cursor;
    this.#cursor = 0;
    this.#goTo(cursor);
  }

  #resize(side) {
    for (const { canvas } of Object.values(this.#layers)) canvas.width = canvas.height = side;
    this.#checkpoints = [];
    this.#blank();
  }

  #blank() {
    this.#wipe("both");
    this.#masked = false;
  }

  #wipe(layer) {
    const { paint: paper, mask } = this.#layers;
    const side = paper.canvas.width;
    if (layer !== "mask") {
      paper.fillStyle = PAPER;
      paper.fillRect(0, 0, side, side);
    }
    if (layer !== "paint") mask.clearRect(0, 0, side, side);
  }

  #apply(mark) {
    if (mark.kind === "clear") this.#wipe(mark.layer);
    else paint(this.#layers[mark.layer], mark);
  }

  #add(mark) {
    this.end();
    this.#apply(mark);
    this.#keep(mark);
  }

  #keep(mark) {
    this.#marks.length = this.#cursor;
    this.#checkpoints = this.#checkpoints.filter(({ at }) => at <= this.#cursor);
    this.#marks.push(mark);
    this.#cursor += 1;
    if (this.#cursor % CHECKPOINT_EVERY === 0) this.#checkpoint();
    if (mark.layer !== "paint") this.#masked = this.#anyMask();
    this.#changed(true);
  }

  #checkpoint() {
    const layers = {};
    for (const [name, { canvas }] of Object.entries(this.#layers)) {
      layers[name] = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
      layers[name].getContext("2d").drawImage(canvas, 0, 0);
    }
    this.#checkpoints.push({ at: this.#cursor, layers });
    if (this.#checkpoints.length > CHECKPOINTS) this.#checkpoints.shift();
  }

  #goTo(cursor) {
    if (cursor < this.#cursor) {
      const from = this.#checkpoints.findLast(({ at }) => at <= cursor);
      this.#blank();
      this.#cursor = from?.at ?? 0;
      for (const [name, canvas] of Object.entries(from?.layers ?? {})) this.#layers[name].drawImage(canvas, 0, 0);
    }
    for (; this.#cursor < cursor; this.#cursor += 1) this.#apply(this.#marks[this.#cursor]);
    this.#masked = this.#anyMask();
    this.#changed(true);
  }

  #anyMask() {
    const { mask } = this.#layers;
    const { data } = mask.getImageData(0, 0, mask.canvas.width, mask.canvas.height);
    for (let i = 3; i < data.length; i += 4) if (data[i] > 127) return true;
    return false;
  }

  #changed(finished) {
    this.#version += 1;
    this.#onchange(finished);
  }
}

function readable(canvas) {
  return canvas.getContext("2d", { willReadFrequently: true });
}
