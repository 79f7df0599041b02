// How a program points its client at a server in its own code: the recipes of docs/clients.md, in Node and in pages.

import { adapt } from "./surfaces.mjs";

const HTTP = ["run", "subscribe", "stream", "upload"];

/** The client `name` by `recipe`, and what the recipe redirects. `module` is the client's package, as it was loaded. */
export function follow(recipe, name, module, server) {
  if (recipe === "proxy") {
    const proxyUrl = `${server}/api/fal/proxy`;
    if (name === "v1") module.fal.config({ proxyUrl: { url: proxyUrl, when: "always" } });
    else module.config({ proxyUrl }); // works in pages only
    return [adapt(name, module), HTTP];
  }
  const client = adapt(name, module);
  if (recipe === "as-is") return [client, [...HTTP, "realtime"]]; // something outside the program redirects it
  const here = (url) =>
    url
      .replace("https://queue.fal.run/", `${server}/queue/`)
      .replace(/^https:\/\/rest\.(alpha\.)?fal\.ai\//, `${server}/rest/`)
      .replace("https://fal.run/", `${server}/run/`);
  client.fal.config({
    requestMiddleware: async (request) => ({ ...request, url: here(request.url) }),
    fetch: (url, options) => fetch(here(String(url)), options),
  });
  if (recipe === "middleware") return [client, HTTP];
  const Socket = globalThis.WebSocket;
  globalThis.WebSocket = class WebSocket extends Socket {
    constructor(url, protocols) {
      super(String(url).replace(/^wss:\/\/fal\.run\//, `${server.replace(/^http/, "ws")}/run/`), protocols);
    }
  };
  return [client, [...HTTP, "realtime"]];
}
