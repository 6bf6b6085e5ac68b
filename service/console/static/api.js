// The public API, and nothing else: every call of the console goes through here.
//
// The token lives in this module's memory: not in a cookie, a storage or a URL. Closing the page forgets it.

let token = null;
let waiting = null; // one sign-in for all calls that were refused meanwhile

export const signals = new EventTarget();
const tell = (name, detail) => signals.dispatchEvent(new CustomEvent(name, { detail }));

/** What the service answered instead of what was asked for (RFC 9457), or that it did not answer. */
export class Problem extends Error {
  constructor(document, status) {
    super(document.detail ?? document.title ?? "The service gave no reason.");
    Object.assign(this, document);
    this.status = status;
    this.title = document.title ?? "Something went wrong";
  }
}

export const signedIn = () => token !== null;
export function signOut() { token = null; tell("signed-out"); }
export function setToken(value) { token = value; tell("signed-in"); }
export const isAbort = (error) => error?.name === "AbortError";

const authorization = () => (token === null ? {} : { Authorization: `Bearer ${token}` });

/** The protocols that a WebSocket offers: a browser cannot set its headers, so the token is one of them. */
export const socketProtocols = () => ["subpage.introspection.v1", ...(token === null ? [] : [`subpage.bearer.${token}`])];

async function refusal(response) {
  const text = await response.text();
  let document = { title: response.statusText || "Refused", detail: text.slice(0, 500) };
  try { document = JSON.parse(text); } catch { /* not ours: a proxy's page */ }
  return new Problem(document, response.status);
}

async function reply(path, options) {
  const { query, json, headers = {}, ...rest } = options;
  const url = query ? `${path}${path.includes("?") ? "&" : "?"}${new URLSearchParams(Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== ""))}` : path;
  if (json !== undefined) {
    rest.body = JSON.stringify(json);
    headers["Content-Type"] = "application/json";
  }
  for (let attempt = 0; ; attempt++) {
    let response;
    try {
      response = await fetch(url, { ...rest, headers: { ...headers, ...authorization() }, credentials: "omit", cache: "no-cache" });
    } catch (error) {
      if (isAbort(error)) throw error;
      tell("unreachable");
      throw new Problem({ title: "The service does not answer", detail: "It may be restarting, or the connection is gone. Nothing on this page is lost.", code: "unreachable" }, 0);
    }
    tell("reachable");
    if (response.status === 401 && attempt < 3) {
      await askForToken(token !== null);
      continue;
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

async function askForToken(refused) {
  token = null;
  waiting ??= new Promise((resolve) => tell("sign-in", { refused, done: resolve })).finally(() => { waiting = null; });
  await waiting;
}

export async function call(method, path, options = {}) {
  const response = await reply(path, { method, ...options });
  if (response.status === 204) return null;
  return response.json();
}
export const get = (path, options) => call("GET", path, options);

export async function octets(path, options = {}) {
  const response = await reply(path, { ...options, headers: { Accept: "application/octet-stream" } });
  return response.arrayBuffer();
}

export async function text(path, options = {}) {
  return (await reply(path, options)).text();
}

/** All pages of a list; `each` is called with every page as it comes. */
export async function pages(path, name, each, options = {}) {
  for (let url = path; url; ) {
    const page = await get(url, options);
    each(page[name], page);
    url = page.next;
    options = { signal: options.signal };
  }
}

async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The lines of an NDJSON reply, in batches as they arrive. */
export async function* lines(path, options = {}) {
  const response = await reply(path, { ...options, headers: { Accept: "application/x-ndjson" } });
  let rest = "";
  for await (const piece of chunks(response)) {
    const found = (rest + piece).split("\n");
    rest = found.pop();
    if (found.length) yield found.filter(Boolean);
  }
  if (rest.trim()) yield [rest];
}

/** Server-Sent Events. An EventSource could not send the token, so the stream is read as text. */
export async function* events(path, options = {}) {
  const response = await reply(path, { ...options, headers: { Accept: "text/event-stream", ...(options.after ? { "Last-Event-ID": options.after } : {}) } });
  let rest = "";
  for await (const piece of chunks(response)) {
    const found = (rest + piece).split("\n\n");
    rest = found.pop();
    for (const block of found) {
      const event = { id: null, kind: "message", data: "" };
      for (const line of block.split("\n")) {
        if (line.startsWith("id:")) event.id = line.slice(3).trim();
        else if (line.startsWith("event:")) event.kind = line.slice(6).trim();
        else if (line.startsWith("data:")) event.data += line.slice(5).trim();
      }
      yield event;
    }
  }
}

/** Send a body with its progress. `fetch` does not tell how much has gone; XMLHttpRequest does. */
export function upload(path, body, { headers = {}, signal, progress } = {}) {
  const once = () => new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    for (const [name, value] of Object.entries({ ...headers, ...authorization() })) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => progress?.(event.loaded, event.total);
    request.onload = () => {
      let document = { title: request.statusText || "Refused", detail: request.responseText.slice(0, 500) };
      try { document = JSON.parse(request.responseText); } catch { /* a proxy's page */ }
      if (request.status >= 400) reject(new Problem(document, request.status));
      else resolve({ status: request.status, document });
    };
    request.onerror = () => { tell("unreachable"); reject(new Problem({ title: "The connection broke off", detail: "The service did not take the whole file. The machine is as it was; send it again.", code: "unreachable" }, 0)); };
    request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    signal?.addEventListener("abort", () => request.abort(), { once: true });
    request.send(body);
  });
  return once().catch(async (error) => {
    if (error.status !== 401) throw error;
    await askForToken(token !== null);
    return once();
  });
}
