// The parts of a result that several views show.

import { h, tableScroll } from "./dom.js";
import { count, plural, seconds, short } from "./format.js";

const factor = (trace) => (trace.violations ? trace.page_granular_violations / trace.violations : null);

/** The answer in a sentence, and the two numbers as lengths. */
export function hero(trace) {
  const most = Math.max(trace.violations, trace.page_granular_violations, 1);
  const times = factor(trace);
  const sentence = !trace.page_granular_violations && !trace.violations ? "No write of this trace was refused."
    : times === null ? `Nothing was refused; whole pages would have cost ${plural(trace.page_granular_violations, "exit")}.`
      : times > 1.005 ? `Whole pages would have cost ${times >= 10 ? count(Math.round(times)) : times.toFixed(1)} times as many exits.`
        : "Whole pages would have cost as many exits.";
  const line = (label, value, pale) => h("div", {}, h("span", {}, label), h("span", { class: `bar-line ${pale ? "pale" : ""}`, style: { width: `${(100 * value) / most}%` } }), h("b", {}, count(value)));
  return h("section", { class: "panel hero", "aria-label": "Result" }, h("h2", {}, sentence),
    h("div", { class: "bars" }, line("Sub-pages", trace.violations, false), line("Whole pages", trace.page_granular_violations, true)),
    trace.stopped_at !== null && h("p", { class: "note" }, `The replay ended at record ${count(trace.stopped_at)}; a replay with start=${trace.stopped_at} goes on there.`));
}

export function totals(trace) {
  const tile = (label, value, note) => h("div", { class: "tile" }, h("dt", {}, label), h("dd", {}, value), note && h("dd", { class: "about" }, note));
  const internal = Object.entries(trace.exits).filter(([, value]) => value).map(([name, value]) => `${short(value)} ${name.replaceAll("_", " ").replace("ept", "EPT").replace("spp", "SPP")}`).join(", ");
  return h("dl", { class: "tiles" },
    tile("Writes replayed", short(trace.writes), trace.writes === trace.records ? "every record" : `of ${short(trace.records)} records`),
    tile("Took", seconds(trace.seconds), `${short(Math.round(trace.records / Math.max(trace.seconds, 1e-6)))} records a second`),
    tile("VM exits, internal ones too", short(Object.values(trace.exits).reduce((sum, one) => sum + one, 0)), internal),
    tile("Outside of memory", short(trace.mmio), "MMIO"),
    trace.unenforced_writes > 0 && tile("Not enforced", short(trace.unenforced_writes), "went through although a bitmap refuses them"),
    trace.stale_translations > 0 && tile("Stale translations", short(trace.stale_translations), "decided against the tables"),
    trace.exit_records_dropped > 0 && tile("Not listed", short(trace.exit_records_dropped), "exit records beyond the limit; totals count them"),
    trace.skipped && tile("Lines skipped", short(Object.values(trace.skipped.reasons ?? trace.skipped).reduce((sum, one) => sum + (Number(one) || 0), 0)), `read as ${trace.format}`));
}

/** By object; a click on a name chooses it. */
export function objectTable(trace, choose) {
  const entries = Object.entries(trace.by_object).sort(([, a], [, b]) => b.violations - a.violations);
  const most = Math.max(1, ...entries.map(([, hit]) => hit.violations));
  const buttons = new Map();
  const element = h("section", { class: "panel flush", "aria-label": "By object" },
    h("div", { class: "map-tools" }, h("h2", {}, "By object"), h("span", { class: "muted small" }, "Choose one to see only its exits")),
    entries.length ? tableScroll(h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Object"), h("th", { scope: "col", class: "number" }, "Sub-pages"), h("th", { scope: "col", class: "number" }, "Refused"), h("th", { scope: "col", class: "share" }, h("span", { class: "sr" }, "Share")), h("th", { scope: "col", class: "number" }, "Neighbours only"), h("th", { scope: "col", class: "number" }, "First record"))),
      h("tbody", {}, entries.map(([name, hit]) => {
        const button = h("button", { type: "button", class: "small", "aria-pressed": "false", disabled: !hit.violations, onclick: () => choose(name) }, name);
        buttons.set(name, button);
        return h("tr", { class: hit.violations ? "" : "dim" }, h("th", { scope: "row" }, hit.violations ? button : name), h("td", { class: "number" }, count(hit.subpages)), h("td", { class: "number" }, count(hit.violations)),
          h("td", { class: "share", style: { width: "22%" } }, hit.violations > 0 && h("span", { class: "meter", style: { width: `${(100 * hit.violations) / most}%`, "margin-top": "0.5em" } })),
          h("td", { class: "number" }, count(hit.collateral)), h("td", { class: "number" }, hit.first_index === null ? "–" : count(hit.first_index)));
      })))) : h("p", { class: "empty" }, "No object was protected."));
  return { element, mark(name) { for (const [one, button] of buttons) button.setAttribute("aria-pressed", one === name); } };
}

/** Who wrote: by the instruction, where the trace says it. */
export function writerTable(exits) {
  const MOST = 50;
  const sums = new Float64Array(exits.writers.texts.length);
  for (let at = 0; at < exits.length; at++) sums[exits.writer[at]]++;
  const order = [...sums.keys()].filter((id) => id && sums[id]).sort((a, b) => sums[b] - sums[a]);
  const most = sums[order[0]] || 1;
  return h("section", { class: "panel flush", "aria-label": "By writer" }, h("div", { class: "map-tools" }, h("h2", {}, "By writer"), h("span", { class: "muted small" }, `${plural(order.length, "instruction")}${order.length > MOST ? `, the first ${MOST}` : ""}`)),
    tableScroll(h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Instruction"), h("th", { scope: "col", class: "number" }, "Refused"), h("th", { scope: "col", class: "share" }, h("span", { class: "sr" }, "Share")))),
      h("tbody", {}, order.slice(0, MOST).map((id) => h("tr", {}, h("th", { scope: "row", class: "mono" }, exits.writers.texts[id]), h("td", { class: "number" }, count(sums[id])), h("td", { class: "share", style: { width: "30%" } }, h("span", { class: "meter", style: { width: `${(100 * sums[id]) / most}%`, "margin-top": "0.5em" } }))))))));
}
