"use strict";
const safe = echarts.format.encodeHTML;
const short = (text, most) => (text.length > most ? text.slice(0, most - 1) + "\u2026" : text);

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const dark = matchMedia("(prefers-color-scheme: dark)");

function colours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["card", "line", "text", "soft", "grid", "low", "mid", "high", "onHigh", "onLow", ..."abcdefgh"];
  const found = Object.fromEntries(names.map((name) => [name, style.getPropertyValue("--" + name).trim()]));
  found.isDark = dark.matches;
  found.series = [..."abcdefgh"].map((name) => found[name]);
  return found;
}

/* What every plot shares. `c` are the colours of the moment; the legend wraps within `width` pixels. */
function base(c, width, rest) {
  const names = rest.visualMap ? [] : rest.series.map((one) => short(one.name, 24));
  let rows = 1, filled = 0;
  for (const name of names) {
    const needs = 48 + 8 * name.length;
    if (filled && filled + needs > width) rows += 1, filled = 0;
    filled += needs;
  }
  return {
    animation: false,
    aria: { enabled: true },
    textStyle: { fontFamily: getComputedStyle(document.body).fontFamily, color: c.text },
    color: c.series,
    legend: { show: names.length > 0, top: 0, left: 0, itemWidth: 22, itemHeight: 10, itemGap: 14,
      formatter: (name) => short(name, 24), textStyle: { color: c.text, fontSize: 13 } },
    ...rest,
    grid: { left: 52, right: 20, top: 18 + 24 * rows, bottom: 52, ...rest.grid },
    tooltip: { confine: true, backgroundColor: c.card, borderColor: c.line,
      textStyle: { color: c.text, fontSize: 13 }, ...rest.tooltip },
  };
}

function axis(c, name, rest) {
  return {
    name, nameLocation: "middle", nameGap: 30, nameTextStyle: { color: c.soft, fontSize: 13 },
    axisLabel: { color: c.soft, fontSize: 12, hideOverlap: true, ...(rest && rest.axisLabel) },
    axisLine: { show: true, lineStyle: { color: c.line } },
    axisTick: { show: false },
    splitLine: { show: false },
    ...Object.fromEntries(Object.entries(rest || {}).filter(([key]) => key !== "axisLabel")),
  };
}

const upAxis = (c, name, rest) =>
  axis(c, name, { nameGap: 40, axisLine: { show: false }, splitLine: { lineStyle: { color: c.grid } }, ...rest });

const row = (marker, name, value) => `${marker} ${safe(name)}: <b>${value}</b>`;

/* One card for each of `plots`: {title, note, formula, height, wide, option(colours, width)}. */
function show(plots) {
  for (const [i, plot] of plots.entries()) {
    const alone = plots.length % 2 === 1 && i === plots.length - 1;
    const section = element("section", undefined, plot.wide || alone ? "wide" : "");
    plot.place = element("div", undefined, "plot");
    plot.place.style.height = `${plot.height}px`;
    const note = element("p", plot.note, "soft");
    if (plot.formula) note.append(element("span", plot.formula, "formula"));
    section.append(element("h2", plot.title), note, plot.place);
    document.getElementById("plots").append(section);
  }

  function draw() {
    const c = colours();
    for (const plot of plots) {
      plot.chart ??= echarts.init(plot.place, null, { renderer: "canvas" });
      plot.chart.resize();
      plot.chart.setOption(plot.option(c, plot.place.clientWidth), true);
    }
  }
  dark.addEventListener("change", draw);
  new ResizeObserver(draw).observe(document.getElementById("plots"));
}
