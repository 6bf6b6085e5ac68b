// The canvas: which rows are in sight at what height, and how they are painted.
//
// Rows are pages. In "some" mode they are the pages that have something to show, with a gap where others lie between;
// in "all" mode all pages of all slots. Only what is in sight is painted; below a pixel a row, pages share one.

import { h, color } from "./dom.js";
import { count, hex } from "./format.js";

const TALLEST = 34;
const COLORS = ["panel", "line", "text", "muted", "writable", "denied", "denied-soft", "refused", "written", "accent", "strong-line"];

export class Heatmap {
  constructor(pages, { select, toggle }) {
    this.pages = pages;
    this.tell = { select, toggle };
    this.mode = "some";
    this.canvas = h("canvas", { "aria-hidden": "true" });
    this.element = h("div", { class: "map", tabindex: "0", role: "application", "aria-label": "Heatmap: a row a page, 32 sub-pages each. Arrows move, space sets or clears a bit, plus and minus zoom, 0 fits everything." }, this.canvas);
    this.rowHeight = 22;
    this.top = 0; // in rows
    this.cursor = null; // { gfn, s }
    this.pending = false;
    this.tile = null;
  }

  start(signal) {
    const { element } = this;
    const watch = new ResizeObserver(() => { this.#measure(); this.later(); });
    watch.observe(element);
    signal.addEventListener("abort", () => watch.disconnect());
    window.addEventListener("theme", () => { this.colors = null; this.later(); }, { signal });
    element.addEventListener("keydown", (event) => this.#key(event));
    element.addEventListener("focus", () => this.later());
    element.addEventListener("blur", () => this.later());
    element.addEventListener("wheel", (event) => {
      event.preventDefault();
      if (event.ctrlKey || event.metaKey) this.zoom(Math.exp(-event.deltaY / 300), event.offsetY);
      else this.#scroll(event.deltaY / this.rowHeight);
    }, { passive: false });
    this.#pointer(element);
    this.#measure();
    // Few pages are shown large, many at a size that can be read.
    if (this.count) this.rowHeight = Math.min(TALLEST, Math.max(18, this.height / this.count));
    this.later();
  }

  #measure() {
    const box = this.element.getBoundingClientRect();
    this.width = box.width;
    this.height = box.height;
    this.ratio = devicePixelRatio || 1;
    this.rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
    this.canvas.width = Math.round(this.width * this.ratio);
    this.canvas.height = Math.round(this.height * this.ratio);
    this.left = 6.2 * this.rem;
    this.mini = 0.9 * this.rem;
    const names = this.width > 44 * this.rem ? 13 * this.rem : this.width > 30 * this.rem ? 8 * this.rem : 0;
    this.names = names;
    this.cellsWidth = Math.max(32, this.width - this.left - names - this.mini - 0.8 * this.rem);
  }

  // ---- rows and pages

  get slots() { return this.pages.slots; }
  get count() { return this.mode === "some" ? this.pages.interesting().length : this.pages.totalPages; }

  gfnOf(row) {
    if (this.mode === "some") return this.pages.interesting()[row];
    for (const slot of this.slots) {
      if (row < slot.pages) return slot.first + row;
      row -= slot.pages;
    }
    return undefined;
  }

  /** The row of a page, or of the first one behind it that is shown. */
  rowOf(gfn) {
    if (this.mode === "some") {
      const rows = this.pages.interesting();
      let low = 0;
      let high = rows.length;
      while (low < high) { const middle = (low + high) >> 1; if (rows[middle] < gfn) low = middle + 1; else high = middle; }
      return low;
    }
    let before = 0;
    for (const slot of this.slots) {
      if (gfn < slot.first) return before;
      if (gfn < slot.first + slot.pages) return before + gfn - slot.first;
      before += slot.pages;
    }
    return Math.max(0, before - 1);
  }

  setMode(mode) {
    this.mode = mode;
    if (mode === "all" && this.cursor) { this.rowHeight = Math.max(this.rowHeight, 12); this.#center(this.rowOf(this.cursor.gfn)); }
    else if (this.cursor) this.#center(this.rowOf(this.cursor.gfn));
    this.changed();
  }

  changed() { this.#clamp(); this.later(); }

  get smallest() { return Math.min(TALLEST, Math.max(1e-7, (this.height || 400) / Math.max(1, this.count))); }
  #clamp() {
    this.rowHeight = Math.min(TALLEST, Math.max(this.rowHeight, Math.min(this.smallest, 22)));
    const most = this.count - (this.height || 0) / this.rowHeight;
    this.top = Math.max(0, Math.min(this.top, most));
  }
  #scroll(rows) { this.top += rows; this.#clamp(); this.later(); }
  #center(row) { this.top = row - (this.height || 400) / this.rowHeight / 2; this.#clamp(); }

  zoom(factor, y = (this.height || 400) / 2) {
    const at = this.top + y / this.rowHeight;
    this.rowHeight = Math.min(TALLEST, Math.max(this.smallest, this.rowHeight * factor));
    this.top = at - y / this.rowHeight;
    this.#clamp();
    this.later();
  }
  fit() { this.rowHeight = Math.min(22, this.smallest); this.top = 0; this.#clamp(); this.later(); }

  goTo(gfn, s, quiet = false) {
    if (this.mode === "some" && this.pages.interesting()[this.rowOf(gfn)] !== gfn) this.pages.byPage.set(gfn, this.pages.byPage.get(gfn) ?? []), (this.pages.rows = null);
    this.cursor = { gfn, s };
    const row = this.rowOf(gfn);
    if (this.height && (row < this.top || row + 1 > this.top + this.height / this.rowHeight)) this.#center(row);
    this.later();
    this.tell.select(gfn, s, quiet ? "quiet" : "keys");
  }

  #key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const cursor = this.cursor ?? { gfn: this.gfnOf(0), s: 0 };
    if (cursor.gfn === undefined) return;
    const row = this.rowOf(cursor.gfn);
    const page = Math.max(1, Math.floor(this.height / this.rowHeight) - 1);
    const to = (next, s = cursor.s) => { const gfn = this.gfnOf(Math.max(0, Math.min(this.count - 1, next))); if (gfn !== undefined) this.goTo(gfn, Math.max(0, Math.min(31, s))); };
    const moves = {
      ArrowUp: () => to(row - 1), ArrowDown: () => to(row + 1), ArrowLeft: () => to(row, cursor.s - 1), ArrowRight: () => to(row, cursor.s + 1),
      PageUp: () => to(row - page), PageDown: () => to(row + page), Home: () => to(0), End: () => to(this.count - 1),
      "+": () => this.zoom(1.5), "=": () => this.zoom(1.5), "-": () => this.zoom(1 / 1.5), 0: () => this.fit(),
      w: () => this.zoom(1.3), s: () => this.zoom(1 / 1.3),
      " ": () => this.tell.toggle(cursor.gfn, cursor.s), Enter: () => this.tell.toggle(cursor.gfn, cursor.s),
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    moves[event.key]();
  }

  #pointer(element) {
    const fingers = new Map();
    let moved = 0;
    let spread = 0;
    element.addEventListener("pointerdown", (event) => {
      element.setPointerCapture(event.pointerId);
      fingers.set(event.pointerId, event);
      moved = 0;
      spread = 0;
      if (event.offsetX > this.width - this.mini - 4) { fingers.clear(); this.#mini(event.offsetY); fingers.set("mini", event); }
    });
    element.addEventListener("pointermove", (event) => {
      if (fingers.has("mini")) { this.#mini(event.offsetY); return; }
      const before = fingers.get(event.pointerId);
      if (!before) return;
      fingers.set(event.pointerId, event);
      if (fingers.size === 2) {
        const [a, b] = [...fingers.values()];
        const wide = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
        if (spread) this.zoom(wide / spread, (a.offsetY + b.offsetY) / 2);
        spread = wide;
        moved = 99;
        return;
      }
      const dy = event.clientY - before.clientY;
      moved += Math.abs(dy) + Math.abs(event.clientX - before.clientX);
      if (moved > 4) this.#scroll(-dy / this.rowHeight);
    });
    const up = (event) => {
      const mini = fingers.has("mini");
      fingers.clear();
      if (event.type === "pointercancel" || mini || moved > 4) return;
      const found = this.#at(event.offsetX, event.offsetY);
      if (!found) return;
      // The first click looks, a second one on the same cell changes it.
      if (this.cursor?.gfn === found.gfn && this.cursor.s === found.s) this.tell.toggle(found.gfn, found.s);
      else { this.cursor = found; this.later(); this.tell.select(found.gfn, found.s, "pointer"); }
    };
    element.addEventListener("pointerup", up);
    element.addEventListener("pointercancel", up);
  }

  #mini(y) { this.#center(Math.floor((y / this.height) * this.count)); this.later(); }

  #at(x, y) {
    const row = Math.floor(this.top + y / this.rowHeight);
    const gfn = row < this.count ? this.gfnOf(row) : undefined;
    if (gfn === undefined) return null;
    const s = Math.floor(((x - this.left) / this.cellsWidth) * 32);
    return { gfn, s: Math.max(0, Math.min(31, s)) };
  }

  // ---- painting

  later() {
    if (this.pending || !this.width) return;
    this.pending = true;
    requestAnimationFrame(() => { this.pending = false; this.paint(); });
  }

  #palette() {
    this.colors = Object.fromEntries(COLORS.map((name) => [name, color(name)]));
    const tile = document.createElement("canvas");
    const side = 6 * this.ratio;
    tile.width = tile.height = side;
    const context = tile.getContext("2d");
    context.fillStyle = this.colors["denied-soft"];
    context.fillRect(0, 0, side, side);
    context.strokeStyle = this.colors.denied;
    context.lineWidth = 1.6 * this.ratio;
    for (const shift of [-side, 0, side]) { context.beginPath(); context.moveTo(shift, side); context.lineTo(shift + side, 0); context.stroke(); }
    this.tile = tile;
  }

  heatOf(hits) { return hits ? 0.25 + 0.75 * (Math.log1p(hits) / Math.log1p(this.pages.hottest)) : 0; }

  /** How strongly a page is coloured that is written so often. */
  warmthOf(writes) { return 0.12 + 0.58 * (Math.log1p(writes) / Math.log1p(this.pages.busiest)); }

  paint() {
    if (!this.colors) this.#palette();
    const context = this.canvas.getContext("2d");
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.fillStyle = this.colors.panel;
    context.fillRect(0, 0, this.width, this.height);
    if (!this.count) {
      context.fillStyle = this.colors.muted;
      context.font = `${this.rem}px ${getComputedStyle(this.element).fontFamily}`;
      context.textAlign = "center";
      context.fillText("Nothing is protected or refused here yet.", this.width / 2, this.height / 2 - this.rem);
      context.fillText("“All memory” shows every page; space or a second click denies a sub-page.", this.width / 2, this.height / 2 + this.rem * 0.6);
      return;
    }
    if (this.rowHeight >= 3) this.#paintRows(context);
    else this.#paintDense(context);
    this.#paintMini(context);
  }

  #paintRows(context) {
    const { left, rowHeight, colors } = this;
    const cell = this.cellsWidth / 32;
    const gap = rowHeight > 8 ? 2 : rowHeight > 5 ? 1 : 0;
    const first = Math.floor(this.top);
    const last = Math.min(this.count, Math.ceil(this.top + this.height / rowHeight));
    const hatch = context.createPattern(this.tile, "repeat");
    hatch.setTransform(new DOMMatrix().scale(1 / this.ratio));
    const text = Math.min(0.85 * this.rem, rowHeight * 0.72);
    const labels = rowHeight >= 11;
    const mono = getComputedStyle(document.documentElement).getPropertyValue("--mono");
    const sans = getComputedStyle(this.element).fontFamily;
    let before = null;
    context.textBaseline = "middle";
    for (let row = first; row < last; row++) {
      const gfn = this.gfnOf(row);
      const y = (row - this.top) * rowHeight;
      const word = this.pages.word(gfn);
      const counts = this.pages.refused.get(gfn);
      const written = this.pages.written.get(gfn) ?? 0;
      const touched = this.pages.touched.get(gfn);
      const tall = rowHeight - gap;
      if (before !== null && gfn !== before + 1) {
        context.fillStyle = colors["strong-line"];
        context.globalAlpha = 0.5;
        context.fillRect(left - 6, y - gap / 2 - 0.5, this.cellsWidth + 12, 1);
        context.globalAlpha = 1;
      }
      before = gfn;
      for (let s = 0; s < 32; s++) {
        const x = left + s * cell;
        const wide = cell - (cell > 5 ? Math.min(2, gap + 1) : 0);
        const open = (word >>> s) & 1;
        context.fillStyle = open ? colors.writable : hatch;
        context.fillRect(x, y, wide, tall);
        if (open && (touched?.subpages >>> s) & 1) {
          context.globalAlpha = this.warmthOf(touched.writes);
          context.fillStyle = colors.written;
          context.fillRect(x, y, wide, tall);
          context.globalAlpha = 1;
        }
        if ((written >>> s) & 1) { context.fillStyle = colors.written; context.fillRect(x, y + tall * 0.7, wide, Math.max(1, tall * 0.3)); }
        const hits = counts?.[s] ?? 0;
        if (hits) {
          context.fillStyle = colors.panel;
          context.fillRect(x, y, wide, tall);
          context.globalAlpha = this.heatOf(hits);
          context.fillStyle = colors.refused;
          context.fillRect(x, y, wide, tall);
          context.globalAlpha = 1;
          if (rowHeight >= 16 && cell >= 2.1 * this.rem) {
            context.fillStyle = this.heatOf(hits) > 0.7 ? colors.panel : colors.text;
            context.font = `${text * 0.85}px ${sans}`;
            context.textAlign = "center";
            context.fillText(hits > 9999 ? `${Math.round(hits / 1000)}k` : String(hits), x + wide / 2, y + tall / 2 + 0.5);
          }
        }
      }
      if (labels || row % Math.ceil(14 / rowHeight) === 0) {
        context.textAlign = "right";
        context.font = `${labels ? text : 0.7 * this.rem}px ${mono}`;
        context.fillStyle = this.cursor?.gfn === gfn ? colors.text : colors.muted;
        context.fillText(hex(gfn), left - 0.7 * this.rem, y + tall / 2 + 0.5);
      }
      if (labels && this.names) {
        const objects = this.pages.byPage.get(gfn);
        const shown = objects?.length ? [...new Set(objects.map((one) => one.name))].join(", ") : "";
        const from = left + this.cellsWidth + 0.7 * this.rem;
        context.textAlign = "left";
        context.font = `${text}px ${sans}`;
        context.fillStyle = colors.text;
        const total = counts ? count(counts[32]) : "";
        const room = this.names - 0.7 * this.rem - (total ? 0.62 * text * total.length + 0.5 * this.rem : 0);
        context.fillText(cut(context, shown, room), from, y + tall / 2 + 0.5);
        if (total) { context.textAlign = "right"; context.fillStyle = colors.refused; context.fillText(total, left + this.cellsWidth + this.names, y + tall / 2 + 0.5); }
      }
      if (this.cursor?.gfn === gfn) {
        const focused = document.activeElement === this.element;
        context.strokeStyle = focused ? colors.accent : colors.text;
        context.lineWidth = focused ? 2.5 : 1.5;
        context.strokeRect(left + this.cursor.s * cell - 1, y - 1, cell, tall + 2);
      }
    }
  }

  /** Less than three pixels a page: only pages with something to show are painted, each at least a pixel. */
  #paintDense(context) {
    const { left, rowHeight, colors } = this;
    const cell = this.cellsWidth / 32;
    const end = this.top + this.height / rowHeight;
    context.fillStyle = colors.writable;
    context.globalAlpha = 0.6;
    context.fillRect(left, Math.max(0, -this.top * rowHeight), this.cellsWidth, Math.min(this.height, (this.count - this.top) * rowHeight));
    context.globalAlpha = 1;
    const rows = this.pages.interesting();
    const tall = Math.max(1.5, rowHeight);
    const painted = new Map(); // pixel row → { denied, heat }
    const start = this.mode === "some" ? Math.floor(this.top) : lower(rows, this.gfnOf(Math.floor(this.top)));
    for (let at = start; at < rows.length; at++) {
      const gfn = rows[at];
      const row = this.mode === "some" ? at : this.rowOf(gfn);
      if (row > end) break;
      const y = Math.floor((row - this.top) * rowHeight);
      let line = painted.get(y);
      if (!line) painted.set(y, (line = { denied: 0, heat: null, written: 0 }));
      line.denied |= ~this.pages.word(gfn);
      line.written |= (this.pages.written.get(gfn) ?? 0) | ((this.pages.touched.get(gfn)?.subpages ?? 0) & this.pages.word(gfn));
      const counts = this.pages.refused.get(gfn);
      if (counts) { line.heat ??= new Float64Array(32); for (let s = 0; s < 32; s++) line.heat[s] = Math.max(line.heat[s], counts[s]); }
    }
    for (const [y, line] of painted) {
      for (let s = 0; s < 32; s++) {
        const x = left + s * cell;
        if ((line.written >>> s) & 1) { context.fillStyle = colors.written; context.fillRect(x, y, cell, tall); }
        if ((line.denied >>> s) & 1) { context.fillStyle = colors.denied; context.fillRect(x, y, cell, tall); }
        if (line.heat?.[s]) { context.globalAlpha = this.heatOf(line.heat[s]); context.fillStyle = colors.refused; context.fillRect(x, y, cell, tall); context.globalAlpha = 1; }
      }
    }
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.font = `${0.78 * this.rem}px ${getComputedStyle(document.documentElement).getPropertyValue("--mono")}`;
    context.fillStyle = colors.muted;
    const step = 3 * this.rem;
    for (let y = 0.7 * this.rem; y < this.height; y += step) {
      const gfn = this.gfnOf(Math.floor(this.top + y / rowHeight));
      if (gfn !== undefined) context.fillText(hex(gfn), left - 0.7 * this.rem, y);
    }
  }

  #paintMini(context) {
    const { colors } = this;
    const x = this.width - this.mini - 4;
    context.fillStyle = colors.writable;
    context.fillRect(x, 0, this.mini, this.height);
    const rows = this.pages.interesting();
    const scale = this.height / this.count;
    let painted = -1;
    for (let at = 0; at < rows.length; at++) {
      const y = Math.floor((this.mode === "some" ? at : this.rowOf(rows[at])) * scale);
      const counts = this.pages.refused.get(rows[at]);
      if (y === painted && !counts) continue;
      painted = y;
      context.fillStyle = counts ? colors.refused : ~this.pages.word(rows[at]) ? colors.denied : colors.written;
      context.fillRect(x, y, this.mini, Math.max(1, Math.min(scale - 0.5, 6)));
    }
    const tall = Math.max(8, (this.height / this.rowHeight) * scale);
    if (tall < this.height - 1) {
      context.strokeStyle = colors.text;
      context.lineWidth = 1.5;
      context.strokeRect(x - 1.5, Math.min(this.height - tall, this.top * scale) + 1, this.mini + 3, tall - 2);
    }
  }
}

function lower(sorted, value) {
  let low = 0;
  let high = sorted.length;
  while (low < high) { const middle = (low + high) >> 1; if (sorted[middle] < value) low = middle + 1; else high = middle; }
  return low;
}

function cut(context, text, room) {
  if (!text || room <= 0) return "";
  if (context.measureText(text).width <= room) return text;
  let end = Math.max(1, Math.floor((text.length * room) / context.measureText(text).width) - 1);
  while (end > 1 && context.measureText(`${text.slice(0, end)}…`).width > room) end--;
  return `${text.slice(0, end)}…`;
}
