// A list of any length of which only the rows in sight are elements.
//
// Browsers lay out some 10 million pixels well; longer lists are scrolled by proportion instead of pixel by pixel.

import { h } from "./dom.js";

const MOST_PIXELS = 8_000_000;

export class VirtualList {
  /** `row(position)` makes the element of a row, or null where it is not known yet. */
  constructor({ row, height, label, most = 480, role = "list" }) {
    this.row = row;
    this.rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
    this.height = Math.round(height * this.rem);
    this.most = most;
    this.count = 0;
    this.rows = h("div", { class: "rows", role });
    this.rows.setAttribute("aria-label", label);
    this.element = h("div", { class: "virtual", tabindex: "0", role: "group", "aria-label": label });
    this.element.append(this.rows);
    this.shown = new Map();
    this.element.addEventListener("scroll", () => this.later(), { passive: true });
    this.watch = new ResizeObserver(() => this.later());
    this.watch.observe(this.element);
    this.pending = false;
  }

  later() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => { this.pending = false; this.draw(); });
  }

  /** How many rows there are, and that those in sight are to be made anew. */
  set(count, { keep = false } = {}) {
    this.count = count;
    const whole = count * this.height;
    this.pixels = Math.min(whole, MOST_PIXELS);
    this.scale = whole > MOST_PIXELS ? whole / MOST_PIXELS : 1;
    this.rows.style.height = `${this.pixels}px`;
    this.element.style.height = `${Math.min(whole + 2, this.most)}px`;
    if (!keep) { this.shown.clear(); this.rows.replaceChildren(); }
    this.draw();
  }

  draw() {
    const view = this.element.clientHeight || this.most;
    const top = this.element.scrollTop;
    const last = Math.max(1, this.pixels - view);
    const first = this.scale === 1 ? Math.floor(top / this.height) : Math.round((top / last) * Math.max(0, this.count - view / this.height));
    const start = Math.max(0, first - 4);
    const end = Math.min(this.count, first + Math.ceil(view / this.height) + 4);
    for (const [position, element] of this.shown) {
      if (position < start || position >= end || this.scale !== 1) {
        // The row that has the focus stays: taking it away would lose the reader's place.
        if (this.scale === 1 && element.contains(document.activeElement)) continue;
        element.remove();
        this.shown.delete(position);
      }
    }
    const fresh = [];
    for (let position = start; position < end; position++) {
      if (this.shown.has(position)) continue;
      const element = this.row(position);
      if (!element) continue;
      const y = this.scale === 1 ? position * this.height : top + (position - first) * this.height;
      element.style.top = `${y}px`;
      element.style.height = `${this.height}px`;
      element.setAttribute("aria-setsize", this.count);
      element.setAttribute("aria-posinset", position + 1);
      this.shown.set(position, element);
      fresh.push(element);
    }
    this.rows.append(...fresh);
  }

  dispose() { this.watch.disconnect(); }
}
