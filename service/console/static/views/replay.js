// Replay: drop a trace, follow it, and look at what came of it.

import { h, fill, add, field, icon, select, problemBox, toast, tableScroll } from "../dom.js";
import { ago, count, hex, plural, seconds, short } from "../format.js";
import { keeping, replayFile } from "../replaying.js";
import { exitsOf } from "../exits.js";
import { hero, objectTable, writerTable, totals } from "../results.js";
import { timeline } from "../timeline.js";
import { exitTable } from "../exittable.js";
import { go } from "../app.js";
import { PageMap } from "../pagemap.js";
import { costOf } from "./machine.js";
import * as api from "../api.js";

const FORMATS = [["", "by name or content"], "lackey", "drmemtrace", "execlog", "bochs", "gem5", "champsim", "ftrace", "perf-script", "perf-mem", "hyperdbg", "csv"];
const RECORDS = [["", "no"], "gpa8", "record16"];
const ANSWERS = [["skip", "is dropped, the guest goes on"], ["allow", "lands once"], ["grant", "opens its sub-pages"], ["stop", "ends the replay"], ["ask", "is asked of the attached tools"]];
const MOST_PAGES = 65536; // of a policy that is asked about
const PARTIAL = new Set(["stop", "ask"]); // such a replay may end before its trace: it has no footprint

export async function show({ root, machine, rest, signal }) {
  if (rest) { await showResult({ root, machine, id: rest, signal }); return; }
  const traces = [];
  await api.pages(`${machine.path}/traces`, "traces", (page) => traces.push(...page), { signal, query: { limit: 1000 } });
  traces.reverse();
  add(root, [h("div", { class: "columns" }, dropPanel(machine, signal), policyPanel(machine, signal)), list(machine, traces)]);
}

// ---- a trace comes in

function dropPanel(machine, signal) {
  const input = h("input", { type: "file", class: "sr", id: "trace-file", "aria-label": "Trace file", onchange: () => input.files[0] && run(input.files[0]) });
  const format = select(FORMATS, "");
  const record = select(RECORDS, "");
  const answer = select(ANSWERS, "skip");
  const where = h("input", { type: "checkbox", checked: true });
  const status = h("div", { role: "status", "aria-live": "polite", class: "small" });
  const bar = h("progress", { max: 1, hidden: true, "aria-label": "Progress" });
  const cancel = h("button", { type: "button", hidden: true }, "Cancel");
  const choose = h("button", { type: "button", class: "primary", onclick: () => input.click() }, icon("upload"), "Choose a file");
  const zone = h("div", { class: "drop" }, h("strong", {}, "Drop a trace here"), h("p", { class: "muted small" }, "Parquet, Arrow, NDJSON, or what lackey, perf, ftrace, QEMU, Bochs, gem5, DynamoRIO, ChampSim and HyperDbg write; gzip, zstd and xz too."), choose, input, bar, status, cancel);
  zone.addEventListener("dragover", (event) => { event.preventDefault(); zone.classList.add("over"); });
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => { event.preventDefault(); zone.classList.remove("over"); if (event.dataTransfer.files[0]) run(event.dataTransfer.files[0]); });

  async function run(file) {
    const stop = new AbortController();
    choose.disabled = true;
    bar.hidden = cancel.hidden = false;
    cancel.onclick = () => { stop.abort(); fill(status, "Calling it off…"); };
    bar.removeAttribute("value");
    try {
      const id = await replayFile(machine.id, file, { format: format.value, record: record.value, query: { on_violation: answer.value, ...(where.checked && !PARTIAL.has(answer.value) && keeping(file)) } }, {
        signal, cancel: stop.signal,
        progress: ({ text, part }) => { fill(status, text); if (part === null) bar.removeAttribute("value"); else bar.value = part; },
      });
      machine.refresh().catch(() => {});
      go(`/vms/${machine.id}/replay/${id}`);
    } catch (error) {
      if (signal.aborted) return;
      fill(status, api.isAbort(error) ? "Cancelled. The machine is as it was." : problemBox(machine.guard(error)));
    } finally {
      choose.disabled = false;
      bar.hidden = cancel.hidden = true;
      input.value = "";
    }
  }

  return h("section", { class: "panel", "aria-label": "Replay a trace" }, h("h2", {}, "Replay a trace"), zone,
    h("div", { class: "fields" }, field("A refused write", answer), field("Format", format), field("Packed records", record)),
    h("label", { class: "check small" }, where, "Keep where it wrote: for the map, for what a denial would cost, and for what whole pages cost over time"));
}

// ---- what it is held against

