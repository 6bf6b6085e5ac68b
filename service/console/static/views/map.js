// The map: a row a page, 32 cells a row. From the whole guest down to the bytes of a sub-page.

import { h, fill, add, field, icon, select, problemBox, toast, newId, tableScroll } from "../dom.js";
import { bytes, count, hex, parseAddress, plural } from "../format.js";
import { bitsText, exitsOf } from "../exits.js";
import { PageMap } from "../pagemap.js";
import { Heatmap } from "../heatmap.js";
import { costOf, slotOf, slotText } from "./machine.js";
import * as api from "../api.js";

export async function show({ root, machine, query, signal }) {
  const pages = new PageMap(machine);
  const traces = [];
  await Promise.all([
    pages.load(signal),
    api.pages(`${machine.path}/traces`, "traces", (page) => traces.push(...page), { signal }),
  ]);
  traces.reverse();
  const inspector = h("aside", {});
  const live = h("div", { class: "sr", role: "status", "aria-live": "polite" });
  const heat = new Heatmap(pages, { select: (gfn, s, how) => inspect(gfn, s, how), toggle: (gfn, s) => toggle(gfn, s) });
  const whole = h("button", { type: "button", class: "small", "aria-pressed": "false", onclick: () => setMode("all") }, "All memory");
  const some = h("button", { type: "button", class: "small", "aria-pressed": "true", onclick: () => setMode("some") }, "Pages that matter");
  const which = select([["", "No trace"], ...traces.map((trace) => [trace.id, `${trace.id.slice(0, 9)}… · ${plural(trace.violations, "refusal")}`])], "", { onchange: () => useTrace(which.value) });
  const go = h("input", { class: "mono", placeholder: "Address or object", spellcheck: "false", autocomplete: "off", id: newId("go"), "aria-label": "Go to an address or an object", list: "objects-of-map" });
  const names = h("datalist", { id: "objects-of-map" }, [...new Set(pages.objects.map((object) => object.name))].slice(0, 500).map((name) => h("option", { value: name })));

  function setMode(mode) {
    heat.setMode(mode);
    whole.setAttribute("aria-pressed", mode === "all");
    some.setAttribute("aria-pressed", mode === "some");
  }

  const tools = h("div", { class: "map-tools" },
    h("div", { class: "group", role: "group", "aria-label": "What is shown" }, some, whole),
    h("div", { class: "group", role: "group", "aria-label": "Zoom" },
      h("button", { type: "button", class: "small", "aria-label": "Zoom out", title: "Zoom out (−)", onclick: () => heat.zoom(1 / 1.5) }, icon("minus")),
      h("button", { type: "button", class: "small", "aria-label": "Zoom in", title: "Zoom in (+)", onclick: () => heat.zoom(1.5) }, icon("plus")),
      h("button", { type: "button", class: "small", "aria-label": "Fit everything", title: "Fit everything (0)", onclick: () => heat.fit() }, icon("fit"))),
    h("form", { onsubmit: (event) => { event.preventDefault(); jump(); } }, go, names),
    traces.length > 0 && field("Trace", which));

  const legend = h("div", { class: "legend" },
    h("span", {}, h("i", {}), "may be written"),
    h("span", {}, h("i", { class: "denied" }), "denied"),
    h("span", {}, h("i", { class: "refused" }), "writes refused, few to many"),
    traces.some((trace) => trace.footprint) && h("span", {}, h("i", { class: "written" }), "written by the trace, little to much"),
    pages.tracking !== "off" && h("span", {}, h("i", { class: "written" }), "written since the last harvest"),
    h("span", { class: "wide-only" }, "Arrows move, space sets or clears a bit, + − zoom, 0 fits"));

  const table = pageTable(pages, (gfn) => heat.goTo(gfn, firstOf(pages, gfn)));
  add(root, [
    !machine.vm.spp && h("p", { class: "note" }, "Sub-page protection is off on this machine: nothing can be denied until it is enabled."),
    !pages.scanned && h("p", { class: "note" }, "This guest is larger than 16 GiB: bitmaps are shown for the first 16 GiB, objects and refused writes for all of it."),
    h("div", { class: "split" }, h("section", { class: "panel flush", "aria-label": "Heatmap of pages" }, tools, heat.element, legend), inspector),
    live,
    slotsPanel(machine, pages),
    table.element,
  ]);
  heat.start(signal);

  function jump() {
    const name = go.value.trim();
    const object = pages.objects.find((one) => one.name === name);
    const address = object ? object.gpa : parseAddress(name);
    const gfn = address === null ? null : Math.floor(address / 4096);
    if (gfn === null || !slotOf(machine.vm, gfn)) {
      go.setAttribute("aria-invalid", "true");
      toast(address === null ? `“${name}” is no object here, and no address such as 0x2a5c6a0.` : `${hex(address)} is in no memory slot.`, "bad");
      return;
    }
    go.removeAttribute("aria-invalid");
    heat.goTo(gfn, Math.floor((address % 4096) / 128));
    heat.element.focus();
  }

  function useTrace(id) {
    const trace = traces.find((one) => one.id === id);
    useFootprint(id, trace?.footprint);
    if (!trace) { pages.setExits(null); heat.changed(); table.update(); return; }
    const exits = exitsOf(machine.id, trace.id, trace.violations);
    exits.watch(() => {
      if (which.value !== id) return;
      pages.setExits(exits);
      heat.changed();
      table.update();
    }, signal);
  }

  let footprint = null;
  async function useFootprint(id, wanted = null) {
    footprint = wanted;
    try {
      const whole = await pages.setFootprint(wanted && `${machine.path}/traces/${id}/pages`, signal);
      if (!whole) toast("This trace writes to more than 100,000 pages: the map has those that it writes most.");
      if (wanted !== footprint) return;
      heat.changed();
      table.update();
      if (heat.cursor) heat.goTo(heat.cursor.gfn, heat.cursor.s, true); // other rows are around it now
    } catch (error) { if (!api.isAbort(error)) toast(machine.guard(error).message, "bad"); }
  }

  /** How many writes of the trace denying one sub-page would refuse, from the trace's footprint; null without one. */
  async function denialCost(gfn, s) {
    if (!footprint) return null;
    const objects = [{ name: "here", gpa: hex(gfn * 4096 + s * 128), size: 128 }];
    try {
      return await costOf(machine, footprint, { name: "this-sub-page", objects }, signal);
    } catch (error) {
      if (api.isAbort(error)) throw error;
      return { unknown: error.message };
    }
  }

  async function toggle(gfn, s) {
    try {
      const words = await layers(gfn);
      const set = (words.set ^ (1 << s)) >>> 0;
      await api.call("PUT", `${machine.path}/subpages`, { query: { gfn, npages: 1 }, json: { access: [hex(set)] } });
      const now = await api.get(`${machine.path}/subpages`, { query: { gfn } });
      pages.setWord(gfn, Number(now.access[0]));
      heat.changed();
      table.update();
      const open = (pages.word(gfn) >>> s) & 1;
      const said = `Sub-page ${s} of page ${hex(gfn)} ${open ? "may be written" : "is denied"}${(set >>> s) & 1 && !open ? ": a protection still denies it" : ""}.`;
      toast(said);
      await inspect(gfn, s, "quiet");
    } catch (error) { toast(machine.guard(error).message, "bad"); }
  }

  async function layers(gfn) {
    const read = async (layer) => Number((await api.get(`${machine.path}/subpages`, { query: { gfn, layer }, signal })).access[0]);
    const [set, covered, granted] = await Promise.all(["set", "protected", "granted"].map(read));
    return { set, covered, granted };
  }

  let inspected = 0;
  async function inspect(gfn, s, how) {
    const mine = ++inspected;
    const objects = pages.objectsAt(gfn, s);
    const counts = pages.refused.get(gfn);
    const open = (pages.word(gfn) >>> s) & 1;
    const refused = counts?.[s] ?? 0;
    if (how !== "quiet") fill(live, `Page ${hex(gfn)}, sub-page ${s}, ${open ? "may be written" : "denied"}${objects.length ? `, ${objects.map((one) => one.name).join(", ")}` : ""}${refused ? `, ${plural(refused, "refused write")}` : ""}.`);
    if (!slotOf(machine.vm, gfn)) return;
    let details = null;
    let content = null;
    let cost = null;
    if (how !== "pointer" || !inspector.firstChild) await new Promise((resolve) => setTimeout(resolve, 60)); // arrows held down
    if (mine !== inspected) return;
    try {
      [details, content, cost] = await Promise.all([
        machine.vm.spp ? layers(gfn) : null,
        api.octets(`${machine.path}/memory`, { query: { gpa: gfn * 4096 + s * 128, size: 128 }, signal }),
        open && machine.vm.spp ? denialCost(gfn, s) : null,
      ]);
    } catch (error) {
      if (!api.isAbort(error)) fill(inspector, problemBox(machine.guard(error)));
      return;
    }
    if (mine !== inspected) return;
    drawInspector(gfn, s, { objects, counts, open, details, content, cost });
  }

  function drawInspector(gfn, s, { objects, counts, open, details, content, cost }) {
    const address = gfn * 4096 + s * 128;
    const byProtection = details && !((~details.covered >>> s) & 1) && !((details.granted >>> s) & 1);
    const setOpen = details && (details.set >>> s) & 1;
    const cells = h("div", { class: "subpages", role: "group", "aria-label": `Sub-pages of page ${hex(gfn)}` }, Array.from({ length: 32 }, (_, n) => {
      const one = (pages.word(gfn) >>> n) & 1;
      const hits = counts?.[n] ?? 0;
      return h("button", {
        type: "button", class: hits ? "refused" : one ? "" : "denied", "aria-current": n === s ? "true" : null,
        "aria-label": `Sub-page ${n}: ${one ? "may be written" : "denied"}${hits ? `, ${plural(hits, "refused write")}` : ""}`,
        onclick: () => heat.goTo(gfn, n),
      }, n);
    }));
    const again = inspector.contains(document.activeElement) ? document.activeElement.dataset.keep : null;
    fill(inspector, h("section", { class: "panel", "aria-label": "Selected sub-page" },
      h("header", {}, h("h2", { class: "mono" }, hex(address)), h("span", { class: `chip ${open ? "good" : "denied"}` }, open ? "may be written" : "denied")),
      cells,
      h("dl", { class: "pairs" },
        h("dt", {}, "Page"), h("dd", { class: "mono" }, hex(gfn)),
        h("dt", {}, "Sub-page"), h("dd", {}, `${s}, bytes ${s * 128} – ${s * 128 + 127}`),
        h("dt", {}, "Objects"), h("dd", {}, objects.length ? objects.map((one) => h("div", {}, one.name, h("span", { class: "muted" }, ` in ${one.protection}`))) : h("span", { class: "muted" }, "none here")),
        counts && [h("dt", {}, "Refused"), h("dd", {}, `${plural(counts[s], "write")} here, ${count(counts[32])} in the page`)],
        pages.touched.has(gfn) && [h("dt", {}, "The trace"), h("dd", {}, `${plural(pages.touched.get(gfn).writes, "write")} to the page, in sub-pages ${bitsText(pages.touched.get(gfn).subpages)}`)],
        pages.written.has(gfn) && [h("dt", {}, "Written"), h("dd", {}, `sub-pages ${bitsText(pages.written.get(gfn))}`)],
        details && [h("dt", {}, "Denied by"), h("dd", {}, open ? h("span", { class: "muted" }, "nothing") : [!setOpen && "its SET bit", byProtection && "a protection"].filter(Boolean).join(" and "))]),
      details && h("div", { class: "actions" },
        h("button", { type: "button", class: setOpen ? "" : "primary", "data-keep": "toggle", onclick: () => toggle(gfn, s) }, setOpen ? (byProtection ? "Clear its SET bit, too" : "Deny writes here") : "Allow writes here"),
        h("a", { class: "button", href: `#/vms/${machine.id}/walk?gpa=${hex(address)}` }, "Walk")),
      cost?.unknown && h("p", { class: "note" }, `What denying it would cost is not known: ${cost.unknown}`),
      cost && !cost.unknown && h("p", { class: "note" }, cost.violations ? `Denying it would refuse ${plural(cost.violations, "write")} of this trace, its whole page ${count(cost.page_granular_violations)}.` : `No write of this trace comes here: denying it costs nothing, its whole page ${plural(cost.page_granular_violations, "exit")}.`),
      details && setOpen && byProtection ? h("p", { class: "note" }, "The SET bit is 1 already; the protection denies it. It ends with the protection, or by a grant.") : null,
      details && !setOpen && (counts?.[s] ?? 0) > 0 ? h("p", { class: "note" }, `Allowing it would let ${plural(counts[s], "refused write")} of this trace land.`) : null,
      h("div", { class: "hexdump", tabindex: "0", role: "region", "aria-label": "Bytes of the sub-page" }, dump(address, new Uint8Array(content)))));
    if (again) inspector.querySelector(`[data-keep="${again}"]`)?.focus();
  }

  const wanted = query.get("trace") ?? traces.find((trace) => trace.violations || trace.footprint)?.id ?? "";
  which.value = wanted;
  if (wanted) useTrace(wanted);
  const at = query.has("gpa") ? parseAddress(query.get("gpa")) : null;
  const first = pages.interesting()[0] ?? pages.slots[0]?.first;
  if (at !== null) heat.goTo(Math.floor(at / 4096), Math.floor((at % 4096) / 128), true);
  else if (first !== undefined) { heat.goTo(first, firstOf(pages, first), true); }
  else fill(inspector, h("section", { class: "panel empty" }, h("strong", {}, "This machine has no memory"), h("p", {}, "Give it a memory slot: PUT …/memory-slots/0.")));
}

