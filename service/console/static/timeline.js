// When writes were refused, and when whole pages would have refused them: uPlot over bins of the trace. Drag to zoom; W and S zoom, A and D pan, as in Perfetto.

import uPlot from "./vendor/uplot/uPlot.esm.js";
import { h, fill, color } from "./dom.js";
import { count, short } from "./format.js";

const BINS = 320;

/** `changed(from, to)` is called with the records in sight. `coming` becomes null, or what whole pages would have refused:
 * `{ width, buckets }`, records of a bucket and the buckets of `POST …/costs`. */
export function timeline(trace, exits, coming, changed, signal) {
  const most = Math.max(1, trace.start + trace.records);
  const holder = h("div", { class: "chart", tabindex: "0", role: "application", "aria-label": "Timeline of refused writes by record. W and S zoom, A and D or the arrows pan, 0 shows everything." });
  const status = h("span", { class: "muted small number", role: "status", "aria-live": "polite" });
  const reset = h("button", { type: "button", class: "small", hidden: true, onclick: () => look(0, most) }, "Show everything");
  const legend = h("p", { class: "legend", hidden: true }, h("span", {}, h("i", { class: "refused" }), "refused"), h("span", {}, h("i", { class: "whole" }), "with whole pages"));
  let plot = null;
  let whole = null;
  let view = [0, most];
  let only = "";

  function bins() {
    const [from, to] = view;
    const width = (to - from) / BINS;
    const ys = new Float64Array(BINS);
    const chosen = only ? new Set(exits.objects.texts.flatMap((text, id) => (text.split(", ").includes(only) ? [id] : []))) : null;
    for (let at = 0; at < exits.length; at++) {
      const index = exits.index[at];
      if (index < from || index >= to || (chosen && !chosen.has(exits.object[at]))) continue;
      ys[Math.min(BINS - 1, Math.floor((index - from) / width))]++;
    }
    const xs = Float64Array.from({ length: BINS }, (_, n) => from + (n + 0.5) * width);
    return [xs, ys, wholeBins(from, to, width)];
  }

  /** A bucket's share of each bin: buckets may be wider than bins, or narrower. */
  function wholeBins(from, to, width) {
    if (!whole || only) return new Array(BINS).fill(null);
    const ys = new Float64Array(BINS);
    for (const { bucket, page_granular_violations: stopped } of whole.buckets) {
      const begin = Math.max(from, bucket * whole.width);
      const end = Math.min(to, Math.min(most, (bucket + 1) * whole.width));
      const each = stopped / (Math.min(most, (bucket + 1) * whole.width) - bucket * whole.width);
      for (let at = begin; at < end; ) {
        const bin = Math.min(BINS - 1, Math.floor((at - from) / width + 1e-9));
        const next = Math.min(end, bin === BINS - 1 ? end : from + (bin + 1) * width);
        ys[bin] += each * (next - at);
        at = next > at ? next : end;
      }
    }
    return ys;
  }

  function look(from, to) {
    const least = 200;
    if (to - from < least) { const middle = (from + to) / 2; from = middle - least / 2; to = middle + least / 2; }
    from = Math.max(0, Math.min(from, most - least));
    to = Math.min(most, Math.max(to, from + least));
    view = [from, to];
    draw();
    reset.hidden = from <= 0 && to >= most;
    changed(reset.hidden ? -Infinity : from, reset.hidden ? Infinity : to);
  }

  function draw() {
    if (!plot) return;
    const data = bins();
    plot.setData(data, false);
    plot.setScale("x", { min: view[0], max: view[1] });
    plot.setScale("y", { min: 0, max: Math.max(1, ...data[1], ...data[2]) * 1.08 });
    fill(status, `${count(data[1].reduce((sum, one) => sum + one, 0))} refused in records ${count(Math.floor(view[0]))} – ${count(Math.ceil(view[1]))}${only ? `, ${only}` : ""}`);
  }

  function make() {
    plot?.destroy();
    const text = color("muted");
    const line = color("line");
    const refused = color("refused");
    const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
    const font = `${0.8 * rem}px ${getComputedStyle(document.body).fontFamily}`;
    const axis = { stroke: text, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font };
    plot = new uPlot({
      width: holder.clientWidth || 600, height: Math.round(12 * rem), padding: [8, 1.4 * rem, 0, 0],
      cursor: { y: false, points: { show: false }, drag: { x: true, y: false, setScale: false } },
      legend: { show: false },
      scales: { x: { time: false, auto: false }, y: { auto: false } },
      axes: [{ ...axis, values: (_, values) => values.map(short) }, { ...axis, size: 3.6 * rem, values: (_, values) => values.map((value) => (Number.isInteger(value) ? short(value) : "")) }],
      series: [{}, { stroke: refused, fill: refused, width: 0, paths: uPlot.paths.bars({ size: [0.9, 100], align: 0 }), points: { show: false } },
        { stroke: color("whole"), width: 1.5, paths: uPlot.paths.stepped({ align: 0 }), points: { show: false } }],
      hooks: { setSelect: [(one) => {
        if (one.select.width < 3) return;
        const from = one.posToVal(one.select.left, "x");
        const to = one.posToVal(one.select.left + one.select.width, "x");
        one.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        look(from, to);
      }] },
    }, bins(), holder);
    draw();
  }

  holder.addEventListener("dblclick", () => look(0, most));
  holder.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const [from, to] = view;
    const step = (to - from) * 0.2;
    const moves = {
      w: () => look(from + step, to - step), s: () => look(from - step, to + step), "+": () => look(from + step, to - step), "-": () => look(from - step, to + step),
      a: () => look(Math.max(0, from - step), Math.max(0, from - step) + to - from), d: () => look(Math.min(most, to + step) - (to - from), Math.min(most, to + step)), 0: () => look(0, most),
    };
    moves.ArrowLeft = moves.a; moves.ArrowRight = moves.d; moves.ArrowUp = moves.w; moves.ArrowDown = moves.s;
    const move = moves[event.key];
    if (move) { event.preventDefault(); move(); }
  });
  window.addEventListener("theme", () => plot && make(), { signal });

  return {
    element: holder,
    tools: h("div", { class: "actions" }, status, reset),
    legend,
    object(name) { only = name; draw(); },
    start() {
      make();
      exits.watch(draw, signal);
      coming.then((found) => { whole = found; legend.hidden = !found; draw(); }).catch(() => { /* the refused ones are there */ });
      const watch = new ResizeObserver(() => plot && holder.clientWidth && plot.setSize({ width: holder.clientWidth, height: plot.height }));
      watch.observe(holder);
      signal.addEventListener("abort", () => { watch.disconnect(); plot?.destroy(); plot = null; });
    },
  };
}
