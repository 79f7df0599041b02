// The drawing that draws itself on the first visit: a sunset over a lake. The paper is coloured at once; the rest follows
// by hand as soon as there is somebody to answer, and stops at the first touch.

const SIDES_PER_SECOND = 3.2; // sides of the canvas that the pen travels each second

/** A level sweep, back and forth, from height `top` to height `bottom`. */
function band(color, top, bottom, size) {
  const points = [];
  const rows = Math.max(1, Math.ceil((bottom - top) / (size * 0.55)));
  for (let row = 0; row <= rows; row += 1) {
    const y = top + ((bottom - top) * row) / rows;
    for (let i = 0; i <= 8; i += 1) {
      const x = row % 2 ? 1.02 - (i / 8) * 1.04 : -0.02 + (i / 8) * 1.04;
      points.push([x, y + 0.006 * Math.sin(9 * x + row), 1]);
    }
  }
  return { color, size, points };
}

/** A ridge along `peaks`, a list of [x, y], and the hatching below it down to `foot`. */
function ridge(color, peaks, foot) {
  const size = 0.042;
  const edge = 0.018;
  const points = [];
  let down = true;
  for (let x = peaks[0][0]; x <= peaks.at(-1)[0]; x += size * 0.55, down = !down) {
    const next = Math.max(1, peaks.findIndex(([peak]) => peak >= x));
    const [x0, y0] = peaks[next - 1];
    const [x1, y1] = peaks[next];
    const slope = (y1 - y0) / (x1 - x0);
    const top = Math.min(foot, y0 + slope * (x - x0) + ((size - edge) / 2) * Math.hypot(1, slope));
    const ends = down ? [top, foot - size / 2] : [foot - size / 2, top];
    points.push([x, ends[0], 1], [x, ends[0], 1], [x, ends[1], 1], [x, ends[1], 1]);
  }
  return [
    { color, size: edge, points: peaks.flatMap(([x, y]) => [[x, y, 1], [x, y, 1]]) },
    { color, size, points },
  ];
}

/** A spiral: once around, then inwards. */
function disc(color, x, y, radius) {
  const points = [];
  for (let i = 0; i <= 30; i += 1) {
    const turn = (i / 30) * 5 * Math.PI;
    const away = radius * 0.5 * Math.min(1, 1.9 * (1 - i / 30));
    points.push([x + away * Math.cos(turn), y + away * Math.sin(turn), 1]);
  }
  return { color, size: radius, points };
}

function dash(color, x, y, length, size) {
  return { color, size, points: [[x - length / 2, y, 1], [x, y + 0.003, 1], [x + length / 2, y, 1]] };
}

const AT_ONCE = [band("#f6a873", 0.04, 0.52, 0.16), band("#7d6448", 0.64, 1, 0.14)];

const BY_HAND = [
  band("#fcc48f", 0.46, 0.53, 0.06),
  disc("#ffe066", 0.62, 0.25, 0.075),
  ...ridge("#8f7484", [[-0.03, 0.42], [0.07, 0.36], [0.12, 0.38], [0.23, 0.27], [0.34, 0.4], [0.41, 0.36], [0.53, 0.47], [0.66, 0.53]], 0.58),
  ...ridge("#6f5c74", [[0.48, 0.55], [0.63, 0.45], [0.68, 0.46], [0.79, 0.32], [0.88, 0.41], [0.93, 0.38], [1.03, 0.44]], 0.58),
  band("#66703f", 0.58, 0.62, 0.05),
  band("#8f5f7c", 0.68, 0.84, 0.08),
  dash("#f9cf92", 0.62, 0.665, 0.16, 0.018),
  dash("#f9cf92", 0.63, 0.7, 0.11, 0.016),
  dash("#f9cf92", 0.61, 0.735, 0.13, 0.016),
  dash("#f9cf92", 0.62, 0.775, 0.07, 0.016),
  band("#4d5a35", 0.93, 1.01, 0.1),
];

export class Example {
  #sketch;
  #frame = 0;
  #going = false;
  #visible = () => this.#resume();
  #left = [];
  #points = [];
  #then = 0;

  constructor(sketch) {
    this.#sketch = sketch;
  }

  get running() {
    return this.#left.length > 0 || this.#points.length > 0;
  }

  start() {
    for (const mark of AT_ONCE) this.#draw(mark);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
      for (const mark of BY_HAND) this.#draw(mark);
    } else {
      this.#left = [...BY_HAND];
    }
  }

  /** Take up the pen; again is harmless. */
  go() {
    if (!this.running || this.#going) return;
    this.#going = true;
    document.addEventListener("visibilitychange", this.#visible);
    this.#resume();
  }

  /** Leave the drawing as it is: somebody else has the pen. */
  stop() {
    if (!this.running) return;
    this.#left = [];
    this.#points = [];
    this.#sketch.end();
    this.#rest();
  }

  #draw({ color, size, points }) {
    this.#sketch.begin({ layer: "paint", color, size });
    this.#sketch.extend(points);
    this.#sketch.end();
  }

  #resume() {
    cancelAnimationFrame(this.#frame);
    if (document.hidden || !this.running) return;
    this.#then = performance.now();
    this.#frame = requestAnimationFrame((now) => this.#step(now));
  }

  #rest() {
    cancelAnimationFrame(this.#frame);
    document.removeEventListener("visibilitychange", this.#visible);
  }

  #step(now) {
    let travel = (SIDES_PER_SECOND * Math.min(100, Math.max(0, now - this.#then))) / 1000;
    this.#then = now;
    while (travel > 0 && this.running) {
      if (!this.#points.length) {
        const { color, size, points } = this.#left.shift();
        this.#sketch.begin({ layer: "paint", color, size });
        this.#points = finely(points);
      }
      const some = this.#points.splice(0, Math.max(1, Math.round(travel / 0.02)));
      this.#sketch.extend(some);
      travel -= some.length * 0.02;
      if (!this.#points.length) this.#sketch.end();
    }
    if (this.running) this.#frame = requestAnimationFrame((then) => this.#step(then));
    else this.#rest();
  }
}

/** The same path with a point every 0.02. */
function finely(points) {
  const fine = [points[0]];
  for (let i = 1; i < points.length; i += 1) {
    const [x0, y0] = points[i - 1];
    const [x1, y1, pressure] = points[i];
    const steps = Math.max(1, Math.ceil(Math.hypot(x1 - x0, y1 - y0) / 0.02));
    for (let step = 1; step <= steps; step += 1) {
      fine.push([x0 + ((x1 - x0) * step) / steps, y0 + ((y1 - y0) * step) / steps, pressure]);
    }
  }
  return fine;
}