/** The first sub-page of a page that is denied; 0 of one without. */
function firstOf(pages, gfn) {
  const denied = ~pages.word(gfn) >>> 0;
  return denied ? 31 - Math.clz32(denied & -denied) : 0;
}

function dump(address, content) {
  const rows = [];
  for (let at = 0; at < content.length; at += 8) {
    const part = [...content.subarray(at, at + 8)];
    rows.push(`${(address + at).toString(16).padStart(8, "0")}  ${part.map((one) => one.toString(16).padStart(2, "0")).join(" ")}  ${part.map((one) => (one >= 32 && one < 127 ? String.fromCharCode(one) : "·")).join("")}`);
  }
  return rows.join("\n");
}

function slotsPanel(machine, pages) {
  const slots = machine.vm.memory_slots;
  if (!slots.length) return null;
  return h("section", { class: "panel flush" }, h("div", { class: "map-tools" }, h("h2", {}, plural(slots.length, "memory slot"))),
    tableScroll(h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Slot"), h("th", { scope: "col" }, "Guest-physical"), h("th", { scope: "col", class: "number" }, "Size"), h("th", { scope: "col", class: "number" }, "Protected pages"), h("th", { scope: "col" }, "Host pages"), h("th", { scope: "col" }, ""))),
      h("tbody", {}, slots.map((slot) => {
        const first = Number(slot.gpa) / 4096;
        const last = first + Number(slot.size) / 4096;
        let covered = 0;
        for (const gfn of pages.words.keys()) if (gfn >= first && gfn < last) covered++;
        return h("tr", {}, h("td", {}, slot.address_space ? `${slot.slot} · SMM` : slot.slot), h("td", { class: "mono" }, slotText(slot)), h("td", { class: "number" }, bytes(Number(slot.size))),
          h("td", { class: "number" }, count(covered)), h("td", {}, bytes(slot.host_page_size)),
          h("td", {}, h("span", { class: "chips" }, slot.read_only && h("span", { class: "chip warn" }, "read-only"), slot.log_dirty && h("span", { class: "chip" }, "dirty log"))));
      })))));
}

