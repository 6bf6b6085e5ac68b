// Machines: those there are, another one, and the demonstration.

import { h, fill, add, field, select, icon, dialog, problemBox, toast, color } from "../dom.js";
import { ago, bytes, count, hex, parseSize, plural } from "../format.js";
import { VirtualList } from "../virtual.js";
import { go } from "../app.js";
import * as api from "../api.js";
import { keeping, replayFile } from "../replaying.js";

const memoryOf = (vm) => vm.memory_slots.reduce((sum, slot) => sum + Number(slot.size), 0);

export async function show({ root, signal }) {
  document.title = "Machines – Subpage";
  const machines = [];
  const heading = h("h2", {}, "Machines");
  const search = h("input", { type: "search", placeholder: "Filter by name, id or profile", "aria-label": "Filter machines", oninput: () => redraw() });
  let chosen = machines;
  const list = new VirtualList({ label: "Machines", height: 3.7, most: Math.max(420, innerHeight - 320), row: (position) => machineRow(chosen[position]) });
  const head = h("div", { class: "machine-row head", "aria-hidden": "true" }, ["Name", "Profile", "Memory", "vCPUs", "Sub-page protection", "Created"].map((text) => h("span", {}, text)));
  const none = h("div", { class: "empty", hidden: true });
  const body = h("div", {}, head, list.element, none);
  const panel = h("section", { class: "panel flush", "aria-label": "Machines" },
    h("div", { class: "map-tools spread" }, heading, h("div", { class: "actions" }, search, h("button", { type: "button", class: "primary", onclick: createMachine }, icon("plus"), "New machine"))),
    body);
  search.style.width = "16rem";
  add(root, [welcome(signal), panel]);

  function redraw() {
    const wanted = search.value.trim().toLowerCase();
    chosen = wanted ? machines.filter((vm) => `${vm.name} ${vm.id} ${vm.profile}`.toLowerCase().includes(wanted)) : machines;
    fill(heading, machines.length ? `${plural(machines.length, "machine")}` : "Machines", wanted && h("span", { class: "muted" }, ` · ${count(chosen.length)} shown`));
    head.hidden = list.element.hidden = !chosen.length;
    none.hidden = chosen.length > 0;
    fill(none, machines.length
      ? [h("strong", {}, "No machine is called that")]
      : [h("strong", {}, "No machine yet"), h("p", {}, "Try the kernel boot above, or make a machine of your own and drop a trace on it.")]);
    list.set(chosen.length);
  }

  await api.pages("/v1/vms", "vms", (page) => { machines.push(...page); redraw(); }, { signal, query: { limit: 1000 } });
  // The newest is what people look for.
  machines.reverse();
  redraw();
  signal.addEventListener("abort", () => list.dispose());
}

function machineRow(vm) {
  return h("a", { class: "machine-row", role: "listitem", href: `#/vms/${vm.id}` },
    h("span", { class: "name" }, vm.name || "unnamed", h("span", { class: "id mono" }, vm.id)),
    h("span", {}, vm.profile),
    h("span", { class: "number" }, bytes(memoryOf(vm))),
    h("span", { class: "number" }, count(vm.vcpus.length)),
    h("span", {}, vm.spp ? h("span", { class: "chip denied" }, "on") : h("span", { class: "chip" }, "off")),
    h("span", { class: "muted small" }, ago(vm.created)));
}

// ---- the demonstration

function welcome(signal) {
  const status = h("div", { class: "small", role: "status", "aria-live": "polite" });
  const bar = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "Progress of the replay" });
  const button = h("button", { type: "button", class: "primary", onclick: run }, icon("play"), "Try it with a real kernel boot");
  const picture = h("canvas", { "aria-hidden": "true" });
  requestAnimationFrame(() => drawPages(picture));
  window.addEventListener("theme", () => drawPages(picture), { signal });

  async function run() {
    button.disabled = true;
    bar.hidden = false;
    bar.removeAttribute("value");
    const say = (text) => fill(status, text);
    try {
      say("Making a machine of 1 GiB…");
      const vm = await api.call("POST", "/v1/vms", { json: { name: "kernel boot", memory_slots: [{ slot: 0, gpa: "0x0", size: "0x40000000" }], spp: true }, signal });
      say("Protecting what a rootkit overwrites…");
      const policy = await api.get("/console/samples/kernel_control_data.json", { signal });
      await api.call("POST", `/v1/vms/${vm.id}/protections`, { json: policy, signal });
      say("Fetching 16 million recorded writes of a Linux boot…");
      const body = await api.octets("/console/samples/boot.parquet", { signal });
      const file = new File([body], "boot.parquet");
      const result = await replayFile(vm.id, file, { query: keeping(file) }, { signal, progress: (stage) => { say(stage.text); if (stage.part === null) bar.removeAttribute("value"); else bar.value = stage.part; } });
      go(`/vms/${vm.id}/replay/${result}`);
    } catch (error) {
      if (api.isAbort(error)) return;
      fill(status, problemBox(error));
    } finally {
      button.disabled = false;
      bar.hidden = true;
    }
  }

  return h("section", { class: "panel welcome", "aria-label": "Demonstration" },
    h("div", { class: "words" },
      h("h1", {}, "What would your policy cost a real guest?"),
      h("p", {}, "Protect memory in pieces of 128 bytes instead of whole pages. Post a recorded trace, and see which writes would have exited, why, and how many exits whole pages would have cost."),
      h("div", { class: "actions" }, button, h("a", { class: "button", href: "/docs" }, "Read the API")),
      bar, status),
    picture);
}

