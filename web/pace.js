// The pace: when to send. The newest state of the page is sent as soon as the server has room for it, never a state twice.

const SLOW = 500; // ms per picture; above, wait until the hand rests and have one message in flight, so that it is the newest
const QUIET = 250; // ms without a change that count as a rest
const LONGEST_WAIT = 3000; // ms

export class Pace {
  #connection;
  #compose;
  #cost;
  #lastKey = null;
  #answeredKey = null;
  #composing = false;
  #changedAt = 0;
  #waitingSince = 0;
  #timer = 0;

  /**
   * `compose()` says what to send now as { key, note, message }: `key` is the same for the same state, and `message` is a
   * promise; or null when there is nothing to send. `cost()` is what a picture takes, in ms.
   */
  constructor({ connection, compose, cost }) {
    this.#connection = connection;
    this.#compose = compose;
    this.#cost = cost;
    document.addEventListener("visibilitychange", () => this.pump());
  }

  /** Something may look different now. */
  changed() {
    this.#changedAt = performance.now();
    if (this.#connection.state === "resting") this.#connection.open();
    this.pump();
  }

  /** Send the present state again, whether or not it was sent before, unless it was answered. */
  again() {
    this.#lastKey = this.#answeredKey;
    this.pump();
  }

  answered(key) {
    this.#answeredKey = key;
    this.pump();
  }

  async pump() {
    clearTimeout(this.#timer);
    if (this.#composing || document.hidden || !this.#connection.room) return;
    const work = this.#compose();
    if (!work || work.key === this.#lastKey) {
      this.#waitingSince = 0;
      return;
    }
    const now = performance.now();
    this.#waitingSince ||= now;
    if (this.#cost() > SLOW) {
      if (this.#connection.pending) return;
      const wait = Math.min(this.#changedAt + QUIET, this.#waitingSince + LONGEST_WAIT) - now;
      if (wait > 0) {
        this.#timer = setTimeout(() => this.pump(), wait);
        return;
      }
    }
    this.#waitingSince = 0;
    this.#composing = true;
    try {
      const message = await work.message();
      if (this.#connection.room) {
        this.#lastKey = work.key;
        this.#connection.send(message, { key: work.key, ...work.note });
      }
    } finally {
      this.#composing = false;
    }
    this.pump();
  }
}
