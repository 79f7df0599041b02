// The present request as code: what to paste into a terminal or a program to get the picture that is shown.

const APP = "fal-ai/lcm";

/**
 * `request` is the message without its files; `files` names those: { image_bytes: "sketch.jpg", mask_bytes: "mask.png",
 * lora_url: "style.safetensors" }. Bytes of a `_url` go as a data: URI.
 */
export function snippet(language, request, files) {
  return { curl, python, javascript }[language](request, files);
}

function curl(request, files) {
  const { previews, ...fields } = request; // one answer has no room for them
  for (const [field, file] of Object.entries(files)) {
    fields[field.replace("_bytes", "_url")] = `${uriHead(file)}\u0000${file}\u0000`;
  }
  const json = JSON.stringify(fields, null, 2)
    .replace(/[\\$`]/g, "\\$&")
    .replace(/\\\\u0000(.*?)\\\\u0000/g, "$(base64 < $1 | tr -d '\\n')");
  return `curl ${location.origin}/${APP} \\
  -H 'Content-Type: application/json' \\
  -d @- <<JSON
${json}
JSON`;
}

function python(request, files) {
  const fields = Object.entries(request).map(([name, value]) => `        "${name}": ${pythonValue(value)},`);
  for (const [name, file] of Object.entries(files)) {
    const bytes = `Path("${file}").read_bytes()`;
    const value = isUrl(name) ? `"${uriHead(file)}" + b64encode(${bytes}).decode()` : bytes;
    fields.push(`        "${name}": ${value},`);
  }
  const skip = `\n    while answer.get("preview"):  # a picture after each step\n        answer = connection.recv()`;
  return `# pip install fal-client
import os
${Object.keys(files).some(isUrl) ? "from base64 import b64encode\n" : ""}from pathlib import Path

import fal_client
import fal_client.client

os.environ.setdefault("FAL_KEY", "local")
fal_client.client.REALTIME_URL_FORMAT = "${socketOrigin()}/"

with fal_client.realtime("${APP}", use_jwt=False) as connection:
    connection.send({
${fields.join("\n")}
    })
    answer = connection.recv()${request.previews ? skip : ""}

Path("picture.jpg").write_bytes(answer["images"][0]["content"])
`;
}

function javascript(request, files) {
  const fields = Object.entries(request).map(([name, value]) => `  ${name}: ${JSON.stringify(value)},`);
  for (const [name, file] of Object.entries(files)) {
    const value = isUrl(name) ? `\`${uriHead(file)}\${(await bytes("${file}")).toBase64()}\`` : `await bytes("${file}")`;
    fields.push(`  ${name}: ${value},`);
  }
  const loader = Object.keys(files).length
    ? `\nconst bytes = async (url) => new Uint8Array(await (await fetch(url)).arrayBuffer());\n`
    : "";
  return `// npm install @fal-ai/client
import { fal } from "@fal-ai/client";

// The client has no setting for the server, so its socket is pointed here.
const Socket = globalThis.WebSocket;
globalThis.WebSocket = class extends Socket {
  constructor(url, ...rest) {
    super(String(url).replace("wss://fal.run", "${socketOrigin()}"), ...rest);
  }
};
${loader}
const connection = fal.realtime.connect("${APP}", {
  connectionKey: "lcm-rt",
  throttleInterval: 0,
  tokenProvider: async () => "local",
  onResult: ({ images }) => {
    const { content, content_type: type } = images[0];
    document.querySelector("img").src = URL.createObjectURL(new Blob([content], { type }));
  },
  onError: console.error,
});

connection.send({
${fields.join("\n")}
});
`;
}

function isUrl(field) {
  return field.endsWith("_url");
}

function uriHead(file) {
  const type = { png: "image/png", jpg: "image/jpeg" }[file.split(".").at(-1)] ?? "application/octet-stream";
  return `data:${type};base64,`;
}

function socketOrigin() {
  return location.origin.replace(/^http/, "ws");
}

function pythonValue(value) {
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, each]) => `"${name}": ${pythonValue(each)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}