/** A few pages as the product sees them: 32 cells each, some denied, a few hit. */
function drawPages(canvas) {
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  if (!width) return;
  const ratio = devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const rows = 12;
  const cell = width / 32;
  const tall = height / rows;
  const [writable, denied, refused] = ["writable", "denied", "refused"].map((name) => color(name));
  const hot = { "2:13": 1, "2:14": 0.6, "5:4": 0.8, "5:5": 1, "5:6": 0.5, "8:22": 0.9, "9:23": 0.4, "9:24": 0.7 };
  const covered = { 1: [8, 30], 2: [12, 16], 4: [0, 3], 5: [3, 8], 6: [20, 22], 8: [21, 24], 9: [22, 26], 10: [5, 6] };
  for (let row = 0; row < rows; row++) {
    for (let s = 0; s < 32; s++) {
      const inside = covered[row] && s >= covered[row][0] && s <= covered[row][1];
      context.globalAlpha = inside ? 0.55 : 1;
      context.fillStyle = inside ? denied : writable;
      context.beginPath();
      context.roundRect(s * cell + 1, row * tall + 1.5, cell - 2, tall - 3, 2);
      context.fill();
      const heat = hot[`${row}:${s}`];
      if (heat) { context.globalAlpha = heat; context.fillStyle = refused; context.fill(); }
    }
  }
}

// ---- another machine

export async function createMachine() {
  const name = h("input", { maxlength: 200, value: "", placeholder: "guest" });
  const memory = h("input", { value: "1 GiB", required: true });
  const vcpus = h("input", { type: "number", min: 1, max: 1024, value: 1 });
  const profile = select([["kvm-2019", "kvm-2019 · the series of 2019"], ["kvm-latest", "kvm-latest · today's KVM"]], "kvm-2019");
  const cache = h("input", { type: "checkbox" });
  const problem = h("div", {});
  const made = await dialog("New machine", (close) => h("form", {
    novalidate: true,
    async onsubmit(event) {
      event.preventDefault();
      const size = parseSize(memory.value);
      const wrong = size === null || size <= 0 || size % 4096;
      memory.setAttribute("aria-invalid", Boolean(wrong));
      if (wrong) { fill(problem, problemBox({ title: "Memory", message: `“${memory.value}” must be a size such as 1 GiB or 0x1000, a multiple of 4,096 bytes.` })); memory.focus(); return; }
      try {
        close(await api.call("POST", "/v1/vms", { json: {
          name: name.value, profile: profile.value, vcpus: Number(vcpus.value) || 1, spp: true,
          translation_cache: cache.checked ? "model" : "off",
          memory_slots: [{ slot: 0, gpa: "0x0", size: hex(size) }],
        } }));
      } catch (error) { fill(problem, problemBox(error)); }
    },
  },
  field("Name", name, "A label; need not be unique."),
  h("div", { class: "fields" }, field("Memory", memory, "One slot from address 0."), field("vCPUs", vcpus)),
  field("Profile", profile, "Which KVM it behaves as."),
  h("label", { class: "check" }, cache, "Model stale translations (for traces with flushes)"),
  problem,
  h("div", { class: "actions" }, h("button", { type: "button", onclick: () => close() }, "Cancel"), h("button", { type: "submit", class: "primary" }, "Make it"))));
  if (made) { toast(`${made.name || made.id} is there.`); go(`/vms/${made.id}`); }
}
