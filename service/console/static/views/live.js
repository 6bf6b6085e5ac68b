// Live: events as they come, and this page as the introspection tool that is asked.

import { h, fill, add, field, icon, select, problemBox, toast } from "../dom.js";
import { clock, count, hex, parseAddress, plural } from "../format.js";
import { accessName, bitsText } from "../exits.js";
import * as api from "../api.js";

const MOST = 400;
const KINDS = ["violation", "subpages", "protection", "memory-slot", "page-access", "host-memory", "flush", "vcpu", "nested", "lifecycle"];
const ANSWERS = [
  ["skip", "Skip", "The access is dropped, the guest goes on"],
  ["allow", "Allow once", "It lands once; what refuses it stays"],
  ["grant", "Grant", "Its sub-pages become writable, and it runs again"],
  ["retry", "Retry", "It runs again on the machine as it is now"],
  ["pass", "Pass", "It is left to the next tool"],
  ["stop", "Stop", "The replay ends"],
];

export async function show({ root, machine, signal }) {
  add(root, [h("div", { class: "columns" }, toolPanel(machine, signal), h("div", { class: "chain" }, accessPanel(machine, signal))), feedPanel(machine, signal)]);
}

// ---- the tool

function toolPanel(machine, signal) {
  const timeout = h("input", { type: "number", min: 1, max: 600, value: 60 });
  const fallback = select([["skip", "skip it"], ["allow", "allow it once"], ["grant", "grant it"], ["stop", "stop"]], "skip");
  const state = h("span", { class: "chip" }, "not attached");
  const attach = h("button", { type: "button", class: "primary", onclick: () => (socket ? socket.close(1000) : open()) }, "Attach");
  const questions = h("div", { class: "chain", "aria-live": "polite", "aria-label": "Questions" });
  const remembered = h("div", { class: "chips" });
  const rules = new Map(); // gfn → mask of sub-pages that are granted without asking
  let socket = null;
  let answered = 0;
  let wanted = false;

  function say(text, kind = "") { state.className = `chip ${kind}`; fill(state, text); }
  const idle = () => fill(questions, h("p", { class: "muted" }, socket ? "No access waits. Questions appear here while a replay or an access with “is asked” runs." : "Attached, this page is asked what becomes of every refused access, as a tool of your own would be."));

  function open() {
    wanted = true;
    say("attaching…");
    const url = `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}${machine.path}/introspection`;
    socket = new WebSocket(url, api.socketProtocols());
    let was = false;
    socket.onopen = () => socket.send(JSON.stringify({ type: "attach", timeout: Number(timeout.value) || 60, default_action: fallback.value }));
    socket.onmessage = (event) => {
      const message = JSON.parse(event.data);
      if (message.type === "attached") { was = true; say(`attached, ${plural(message.tools, "tool")}`, "good"); fill(attach, "Detach"); idle(); }
      else if (message.type === "violation") ask(message);
      else if (message.type === "resolved") resolved(message);
      else if (message.type === "error") toast(message.problem?.detail ?? message.detail ?? "The service did not take that.", "bad");
    };
    socket.onclose = (event) => {
      socket = null;
      fill(attach, "Attach");
      for (const one of open_.values()) one.stop();
      open_.clear();
      const why = { 1000: "not attached", 4404: "the machine is gone", 1012: "the service stopped", 1008: "the service let go" }[event.code] ?? "the connection broke off";
      say(was || event.code !== 1006 ? why : "refused", event.code === 1000 ? "" : "bad");
      idle();
      if (!was && wanted && !signal.aborted) toast("The service does not let this page attach: the machine may be gone, too many tools are attached, or the token may not change things.", "bad");
    };
  }

  const open_ = new Map();
  function send(id, action) { socket?.send(JSON.stringify({ type: "answer", id, action })); }

  function ask(message) {
    const exit = message.exit;
    const gfn = Number(exit.gfn);
    const denied = Number(exit.denied);
    if (denied && ((rules.get(gfn) ?? 0) & denied) >>> 0 === denied) { send(message.id, "grant"); return; }
    if (!open_.size) fill(questions);
    const until = Date.parse(message.deadline);
    const whole = Math.max(1, until - Date.now());
    const line = h("div", { class: "deadline" });
    const left = h("span", { class: "number muted small" });
    const answer = (action, remember) => {
      if (remember) { rules.set(gfn, ((rules.get(gfn) ?? 0) | denied) >>> 0); drawRules(); }
      answered++;
      send(message.id, action);
      for (const button of box.querySelectorAll("button")) button.disabled = true;
    };
    const box = h("article", { class: "question", "aria-label": "Question" },
      h("div", { class: "spread" }, h("strong", {}, `May vCPU ${message.vcpu} ${accessName(exit.access)} ${plural(exit.size, "byte")} at `, h("span", { class: "mono" }, exit.gpa), "?"), left),
      line,
      h("dl", { class: "pairs small" },
        h("dt", {}, "Objects"), h("dd", {}, exit.objects.join(", ") || "none"),
        h("dt", {}, "Denied"), h("dd", {}, `sub-page ${bitsText(denied)} of page ${exit.gfn}`),
        (exit.writer || exit.pc) && [h("dt", {}, "Writer"), h("dd", { class: "mono" }, exit.writer ?? String(exit.pc))],
        message.trace && [h("dt", {}, "Record"), h("dd", {}, `${count(exit.index)} of ${message.trace}`)],
        message.attempt > 1 && [h("dt", {}, "Attempt"), h("dd", {}, count(message.attempt))]),
      h("div", { class: "actions" }, ANSWERS.map(([action, text, about], n) => h("button", { type: "button", class: n === 0 ? "primary small" : "small", title: about, onclick: () => answer(action) }, text)),
        denied > 0 && h("button", { type: "button", class: "small", title: "Grant, and answer the next question about these sub-pages by itself", onclick: () => answer("grant", true) }, "Grant and remember")));
    let frame = 0;
    const tick = () => {
      const rest = Math.max(0, until - Date.now());
      line.style.transform = `scaleX(${Math.min(1, rest / whole)})`;
      fill(left, rest ? `${Math.ceil(rest / 1000)} s left` : "too late: it went on without this page");
      if (rest) frame = requestAnimationFrame(() => setTimeout(tick, 200));
    };
    open_.set(message.id, { stop() { cancelAnimationFrame(frame); box.remove(); } });
    questions.append(box);
    tick();
    if (open_.size === 1 && questions.closest("section").contains(document.activeElement)) box.querySelector("button").focus();
  }

  function resolved(message) {
    open_.get(message.id)?.stop();
    open_.delete(message.id);
    if (message.reason === "default") toast(`No answer in time: ${message.action}.`);
    if (!open_.size) { idle(); if (document.activeElement === document.body) attach.focus(); }
  }

  function drawRules() {
    fill(remembered, [...rules].map(([gfn, mask]) => h("span", { class: "chip denied" }, `granted: ${hex(gfn)} sub-page ${bitsText(mask)}`,
      h("button", { type: "button", class: "quiet small", "aria-label": `Forget ${hex(gfn)}`, onclick: () => { rules.delete(gfn); drawRules(); } }, icon("close")))));
  }

  signal.addEventListener("abort", () => { wanted = false; socket?.close(1000); });
  idle();
  return h("section", { class: "panel", "aria-label": "Introspection tool" },
    h("header", {}, h("h2", {}, "Be the introspection tool"), state),
    h("div", { class: "fields" }, field("Seconds to answer", timeout), field("Without an answer", fallback), h("div", { class: "actions" }, attach)),
    remembered, questions);
}

