/* The live page: asks the server every second for what is new, while somebody looks. Plots and colours are plots.js's. */
"use strict";
import { Refused, Unreachable, askForJson, make } from "./session.js";
import { HeatMap } from "./heatmap.js";

const SPAN_S = 300; // of the plots
const WINDOW_S = 5; // over which rates are taken
const at = (id) => document.getElementById(id);
const text = (id, value) => { if (at(id).textContent !== value) at(id).textContent = value; };

/* -- numbers -- */

const round = (x) => (x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1).replace(/\.0$/, "") : x.toFixed(x > 0 ? 1 : 0));
const count = (x) => x.toLocaleString("en");
const percent = (x) => (x > 0.9995 && x < 1 ? "99.9" : (100 * x).toFixed(1));

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1024 && i < 4) n /= 1024, i += 1;
  return `${n.toFixed(i && n < 100 ? 1 : 0)} ${units[i]}`;
}

function span(s) {
  if (s < 0.0995) return `${Math.max(0, 1000 * s).toFixed(0)} ms`;
  if (s < 1) return `${s.toFixed(2)} s`;
  if (s < 60) return `${s < 10 ? s.toFixed(1) : s.toFixed(0)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/* -- what is known: rows of counters, oldest first -- */

let server = null; // the id of its process
let rows = [];
let latest = null; // the last answer
let table = null; // of the experts

/* By how much counters grew up to row i over the window, and in how many seconds; null where they began anew. */
function growth(i, ...names) {
  let from = i;
  while (from > 0 && rows[i].time_s - rows[from].time_s < WINDOW_S - 0.5) from -= 1;
  const seconds = rows[i].time_s - rows[from].time_s;
  if (!(seconds > 0) || seconds > 3 * WINDOW_S || rows[i].steps < rows[from].steps) return null;
  return [...names.map((name) => rows[i][name] - rows[from][name]), seconds];
}

const rate = (name, scale = 1) => (i) => {
  const grown = growth(i, name);
  return grown && grown[0] / grown[1] / scale;
};

const share = (part, whole) => (i) => {
  const grown = growth(i, part, whole);
  return grown && grown[1] > 0 ? (100 * grown[0]) / grown[1] : null;
};

const MB = 1e6;
const CARDS = [
  { title: "Generated tokens/s", series: [{ name: "generated", of: rate("output_tokens"), shade: "a" }] },
  { title: "Prompt tokens/s", series: [{ name: "computed", of: rate("prompt_tokens"), shade: "a" }] },
  { title: "Requests", whole: true, step: true, series: [
    { name: "running", of: (i) => rows[i].running, shade: "a" },
    { name: "waiting", of: (i) => rows[i].waiting, shade: "b", dashed: true }] },
  { title: "KV memory in use", unit: "%", max: 100, series: [
    { name: "held by requests", shade: "a",
      of: (i) => (rows[i].kv_blocks ? (100 * rows[i].kv_blocks_used) / rows[i].kv_blocks : null) }] },
  { title: "Expert hit rate", unit: "%", max: 100, experts: true, series: [
    { name: "decode", of: share("decode_hits", "decode_queries"), shade: "a" },
    { name: "prefill", of: share("prefill_hits", "prefill_queries"), shade: "b", dashed: true }] },
  { title: "Waiting for experts", unit: "%", of: " of step time", max: 100, experts: true, series: [
    { name: "stall", of: share("stall_s", "step_s"), shade: "b" }] },
  { title: "Expert loads, MB/s", experts: true, series: [
    { name: "now", of: rate("fetched_bytes", MB), shade: "a" },
    { name: "bandwidth", of: (i) => (rows[i].bandwidth ? rows[i].bandwidth / MB : null), shade: "h", dashed: true }] },
  { title: "Prefetches/s", experts: true, series: [
    { name: "used", of: rate("prefetch_used"), shade: "c" },
    { name: "late", of: rate("prefetch_late"), shade: "e", dashed: true },
    { name: "wasted", of: rate("prefetch_wasted"), shade: "b" },
    { name: "cancelled", of: rate("prefetch_cancelled"), shade: "h", dashed: true }] },
];

/* -- the cards -- */

function makeCard(card) {
  const section = make("section", { "aria-label": card.title });
  const values = make("dl", { className: card.series.length > 2 ? "values many" : "values" });
  card.numbers = card.series.map((one) => {
    const number = make("dd", { text: "\u2013" });
    const name = make("dt", { text: one.name, className: one.dashed ? "dashed" : "" });
    name.style.setProperty("--series", `var(--${one.shade})`);
    values.append(card.series.length > 1 ? make("div", {}, name, number) : make("div", {}, number));
    if (card.series.length === 1) number.before(make("dt", { text: one.name, className: "hidden" }));
    return number;
  });
  card.place = make("div", { className: "small-plot", role: "img" });
  section.append(make("h2", { text: card.title }), values, card.place);
  card.section = section;
  at("cards").append(section);
}

const value = (card, x) => (card.whole ? count(x) : card.unit === "%" ? percent(x / 100) : round(x));

function tip(card) {
  return (items) => {
    const ago = -items[0].value[0];
    const place = make("div", {}, make("div", { text: ago < 1 ? "now" : `${ago.toFixed(0)} s ago`, className: "soft" }));
    for (const item of items) {
      if (item.value[1] === null) continue;
      const line = make("div", { text: `${item.seriesName}: ` }, make("b", { text: `${value(card, item.value[1])}${card.unit || ""}` }));
      place.append(line);
    }
    return place;
  };
}

function drawCard(card, c) {
  const now = rows.length ? rows.at(-1).time_s : 0;
  const first = rows.findIndex((row) => row.time_s >= now - SPAN_S);
  const points = card.series.map((one) => {
    const data = [];
    for (let i = Math.max(0, first); i < rows.length; i += 1) {
      if (i && rows[i].time_s - rows[i - 1].time_s > 3 * WINDOW_S) data.push([rows[i - 1].time_s - now + 1, null]);
      data.push([rows[i].time_s - now, one.of(i)]);
    }
    return data;
  });
  const told = [];
  for (const [k, number] of card.numbers.entries()) {
    const last = points[k].length ? points[k].at(-1)[1] : null;
    number.replaceChildren(last === null ? "\u2013" : value(card, last));
    if (last !== null && card.unit) number.append(make("small", { text: card.unit + (card.of || "") }));
    told.push(`${card.series[k].name} ${last === null ? "unknown" : `${value(card, last)}${card.unit || ""}`}`);
  }
  card.place.setAttribute("aria-label", `${card.title} in the last five minutes. Now: ${told.join(", ")}`);
  if (!card.place.clientWidth) return;
  const tallest = Math.max(0, ...points.flat().map((point) => point[1] ?? 0));
  card.chart ??= echarts.init(card.place, null, { renderer: "canvas" });
  card.chart.setOption(base(c, card.place.clientWidth, {
    aria: { enabled: false },
    legend: { show: false },
    grid: { left: 34, right: 6, top: 8, bottom: 20 },
    xAxis: axis(c, "", { type: "value", min: -SPAN_S, max: 0, interval: SPAN_S,
      axisLabel: { fontSize: 11, showMinLabel: true, showMaxLabel: true, alignMinLabel: "left", alignMaxLabel: "right",
        formatter: (x) => (x === 0 ? "now" : "5 min ago") } }),
    yAxis: upAxis(c, "", { type: "value", min: 0, max: card.max ?? (tallest ? undefined : 1), splitNumber: 2,
      interval: card.max ? card.max / 2 : undefined, minInterval: card.whole ? 1 : 0,
      axisLabel: { fontSize: 11, formatter: (y) => (y >= 10000 ? `${y / 1000}k` : String(y)) } }),
    series: card.series.map((one, k) => ({
      name: one.name, type: "line", showSymbol: false, color: c[one.shade], step: card.step ? "end" : false,
      lineStyle: { width: one.dashed ? 1.6 : 2, type: one.dashed ? [4, 3] : "solid" },
      areaStyle: card.series.length === 1 ? { opacity: 0.12 } : undefined,
      emphasis: { disabled: true }, data: points[k],
    })),
    tooltip: { trigger: "axis", formatter: tip(card), transitionDuration: 0,
      axisPointer: { lineStyle: { color: c.soft }, animation: false } },
  }), true);
}

/* -- the experts -- */

const VIEWS = [
  { name: "Used lately", unit: "uses/s", of: (t) => t.recent.flat().map((uses) => (uses * Math.LN2) / t.half_life_s) },
  { name: "Used since the start", unit: "uses", of: (t) => t.queries.flat() },
  { name: "Missed", unit: "misses", of: (t) => t.queries.flatMap((layer, l) => layer.map((n, e) => n - t.hits[l][e])) },
];
const PLACES = { top: "in expert memory", host: "in host memory", absent: "on disk" };
let view = VIEWS[0];

const heat = new HeatMap(at("heat"), (row, expert) => {
  const queries = table.queries[row][expert], hits = table.hits[row][expert];
  const lately = (table.recent[row][expert] * Math.LN2) / table.half_life_s;
  const found = queries ? `, ${percent(hits / queries)}% of them hits` : "";
  return `Layer ${table.layers[row]}, expert ${expert}: ${lately.toFixed(1)} uses/s lately, ${count(queries)} uses since ` +
    `the start${found}; now ${PLACES[table.residency_names[table.residency[row][expert]]]}.`;
}, (sentence) => text("readout", sentence || "Point at a cell, or move with the arrow keys."));

for (const one of VIEWS) {
  const button = make("button", { text: one.name, type: "button", "aria-pressed": String(one === view) });
  button.addEventListener("click", () => {
    view = one;
    for (const each of at("choice").children) each.setAttribute("aria-pressed", String(each === button));
    drawExperts(colours());
  });
  at("choice").append(button);
}

function colourSet() {
  const c = colours();
  c.heat0 = getComputedStyle(document.documentElement).getPropertyValue("--heat0").trim();
  return c;
}

function drawExperts() {
  const isShown = Boolean(table && table.layers.length);
  at("experts").hidden = !isShown;
  if (!isShown) return;
  const values = view.of(table);
  const ascending = values.toSorted((a, b) => a - b), largest = ascending.at(-1);
  const most = ascending[Math.floor(0.99 * (ascending.length - 1))] || largest; // a few may lie beyond
  const number = (x) => (x < 10 && x % 1 ? x.toFixed(1) : count(Math.round(x)));
  const where = table.totals.residency;
  const legend = at("legend");
  const marks = table.residency_names.toReversed().filter((name) => name !== "host" || latest.experts.host_slots)
    .map((name) => make("span", { className: "where" }, make("span", { className: `mark ${name}` }),
      `${PLACES[name]}: ${count(where[name])}`));
  legend.replaceChildren(
    make("span", {}, "0", make("span", { className: "ramp" }), number(most) + ` ${view.unit}` + (largest > most ? " or more" : "")),
    ...marks);
  const summary = `Experts by layer: ${count(where.top)} of ${count(table.totals.experts)} in expert memory; the largest ` +
    `number of ${view.unit} is ${number(largest)}. The arrow keys tell of each expert.`;
  heat.show({ layers: table.layers, numExperts: table.num_experts, residency: table.residency.flat(),
    shares: values.map((x) => (most ? Math.min(1, x / most) : 0)) }, colourSet(), summary);
  text("experts-note", `One ${heat.upright ? "column" : "row"} is a layer, one ${heat.upright ? "row" : "column"} an expert. ` +
    "The colour tells the number, the size of the mark where the expert is.");
}

/* -- requests -- */

const ENDS = { stop: "stop", length: "length", abort: "aborted", error: "error", tool_calls: "tool calls" };

function end(line) {
  if (line.running) return line.output_tokens ? "answering" : "waiting";
  if (line.code === "499") return "client left";
  if (line.code !== "200") return `error ${line.code}`;
  return ENDS[line.finish_reason] || line.finish_reason || "done";
}

function drawRequests() {
  const lines = latest.requests.slice(0, 25);
  const away = latest.turned_away;
  text("latest-note", "What was asked and answered is not kept." +
    (away ? ` ${count(away)} more found no room or no model and were turned away with 503.` : ""));
  at("requests").replaceChildren(...(lines.length ? lines.map((line) => {
    const cell = (content, className = "") => make("td", { text: content, className });
    const id = cell(line.id, "extra text id");
    id.title = line.id;
    return make("tr", { className: line.running ? "running" : "" },
      cell(span(line.age_s)), id, cell(line.endpoint + (line.stream ? ", stream" : ""), "extra text"),
      cell(line.prompt_tokens ? count(line.prompt_tokens) : "\u2013"), cell(count(line.output_tokens)),
      cell(line.ttft_s === null ? "\u2013" : span(line.ttft_s)),
      cell(line.tokens_per_s === null ? "\u2013" : round(line.tokens_per_s)), cell(end(line), "text"));
  }) : [make("tr", {}, make("td", { text: "None yet.", className: "none", colspan: "8" }))]));
}

/* -- the whole page -- */

function drawHead() {
  const { model, experts, state } = latest;
  text("model", model ? model.name : "Dashboard");
  setState(state, state === "ready" ? "ready" : state);
  const about = [];
  if (model) about.push(`${model.type}, dense ${model.dtype}, context of ${count(model.max_model_len)} tokens`);
  if (model && model.expert_format) about.push(`experts in ${model.expert_format}`);
  if (experts) {
    const all = table && table.totals.experts ? ` of ${count(table.totals.experts)}` : "";
    about.push(`room for ${count(experts.slots)}${all} experts (${bytes(experts.slots * experts.slot_bytes)})`);
  }
  if (!model && state === "loading") about.push("The model is still loading.");
  text("about", about.join("; "));
  text("bottom", `Foregate ${latest.server.version}, up ${span(latest.server.uptime_s)}. Rates are means over ${WINDOW_S} s. ` +
    "The page pauses while its tab is hidden.");
  if (state === "dead") trouble(`The engine has stopped${latest.error ? `: ${latest.error}` : ""}. The server's log says more.`);
  if (state === "restarting") trouble("The engine had failed and is being started again.");
}

