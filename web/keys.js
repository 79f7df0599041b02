// The keyboard: single keys for the tools, when nobody is typing.

/** `actions` maps a key, such as "b" or "ctrl+z", to what it does. */
export function bindKeys(actions) {
  addEventListener("keydown", (event) => {
    if (event.altKey || document.querySelector("dialog[open]") || event.target.matches?.("input[type=text], textarea")) return;
    const control = event.ctrlKey || event.metaKey;
    const name = `${control ? "ctrl+" : ""}${control && event.shiftKey ? "shift+" : ""}${event.key.toLowerCase()}`;
    if (!Object.hasOwn(actions, name)) return;
    event.preventDefault();
    actions[name]();
  });
}
