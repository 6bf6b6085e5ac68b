"""Printing, and the few figures that a run is about."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.sections import Row

# Heading and how to show it, for the fields of a row that are shown, in order.
COLUMNS: dict[str, tuple[str, str]] = {
    "trace": ("trace", "{}"),
    "policy": ("policy", "{}"),
    "method": ("method", "{}"),
    "of_c_walk": ("x C walk", "{:.2f}"),
    "of_numpy": ("x numpy", "{:.2f}"),
    "of_sum": ("x sum", "{:.2f}"),
    "of_empty": ("x empty", "{:.2f}"),
    "of_constant": ("x constants", "{:.2f}"),
    "of_raw": ("x httpx2", "{:.3f}"),
    "of_plain": ("x plain", "{:.3f}"),
    "of_gpa": ("x by GPA", "{:.2f}"),
    "bytes_record": ("bytes a record", "{:.2f}"),
    "bytes_kept": ("bytes kept", "{:.1f}"),
    "microseconds": ("µs each question", "{:,.0f}"),
    "places": ("places", "{:,}"),
    "milliseconds": ("ms", "{:,.2f}"),
    "peak_growth_bytes": ("peak growth, bytes", "{:,}"),
    "final_growth_bytes": ("growth at the end, bytes", "{:,}"),
    "bytes_each": ("bytes each", "{:.1f}"),
    "table_bytes": ("frames, bytes", "{:,}"),
    "records": ("records", "{:,}"),
    "violations": ("violations", "{:,}"),
}

# Figure, part of the run and perhaps a policy, name of the methods, field, and which of the rows counts.
SUMMARY: tuple[tuple[str, str, str, str, Any, str], ...] = (
    ("replay of records / C walk", "checks", "engine (e)", "of_c_walk", min, ">= 0.8"),
    ("replay of records / numpy", "checks", "engine (e)", "of_numpy", min, ">= 1.2"),
    ("replay of columns / C walk", "checks kernel_control_data", "engine, columns", "of_c_walk", min, ">= 1.5"),
    ("the same, hot pages", "checks hot_pages_stress", "engine, columns", "of_c_walk", min, ">= 1.0"),
    ("replay of columns / numpy", "checks", "engine, columns", "of_numpy", min, ">= 1.3"),
    ("exits/s, in this process", "exits", "refused, engine", "per_second", min, ">= 20 M"),
    ("exits/s, over HTTP until SQLite has them", "exits", "refused, HTTP", "per_second", min, ">= 10 M"),
    ("exit record in the store, bytes", "exits", "refused, HTTP", "bytes_kept", max, "<= 24"),
    ("first touches, pages/s", "exits", "touched, engine", "per_second", min, ">= 3 M"),
    ("C walk / C sum", "checks", "C walk", "of_sum", min, ">= 0.2, or the baseline is wrong"),
    ("HTTP packed, slowest, records/s", "http", "HTTP packed", "per_second", min, ">= 30 M"),
    ("HTTP Arrow, slowest, records/s", "http", "HTTP arrow", "per_second", min, ">= 150 M"),
    ("HTTP Parquet of the boot, records/s", "http", "HTTP parquet, boot", "per_second", min, ">= 120 M"),
    ("HTTP compact Arrow of the boot, records/s", "http", "HTTP compact, boot", "per_second", min, ">= 150 M"),
    ("compact Arrow, bytes a record", "http", "HTTP compact", "bytes_record", max, "<= 2"),
    ("asking, µs for each question", "ask", "asked", "microseconds", max, "< 10,000"),
    ("KVMI, µs for each question", "ask", "KVMI", "microseconds", max, "<= 500"),
    ("KVMI reads / constants", "kvmi", "KVMI read", "of_constant", min, ">= 0.6"),
    ("bitmap by the client / by httpx2", "client", "bitmap, client", "of_raw", min, ">= 0.87: adds 15 %"),
    ("boot by the client / by httpx2", "client", "boot, client", "of_raw", min, ">= 0.97: adds 3 %"),
    ("GET subpages / empty endpoint", "calls", "GET", "of_empty", min, ">= 0.7"),
    ("SET subpages, memory / empty endpoint", "calls", "SET subpages, memory", "of_empty", min, ">= 0.35"),
    ("SET subpages, SQLite / empty endpoint", "calls", "SET subpages, SQLite", "of_empty", min, ">= 0.35"),
    ("lackey, lines/s", "readers", "lackey", "per_second", min, ">= 1 M a core"),
    *(
        (f"{name}, lines/s", "readers", name, "per_second", min, ">= 1 M a core")
        for name in ("drmemtrace", "execlog", "bochs", "gem5", "ftrace", "perf-script", "perf-mem", "hyperdbg")
    ),
    ("csv, rows/s", "readers", "csv", "per_second", min, ">= 5 M a core"),
    ("champsim, instructions/s", "readers", "champsim", "per_second", min, ">= 10 M a core: 20 M records"),
    ("footprint of sub-pages, records/s", "footprints", "built, spans", "per_second", min, ">= 300 M a core"),
    ("footprint of bytes, records/s", "footprints", "built, bytes", "per_second", min, ">= 50 M a core"),
    ("10,000 policies, slowest, ms", "footprints", "10,000 policies", "milliseconds", max, "<= 3,000"),
    ("one more policy, slowest, ms", "footprints", "one more", "milliseconds", max, "<= 0.5"),
    ("console, first paint, ms", "console", "first paint", "milliseconds", max, "<= 1,000"),
    ("console, frame while panning, ms", "console", "frame", "milliseconds", max, "<= 33: 30 a second"),
    ("1 TiB guest, peak growth, bytes", "memory", "1 TiB", "peak_growth_bytes", max, "< 12 M"),
    ("a protected page beyond its tables, bytes", "memory", "1 M protected", "bytes_each", max, "<= 24"),
)


def rate(value: float) -> str:
    """Items per second, to three digits."""
    return f"{value / 1e6:,.3g} M/s" if value >= 1e5 else f"{value:,.0f} /s"


def print_section(title: str, rows: list[Row]) -> None:
    """One table; nothing if the part could not run."""
    console = Console(width=None if Console().is_terminal else 120)
    if not rows:
        console.print(f"\n{title}: not available here")
        return
    shown = [name for name in COLUMNS if any(name in row for row in rows)]
    table = Table(title=title, title_justify="left")
    for name in shown:
        table.add_column(COLUMNS[name][0], justify="left" if COLUMNS[name][1] == "{}" else "right")
    timed = any("per_second" in row for row in rows)
    if timed:
        table.add_column("median", justify="right")
    for row in rows:
        cells = [COLUMNS[name][1].format(row[name]) if name in row else "" for name in shown]
        table.add_row(*cells, *([rate(row["per_second"])] if timed else []))
    console.print()
    console.print(table)


def held(worst: float, promise: str) -> bool:
    """Whether a figure is within what begins a promise: an operator and a number, perhaps of millions."""
    found = re.match(r"(>=|<=|<) ([\d.,]+)( M)?", promise)
    if found is None:
        raise ValueError(f"a promise begins with >=, <= or < and a number: {promise}")
    bound = float(found[2].rstrip(",.").replace(",", "")) * (1e6 if found[3] else 1)
    return {">=": worst >= bound, "<=": worst <= bound, "<": worst < bound}[found[1]]


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The worst case of each promise, over all traces and policies that were run."""
    figures = []
    for name, section, method, field, worst, promise in SUMMARY:
        part, _, policy = section.partition(" ")
        rows = [row for row in results.get(part, []) if not policy or row["policy"] == policy]
        values = [row[field] for row in rows if row["method"].startswith(method) and field in row]
        if values:
            figure = worst(values)
            figures.append({"figure": name, "worst": figure, "promise": promise, "held": held(figure, promise)})
    return figures


def print_summary(figures: list[dict[str, Any]]) -> None:
    """The same, for reading."""
    table = Table(title="Worst case of each promise", title_justify="left")
    for heading in ("figure", "worst", "promise", "held"):
        table.add_column(heading, justify="right" if heading == "worst" else "left")
    for item in figures:
        value = item["worst"]
        table.add_row(
            item["figure"],
            f"{value:.2f}" if value < 1000 else f"{value:,.0f}",
            item["promise"],
            "yes" if item["held"] else "no",
        )
    console = Console(width=None if Console().is_terminal else 120)
    console.print()
    console.print(table)
