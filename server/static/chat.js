/* The chat page: one conversation, kept in this tab, answered over the same API that every client uses. */
"use strict";
import { Refused, Unreachable, ask, askForJson, make, remember, remembered, sleep } from "./session.js";
import { render } from "./markdown.js";

const at = (id) => document.getElementById(id);
const [log, empty, status, prompt, send, stop] = ["log", "empty", "status", "prompt", "send", "stop"].map(at);
const SETTINGS = { system: "", temperature: "0.7", "max-tokens": "" };
const EXAMPLES = ["What is the capital of France?", "Explain in three sentences why the sky is blue.",
  "Write a Python function that reverses a string."];
const PASSES = { loading: "The model is still loading", overloaded: "The server is busy",
  restarting: "The engine had failed and is being started again" }; // what 503 is worth waiting for
const STORED_AS = "foregate.conversation";

let turns = []; // {role, content, figures, error, reasoning}
let running = null; // the AbortController of the answer that is being written

/* -- what is kept for this tab -- */

function save() {
  remember(STORED_AS, JSON.stringify(turns.filter((turn) => turn.content || turn.error)));
}

function load() {
  for (const [id, value] of Object.entries(SETTINGS)) {
    at(id).value = remembered(`foregate.${id}`) ?? value;
    at(id).addEventListener("input", () => remember(`foregate.${id}`, at(id).value));
  }
  try { turns = JSON.parse(remembered(STORED_AS)) || []; } catch { turns = []; }
  for (const turn of turns) turn.busy = false, show(turn);
}

/* -- one turn on the page -- */

function show(turn) {
  const isUser = turn.role === "user";
  const place = make("article", { className: turn.role, "aria-label": isUser ? "You" : "Answer" });
  const body = make("div", { className: "body" });
  const foot = make("div", { className: "foot" });
  place.append(body, foot);
  log.append(place);
  turn.place = { place, body, foot };
  Object.defineProperty(turn, "place", { enumerable: false });
  update(turn);
}

function update(turn) {
  const { place, body, foot } = turn.place;
  if (turn.role === "user") {
    body.textContent = turn.content;
  } else {
    const hasThought = Boolean(turn.reasoning);
    let answer = body.querySelector(".answer");
    if (!answer) body.append(answer = make("div", { className: "answer" }));
    if (hasThought) {
      let thought = body.querySelector("details");
      if (!thought) body.prepend(thought = make("details", {}, make("summary", { text: "Reasoning" }), make("div")));
      render(thought.lastElementChild, turn.reasoning);
    }
    render(answer, turn.content);
  }
  place.classList.toggle("waiting", turn.role === "assistant" && turn.busy === true && !turn.content);
  foot.replaceChildren();
  if (turn.error) body.querySelector(".error")?.remove(), body.append(make("p", { className: "error", text: turn.error }));
  else body.querySelector(".error")?.remove();
  if (turn.role === "assistant" && !turn.busy) {
    if (turn.figures) foot.append(make("span", { className: "soft figures-line", text: turn.figures }));
    if (turn.content) foot.append(make("button", { text: "Copy", type: "button", className: "quiet copy" }));
    if (turn === turns.at(-1)) foot.append(make("button", { text: "Try again", type: "button", className: "quiet again" }));
  }
}

const isAtEnd = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 80;
const toEnd = () => scrollTo({ top: document.documentElement.scrollHeight });

function refresh() {
  empty.hidden = turns.length > 0;
  stop.hidden = !running;
  send.hidden = Boolean(running);
  at("new").disabled = turns.length === 0;
}

/* -- asking -- */

function request() {
  const messages = [];
  if (at("system").value.trim()) messages.push({ role: "system", content: at("system").value });
  for (const turn of turns) if (turn.content && !turn.busy) messages.push({ role: turn.role, content: turn.content });
  const body = { messages, stream: true, stream_options: { include_usage: true } };
  const temperature = at("temperature").value, most = at("max-tokens").value;
  if (temperature !== "") body.temperature = Number(temperature);
  if (most !== "") body.max_tokens = Number(most);
  return body;
}

/* Events of the stream, as objects. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Unreachable("the connection was lost before the answer was complete");
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue; // a comment keeps the connection open
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice(6));
    }
  }
}

/* A full or loading server is asked again until it has room; the user may stop that. */
async function patientlyAsk(body, signal, sending) {
  for (;;) {
    try {
      sending(); // what it waited before is not the answer's time
      return await ask("v1/chat/completions", { body, signal });
    } catch (error) {
      const what = error instanceof Refused && error.status === 503 && PASSES[error.code];
      if (!what) throw error;
      const seconds = Math.min(30, Math.max(1, error.retryAfter));
      for (let left = Math.round(seconds); left > 0; left -= 1) {
        say(`${what}. Your message is sent again in ${left} s.`);
        await sleep(1, signal);
      }
    }
  }
}