/** The same as a table, for those who read rather than look. */
function pageTable(pages, select) {
  const MOST = 400;
  const body = h("tbody", {});
  const title = h("summary", {});
  const element = h("details", { class: "panel" }, title, tableScroll(h("table", {},
    h("thead", {}, h("tr", {}, ["Page", "Objects", "Denied sub-pages", "Refused writes"].map((text, n) => h("th", { scope: "col", class: n === 3 ? "number" : "" }, text)))), body)));
  element.addEventListener("toggle", () => update());
  function update() {
    const found = pages.interesting();
    fill(title, h("b", {}, `${plural(found.length, "page")} as a table`), h("span", { class: "muted" }, found.length > MOST ? ` · the first ${MOST} by refused writes` : ""));
    if (!element.open) return;
    const sorted = [...found].sort((a, b) => (pages.refused.get(b)?.[32] ?? 0) - (pages.refused.get(a)?.[32] ?? 0) || a - b).slice(0, MOST);
    fill(body, sorted.map((gfn) => h("tr", {},
      h("td", { class: "mono" }, h("button", { type: "button", class: "small mono", onclick: () => select(gfn) }, hex(gfn))),
      h("td", {}, [...new Set((pages.byPage.get(gfn) ?? []).map((object) => object.name))].join(", ")),
      h("td", {}, bitsText(~pages.word(gfn) >>> 0)),
      h("td", { class: "number" }, count(pages.refused.get(gfn)?.[32] ?? 0)))));
  }
  update();
  return { element, update };
}
