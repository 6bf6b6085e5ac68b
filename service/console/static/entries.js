// Table entries as their bit fields, with what the manual says of each.
//
// EPT: Intel SDM volume 3C, section 30.3.2 "EPT Translation Mechanism". SPPT: section 30.3.4 "Sub-Page Write Permissions".

import { h } from "./dom.js";
import { word } from "./format.js";
import { bitsText } from "./exits.js";

const MEMORY_TYPES = { "0x0": "uncacheable", "0x1": "write combining", "0x4": "write through", "0x5": "write protected", "0x6": "write back" };

// name: [bits, short name, meaning]
const EPT = {
  read: ["0", "R", "Read access. An entry without read, write and execute is not present."],
  write: ["1", "W", "Write access. Clear with bit 61 set in a 4-KByte leaf: the sub-page permissions decide."],
  execute: ["2", "X", "Execute access; for supervisor-mode addresses only, where mode-based execute control is on."],
  memory_type: ["5:3", "memory type", "EPT memory type of the page: 0 UC, 1 WC, 4 WT, 5 WP, 6 WB; others are misconfigurations."],
  ignore_pat: ["6", "ignore PAT", "The guest's PAT does not count for the memory type."],
  page: ["7", "large page", "In a PDPTE or PDE: the entry maps a page of 1 GByte or 2 MBytes. Ignored in a PTE."],
  accessed: ["8", "A", "Accessed: software has used the page, where EPT has accessed and dirty flags."],
  dirty: ["9", "D", "Dirty: software has written the page, where EPT has accessed and dirty flags."],
  user_execute: ["10", "XU", "Execute access for user-mode addresses, where mode-based execute control is on."],
  address: ["51:12", "address", "Physical address of the page, or of the next table."],
  verify_paging: ["57", "verify guest paging", "HLAT: paging structures that lead here must have been translated with paging-write."],
  paging_write: ["58", "paging-write", "The processor may write the guest's paging structures in this page."],
  supervisor_shadow_stack: ["60", "SSS", "Supervisor shadow-stack accesses are allowed."],
  spp: ["61", "SPP", "Sub-page write permissions: a refused write to this page goes on in the SPPT. Needs secondary control 23."],
  suppress_ve: ["63", "suppress #VE", "An EPT violation here exits and is never turned into a virtualization exception."],
  reserved: ["", "reserved", "Bits that must be 0 and are not: a misconfiguration."],
};
const SPPT = {
  valid: ["0", "valid", "The entry points to the next table. 0: an SPP miss (exit 66), which KVM fills."],
  address: ["51:12", "address", "Physical address of the next SPPT table."],
  reserved: ["", "reserved", "Bits that must be 0 and are not: an SPP misconfiguration (exit 66)."],
  writable_subpages: ["even", "vector", "Bit 2s is the write permission of sub-page s. An entry of 0 refuses all 32."],
};

/** One entry of a walk. `edit(entry)` is offered where it is given, `tell(text)` hears what a field means; `hit` are the
 * sub-pages that the access touches. */
export function entryCard(entry, { deciding = false, hit = 0, edit = null, tell = () => {} } = {}) {
  const sppt = entry.structure.startsWith("SPP");
  const names = sppt ? SPPT : EPT;
  const bits = Object.entries(entry.fields).filter(([name, value]) => name !== "writable_subpages" && (name !== "reserved" || value !== "0x0")).map(([name, value]) => {
    const [where, label, about] = names[name] ?? ["", name.replaceAll("_", " "), ""];
    const shown = name === "memory_type" ? `${Number(value)} ${MEMORY_TYPES[value] ?? "reserved"}` : value === "0x0" || value === "0x1" ? Number(value) : value;
    const say = () => tell(`${label}${where ? `, bit${where.includes(":") ? "s" : ""} ${where}` : ""}: ${about}`);
    return h("button", { type: "button", class: `bit ${value === "0x0" ? "off" : ""} ${name === "reserved" ? "wrong" : ""}`, onmouseenter: say, onfocus: say, onclick: say, "aria-description": about },
      h("span", {}, label, where && h("span", { class: "muted" }, ` ${where}`)), h("span", { class: "sr" }, ": "), h("b", {}, shown));
  });
  const vector = entry.fields.writable_subpages;
  return h("article", { class: `entry ${deciding ? "deciding" : ""}`, "aria-label": entry.structure },
    h("div", { class: "spread" },
      h("h3", {}, h("b", {}, entry.structure), `  entry ${entry.index} of the table at `, h("span", { class: "mono" }, entry.table)),
      h("div", { class: "actions" }, deciding && h("span", { class: "chip bad" }, "decides"), entry.absent && h("span", { class: "chip warn" }, "no table memory here"), edit && h("button", { type: "button", class: "small", onclick: () => edit(entry) }, "Edit"))),
    h("div", { class: "mono small" }, word(entry.raw)),
    vector !== undefined && h("div", { role: "img", "aria-label": `Writable sub-pages: ${bitsText(Number(vector))}`, class: "vector" },
      Array.from({ length: 32 }, (_, s) => h("i", { class: `${(Number(vector) >>> s) & 1 ? "" : "denied"} ${(hit >>> s) & 1 ? "hit" : ""}`, title: `sub-page ${s}` }))),
    bits.length > 0 && h("div", { class: "bits" }, bits));
}
