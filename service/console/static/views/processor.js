// Processor: what each virtual processor has cached, what it has still to flush, and what decides over its nested state.

import { h, fill, add, field, select, problemBox, tableScroll } from "../dom.js";
import { bytes, count, plural } from "../format.js";
import * as api from "../api.js";

export async function show({ root, machine, signal }) {
  const place = h("div", { class: "stack" });
  const vcpu = select(machine.vm.vcpus.map((one) => [String(one.id), `vCPU ${one.id}${one.vp_index !== null ? ` · VP ${one.vp_index}` : ""}`]), undefined, { onchange: () => draw() });
  add(root, [
    h("div", { class: "spread" }, h("div", { class: "fields" }, field("Processor", vcpu)), h("button", { type: "button", onclick: () => draw() }, "Read again")),
    place,
  ]);

  async function draw() {
    const home = `${machine.path}/vcpus/${vcpu.value}`;
    const perhaps = (promise) => promise.catch((error) => { if (api.isAbort(error)) throw error; return error; });
    try {
      const [tlb, queue, partitions, nested, counters] = await Promise.all([
        api.get(`${home}/tlb`, { signal }), perhaps(api.get(`${home}/flush-queue`, { signal })), perhaps(api.get(`${machine.path}/partitions`, { signal })),
        perhaps(api.get(`${home}/nested-state`, { signal })), api.get(`${machine.path}/counters`, { signal }),
      ]);
      fill(place,
        h("div", { class: "columns" }, vpPanel(partitions, vcpu.value), queuePanel(queue)),
        tlbPanel(tlb.entries, machine.vm.translation_cache),
        nestedPanel(home, nested, signal), countersPanel(counters.counters));
    } catch (error) { if (!api.isAbort(error)) fill(place, problemBox(machine.guard(error), draw)); }
  }
  await draw();
}

function refused(title, problem) {
  return h("section", { class: "panel", "aria-label": title }, h("h2", {}, title), h("p", { class: "muted" }, problem.message));
}

function vpPanel(partitions, chosen) {
  if (partitions instanceof Error) return refused("Partitions", partitions);
  return h("section", { class: "panel flush", "aria-label": "Virtual processors" }, h("div", { class: "map-tools" }, h("h2", {}, "Virtual processors"), h("span", { class: "chip" }, `L0: ${partitions.l0}`)),
    tableScroll(h("table", {}, h("thead", {}, h("tr", {}, ["vCPU", "VP", "Partition", "Nested flush", "Direct hypercalls"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, partitions.vps.map((vp) => h("tr", {}, h("th", { scope: "row" }, vp.vcpu, String(vp.vcpu) === chosen && h("span", { class: "sr" }, " (shown)")), h("td", {}, vp.vp_index), h("td", { class: "mono" }, vp.vm_id),
        h("td", {}, vp.nested_flush ? h("span", { class: "chip good" }, "on") : h("span", { class: "muted" }, "off")), h("td", {}, vp.direct_hypercall ? h("span", { class: "chip good" }, "on") : h("span", { class: "muted" }, "off"))))))));
}

function queuePanel(queue) {
  if (queue instanceof Error) return refused("Still to flush", queue);
  const all = [...queue.own.map((one) => ["own", one]), ...queue.nested.map((one) => ["nested", one])];
  return h("section", { class: "panel", "aria-label": "Still to flush" }, h("header", {}, h("h2", {}, "Still to flush"), queue.requested ? h("span", { class: "chip warn" }, "requested") : h("span", { class: "chip good" }, "nothing waits")),
    all.length ? h("ul", {}, all.map(([whose, one]) => h("li", { class: "mono small" }, `${whose}: ${typeof one === "object" ? JSON.stringify(one) : one}`))) : h("p", { class: "muted" }, "No flush is queued for this processor."),
    h("dl", { class: "pairs" }, h("dt", {}, "Whole flushes"), h("dd", {}, count(queue.tlb_flush)), h("dt", {}, "Hypercalls made"), h("dd", {}, count(queue.hypercalls))));
}

function tlbPanel(entries, cache) {
  const MOST = 500;
  const rights = (one) => `${one.readable ? "r" : "-"}${one.writable ? "w" : "-"}${one.executable ? "x" : "-"}`;
  return h("section", { class: "panel flush", "aria-label": "Translation cache" }, h("div", { class: "map-tools spread" }, h("h2", {}, `Translation cache · ${plural(entries.length, "entry", "entries")}`), entries.length > MOST && h("span", { class: "muted small" }, `the first ${MOST}`)),
    entries.length ? tableScroll(h("table", {}, h("thead", {}, h("tr", {}, ["Kind", "Address", "Guest-physical", "Size", "Rights", "EPT root", "VPID", "Leaf", "Sub-pages"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, entries.slice(0, MOST).map((one) => h("tr", {}, h("td", {}, one.kind, one.global && " · global"), h("td", { class: "mono" }, one.address), h("td", { class: "mono" }, one.gpa), h("td", {}, bytes(2 ** one.page_bits)), h("td", { class: "mono" }, rights(one)), h("td", { class: "mono" }, one.ept_root), h("td", {}, one.vpid ?? "–"), h("td", { class: "mono" }, one.leaf), h("td", { class: "mono" }, one.spp_vector ?? "–"))))))
      : h("div", { class: "empty" }, h("p", {}, cache === "off" ? "This machine models no stale translations: every access reads the tables. Make one with “Model stale translations” to see what a forgotten flush leaves behind." : "Nothing is cached.")));
}

function nestedPanel(home, nested, signal) {
  if (nested instanceof Error) return refused("Nested state", nested);
  const place = h("div", {});
  const only = h("input", { type: "checkbox", onchange: () => draw() });
  let told = null;
  function draw() {
    if (!told) return;
    const trail = told.trail.filter((check) => !only.checked || check.outcome !== "pass");
    fill(place, h("p", { class: "sentence" }, told.errno ? `Refused: ${told.says} (${told.errno}).` : `Accepted: ${told.says}.`),
      tableScroll(h("table", {}, h("thead", {}, h("tr", {}, ["Check", "Outcome", "Field", "Found", "Required"].map((text) => h("th", { scope: "col" }, text)))),
        h("tbody", {}, trail.map((check) => h("tr", {}, h("td", { class: "mono" }, check.check), h("td", {}, h("span", { class: `chip ${check.outcome === "pass" ? "good" : check.outcome === "fail" ? "bad" : ""}` }, check.outcome)), h("td", { class: "mono" }, check.field ?? "–"), h("td", {}, check.found ?? "–"), h("td", {}, check.required ?? check.says)))))));
  }
  api.call("POST", `${home}/nested-state:explain`, { json: nested, signal }).then((answer) => { told = answer; draw(); }).catch((error) => { if (!api.isAbort(error)) fill(place, problemBox(error)); });
  return h("section", { class: "panel", "aria-label": "Nested state" }, h("header", {}, h("h2", {}, "Nested state: what loading it would check"), h("label", { class: "check small" }, only, "Hide what passes")), place);
}

function countersPanel(counters) {
  return h("details", { class: "panel" }, h("summary", {}, h("b", {}, "Counters of the machine")), h("dl", { class: "pairs number" }, Object.entries(counters).map(([name, value]) => [h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, count(value))])));
}
