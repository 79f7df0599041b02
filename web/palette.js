// The palette: colours of landscapes, as light falls on them.

export const COLORS = [
  ["Day sky", "#8fd0ff"],
  ["Deep sky", "#3f86d6"],
  ["Night sky", "#203060"],
  ["Dawn", "#ffd8c8"],
  ["Sunset", "#ffb070"],
  ["Dusk", "#7a3b63"],
  ["Sun", "#ffdf20"],
  ["Moon", "#f4f4e6"],
  ["Cloud", "#d9dfe8"],
  ["Rock", "#7b8494"],
  ["Snow", "#f2f6fb"],
  ["Sand", "#dfb56c"],
  ["Meadow", "#6fae4a"],
  ["Pine", "#2f6b3a"],
  ["Water", "#2f6f9f"],
  ["Roof", "#b5483a"],
  ["Wood", "#6a4430"],
];

/** Put a radio button for each colour into `fieldset`, before its colour picker. */
export function fill(fieldset) {
  for (const [name, color] of COLORS) {
    const label = Object.assign(document.createElement("label"), { title: name });
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "color", value: color });
    input.setAttribute("aria-label", name);
    label.style.setProperty("--color", color);
    label.append(input);
    fieldset.querySelector(".custom").before(label);
  }
}
