// Points an unmodified @fal-ai/client at a server of yours: LCM_RT_URL=http://localhost:8000 node --import ./redirect.mjs app.mjs
// The client has no setting for it: it builds https://fal.run/... and wss://fal.run/... and looks both globals up when it calls.

import { WebSocket } from "ws"; // Node has a global one from version 22 on; both work

const http = process.env.LCM_RT_URL.replace(/\/$/, "");
const ws = http.replace(/^http/, "ws");

const fetchAnywhere = globalThis.fetch;
globalThis.fetch = (url, options) =>
  fetchAnywhere(typeof url === "string" ? url.replace(/^https:\/\/fal\.run/, http) : url, options);

globalThis.WebSocket = class extends WebSocket {
  constructor(url) {
    super(String(url).replace(/^wss:\/\/fal\.run/, ws));
  }
};