// ---- an access, to see what happens

function accessPanel(machine, signal) {
  const gpa = h("input", { class: "mono", placeholder: "0x2a5c6a0", required: true, spellcheck: "false" });
  const size = h("input", { type: "number", min: 1, max: 65535, value: 8 });
  const answer = select([["ask", "is asked"], ["skip", "is dropped"], ["allow", "lands once"], ["grant", "opens its sub-pages"]], "ask");
  const result = h("div", { role: "status", "aria-live": "polite" });
  return h("form", {
    class: "panel", "aria-label": "Try a write",
    async onsubmit(event) {
      event.preventDefault();
      const address = parseAddress(gpa.value);
      gpa.setAttribute("aria-invalid", address === null);
      if (address === null) { fill(result, problemBox({ title: "Address", message: `“${gpa.value}” must be an address such as 0x2a5c6a0.` })); return; }
      fill(result, h("p", { class: "muted" }, "The access is under way…"));
      try {
        const done = await api.call("POST", `${machine.path}/accesses`, { json: { gpa: hex(address), size: Number(size.value), on_violation: answer.value }, signal });
        fill(result, h("p", {}, h("span", { class: `chip ${done.landed ? "good" : "bad"}` }, done.landed ? "landed" : "refused"), ` ${plural(done.exits.length, "exit")} on the way, `, h("a", { href: `#/vms/${machine.id}/walk?gpa=${hex(address)}&size=${size.value}` }, "walk the tables"), "."));
      } catch (error) { if (!api.isAbort(error)) fill(result, problemBox(machine.guard(error))); }
    },
  }, h("h2", {}, "Try a write"), h("div", { class: "fields" }, field("Guest-physical address", gpa), field("Bytes", size), field("Refused, it", answer)), h("div", { class: "actions" }, h("button", { type: "submit" }, "Write")), result);
}

