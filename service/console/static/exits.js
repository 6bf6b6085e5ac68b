// The exit records of a trace as columns: read as a stream, kept as typed arrays, so that a million fit in 60 MB.

import * as api from "./api.js";

const FIRST = 4096;
const kept = new Map(); // by URL: results do not change, and going back and forth should not read them again
const MOST_KEPT = 4;

class Words {
  constructor() { this.texts = [""]; this.ids = new Map([["", 0]]); }
  id(text) {
    if (!text) return 0;
    let found = this.ids.get(text);
    if (found === undefined) { found = this.texts.length; this.texts.push(text); this.ids.set(text, found); }
    return found;
  }
}

export class Exits {
  constructor(url, expected) {
    this.url = url;
    this.expected = expected;
    this.length = 0;
    this.done = false;
    this.listeners = new Set();
    this.objects = new Words();
    this.writers = new Words();
    this.resolutions = new Words();
    this.hasTime = false;
    this.#room(Math.max(FIRST, Math.min(expected, 1 << 24)));
  }

  #room(size) {
    const grow = (old, Type) => { const next = new Type(size); if (old) next.set(old); return next; };
    this.index = grow(this.index, Float64Array);
    this.gpa = grow(this.gpa, Float64Array);
    this.pc = grow(this.pc, BigUint64Array);
    this.time = grow(this.time, Float64Array);
    this.denied = grow(this.denied, Uint32Array);
    this.size = grow(this.size, Uint16Array);
    this.vcpu = grow(this.vcpu, Uint16Array);
    this.access = grow(this.access, Uint8Array);
    this.reason = grow(this.reason, Uint8Array);
    this.object = grow(this.object, Uint32Array);
    this.writer = grow(this.writer, Uint32Array);
    this.resolution = grow(this.resolution, Uint8Array);
  }

  #add(record) {
    const at = this.length;
    if (at === this.index.length) this.#room(at * 2);
    this.index[at] = record.index;
    this.gpa[at] = Number(record.gpa);
    if (record.pc) this.pc[at] = BigInt(record.pc);
    if (record.time !== undefined) { this.time[at] = Number(record.time); this.hasTime = true; }
    this.denied[at] = Number(record.denied);
    this.size[at] = record.size;
    this.vcpu[at] = record.vcpu;
    this.access[at] = record.access;
    this.reason[at] = record.reason;
    this.object[at] = this.objects.id(record.objects.join(", "));
    this.writer[at] = this.writers.id(record.writer ?? (record.pc ? `${record.pc}` : ""));
    this.resolution[at] = this.resolutions.id(record.resolution);
    this.length++;
  }

  async load(signal) {
    let told = 0;
    for await (const batch of api.lines(this.url, { signal })) {
      for (const line of batch) this.#add(JSON.parse(line));
      if (performance.now() - told > 150) {
        told = performance.now();
        this.#tell();
        await new Promise(requestAnimationFrame);
      }
    }
    this.done = true;
    this.#tell();
  }

  #tell() { for (const listener of this.listeners) listener(this); }

  /** Call `listener` when more has come, and at once with what is there. */
  watch(listener, signal) {
    this.listeners.add(listener);
    signal?.addEventListener("abort", () => this.listeners.delete(listener));
    listener(this);
  }

  gfn(at) { return Math.floor(this.gpa[at] / 4096); }
}

/** The exits of a trace, read once however many views look at them. */
export function exitsOf(vm, trace, expected = 0) {
  const url = `/v1/vms/${vm}/traces/${trace}/exits`;
  let found = kept.get(url);
  if (!found) {
    found = new Exits(url, expected);
    found.loading = found.load().catch((error) => { found.failed = error; kept.delete(url); found.done = true; for (const listener of found.listeners) listener(found); });
    kept.set(url, found);
    if (kept.size > MOST_KEPT) kept.delete(kept.keys().next().value);
  }
  return found;
}

const ACCESSES = ["read", "write", "execute"];
export const accessName = (value) => ACCESSES[value] ?? String(value);

/** The sub-pages of a bitmap in words: `13`, `3–8`, `0, 4–5`. */
export function bitsText(mask) {
  const parts = [];
  for (let s = 0; s < 32; s++) {
    if (!((mask >>> s) & 1)) continue;
    let end = s;
    while (end < 31 && (mask >>> (end + 1)) & 1) end++;
    parts.push(end > s ? `${s}–${end}` : `${s}`);
    s = end;
  }
  return parts.join(", ") || "none";
}