function setState(name, words) {
  at("state").className = `state ${name}`;
  text("state", words);
}

function draw() {
  if (!latest) return;
  const c = colours();
  for (const card of CARDS) {
    card.section.hidden = Boolean(card.experts) && !latest.experts;
    if (!card.section.hidden) drawCard(card, c);
  }
  drawExperts();
  drawRequests();
  drawHead();
}

function trouble(sentence) {
  at("trouble").hidden = !sentence;
  text("trouble", sentence || "");
}

function take(data) {
  if (data.server.id !== server) {
    const isNew = server !== null;
    server = data.server.id;
    rows = [];
    table = null;
    if (isNew) return false; // what it sent began after rows of another process
  }
  for (const values of data.rows) rows.push(Object.fromEntries(data.columns.map((name, i) => [name, values[i]])));
  const oldest = rows.length ? rows.at(-1).time_s - SPAN_S - WINDOW_S : 0;
  while (rows.length && rows[0].time_s < oldest) rows.shift();
  if (data.state === "restarting" && latest) data.experts ??= latest.experts; // it will have them again
  latest = data;
  return true;
}

let lastHeardAt = 0;
let expertsAskedAt = 0;

async function askForExperts() {
  if (!latest.experts || !["ready", "draining"].includes(latest.state) || performance.now() - expertsAskedAt < 1900) return;
  expertsAskedAt = performance.now();
  try {
    table = await askForJson("v1/experts/stats", 10);
  } catch (error) {
    if (!(error instanceof Refused || error instanceof Unreachable)) throw error; // the next second will tell
  }
}