// ---- events

function feedPanel(machine, signal) {
  const rows = h("div", { class: "feed", tabindex: "0", role: "log", "aria-label": "Events", "aria-live": "off" });
  const state = h("span", { class: "chip" }, "connecting…");
  const kind = select([["", "every kind"], ...KINDS.map((one) => [one, one.replace("-", " ")])], "", { "aria-label": "Kinds of events", onchange: () => begin() });
  kind.style.width = "auto";
  let run = null;
  let waiting = [];

  function flush() {
    if (!waiting.length) return;
    const fresh = waiting.slice(-MOST).reverse().map(eventRow);
    waiting = [];
    rows.querySelector(".empty")?.remove();
    rows.prepend(...fresh);
    while (rows.childElementCount > MOST) rows.lastElementChild.remove();
  }

  async function begin() {
    run?.abort();
    const mine = (run = new AbortController());
    signal.addEventListener("abort", () => mine.abort(), { once: true });
    fill(rows, h("p", { class: "empty" }, "Nothing yet. What happens to this machine appears here at once."));
    let last = null;
    // The last things that happened, and then what comes.
    try {
      const page = await api.get(`${machine.path}/events`, { query: { kinds: kind.value, expand: "false", limit: 1000 }, signal: mine.signal });
      waiting.push(...page.events);
      last = page.next ? null : String(page.last);
      flush();
    } catch (error) { if (api.isAbort(error)) return; fill(state, error.title); return; }
    while (!mine.signal.aborted) {
      try {
        fill(state, "live");
        state.className = "chip good";
        for await (const event of api.events(`${machine.path}/events`, { query: { kinds: kind.value, after: last ?? "latest", expand: "false" }, signal: mine.signal })) {
          if (event.id) last = event.id;
          if (!event.data) continue;
          const document = JSON.parse(event.data);
          waiting.push(document);
          if (waiting.length === 1) requestAnimationFrame(flush);
          if (document.kind === "end" && document.detail?.reason === "deleted") { fill(state, "the machine was deleted"); state.className = "chip bad"; return; }
        }
      } catch (error) {
        if (api.isAbort(error)) return;
        if (error.status === 404) { machine.guard(error); return; }
      }
      fill(state, "reconnecting…");
      state.className = "chip warn";
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }
  begin();
  return h("section", { class: "panel flush", "aria-label": "Events of the machine" }, h("div", { class: "map-tools spread" }, h("div", { class: "actions" }, h("h2", {}, "Events"), state), kind), rows);
}

function eventRow(event) {
  return h("div", {}, h("span", { class: "number muted" }, event.created ? clock(event.created) : ""), h("span", { class: event.kind === "violation" ? "chip bad" : "chip" }, event.kind), h("span", {}, told(event)));
}

/** An event in a few words. */
function told({ kind, detail = {} }) {
  switch (kind) {
    case "violation": return detail.count ? `${plural(detail.count, "write")} refused in a replay` : `${accessName(detail.access)} of ${plural(detail.size, "byte")} at ${detail.gpa} refused: ${detail.objects?.join(", ") || `sub-page ${bitsText(Number(detail.denied))} of ${detail.gfn}`}`;
    case "lifecycle": return { created: `made, ${detail.profile}`, restored: "restored from a backup", "spp-enabled": "sub-page protection enabled" }[detail.change] ?? detail.change;
    case "subpages": return `bitmaps of ${plural(detail.pages ?? 0, "page")} set${detail.ranges?.[0] ? `, from ${detail.ranges[0].gfn}` : ""}`;
    case "protection": return `${detail.name} ${detail.change}${detail.objects_total ? `, ${plural(detail.objects_total, "object")}` : ""}`;
    case "memory-slot": return `slot ${detail.slot} ${detail.change}`;
    case "page-access": return `access of ${plural(detail.pages ?? 0, "page")} replaced`;
    case "vcpu": return `vCPU ${detail.vcpu} ${detail.change}`;
    case "flush": return `vCPU ${detail.vcpu}: ${detail.outcome}`;
    case "dropped": return `${plural(detail.count ?? 0, "event")} missing: ${detail.reason}`;
    case "end": return `the stream ended: ${detail.reason}`;
    default: return JSON.stringify(detail).slice(0, 300);
  }
}
