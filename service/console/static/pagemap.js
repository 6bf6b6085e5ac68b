// What a machine's pages are, as the map shows them: bitmaps, objects, refused and noticed writes.

import * as api from "./api.js";

const WINDOW = 1 << 18; // pages of one call: 1 MiB of bitmaps
const MOST_SCANNED = 1 << 22; // 16 GiB of guest
const MOST_TOUCHED = 100_000; // pages of a footprint

export class PageMap {
  constructor(machine) {
    this.machine = machine;
    this.words = new Map(); // gfn → bitmap, of pages that are not all ones
    this.refused = new Map(); // gfn → Uint32Array(33): by sub-page, and their sum
    this.written = new Map(); // gfn → bitmap, where dirty tracking says so
    this.touched = new Map(); // gfn → { writes, subpages }, where a footprint says so
    this.busiest = 1;
    this.objects = []; // { name, gpa, end, protection }, by gpa
    this.byPage = new Map(); // gfn → objects
    this.scanned = true;
    this.hottest = 1;
    this.rows = null;
  }

  get slots() {
    return this.machine.vm.memory_slots.filter((slot) => slot.address_space === 0)
      .map((slot) => ({ ...slot, first: Number(slot.gpa) / 4096, pages: Number(slot.size) / 4096 }))
      .sort((a, b) => a.first - b.first);
  }

  get totalPages() { return this.slots.reduce((sum, slot) => sum + slot.pages, 0); }

  /** Read bitmaps, objects and dirty pages. */
  async load(signal) {
    if (this.machine.vm.spp) await this.#bitmaps(signal);
    await this.#protections(signal);
    await this.#dirty(signal);
    this.rows = null;
  }

  async #bitmaps(signal) {
    let room = MOST_SCANNED;
    this.words.clear();
    for (const slot of this.slots) {
      for (let done = 0; done < slot.pages; done += WINDOW) {
        const npages = Math.min(WINDOW, slot.pages - done);
        if (room < npages) { this.scanned = false; return; }
        room -= npages;
        const first = slot.first + done;
        const words = new Uint32Array(await api.octets(`${this.machine.path}/subpages`, { query: { gfn: first, npages }, signal }));
        for (let at = 0; at < npages; at++) if (words[at] !== 0xffffffff) this.words.set(first + at, words[at]);
      }
    }
  }

  async #protections(signal) {
    this.objects = [];
    await api.pages(`${this.machine.path}/protections`, "protections", (page) => {
      for (const protection of page) {
        for (const object of protection.objects) {
          if (object.gpa === null || object.gpa === undefined) continue;
          const gpa = Number(object.gpa);
          this.objects.push({ name: object.name, gpa, end: gpa + Number(object.size), protection: protection.name, granularity: object.granularity });
        }
      }
    }, { signal });
    this.objects.sort((a, b) => a.gpa - b.gpa);
    this.byPage.clear();
    for (const object of this.objects) {
      const last = Math.floor((object.end - 1) / 4096);
      for (let gfn = Math.floor(object.gpa / 4096), left = 1 << 16; gfn <= last && left; gfn++, left--) {
        const there = this.byPage.get(gfn);
        if (there) there.push(object); else this.byPage.set(gfn, [object]);
      }
    }
  }

  async #dirty(signal) {
    this.written.clear();
    this.tracking = "off";
    const first = await api.get(`${this.machine.path}/dirty`, { query: { limit: 1000 }, signal });
    this.tracking = first.tracking;
    if (first.tracking === "off") return;
    const take = (pages) => { for (const page of pages) this.written.set(Number(page.gfn), Number(page.written)); };
    take(first.pages);
    if (first.next) await api.pages(first.next, "pages", take, { signal });
  }

  /** Count the refused writes of `exits` by sub-page; null for none. */
  setExits(exits) {
    this.refused.clear();
    this.hottest = 1;
    this.rows = null;
    for (let at = 0; exits && at < exits.length; at++) {
      if (!exits.denied[at]) continue;
      const gfn = exits.gfn(at);
      let counts = this.refused.get(gfn);
      if (!counts) this.refused.set(gfn, (counts = new Uint32Array(33)));
      counts[32]++;
      for (let mask = exits.denied[at]; mask; mask &= mask - 1) {
        const s = 31 - Math.clz32(mask & -mask);
        if (++counts[s] > this.hottest) this.hottest = counts[s];
      }
    }
  }

  /** Where a trace wrote: the pages of its footprint, the most written first; null for none. Whether these are all. */
  async setFootprint(url, signal) {
    this.touched.clear();
    this.busiest = 1;
    this.rows = null;
    if (!url) return true;
    const touched = new Map();
    let total = 0;
    for (let next = `${url}?order=writes&limit=1000`; next && touched.size < MOST_TOUCHED; ) {
      const page = await api.get(next, { signal });
      for (const one of page.pages) if (one.writes) touched.set(Number(one.gfn), { writes: one.writes, subpages: Number(one.subpages) });
      total = page.total;
      next = page.next;
    }
    this.touched = touched;
    for (const one of touched.values()) this.busiest = Math.max(this.busiest, one.writes);
    this.rows = null;
    return total <= MOST_TOUCHED;
  }

  /** Pages that have something to show, in order. */
  interesting() {
    this.rows ??= Float64Array.from(new Set([...this.words.keys(), ...this.refused.keys(), ...this.written.keys(), ...this.touched.keys(), ...this.byPage.keys()])).sort();
    return this.rows;
  }

  word(gfn) { return this.words.get(gfn) ?? 0xffffffff; }

  setWord(gfn, word) {
    if (word >>> 0 === 0xffffffff) this.words.delete(gfn); else this.words.set(gfn, word >>> 0);
    this.rows = null;
  }

  objectsAt(gfn, subpage) {
    const from = gfn * 4096 + subpage * 128;
    return (this.byPage.get(gfn) ?? []).filter((object) => object.granularity === "page" || (object.gpa < from + 128 && object.end > from));
  }
}
