// A machine: what it is, and the tabs that look into it.

import { h, fill, add, dialog, icon, problemBox, toast } from "../dom.js";
import { ago, bytes, hex, plural } from "../format.js";
import { go } from "../app.js";
import * as api from "../api.js";

const TABS = [
  ["map", "Map", () => import("./map.js")],
  ["replay", "Replay", () => import("./replay.js")],
  ["walk", "Walk", () => import("./walk.js")],
  ["live", "Live", () => import("./live.js")],
  ["processor", "Processor", () => import("./processor.js")],
];

export async function show({ root, params, query, signal }) {
  const id = params.vm;
  const path = `/v1/vms/${id}`;
  const context = { id, path, vm: await api.get(path, { signal }) };
  const header = h("header", { class: "spread" });
  const tabs = h("nav", { class: "tabs", "aria-label": "Views of the machine" });
  const panel = h("div", {});
  let inner = null;

  context.refresh = async () => { context.vm = await api.get(path, { signal }); drawHeader(); };
  context.guard = (error) => { // the machine was deleted under the page
    if (error.status === 404 && error.code === "not-found") gone();
    return error;
  };

  function gone() {
    fill(root, h("div", { class: "panel empty" }, h("strong", {}, "This machine does not exist any more"), h("p", {}, "Somebody deleted it, or the service keeps machines in memory and was restarted."), h("a", { class: "button", href: "#/" }, "All machines")));
  }

  function drawHeader() {
    const { vm } = context;
    document.title = `${vm.name || vm.id} – Subpage`;
    const memory = vm.memory_slots.reduce((sum, slot) => sum + Number(slot.size), 0);
    fill(header,
      h("div", {},
        h("h1", {}, vm.name || "unnamed machine"),
        h("div", { class: "facts" },
          h("span", { class: "mono" }, vm.id), h("span", {}, vm.profile), h("span", {}, plural(vm.vcpus.length, "vCPU")),
          h("span", {}, bytes(memory)), h("span", {}, "sub-page protection ", h("b", {}, vm.spp ? "on" : "off")), h("span", {}, `made ${ago(vm.created)}`))),
      h("div", { class: "actions" },
        !vm.spp && h("button", { type: "button", onclick: enable }, "Enable sub-page protection"),
        h("button", { type: "button", class: "quiet danger", onclick: remove }, icon("trash"), "Delete")));
  }

  async function enable() {
    try { await api.call("PUT", `${path}/spp`, { json: { active: true } }); await context.refresh(); await switchTo(inner.params, inner.query); }
    catch (error) { toast(error.message, "bad"); }
  }

  async function remove() {
    const sure = await dialog("Delete this machine?", (close) => h("div", {},
      h("p", {}, `${context.vm.name || context.vm.id}, its protections, results and events are gone for good.`),
      h("div", { class: "actions" }, h("button", { type: "button", onclick: () => close(false) }, "Keep it"), h("button", { type: "button", class: "danger", onclick: () => close(true) }, "Delete"))));
    if (!sure) return;
    try { await api.call("DELETE", path); toast("Deleted."); go("/"); } catch (error) { toast(error.message, "bad"); }
  }

  async function switchTo(wanted, wantedQuery) {
    const [name, , load] = TABS.find(([tab]) => tab === (wanted.tab ?? "map")) ?? TABS[0];
    inner?.abort.abort();
    const abort = new AbortController();
    const mine = (inner = { abort, name, params: wanted, query: wantedQuery });
    signal.addEventListener("abort", () => abort.abort(), { once: true });
    fill(tabs, TABS.map(([tab, text]) => h("a", { href: `#/vms/${id}/${tab}`, "aria-current": tab === name ? "page" : null }, text)));
    const place = h("div", { class: "stack" });
    try {
      const view = await load();
      if (inner !== mine) return;
      fill(panel, place);
      await view.show({ root: place, machine: context, rest: wanted.rest ?? "", query: wantedQuery, signal: abort.signal });
    } catch (error) {
      if (api.isAbort(error) || inner !== mine) return;
      if (!(error instanceof api.Problem)) console.error(error);
      if (error.status === 404 && !wanted.rest) { gone(); return; }
      fill(panel, problemBox(error, () => switchTo(wanted, wantedQuery)));
    }
  }

  drawHeader();
  add(root, [header, tabs, panel]);
  await switchTo(params, query);
  return {
    async again(next, nextQuery) {
      if (next.vm !== id || !root.contains(panel)) return false;
      await switchTo(next, nextQuery);
      return true;
    },
  };
}

/** The slot that a page is in. */
const assumedSlots = (vm) => vm.memory_slots.filter((slot) => slot.address_space === 0).map(({ gpa, size, read_only, host_page_size }) => ({ gpa, size, read_only, host_page_size }));

/** What one policy costs on a footprint, for a machine like this one; `more` are further members of the question. */
export async function costOf(machine, footprint, policy, signal, more = {}) {
  const asked = { policies: [policy], memory_slots: assumedSlots(machine.vm), profile: machine.vm.profile, ...more };
  return (await api.call("POST", `/v1/footprints/${footprint}/costs`, { json: asked, signal })).costs[0];
}

export const slotOf = (vm, gfn) => vm.memory_slots.find((slot) => gfn * 4096 >= Number(slot.gpa) && gfn * 4096 < Number(slot.gpa) + Number(slot.size));

/** Where a slot lies, for people. */
export const slotText = (slot) => `${hex(Number(slot.gpa))} – ${hex(Number(slot.gpa) + Number(slot.size) - 1)}`;
