// The realtime connection: one socket, its messages and answers, and how it comes back after a loss.

import { decode, encode } from "./vendor/msgpack.js";

const FIRST_RETRY = 400; // ms
const LAST_RETRY = 10_000; // ms
const PATIENCE = 60_000; // ms without an answer, after which the socket counts as lost
const WINDOW = 2; // messages in flight

export class Connection {
  #url;
  #on;
  #socket = null;
  #opening = false;
  #retries = 0;
  #timer = 0;
  #watchdog = 0;
  #inFlight = new Map(); // number of the message -> { sent, note }
  #number = 0;
  #state = "connecting";
  #heard = 0; // when the last preview came
  #loading = false; // the server said that its model is on its way in, and has not answered since

  /**
   * `url` gives a promise of the address, asked for each time that the socket is opened. `on` holds the callbacks: `state()`, `open()`, `preview(preview, number)`,
   * `answer(answer, { number, note, latency, depth })` and `error({ code, reason, detail }, note)`. A note is whatever
   * `send` was given with the message; `latency` is in ms, or null when the message had to wait for the model; `depth` is
   * how many were in flight with the message; `detail` lists the fields in question as [{ loc, msg }].
   */
  constructor(url, on) {
    this.#url = url;
    this.#on = on;
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden && this.#state === "waiting") this.open();
    });
    addEventListener("online", () => this.#state === "waiting" && this.open());
  }

  /** "connecting", "open", "waiting" for the next try, "resting" until it is needed, or "refused". */
  get state() {
    return this.#state;
  }

  get retries() {
    return this.#retries;
  }

  get room() {
    return this.#state === "open" && this.#inFlight.size < WINDOW;
  }

  /** For how many ms the oldest message has been waiting for its answer; 0 when none is. */
  get pending() {
    const [oldest] = this.#inFlight.values();
    return oldest ? performance.now() - oldest.sent : 0;
  }

  async open() {
    if (this.#socket || this.#opening) return;
    clearTimeout(this.#timer);
    this.#become("connecting");
    this.#opening = true;
    let url;
    try {
      url = await this.#url();
    } catch {
      this.#wait(); // the server is away
      return;
    } finally {
      this.#opening = false;
    }
    const socket = new WebSocket(url);
    this.#socket = socket;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      this.#become("open");
      this.#on.open();
    };
    socket.onmessage = ({ data }) => this.#receive(data);
    socket.onclose = ({ code, reason }) => this.#lost(socket, code, reason);
  }

  /** Send one message; call only while there is `room`. */
  send(message, note) {
    const number = (this.#number += 1);
    this.#inFlight.set(number, { sent: performance.now(), depth: this.#inFlight.size + 1, note });
    this.#socket.send(encode({ ...message, request_id: String(number) }));
    if (!this.#watchdog) this.#watch();
    this.#on.state();
  }

  #receive(data) {
    let answer;
    try {
      answer = typeof data === "string" ? JSON.parse(data) : decode(new Uint8Array(data));
    } catch {
      this.#on.error({ code: "unreadable", reason: "an answer could not be read", detail: [] }, this.#settle(null)?.note);
      return;
    }
    if (answer?.type === "x-fal-error") {
      if (answer.error === "TIMEOUT") {
        this.#become("resting");
        return;
      }
      const { error: code, reason = "", detail = [] } = answer;
      this.#on.error({ code, reason, detail }, this.#settle(answer.request_id)?.note);
    } else if (answer?.type === "x-fal-message") {
      if (answer.action === "loading") this.#loading = true;
    } else if (answer?.status === "error") {
      this.#become("refused");
    } else if (answer?.preview) {
      this.#heard = performance.now();
      const number = Number(answer.request_id);
      if (this.#inFlight.has(number)) this.#on.preview(answer, number);
    } else if (answer?.images?.length) {
      this.#retries = 0;
      const known = this.#settle(answer.request_id);
      if (known && this.#loading) known.latency = null;
      this.#loading = false;
      if (known) this.#on.answer(answer, known);
    }
  }

  /** Answers come in order, so one settles its own message and all before it. */
  #settle(id) {
    const number = id ? Number(id) : this.#inFlight.keys().next().value;
    const entry = this.#inFlight.get(number);
    for (const older of this.#inFlight.keys()) if (older <= number) this.#inFlight.delete(older);
    return entry && { number, note: entry.note, latency: performance.now() - entry.sent, depth: entry.depth };
  }

  #lost(socket, code, reason) {
    if (socket !== this.#socket) return;
    this.#socket = null;
    this.#loading = false;
    this.#inFlight.clear();
    clearTimeout(this.#watchdog);
    this.#watchdog = 0;
    if (this.#state === "refused") return;
    if (this.#state === "resting" || (code === 1000 && /timeout/i.test(reason))) {
      this.#become("resting");
      return;
    }
    this.#wait();
  }

  #wait() {
    const longest = Math.min(LAST_RETRY, FIRST_RETRY * 2 ** this.#retries);
    const wait = longest * (0.5 + Math.random() / 2);
    this.#retries += 1;
    this.#timer = setTimeout(() => document.hidden || this.open(), wait);
    this.#become("waiting");
  }

  #watch() {
    const [oldest] = this.#inFlight.values();
    const left = oldest ? Math.max(oldest.sent, this.#heard) + PATIENCE - performance.now() : 0;
    this.#watchdog = oldest ? setTimeout(() => this.#watch(), left > 0 ? left : PATIENCE) : 0;
    if (oldest && left <= 0 && !this.#loading) {
      const socket = this.#socket;
      socket.close();
      this.#lost(socket, 1006, "");
    }
  }

  #become(state) {
    this.#state = state;
    this.#on.state();
  }
}
