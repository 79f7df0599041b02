// The status, in plain words: a pill that is always there, and a notice over the result when there is trouble.

const TROUBLE = {
  invalid_input: (reason) => `The server did not accept a setting. ${reason}`,
  image_load_error: (reason) => `The server could not read the drawing. ${reason}`,
  overloaded: () => "The server has more to do than it takes on. Trying again.",
  rate_limited: () => "The server limits how often you may ask. Trying again.",
  engine_lost: () => "The engine stopped and is starting again. Your drawing is safe.",
  unavailable: () => "No engine can answer just now. Trying again.",
  out_of_memory: () => "The device has no memory left for this picture. Trying again.",
  generation_failed: () => "This picture could not be made. Change anything to try again.",
  unreadable: () => "An answer of the server could not be read. Change anything to try again.",
};

const LONG = 700; // ms, after which a picture is worth a word

/** { tone, pill, notice, progress } for the present state of things. */
export function describe({ connection, model, trouble, meter, showing }) {
  if (connection.state === "refused") {
    return { tone: "bad", pill: "not allowed", notice: "This server asks for a key, and this page has none to show." };
  }
  if (connection.state === "waiting" || (connection.state === "connecting" && connection.retries > 0)) {
    const notice = connection.retries > 2 ? "The server does not answer. Trying again; your drawing is safe." : "";
    return { tone: "busy", pill: "reconnecting", notice };
  }
  if (model?.state === "failed") {
    const why = model.error ?? model.reason ?? "The server's log says why.";
    return { tone: "bad", pill: "model failed", notice: `The model could not be loaded. ${why}` };
  }
  if (model && model.state !== "ready") {
    const percent = model.progress > 0 ? ` ${Math.round(100 * model.progress)} %` : "";
    const stage = model.stage ? `: ${model.stage}` : "";
    return {
      tone: "busy",
      pill: `loading model${percent}`,
      notice: `Loading the model${stage}. You can draw meanwhile.`,
      progress: model.progress ?? 0,
    };
  }
  if (trouble?.code === "model_loading") return { tone: "busy", pill: "loading model", notice: "" };
  if (trouble) {
    const words = TROUBLE[trouble.code] ?? (() => "Something went wrong in the server; its log says what.");
    const full = trouble.code === "overloaded" || trouble.code === "rate_limited";
    return { tone: full ? "busy" : "bad", pill: full ? "server full" : "server error", notice: words(trouble.reason) };
  }
  if (connection.state === "connecting") return { tone: "busy", pill: "connecting", notice: "" };
  const latency = meter.p50 ? ` · ${duration(meter.p50)}` : "";
  if (connection.pending > LONG && !(meter.fps > 0)) return { tone: "busy", pill: `painting${latency}`, notice: "" };
  if (meter.moving) {
    const fps = meter.fps < 9.95 ? meter.fps.toFixed(1) : Math.round(meter.fps);
    return { tone: "live", pill: `live${meter.fps ? ` · ${fps} fps` : ""}${latency}`, notice: "" };
  }
  return { tone: "live", pill: showing ? `ready${latency}` : "ready", notice: "" };
}

export function duration(ms) {
  return ms < 950 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}
