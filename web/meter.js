// The meter: pictures per second and latency, from the last few seconds.

const SPAN = 2000; // ms
const KEPT = 60; // latencies
const RECENT = 7; // costs, so that the pace follows soon

export class Meter {
  #shown = []; // times
  #latencies = [];
  #costs = []; // latencies, shared among the messages in flight

  /** One more picture, `latency` ms after its message, which was the `depth`th in flight. */
  add(latency, depth) {
    const now = performance.now();
    this.#shown.push(now);
    this.#shown = this.#shown.filter((time) => time > now - SPAN);
    this.#latencies = [...this.#latencies.slice(1 - KEPT), latency];
    this.#costs = [...this.#costs.slice(1 - RECENT), latency / depth];
  }

  /** Forget the latencies: the work has become another. */
  reset() {
    this.#latencies = [];
    this.#costs = [];
  }

  /** Pictures per second; 0 when there are too few to say. */
  get fps() {
    const recent = this.#shown.filter((time) => time > performance.now() - SPAN);
    return recent.length > 2 ? (1000 * (recent.length - 1)) / (recent.at(-1) - recent[0] || 1) : 0;
  }

  get moving() {
    return this.#shown.length > 0 && this.#shown.at(-1) > performance.now() - SPAN;
  }

  /** Median latency in ms, or 0 before the first picture. */
  get p50() {
    return median(this.#latencies);
  }

  /** What one picture takes, in ms, however many are in flight. */
  get cost() {
    return median(this.#costs);
  }
}

function median(values) {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? 0;
}
