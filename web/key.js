// The API key, for a server that asks for one: kept in this browser, shown to that server only, for short-lived tokens.

const PLACE = "lcm-rt key";
const LIFETIME = 120; // s, of a token; an open socket outlives it

let key = "";
try {
  key = localStorage.getItem(PLACE) ?? "";
} catch {
  // Without storage it is asked for at each visit.
}

/** Use another key from here on; an empty one forgets it. */
export function setKey(value) {
  key = value.trim();
  try {
    if (key) localStorage.setItem(PLACE, key);
    else localStorage.removeItem(PLACE);
  } catch {
    // As above.
  }
}

export const hasKey = () => Boolean(key);

/** The headers of a request that may need a key. */
export const keyHeaders = () => (key ? { Authorization: `Key ${key}` } : {});

/** What a socket's address needs besides: a socket has no headers, so it shows a token. Without a key, nothing. */
export async function tokenQuery() {
  if (!key) return "";
  const asked = await fetch("/tokens/", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...keyHeaders() },
    body: JSON.stringify({ allowed_apps: ["lcm"], token_expiration: LIFETIME }),
  });
  return asked.ok ? `&fal_jwt_token=${encodeURIComponent(await asked.json())}` : "";
}
