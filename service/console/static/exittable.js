// Exit records as a table of any length: rows are made of columns when they come in sight.

import { h, fill } from "./dom.js";
import { count, hex, plural } from "./format.js";
import { accessName, bitsText } from "./exits.js";
import { VirtualList } from "./virtual.js";

/** `range` has `from`, `to` and `object`; `filter` reads it again. */
export function exitTable(machine, exits, range, signal) {
  let chosen = null; // positions, where something is filtered
  const title = h("h2", {}, "Exits");
  const note = h("span", { class: "muted small", role: "status" });
  const list = new VirtualList({ label: "Exit records", height: 2.1, most: Math.max(360, Math.min(720, innerHeight * 0.7)), row: (position) => row(chosen ? chosen[position] : position) });

  function row(at) {
    if (at === undefined || at >= exits.length) return null;
    const gpa = exits.gpa[at];
    const objects = exits.objects.texts[exits.object[at]];
    const cells = [count(exits.index[at]), hex(gpa), String(exits.size[at]), accessName(exits.access[at]), `sub-page ${bitsText(exits.denied[at])} of ${hex(exits.gfn(at))}`, objects || "no object"];
    return h("a", { class: "exit-row", role: "listitem", href: `#/vms/${machine.id}/walk?gpa=${hex(gpa)}&size=${exits.size[at]}&access=${accessName(exits.access[at])}&vcpu=${exits.vcpu[at]}`, title: "Why: walk the tables" },
      h("span", { class: "number" }, cells[0]), h("span", { class: "mono" }, cells[1]), h("span", { class: "number" }, cells[2]), h("span", {}, cells[3]), h("span", {}, cells[4]), h("span", { class: objects ? "" : "muted" }, cells[5]));
  }

  function filter() {
    const whole = range.from === -Infinity && range.to === Infinity && !range.object;
    if (whole) chosen = null;
    else {
      const wanted = range.object ? new Set(exits.objects.texts.flatMap((text, id) => (text.split(", ").includes(range.object) ? [id] : []))) : null;
      const found = new Uint32Array(exits.length);
      let length = 0;
      for (let at = 0; at < exits.length; at++) {
        if (exits.index[at] >= range.from && exits.index[at] < range.to && (!wanted || wanted.has(exits.object[at]))) found[length++] = at;
      }
      chosen = found.subarray(0, length);
    }
    show(false);
  }

  function show(keep) {
    const shown = chosen ? chosen.length : exits.length;
    fill(title, chosen ? `${count(shown)} of ${plural(exits.length, "exit")}` : plural(exits.length, "exit"));
    fill(note, exits.failed ? `Not all could be read: ${exits.failed.message}` : exits.done ? "" : `reading, ${count(exits.length)} of ${count(exits.expected)}`);
    list.set(shown, { keep });
  }

  exits.watch(() => { if (chosen) filter(); else show(true); }, signal);
  signal.addEventListener("abort", () => list.dispose());
  return {
    filter,
    element: h("section", { class: "panel flush", "aria-label": "Exits" }, h("div", { class: "map-tools spread" }, title, note),
      h("div", { class: "exit-row head", "aria-hidden": "true" }, ["Record", "Address", "Bytes", "Access", "Denied by", "Object"].map((text) => h("span", {}, text))), list.element),
  };
}
