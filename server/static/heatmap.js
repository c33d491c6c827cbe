/* Layers x experts on a canvas: colour says how much, the size of a cell where the expert is. A canvas of our own, for
   thousands of cells are drawn anew every other second, on phones too. */
"use strict";
import { make } from "./session.js";

const SIZES = [0.34, 0.66, 1]; // of a cell, by residency: absent, host, top
const AXIS = { left: 40, top: 18 };

function rgb(hex) {
  const n = parseInt(hex.slice(1), 16);
  return [n >> 16, (n >> 8) & 255, n & 255];
}

/* [0, 1] -> colour, through three. */
function ramp(c) {
  const stops = [c.heat0, c.mid, c.high].map(rgb);
  return (share) => {
    const x = Math.min(1.999, 2 * Math.max(0, share)), i = Math.floor(x), f = x - i;
    return `rgb(${stops[i].map((a, k) => Math.round(a + f * (stops[i + 1][k] - a))).join(" ")})`;
  };
}

/* `describe(row, expert)` is the sentence about a cell; `tell(sentence)` is told it when a cell is looked at. */
export class HeatMap {
  constructor(place, describe, tell) {
    this.canvas = make("canvas", { tabindex: "0", role: "img" });
    place.append(this.canvas);
    Object.assign(this, { place, describe, tell, data: null, cell: null });
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => this.#look(null));
    this.canvas.addEventListener("blur", () => this.#look(null));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  /* `data`: {layers, numExperts, shares: [0, 1] of each cell, residency}. `c` are colours, `summary` is for who cannot
     see it. */
  show(data, c, summary) {
    Object.assign(this, { data, c });
    this.canvas.setAttribute("aria-label", summary);
    this.draw();
    if (this.cell) this.tell(this.describe(...this.cell));
  }

  draw() {
    if (!this.data) return;
    const { layers, numExperts, shares, residency } = this.data;
    const wide = this.place.clientWidth - AXIS.left;
    this.upright = wide / numExperts < 4 && layers.length < numExperts; // experts go down where they are too many
    const columns = this.upright ? layers.length : numExperts, rows = this.upright ? numExperts : layers.length;
    const width = wide / columns;
    const height = Math.max(6, Math.min(15, Math.max(width * 0.9, 420 / rows)));
    const ratio = devicePixelRatio || 1;
    const fullHeight = AXIS.top + rows * height + 2;
    Object.assign(this, { columns, rows, width, height });
    if (this.canvas.width !== Math.round(this.place.clientWidth * ratio) ||
        this.canvas.height !== Math.round(fullHeight * ratio)) {
      this.canvas.width = Math.round(this.place.clientWidth * ratio);
      this.canvas.height = Math.round(fullHeight * ratio);
      this.canvas.style.height = `${fullHeight}px`;
    }
    const g = this.canvas.getContext("2d");
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, this.place.clientWidth, fullHeight);
    const colour = ramp(this.c);
    const gap = Math.min(1, width * 0.14, height * 0.14);
    for (let y = 0; y < rows; y += 1) {
      for (let x = 0; x < columns; x += 1) {
        const at = this.upright ? x * numExperts + y : y * numExperts + x;
        const size = SIZES[residency[at]];
        const w = Math.max(1.5, (width - gap) * size), h = Math.max(1.5, (height - gap) * size);
        const isSmall = size < 1;
        const side = isSmall ? Math.min(Math.max(w, h), width - gap, height - gap, 12 * size + 1) : 0;
        g.fillStyle = colour(shares[at]);
        const [cw, ch] = isSmall ? [side, side] : [w, h];
        g.fillRect(AXIS.left + x * width + (width - cw) / 2, AXIS.top + y * height + (height - ch) / 2, cw, ch);
      }
    }
    this.#axes(g);
    if (this.cell) {
      const [row, expert] = this.cell, [x, y] = this.upright ? [row, expert] : [expert, row];
      g.strokeStyle = this.c.text;
      g.lineWidth = 1.5;
      g.strokeRect(AXIS.left + x * width - 0.5, AXIS.top + y * height - 0.5, width + 1, height + 1);
    }
  }

  #axes(g) {
    const { layers } = this.data;
    g.fillStyle = this.c.soft;
    g.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    const across = this.upright ? layers : null, down = this.upright ? null : layers;
    const step = (size, count) => [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100].find((n) => n * size >= 26 || n >= count) || 128;
    g.textAlign = "center";
    const xs = step(this.width, this.columns);
    for (let x = 0; x < this.columns; x += xs) g.fillText(across ? across[x] : x, AXIS.left + (x + 0.5) * this.width, 12);
    g.textAlign = "right";
    const ys = step(this.height * 1.6, this.rows);
    for (let y = 0; y < this.rows; y += ys) g.fillText(down ? down[y] : y, AXIS.left - 6, AXIS.top + (y + 0.5) * this.height + 4);
    g.textAlign = "left";
    g.fillText(this.upright ? "exp." : "layer", 0, 12);
  }

  #point(event) {
    if (!this.data) return;
    const box = this.canvas.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left - AXIS.left) / this.width);
    const y = Math.floor((event.clientY - box.top - AXIS.top) / this.height);
    const isIn = x >= 0 && y >= 0 && x < this.columns && y < this.rows;
    this.#look(isIn ? (this.upright ? [x, y] : [y, x]) : null);
  }

  #key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (!this.data || !moves[event.key]) return;
    event.preventDefault();
    const [dx, dy] = moves[event.key];
    const [row, expert] = this.cell || [0, 0];
    const moved = this.cell ? (this.upright ? [row + dx, expert + dy] : [row + dy, expert + dx]) : [0, 0];
    const most = [this.data.layers.length - 1, this.data.numExperts - 1];
    this.#look(moved.map((value, i) => Math.min(most[i], Math.max(0, value))));
  }

  #look(cell) {
    if (String(cell) === String(this.cell)) return;
    this.cell = cell;
    this.draw();
    this.tell(cell ? this.describe(...cell) : "");
  }
}
