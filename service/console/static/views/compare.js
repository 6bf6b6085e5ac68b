// Two results side by side: two policies over one trace, or one policy before and after a change.

import { h, fill, add, field, select, problemBox, tableScroll } from "../dom.js";
import { ago, count, plural, seconds, short } from "../format.js";
import * as api from "../api.js";

export async function show({ root, query, signal }) {
  document.title = "Compare – Subpage";
  const machines = [];
  await api.pages("/v1/vms", "vms", (page) => machines.push(...page), { signal, query: { limit: 1000 } });
  machines.reverse();
  const chosen = { a: query.get("a") ?? "", b: query.get("b") ?? "" };
  const result = h("div", { class: "stack", role: "status" });
  const pickers = await Promise.all(["a", "b"].map((side) => picker(side)));
  add(root, [h("h1", {}, "Compare two results"), h("section", { class: "panel" }, h("div", { class: "columns" }, pickers)), result]);
  await draw();

  async function picker(side) {
    const [vm, trace] = chosen[side].split("/");
    const traces = select([], "", { onchange: () => { chosen[side] = traces.value ? `${machine.value}/${traces.value}` : ""; remember(); draw(); } });
    const machine = select([["", "Choose a machine"], ...machines.map((one) => [one.id, `${one.name || "unnamed"} · ${one.id}`])], vm ?? "", { onchange: () => list("") });
    async function list(wanted) {
      const found = [];
      if (machine.value) await api.pages(`/v1/vms/${machine.value}/traces`, "traces", (page) => found.push(...page), { signal, query: { limit: 1000 } });
      found.reverse();
      fill(traces, h("option", { value: "" }, found.length ? "Choose a result" : "No result yet"), found.map((one) => h("option", { value: one.id, selected: one.id === wanted }, `${plural(one.violations, "refusal")} of ${short(one.writes)} writes, ${ago(one.created)} · ${one.id}`)));
      traces.disabled = !found.length;
    }
    await list(trace ?? "").catch(() => {});
    return h("fieldset", {}, h("legend", { class: "sr" }, side === "a" ? "First result" : "Second result"), h("div", { class: "stack tight" }, h("h2", {}, side === "a" ? "Before, or this policy" : "After, or that policy"), field("Machine", machine), field("Result", traces)));
  }

  function remember() { history.replaceState(null, "", `#/compare?${new URLSearchParams(Object.entries(chosen).filter(([, value]) => value))}`); }

  async function draw() {
    if (!chosen.a || !chosen.b) { fill(result, h("section", { class: "panel empty" }, h("strong", {}, "Choose two results"), h("p", {}, "Of one machine or of two: the same trace under two policies says what a policy costs."))); return; }
    try {
      const [a, b] = await Promise.all(["a", "b"].map((side) => { const [vm, trace] = chosen[side].split("/"); return api.get(`/v1/vms/${encodeURIComponent(vm)}/traces/${encodeURIComponent(trace ?? "")}`, { signal }); }));
      fill(result, comparison(a, b));
    } catch (error) { if (!api.isAbort(error)) fill(result, problemBox(error)); }
  }
}

/** A difference with its sign, in words where there is none. */
function change(before, after) {
  if (before === after) return h("span", { class: "muted" }, "same");
  const more = after - before;
  return h("span", { class: `chip ${more > 0 ? "bad" : "good"}` }, `${more > 0 ? "+" : "−"}${count(Math.abs(more))}`);
}

export function comparison(a, b) {
  const more = b.violations - a.violations;
  const sentence = more === 0 ? "Both refuse as many writes." : `The second refuses ${plural(Math.abs(more), "write")} ${more > 0 ? "more" : "fewer"}${a.violations && b.violations ? `: ${(Math.max(a.violations, b.violations) / Math.min(a.violations, b.violations)).toFixed(1)} times ${more > 0 ? "as many" : "fewer"}` : ""}.`;
  const most = Math.max(1, a.violations, b.violations, a.page_granular_violations, b.page_granular_violations);
  const bar = (label, value, pale) => h("div", {}, h("span", {}, label), h("span", { class: `bar-line ${pale ? "pale" : ""}`, style: { width: `${(100 * value) / most}%` } }), h("b", {}, count(value)));
  const names = [...new Set([...Object.keys(a.by_object), ...Object.keys(b.by_object)])];
  const of = (trace, name) => trace.by_object[name]?.violations ?? null;
  const rows = names.map((name) => ({ name, a: of(a, name), b: of(b, name) })).sort((one, other) => Math.abs((other.b ?? 0) - (other.a ?? 0)) - Math.abs((one.b ?? 0) - (one.a ?? 0)) || (other.b ?? 0) - (one.b ?? 0));
  const line = (label, get, show = count) => h("tr", {}, h("th", { scope: "row" }, label), h("td", { class: "number" }, show(get(a))), h("td", { class: "number" }, show(get(b))), h("td", { class: "number" }, show === count ? change(get(a), get(b)) : ""));
  const head = (first) => h("thead", {}, h("tr", {}, h("th", { scope: "col" }, first), h("th", { scope: "col", class: "number" }, "First"), h("th", { scope: "col", class: "number" }, "Second"), h("th", { scope: "col", class: "number" }, "Change")));
  return [
    h("section", { class: "panel hero", "aria-label": "Outcome" }, h("h2", {}, sentence), h("div", { class: "bars" }, bar("First, sub-pages", a.violations), bar("Second, sub-pages", b.violations), bar("First, whole pages", a.page_granular_violations, true), bar("Second, whole pages", b.page_granular_violations, true)),
      a.writes !== b.writes && h("p", { class: "note" }, `They are not of one trace: ${count(a.writes)} writes and ${count(b.writes)}.`)),
    h("div", { class: "columns" },
      h("section", { class: "panel flush", "aria-label": "Totals" }, h("div", { class: "map-tools" }, h("h2", {}, "Totals")), tableScroll(h("table", {}, head("Total"), h("tbody", {},
        line("Writes replayed", (one) => one.writes), line("Refused writes", (one) => one.violations), line("With whole pages", (one) => one.page_granular_violations), line("Exits, internal ones too", (one) => Object.values(one.exits).reduce((sum, value) => sum + value, 0)), line("Not enforced", (one) => one.unenforced_writes), line("Outside of memory", (one) => one.mmio), line("Took", (one) => one.seconds, seconds))))),
      h("section", { class: "panel flush", "aria-label": "By object" }, h("div", { class: "map-tools" }, h("h2", {}, "Refused, by object")), rows.length ? tableScroll(h("table", {}, head("Object"), h("tbody", {}, rows.map((row) => h("tr", { class: row.a || row.b ? "" : "dim" }, h("th", { scope: "row" }, row.name), h("td", { class: "number" }, row.a === null ? "–" : count(row.a)), h("td", { class: "number" }, row.b === null ? "–" : count(row.b)), h("td", { class: "number" }, change(row.a ?? 0, row.b ?? 0))))))) : h("p", { class: "empty" }, "No object was protected in either."))),
  ];
}