async function once() {
  try {
    const news = () => askForJson(`dashboard/data?after=${rows.length ? rows.at(-1).seq : 0}`, 8);
    if (!take(await news())) take(await news());
    lastHeardAt = performance.now();
    trouble("");
    at("data").classList.remove("stale");
    const experts = askForExperts();
    if (!table) await Promise.race([experts, new Promise((resolve) => setTimeout(resolve, 500))]);
    draw();
  } catch (error) {
    if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
    const since = lastHeardAt ? ` What is shown is ${span((performance.now() - lastHeardAt) / 1000)} old.` : "";
    const what = error instanceof Refused ? `The server answers: ${error.message}.` : "Cannot reach the server.";
    trouble(`${what} Trying again every second.${since}`);
    setState("unreachable", "unreachable");
    at("data").classList.add("stale");
  }
}

let timer = 0;
let isAsking = false;

async function loop() {
  clearTimeout(timer);
  if (document.hidden || isAsking) return;
  isAsking = true;
  const began = performance.now();
  try {
    await once();
  } finally {
    isAsking = false;
    timer = setTimeout(loop, Math.max(100, 1000 - (performance.now() - began)));
  }
}

CARDS.forEach(makeCard);
text("readout", "Point at a cell, or move with the arrow keys.");
document.addEventListener("visibilitychange", loop);
dark.addEventListener("change", draw);
new ResizeObserver(() => {
  for (const card of CARDS) if (card.chart) card.chart.resize();
  heat.draw();
}).observe(at("data"));
loop();
