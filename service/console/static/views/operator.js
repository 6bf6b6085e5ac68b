// Operator: is the service well, what is it doing, and what waits.

import { h, fill, add, problemBox, toast, tableScroll } from "../dom.js";
import { ago, bytes, count, plural, seconds, short } from "../format.js";
import * as api from "../api.js";

const EVERY = 2000;

/** Prometheus text as samples: name, labels, value. */
export function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match || line.startsWith("#")) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value.replace(/\\(.)/g, "$1");
    samples.push({ name: match[1], labels, value: Number(match[3]) });
  }
  return samples;
}

/** The value below which a share of what a histogram has seen lies, as Prometheus interpolates it. */
export function quantile(buckets, share) {
  const sorted = [...buckets].sort(([a], [b]) => a - b);
  const total = sorted.at(-1)?.[1] ?? 0;
  if (!total) return null;
  let below = 0;
  let before = 0;
  for (const [edge, sum] of sorted) {
    if (sum >= share * total) return edge === Infinity ? below : below + ((edge - below) * (share * total - before)) / Math.max(1, sum - before);
    below = edge === Infinity ? below : edge;
    before = sum;
  }
  return below;
}

export async function show({ root, signal }) {
  document.title = "Operator – Subpage";
  const health = h("div", { class: "chips", role: "status" });
  const tiles = h("dl", { class: "tiles" });
  const jobs = h("section", { class: "panel flush", "aria-label": "Jobs" });
  const routes = h("section", { class: "panel flush", "aria-label": "Requests" });
  const problem = h("div", {});
  add(root, [h("div", { class: "spread" }, h("h1", {}, "Operator"), health), problem, tiles, jobs, routes]);
  let before = null;

  async function read() {
    const [ready, version] = await Promise.all([fetch("/readyz", { cache: "no-store", signal }).then((reply) => reply.ok), api.get("/version", { signal })]);
    fill(health, h("span", { class: `chip ${ready ? "good" : "warn"}` }, ready ? "ready" : "not ready"), h("span", { class: "chip" }, `Subpage ${version.version}`));
    await drawJobs();
    const samples = parse(await api.text("/metrics", { signal }));
    drawTiles(samples);
    drawRoutes(samples);
    fill(problem);
  }

  function drawTiles(samples) {
    const sum = (name, wanted = {}) => samples.filter((one) => one.name === name && Object.entries(wanted).every(([key, value]) => one.labels[key] === value)).reduce((total, one) => total + one.value, 0);
    const now = { at: performance.now(), requests: sum("subpage_request_seconds_count"), records: sum("subpage_replayed_records_total"), cpu: sum("process_cpu_seconds_total") };
    const rate = (key) => (before ? (now[key] - before[key]) / ((now.at - before.at) / 1000) : null);
    const lag = new Map();
    for (const one of samples) if (one.name === "subpage_event_loop_lag_seconds_bucket") lag.set(one.labels.le === "+Inf" ? Infinity : Number(one.labels.le), one.value);
    const tile = (label, value, about) => h("div", { class: "tile" }, h("dt", {}, label), h("dd", {}, value), about && h("dd", { class: "about" }, about));
    const perSecond = (value) => (value === null ? "…" : short(Math.round(value * 10) / 10));
    fill(tiles,
      tile("Machines", count(sum("subpage_vms"))),
      tile("Requests a second", perSecond(rate("requests")), `${count(sum("subpage_requests_under_way"))} under way`),
      tile("Records a second", perSecond(rate("records")), `${short(now.records)} replayed in all`),
      tile("Event loop, 99 % below", seconds(quantile(lag, 0.99)), "how late it comes to what is due"),
      tile("Memory", bytes(sum("process_resident_memory_bytes")), `${short(sum("subpage_frames"))} frames of machines`),
      tile("CPU", rate("cpu") === null ? "…" : `${Math.round(100 * rate("cpu"))} %`, "of one core"),
      tile("Refused writes", short(sum("subpage_violations_total"))),
      tile("Streams and tools", `${count(sum("subpage_event_streams"))} · ${count(sum("subpage_introspection_tools"))}`, `${plural(sum("subpage_introspection_waiting"), "access waits", "accesses wait")} for an answer`),
      tile("Store", count(sum("subpage_store_commit_seconds_count")), `transactions, ${bytes(sum("subpage_store_written_bytes_total"))} written, ${count(sum("subpage_store_failures_total"))} failed`));
    before = now;
  }

  function drawRoutes(samples) {
    const found = new Map();
    for (const { name, labels, value } of samples) {
      if (!name.startsWith("subpage_request_seconds_")) continue;
      const key = `${labels.method} ${labels.route}`;
      const row = found.get(key) ?? found.set(key, { count: 0, sum: 0, bad: 0, buckets: new Map() }).get(key);
      if (name.endsWith("_count")) { row.count += value; if (Number(labels.status) >= 500 && labels.route !== "/readyz") row.bad += value; }
      else if (name.endsWith("_sum")) row.sum += value;
      else if (name.endsWith("_bucket")) { const edge = labels.le === "+Inf" ? Infinity : Number(labels.le); row.buckets.set(edge, (row.buckets.get(edge) ?? 0) + value); }
    }
    const rows = [...found].sort(([, a], [, b]) => b.count - a.count).slice(0, 40);
    fill(routes, h("div", { class: "map-tools" }, h("h2", {}, "Requests since the start")), tableScroll(h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Route"), ["Requests", "Half below", "99 % below", "5xx"].map((text) => h("th", { scope: "col", class: "number" }, text)))),
      h("tbody", {}, rows.map(([key, row]) => h("tr", {}, h("th", { scope: "row", class: "mono" }, key), h("td", { class: "number" }, count(row.count)), h("td", { class: "number" }, seconds(quantile(row.buckets, 0.5))), h("td", { class: "number" }, seconds(quantile(row.buckets, 0.99))), h("td", { class: "number" }, row.bad ? h("span", { class: "chip bad" }, count(row.bad)) : "0")))))));
  }

  async function drawJobs() {
    const found = [];
    await api.pages("/v1/jobs", "jobs", (page) => found.push(...page), { signal, query: { limit: 1000 } });
    found.reverse();
    const focus = jobs.contains(document.activeElement) ? document.activeElement.dataset.job : null;
    const kinds = { succeeded: "good", failed: "bad", interrupted: "bad", running: "denied", queued: "warn" };
    const MOST = 50;
    fill(jobs, h("div", { class: "map-tools" }, h("h2", {}, found.length ? plural(found.length, "job") : "Jobs"), found.length > MOST && h("span", { class: "muted small" }, `the last ${MOST}`)),
      found.length ? tableScroll(h("table", {}, h("thead", {}, h("tr", {}, ["Job", "State", "Machine", "Records", "Accepted", ""].map((text, n) => h("th", { scope: "col", class: n === 3 ? "number" : "" }, text || h("span", { class: "sr" }, "Cancel"))))),
        h("tbody", {}, found.slice(0, MOST).map((job) => h("tr", {}, h("th", { scope: "row", class: "mono" }, job.id), h("td", {}, h("span", { class: `chip ${kinds[job.state] ?? ""}` }, job.state), job.error && h("div", { class: "small muted" }, job.error.detail ?? job.error.title)),
          h("td", { class: "mono" }, h("a", { href: job.result ? `#/vms/${job.vm}/replay/${job.result.split("/").pop()}` : `#/vms/${job.vm}` }, job.vm)), h("td", { class: "number" }, short(job.records_done)), h("td", {}, ago(job.created)),
          h("td", {}, ["queued", "running"].includes(job.state) && h("button", { type: "button", class: "small", "data-job": job.id, onclick: () => cancel(job.id) }, "Cancel")))))))
        : h("p", { class: "empty" }, "No replay was accepted as a job lately."));
    if (focus) jobs.querySelector(`[data-job="${focus}"]`)?.focus();
  }

  async function cancel(id) {
    try { await api.call("POST", `/v1/jobs/${id}:cancel`); await drawJobs(); } catch (error) { toast(error.message, "bad"); }
  }

  let timer = 0;
  async function round() {
    let wait = EVERY;
    try { await read(); }
    catch (error) {
      if (api.isAbort(error)) return;
      // A token that may not read metrics will not be able to in two seconds either.
      if (error.status === 403) { fill(problem, h("p", { class: "note" }, "Metrics need a token with scope admin. Jobs are shown.")); wait = 10 * EVERY; }
      else if (error.code !== "unreachable") fill(problem, problemBox(error));
    }
    if (!signal.aborted) timer = setTimeout(() => (document.hidden ? document.addEventListener("visibilitychange", round, { once: true, signal }) : round()), wait);
  }
  await round();
  signal.addEventListener("abort", () => clearTimeout(timer));
}
