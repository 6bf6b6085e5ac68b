// Walk: what the processor reads for an access, entry by entry, and how it ends.

import { h, fill, add, field, select, dialog, problemBox, toast } from "../dom.js";
import { hex, parseAddress } from "../format.js";
import { bitsText } from "../exits.js";
import { entryCard } from "../entries.js";
import * as api from "../api.js";

export async function show({ root, machine, query, signal }) {
  const gpa = h("input", { class: "mono", value: query.get("gpa") ?? "", placeholder: "0x2a5c6a0", required: true, spellcheck: "false", autocomplete: "off" });
  const access = select(["write", "read", "execute"], query.get("access") ?? "write");
  const size = h("input", { type: "number", min: 1, max: 65535, value: query.get("size") ?? 8 });
  const vcpu = select(machine.vm.vcpus.map((one) => [String(one.id), `vCPU ${one.id}`]), query.get("vcpu") ?? String(machine.vm.vcpus[0]?.id ?? 0));
  const result = h("div", { class: "stack" });
  const meaning = h("p", { class: "meaning", hidden: true });
  const tell = (text) => { meaning.hidden = false; fill(meaning, text); };
  const undo = h("button", { type: "button", hidden: true, onclick: undoLast }, "Undo");
  const done = []; // { path, raw } to be stored back
  let stage = "now";

  add(root, [
    h("form", { class: "panel", "aria-label": "Access", onsubmit: (event) => { event.preventDefault(); walk(); } },
      h("div", { class: "fields" }, field("Guest-physical address", gpa), field("Access", access), field("Bytes", size), field("On", vcpu), h("div", { class: "actions" }, h("button", { type: "submit", class: "primary" }, "Walk"), undo)),
      h("p", { class: "hint" }, "A walk changes nothing: no flag is set, no entry filled. Point at a field of an entry, or reach it with Tab, for its meaning.")),
    result, meaning,
  ]);

  async function walk() {
    const address = parseAddress(gpa.value);
    gpa.setAttribute("aria-invalid", address === null);
    if (address === null) { fill(result, problemBox({ title: "Address", message: `“${gpa.value}” must be an address such as 0x2a5c6a0.` })); return; }
    history.replaceState(null, "", `#/vms/${machine.id}/walk?gpa=${hex(address)}&access=${access.value}&size=${size.value}&vcpu=${vcpu.value}`);
    try {
      draw(await api.get(`${machine.path}/walk`, { query: { gpa: hex(address), access: access.value, size: size.value, vcpu: vcpu.value }, signal }));
    } catch (error) { if (!api.isAbort(error)) fill(result, problemBox(machine.guard(error))); }
  }

  function draw(told) {
    const then = told.then;
    const same = then.sentence === told.sentence;
    if (same) stage = "now";
    const shown = stage === "then" ? then : told;
    const refused = then.resolution === "violation";
    const ends = { completed: ["good", "goes through"], violation: ["bad", "is refused"], mmio: ["warn", "is MMIO"] }[then.resolution] ?? ["warn", then.resolution];
    const choose = (value, text) => h("button", { type: "button", class: "small", "aria-pressed": String(stage === value), onclick: () => { stage = value; draw(told); } }, text);
    const denied = Number(shown.denied);
    const decides = (entries, position) => {
      const last = position === entries.length - 1;
      if (!last) return false;
      if (stage === "now" ? told.outcome === "allowed" : !refused) return false;
      return shown.sppt.length ? entries === shown.sppt : true;
    };
    const card = (entries, kind) => entries.map((entry, position) => entryCard(entry, {
      deciding: decides(entries, position), hit: Number(told.subpages), tell,
      edit: stage === "now" ? (one) => editEntry(kind, one) : null,
    }));
    fill(result,
      h("section", { class: "panel", "aria-label": "Outcome" },
        h("div", { class: "chips" }, h("span", { class: `chip ${ends[0]}` }, `the access ${ends[1]}`), told.reason !== null && stage === "now" && h("span", { class: "chip" }, `exit ${told.reason}, qualification ${told.qualification}`), h("span", { class: "chip" }, `sub-pages ${bitsText(Number(told.subpages))}`), denied > 0 && h("span", { class: "chip bad" }, `denied: ${bitsText(denied)}`)),
        h("p", { class: "sentence" }, sentence(shown.sentence)),
        !same && h("div", { class: "spread" }, h("div", { class: "group", role: "group", "aria-label": "Moment" }, choose("now", "As the tables are now"), choose("then", "After KVM has handled it")),
          stage === "now" ? h("p", { class: "muted small" }, "In the end: ", then.sentence) : h("p", { class: "muted small" }, `After ${then.exits.length} exits, on a copy of the machine that is thrown away.`))),
      h("div", { class: "columns" },
        h("section", { class: "chain", "aria-label": "EPT entries" }, h("h2", {}, "EPT"), shown.ept.length ? card(shown.ept, "ept") : h("p", { class: "muted" }, "No EPT entry is read.")),
        h("section", { class: "chain", "aria-label": "SPPT entries" }, h("h2", {}, "SPPT"), shown.sppt.length ? card(shown.sppt, "sppt") : h("p", { class: "muted" }, "The walk does not get here: bit 61 of the leaf is 0, or EPT has decided already."))));
  }

  async function editEntry(kind, entry) {
    const raw = h("input", { class: "mono", value: entry.raw, spellcheck: "false", autocomplete: "off" });
    const problem = h("div", {});
    const address = parseAddress(gpa.value);
    const path = `${machine.path}/${kind}/${entry.level}/${hex(address)}`;
    const stored = await dialog(`Edit ${entry.structure}`, (close) => h("form", {
      async onsubmit(event) {
        event.preventDefault();
        try { close(await api.call("PUT", path, { json: { raw: raw.value.trim() } })); } catch (error) { raw.setAttribute("aria-invalid", "true"); fill(problem, problemBox(error)); }
      },
    },
    field("The 64 bits", raw, "Stored as they are: malformed entries are legal, and nothing is flushed from the translation caches."), problem,
    h("div", { class: "actions" }, h("button", { type: "button", onclick: () => close() }, "Cancel"), h("button", { type: "submit", class: "primary" }, "Store"))));
    if (!stored) return;
    done.push({ path, raw: entry.raw, structure: entry.structure });
    undo.hidden = false;
    await walk();
  }

  async function undoLast() {
    const last = done.pop();
    undo.hidden = !done.length;
    try { await api.call("PUT", last.path, { json: { raw: last.raw } }); toast(`${last.structure} is as it was.`); } catch (error) { toast(error.message, "bad"); }
    await walk();
  }

  if (gpa.value) await walk();
  else fill(result, h("section", { class: "panel empty" }, h("strong", {}, "Which access?"), h("p", {}, "Give an address, and see each entry that the processor reads for it and what decides.")));
}

const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}.`;
