// Sends what the hosted platform's JavaScript clients send to a server of your own: load it before them, change nothing else.
//   a page     <script src="http://localhost:8000/fal-local.js"></script>, or import "http://localhost:8000/fal-local.js";
//   Node       FAL_LOCAL=http://localhost:8000 node --require ./fal-local.cjs app.js
// It is neither an ES module nor a CommonJS one, so it loads as either. Those clients have no setting for another address:
// they use the globals fetch, which some take once as they load, and WebSocket. Other addresses go where they went.

(() => {
  const server = (globalThis.process?.env?.FAL_LOCAL || "http://localhost:8000").replace(/\/+$/, "");

  const SERVICES = {
    "fal.run": "/run",
    "falrun.com": "/run",
    "queue.fal.run": "/queue",
    "queue.falrun.com": "/queue",
    "ws.fal.run": "/ws",
    "rest.fal.ai": "/rest",
    "rest.alpha.fal.ai": "/rest",
    "v3.fal.media": "/cdn",
    "fal.media": "/cdn",
  };
  const GATEWAY = ".gateway.alpha.fal.ai"; // the oldest client: an application is a host

  /** The path here of what the platform has at `path` of `host`; undefined where the host is none of the platform's. */
  const pathHere = (host, path) => {
    if (Object.hasOwn(SERVICES, host)) return SERVICES[host] + path;
    if (!host.endsWith(GATEWAY)) return undefined;
    const app = host.slice(0, -GATEWAY.length);
    const [, job, what] = path.match(/^\/fal\/queue\/requests\/([^/]+)\/(status|cancel|response)\/?$/) ?? [];
    if (job) return `/queue/${app}/requests/${job}${what === "response" ? "" : `/${what}`}`;
    const submit = "/fal/queue/submit";
    return path.startsWith(submit) ? `/queue/${app}${path.slice(submit.length)}` : `/run/${app}${path}`;
  };

  /** Where `address` lies on our server; undefined if it is none of the platform's. */
  const here = (address) => {
    let url;
    try {
      url = new URL(address);
    } catch {
      return undefined; // relative: the page's own
    }
    const path = /^(https|wss):$/.test(url.protocol) ? pathHere(url.hostname, url.pathname) : undefined;
    if (path === undefined) return undefined;
    return (url.protocol === "wss:" ? server.replace(/^http/, "ws") : server) + path + url.search;
  };

  const fetchAnywhere = globalThis.fetch;
  globalThis.fetch = async function fetch(resource, options) {
    const isRequest = resource instanceof Request;
    const address = here(isRequest ? resource.url : resource);
    if (address === undefined) return fetchAnywhere(resource, options);
    if (!isRequest) return fetchAnywhere(address, options);
    const { method, headers, signal } = resource;
    const body = ["GET", "HEAD"].includes(method) ? undefined : await resource.arrayBuffer();
    return fetchAnywhere(address, { method, headers, signal, body, ...options });
  };

  /** Node has a WebSocket of its own from version 22 on; before that, the package ws has one. */
  const findWebSocket = () => {
    if (globalThis.WebSocket) return globalThis.WebSocket;
    const { createRequire } = process.getBuiltinModule("module");
    for (const folder of [process.cwd(), process.argv[1] ?? "."]) {
      try {
        return createRequire(`${folder}/`)("ws").WebSocket;
      } catch {
        // not there; perhaps beside the program
      }
    }
    return class {
      constructor() {
        throw new Error("this Node has no WebSocket: npm install ws, or start it with --experimental-websocket");
      }
    };
  };
  globalThis.WebSocket = class WebSocket extends findWebSocket() {
    constructor(address, protocols) {
      super(here(address) ?? address, protocols);
    }
  };
})();