const seconds = (ms) => (ms < 10000 ? (ms / 1000).toFixed(2) : (ms / 1000).toFixed(1)) + " s";
const say = (text) => { if (status.textContent !== text) status.textContent = text; };

async function answer() {
  const turn = { role: "assistant", content: "", busy: true };
  const body = request();
  turns.push(turn);
  const before = turns.at(-3);
  if (before && before.place) update(before); // only the last answer can be tried again
  show(turn);
  running = new AbortController();
  const { signal } = running;
  refresh();
  toEnd();
  say("Waiting for the first token.");
  at("done").textContent = "";
  let sent = 0, first = 0, last = 0, numTokens = 0, isExact = false, finish = "", drawing = 0;
  const draw = () => {
    drawing = 0;
    const follow = isAtEnd();
    update(turn);
    if (follow) toEnd();
  };
  try {
    const response = await patientlyAsk(body, signal, () => { sent = performance.now(); });
    for await (const event of events(response)) {
      if (event.error) throw new Refused(500, event.error);
      if (event.usage) numTokens = event.usage.completion_tokens, isExact = true;
      const choice = event.choices && event.choices[0];
      if (!choice) continue;
      const thought = choice.delta.reasoning ?? choice.delta.reasoning_content;
      if (thought) turn.reasoning = (turn.reasoning || "") + thought;
      if (choice.delta.content) turn.content += choice.delta.content;
      if (thought || choice.delta.content) {
        last = performance.now();
        if (!first) first = last, say("Answering.");
        if (!isExact) numTokens += 1;
      }
      finish = choice.finish_reason || finish;
      drawing ||= requestAnimationFrame(draw);
    }
    if (finish === "length") turn.note = "ended at the limit of tokens";
    say("");
    at("done").textContent = "The answer is complete."; // read out, not shown: one sees it
  } catch (error) {
    if (signal.aborted) turn.note = "stopped", say("Stopped.");
    else turn.error = explain(error), say("");
  }
  cancelAnimationFrame(drawing);
  turn.busy = false;
  const parts = [];
  if (first) parts.push(`first token after ${seconds(first - sent)}`);
  if (numTokens > 1 && last > first) parts.push(`${((numTokens - 1) / ((last - first) / 1000)).toFixed(1)} tokens/s`);
  if (first) parts.push(`${isExact ? "" : "about "}${numTokens} token${numTokens === 1 ? "" : "s"}`);
  if (turn.note) parts.push(turn.note);
  turn.figures = parts.join(", ");
  if (!turn.content && !turn.error && !turn.note) turn.error = "The model answered with nothing.";
  running = null;
  draw();
  refresh();
  save();
}

function explain(error) {
  if (error instanceof Unreachable) return `Cannot reach the server: ${error.message}. Is it running?`;
  if (error.code === "context_length_exceeded") {
    return `${error.message} Begin a new conversation, or allow fewer tokens in the settings.`;
  }
  if (error instanceof Refused) return `${error.message[0].toUpperCase()}${error.message.slice(1)}.`.replace(/\.\.$/, ".");
  console.warn(error);
  return `Something went wrong on this page: ${error.message}`;
}

function submit() {
  const text = prompt.value.trim();
  if (!text || running) return;
  turns.push({ role: "user", content: text });
  show(turns.at(-1));
  save();
  prompt.value = "";
  grow();
  answer();
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight + 2, 200)}px`;
}

async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

/* -- what the user does -- */

at("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
prompt.addEventListener("input", grow);
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
stop.addEventListener("click", () => running && running.abort());
at("new").addEventListener("click", () => {
  if (running) running.abort();
  turns = [];
  log.replaceChildren();
  remember(STORED_AS, null);
  say("");
  refresh();
  prompt.focus();
});
log.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  const turn = button && turns.find((one) => one.place.place.contains(button));
  if (!turn) return;
  if (button.matches(".copy")) copy(button, turn.content);
  if (button.matches(".copy-code")) copy(button, button.closest("figure").querySelector("pre").textContent);
  if (button.matches(".again") && !running) {
    turn.place.place.remove();
    turns.pop();
    answer();
  }
});

for (const text of EXAMPLES) {
  const button = make("button", { text, type: "button", className: "example" });
  button.addEventListener("click", () => { prompt.value = text; submit(); });
  at("examples").append(button);
}

/* -- which model -- */

async function name() {
  for (;;) {
    try {
      const { data } = await askForJson("v1/models", 10);
      at("model").textContent = data[0].id;
      if (!running && /^(The model is still|Cannot)/.test(status.textContent)) say("");
      return;
    } catch (error) {
      if (error instanceof Refused && error.status !== 503) return;
      const isLoading = error instanceof Refused && error.code === "loading";
      if (!running) say(isLoading ? "The model is still loading; you can write already." : "Cannot reach the server; trying again.");
      await sleep(1.5);
    }
  }
}

load();
refresh();
grow();
toEnd();
prompt.focus({ preventScroll: true });
name();
