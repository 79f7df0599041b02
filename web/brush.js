// Marks on a canvas: the one place that knows how a mark becomes pixels.
//
// A mark is plain data in units of the canvas's side, so a drawing looks the same at any resolution and can be stored:
//   { kind: "stroke", layer, color, size, erase, points: [x, y, pressure, ...] }
//   { kind: "fill",   layer, color, x, y }
//   { kind: "image",  layer, picture: Blob }      with `bitmap` while it is in memory
//   { kind: "clear",  layer }                     layer "both" clears the drawing and the mask

export const PAPER = "#ffffff";
const FILL_TOLERANCE = 40; // per channel; bridges the soft edge of a stroke

/** A stroke that is being drawn; fed point by point, live as well as when it is drawn again. */
export class Stroke {
  #context;
  #mark;
  #x = 0;
  #y = 0;
  #middleX = 0;
  #middleY = 0;
  #started = false;

  constructor(context, mark) {
    this.#context = context;
    this.#mark = mark;
  }

  add(x, y, pressure) {
    const context = this.#context;
    const side = context.canvas.width;
    x *= side;
    y *= side;
    context.save();
    context.globalCompositeOperation = this.#mark.erase ? "destination-out" : "source-over";
    context.strokeStyle = context.fillStyle = this.#mark.color;
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = Math.max(1, this.#mark.size * side * (0.25 + 0.75 * pressure));
    context.beginPath();
    if (this.#started) {
      const middleX = (this.#x + x) / 2;
      const middleY = (this.#y + y) / 2;
      context.moveTo(this.#middleX, this.#middleY);
      context.quadraticCurveTo(this.#x, this.#y, middleX, middleY);
      context.stroke();
      this.#middleX = middleX;
      this.#middleY = middleY;
    } else {
      context.arc(x, y, context.lineWidth / 2, 0, 2 * Math.PI);
      context.fill();
      this.#middleX = x;
      this.#middleY = y;
      this.#started = true;
    }
    context.restore();
    this.#x = x;
    this.#y = y;
  }
}

export function paint(context, mark) {
  const side = context.canvas.width;
  if (mark.kind === "stroke") {
    const stroke = new Stroke(context, mark);
    for (let i = 0; i < mark.points.length; i += 3) stroke.add(mark.points[i], mark.points[i + 1], mark.points[i + 2]);
  } else if (mark.kind === "fill") {
    flood(context, Math.floor(mark.x * side), Math.floor(mark.y * side), mark.color);
  } else if (mark.kind === "image" && mark.bitmap) {
    context.drawImage(mark.bitmap, 0, 0, side, side);
  }
}

/** Fill the region around (x, y) whose colour is close to the colour there. */
function flood(context, x, y, color) {
  const { width, height } = context.canvas;
  if (x < 0 || y < 0 || x >= width || y >= height) return;
  const image = context.getImageData(0, 0, width, height);
  const bytes = image.data;
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
  const start = 4 * (y * width + x);
  const [red0, green0, blue0, alpha0] = bytes.subarray(start, start + 4);
  const seen = new Uint8Array(width * height);
  const open = (at) =>
    !seen[at] &&
    Math.abs(bytes[4 * at] - red0) <= FILL_TOLERANCE &&
    Math.abs(bytes[4 * at + 1] - green0) <= FILL_TOLERANCE &&
    Math.abs(bytes[4 * at + 2] - blue0) <= FILL_TOLERANCE &&
    Math.abs(bytes[4 * at + 3] - alpha0) <= FILL_TOLERANCE;
  const stack = [y * width + x];
  while (stack.length) {
    let at = stack.pop();
    if (!open(at)) continue;
    const row = Math.floor(at / width) * width;
    while (at > row && open(at - 1)) at -= 1;
    for (let above = false, below = false; at < row + width && open(at); at += 1) {
      seen[at] = 1;
      if (at >= width && open(at - width) !== above) {
        above = !above;
        if (above) stack.push(at - width);
      }
      if (at < width * (height - 1) && open(at + width) !== below) {
        below = !below;
        if (below) stack.push(at + width);
      }
    }
  }
  for (let at = 0; at < seen.length; at += 1) {
    if (!seen[at]) continue;
    bytes[4 * at] = red;
    bytes[4 * at + 1] = green;
    bytes[4 * at + 2] = blue;
    bytes[4 * at + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}