function policyPanel(machine, signal) {
  const box = h("div", {});
  const input = h("input", { type: "file", accept: ".json,application/json", class: "sr", "aria-label": "Policy file", onchange: () => input.files[0] && take(input.files[0]) });
  const problem = h("div", { role: "status" });
  async function take(file) {
    try {
      const policy = JSON.parse(await file.text());
      policy.name ??= file.name.replace(/\.json$/i, "");
      await api.call("POST", `${machine.path}/protections`, { json: policy });
      toast(`${policy.name} protects ${plural((policy.objects ?? []).length, "object")}.`);
      fill(problem);
    } catch (error) {
      fill(problem, problemBox(error instanceof SyntaxError ? { title: "No policy", message: `${file.name} is no JSON: ${error.message}` } : machine.guard(error)));
    } finally { input.value = ""; }
    await draw();
  }
  async function remove(name) {
    try { await api.call("DELETE", `${machine.path}/protections/${encodeURIComponent(name)}`); toast(`${name} is lifted.`); } catch (error) { toast(error.message, "bad"); }
    await draw();
  }
  async function draw() {
    const found = [];
    await api.pages(`${machine.path}/protections`, "protections", (page) => found.push(...page), { signal });
    fill(box, found.length
      ? tableScroll(h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Protection"), h("th", { scope: "col", class: "number" }, "Objects"), h("th", { scope: "col", class: "number" }, "Pages"), h("th", { scope: "col" }, h("span", { class: "sr" }, "Lift")))),
        h("tbody", {}, found.map((one) => h("tr", {}, h("th", { scope: "row" }, one.name, one.about && h("div", { class: "hint" }, one.about)), h("td", { class: "number" }, count(one.objects.length)), h("td", { class: "number" }, count(one.pages)),
          h("td", { class: "number" }, h("button", { type: "button", class: "small quiet danger", "aria-label": `Lift ${one.name}`, onclick: () => remove(one.name) }, icon("trash"))))))))
      : h("p", { class: "muted" }, "Nothing is protected yet: a replay would refuse only what the map denies."));
  }
  draw().catch((error) => { if (!api.isAbort(error)) fill(box, problemBox(machine.guard(error))); });
  return h("section", { class: "panel", "aria-label": "Policy" }, h("header", {}, h("h2", {}, "Policy"), h("button", { type: "button", class: "small", onclick: () => input.click() }, icon("plus"), "Add a policy file")), input, box, problem);
}

function list(machine, traces) {
  if (!traces.length) return h("section", { class: "panel empty" }, h("strong", {}, "No replay yet"), h("p", {}, "Its result stays here: what was refused, by object, and what whole pages would have cost."));
  return h("section", { class: "panel flush" }, h("div", { class: "map-tools spread" }, h("h2", {}, plural(traces.length, "result")), traces.length > 1 && h("a", { class: "button", href: `#/compare?a=${machine.id}/${traces[1].id}&b=${machine.id}/${traces[0].id}` }, "Compare the last two")),
    tableScroll(h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Result"), h("th", { scope: "col" }, "When"), h("th", { scope: "col", class: "number" }, "Writes"), h("th", { scope: "col", class: "number" }, "Refused"), h("th", { scope: "col", class: "number" }, "With whole pages"), h("th", { scope: "col" }, "Refused writes"), h("th", { scope: "col" }, "Format"), h("th", { scope: "col", class: "number" }, "Took"))),
      h("tbody", {}, traces.map((trace) => h("tr", {},
        h("td", { class: "mono" }, h("a", { href: `#/vms/${machine.id}/replay/${trace.id}` }, trace.id)),
        h("td", {}, ago(trace.created)), h("td", { class: "number" }, short(trace.writes)), h("td", { class: "number" }, count(trace.violations)), h("td", { class: "number" }, count(trace.page_granular_violations)),
        h("td", {}, trace.on_violation), h("td", {}, trace.format), h("td", { class: "number" }, seconds(trace.seconds))))))));
}

// ---- a result

/** What whole pages would have cost, by parts of the trace: null without a footprint, or where the policy is another by now. */
async function wholePages(machine, trace, signal) {
  if (!trace.footprint || !trace.page_granular_violations) return null;
  const about = await api.get(`/v1/footprints/${trace.footprint}`, { signal });
  if (!about.by.records) return null;
  const cost = await costNow(machine, trace.footprint, signal);
  const same = cost && ["violations", "page_granular_violations"].every((total) => cost[total] === trace[total]);
  return same ? { width: about.by.records, buckets: cost.timeline } : null;
}

/** What all that the machine's map denies would cost on a footprint; null where that cannot be told. */
async function costNow(machine, footprint, signal) {
  const map = new PageMap(machine);
  await map.load(signal);
  const pages = [...map.words].map(([gfn, word]) => [gfn, 1, hex(word >>> 0)]);
  if (!pages.length || pages.length > MOST_PAGES) return null;
  return costOf(machine, footprint, { name: "now", pages }, signal, { timeline: true });
}

async function showResult({ root, machine, id, signal }) {
  const trace = await api.get(`${machine.path}/traces/${encodeURIComponent(id)}`, { signal });
  const exits = exitsOf(machine.id, trace.id, trace.violations);
  const columns = h("div", { class: "columns" });
  const range = { from: -Infinity, to: Infinity, object: "" };
  const table = exitTable(machine, exits, range, signal);
  const chart = timeline(trace, exits, wholePages(machine, trace, signal), (from, to) => { range.from = from; range.to = to; table.filter(); }, signal);
  const chooseObject = (name) => { range.object = range.object === name ? "" : name; table.filter(); chart.object(range.object); objects.mark(range.object); };
  const objects = objectTable(trace, chooseObject);
  exits.watch(() => fill(columns, objects.element, exits.writers.texts.length > 1 && writerTable(exits)), signal);
  add(root, [
    h("div", { class: "spread" }, h("p", {}, h("a", { href: `#/vms/${machine.id}/replay` }, "All results"), h("span", { class: "muted mono small" }, `  ${trace.id}`)),
      h("div", { class: "actions" }, h("a", { class: "button", href: `#/vms/${machine.id}/map?trace=${trace.id}` }, "Show on the map"), h("a", { class: "button", href: `#/compare?a=${machine.id}/${trace.id}` }, "Compare with…"))),
    hero(trace), totals(trace),
    trace.violations > 0 && h("section", { class: "panel", "aria-label": "Timeline" }, h("header", {}, h("h2", {}, "Refused writes over the trace"), chart.tools), chart.element, chart.legend),
    columns,
    trace.violations > 0 && table.element,
  ]);
  chart.start();
}
