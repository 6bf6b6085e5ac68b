"""The console in Chromium: first paint with 1,000 machines, frames while a large map and a million exits are panned."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from bench.servers import call, post

MACHINES, PAGES, EXITS = 1000, 100_000, 1_000_000
PANNING_MS = 3000

# Wheel events as fast as frames come; the time of every frame.
_PAN = """async ([selector, ms]) => {
  const element = document.querySelector(selector);
  const times = [];
  let last = performance.now();
  const end = last + ms;
  while (last < end) {
    const now = await new Promise(requestAnimationFrame);
    times.push(now - last);
    last = now;
    element.dispatchEvent(new WheelEvent("wheel", { deltaY: 40, cancelable: true, bubbles: true }));
    element.scrollTop += 400;
  }
  return times.slice(1);
}"""


@contextmanager
def browser() -> Iterator[Any]:
    """Debian's Chromium, or None where it or Playwright is missing."""
    path = os.environ.get("SUBPAGE_CHROMIUM") or shutil.which("chromium")
    try:
        playwright_api: Any = importlib.import_module("playwright.sync_api")
    except ImportError:
        path = None
    if path is None:
        yield None
        return
    with playwright_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()


def prepared(port: int) -> dict[str, str]:
    """Machines to look at; where each is looked at."""
    for number in range(MACHINES - 2):
        post(port, "/v1/vms", {"name": f"machine {number}"})
    slots = [{"slot": 0, "gpa": 0, "size": 1 << 30}]
    mapped = post(port, "/v1/vms", {"name": "map", "spp": True, "memory_slots": slots})["id"]
    words = np.random.default_rng(1).integers(0, 1 << 32, PAGES, dtype=np.uint32).tobytes()
    octets = "application/octet-stream"
    call(port, "PUT", f"/v1/vms/{mapped}/subpages?gfn=0&npages={PAGES}", words, octets)
    exits = post(port, "/v1/vms", {"name": "exits", "spp": True, "memory_slots": slots})["id"]
    objects = [{"name": "object", "gpa": 0x10000, "size": 128}]
    post(port, f"/v1/vms/{exits}/protections", {"name": "p", "objects": objects})
    records = np.full(EXITS, 0x10000, dtype="<u8").tobytes()
    _, trace = call(port, "POST", f"/v1/vms/{exits}/traces?record=gpa8", records, octets)
    return {"start": "/", "map": f"/vms/{mapped}/map", "exits": f"/vms/{exits}/replay/{trace['id']}"}


def frames(chromium: Any, url: str, shown: str, selector: str) -> list[float]:
    """Milliseconds of each frame while what ``selector`` names is panned, once ``shown`` is on the page."""
    page = chromium.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(300_000)
    page.goto(url)
    page.get_by_text(shown).first.wait_for()
    times: list[float] = page.evaluate(_PAN, [selector, PANNING_MS])
    page.close()
    return times


def first_paint(chromium: Any, url: str) -> tuple[float, int]:
    """(milliseconds from the navigation to the first contentful paint, bytes that came over the network)."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.goto(url)
    page.get_by_text(f"{MACHINES:,} machines").wait_for()
    told = json.loads(
        page.evaluate(
            """() => JSON.stringify({
            paint: performance.getEntriesByName("first-contentful-paint")[0].startTime,
            bytes: [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")]
              .filter((one) => !one.name.includes("/v1/")).reduce((sum, one) => sum + one.transferSize, 0)})"""
        )
    )
    context.close()
    return told["paint"], told["bytes"]


def measure(port: int, rounds: int) -> list[dict[str, Any]]:
    """Medians; nothing where there is no browser."""
    with browser() as chromium:
        if chromium is None:
            return []
        places = prepared(port)
        base = f"http://127.0.0.1:{port}/#"
        paints = [first_paint(chromium, base + places["start"]) for _ in range(rounds + 1)][1:]
        rows: list[dict[str, Any]] = [
            {
                "method": f"first paint, {MACHINES:,} machines",
                "milliseconds": statistics.median(paint for paint, _ in paints),
                "table_bytes": max(size for _, size in paints),
            }
        ]
        panned = (
            (f"frame, {PAGES:,} protected pages", "map", f"{PAGES:,} pages as a table", ".map"),
            (f"frame, {EXITS:,} exits", "exits", f"{EXITS:,} exits", ".virtual"),
        )
        for name, place, shown, selector in panned:
            times = [one for _ in range(rounds) for one in frames(chromium, base + places[place], shown, selector)]
            rows.append({"method": name, "milliseconds": statistics.median(times)})
            rows.append({"method": f"slow {name}, 95 %", "milliseconds": float(np.percentile(times, 95))})
        return rows
