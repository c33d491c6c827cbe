/* Asking the server, and the API key that it may want. The key is kept for this tab only, and only if it was accepted. */
"use strict";

const STORED_AS = "foregate.key";

/* The server did not answer at all. */
export class Unreachable extends Error {}

/* It answered, and said no. */
export class Refused extends Error {
  constructor(status, error, retryAfter) {
    super(error.message || `the server answered ${status}`);
    this.status = status;
    this.code = error.code || "";
    this.retryAfter = Number(retryAfter) || 2;
  }
}

export const remembered = (name) => {
  try { return sessionStorage.getItem(name); } catch { return null; }
};

export const remember = (name, value) => {
  try {
    if (value === null) sessionStorage.removeItem(name);
    else sessionStorage.setItem(name, value);
  } catch { /* a browser that keeps nothing: it lasts until the page is left */ }
};

let key = remembered(STORED_AS);

/* Null: none has been needed. */
export const keyInUse = () => key;

export function make(name, { text, className, ...attributes } = {}, ...children) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children);
  return made;
}

/* What it sends, whole, as JSON decodes it; a server that takes longer than `seconds` counts as `Unreachable`. */
export const askForJson = (path, seconds) => ask(path, { seconds, read: (response) => response.json() });

/* A response that is fine, or what `read` makes of it. Throws `Unreachable`, `Refused` or, when `signal` says so, an
   AbortError. A server that wants a key gets the one the user is asked for, who may take any time. */
export async function ask(path, { body, signal, seconds, read } = {}) {
  for (let isAgain = false; ; isAgain = true) {
    const sent = key;
    const headers = body === undefined ? {} : { "Content-Type": "application/json" };
    if (sent) headers.Authorization = `Bearer ${sent}`;
    let response, made;
    try {
      response = await fetch(path, {
        method: body === undefined ? "GET" : "POST", headers, cache: "no-store", credentials: "same-origin",
        signal: seconds ? AbortSignal.timeout(1000 * seconds) : signal,
        body: body === undefined ? undefined : JSON.stringify(body),
      });
      made = response.ok && read ? await read(response) : response;
    } catch (error) {
      if (signal && signal.aborted) throw error;
      throw new Unreachable("the server does not answer");
    }
    if (response.status === 401) {
      if (sent === key) await askForKey(isAgain || Boolean(sent), signal);
      continue;
    }
    if (sent) remember(STORED_AS, sent);
    if (response.ok) return made;
    const told = await response.json().catch(() => ({}));
    throw new Refused(response.status, (told && told.error) || {}, response.headers.get("retry-after"));
  }
}

let asking = null;

/* Resolves when the user has given one. Whoever asks meanwhile waits for the same. */
function askForKey(isWrong, signal) {
  asking ??= new Promise((resolve) => {
    const input = make("input", { type: "password", id: "key", autocomplete: "off", spellcheck: "false", required: "" });
    const why = isWrong ? "That key is not accepted. Try another one." : "This server wants an API key.";
    const form = make("form", {},
      make("h2", { text: "API key", id: "key-title" }),
      make("p", { text: why, role: isWrong ? "alert" : "note", className: isWrong ? "bad" : "" }),
      make("label", { text: "Key", for: "key" }), input,
      make("p", { text: "It is kept in this tab until you close it.", className: "soft" }),
      make("button", { text: "Use it", type: "submit", className: "primary" }));
    const dialog = make("dialog", { className: "key", "aria-labelledby": "key-title" }, form);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      key = input.value.trim();
      remember(STORED_AS, null);
      dialog.remove();
      asking = null;
      resolve();
    });
    dialog.addEventListener("cancel", (event) => event.preventDefault()); // there is nothing to see without one
    document.body.append(dialog);
    dialog.showModal();
  });
  if (!signal) return asking;
  return Promise.race([asking, new Promise((_, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  })]);
}

export const sleep = (seconds, signal) => new Promise((resolve, reject) => {
  if (signal && signal.aborted) return reject(signal.reason);
  const timer = setTimeout(resolve, 1000 * seconds);
  if (signal) signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
});
