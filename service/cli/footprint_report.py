"""What the commands about footprints print: as documents for programs, as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from engine.footprint.advice import MOVE, Report
from engine.footprint.costs import Cost
from engine.footprint.places import Footprint
from engine.footprint.question import Question
from engine.footprint.summaries import Counts, pages, timeline, writers
from engine.kvm.protections import Protection
from service.runtime.footprint_documents import NO_SLOTS, asked, costed, seconds_of, totals

_MILLION = 1_000_000


# ---- what is in one


def contents(footprint: Footprint, top: int) -> dict[str, Any]:
    """A footprint as numbers and texts."""
    by_page = pages(footprint)
    found: dict[str, Any] = {
        **totals(footprint),
        "pages": len(by_page.key),
        "subpages": int(np.bitwise_count(by_page.subpages).sum()),
        "traces": [dict(origin._asdict()) for origin in footprint.origins],
        "top_pages": [
            {
                "page": f"{int(by_page.key[at]) << 12:#x}",
                "accesses": int(by_page.accesses[at]),
                "writes": int(by_page.writes[at]),
                "subpages": f"{int(by_page.subpages[at]):#010x}",
            }
            for at in by_page.most(top)
        ],
    }
    if footprint.bucket is not None:
        counts = timeline(footprint)
        found["timeline"] = [_row(counts, at, "bucket", int(counts.key[at])) for at in range(min(top, len(counts.key)))]
    if footprint.pc is not None:
        counts = writers(footprint)
        found["top_writers"] = [_row(counts, at, "pc", f"{int(counts.key[at]):#x}") for at in counts.most(top)]
    return found


def _row(counts: Counts, at: int, name: str, key: Any) -> dict[str, Any]:
    return {name: key, "accesses": int(counts.accesses[at]), "writes": int(counts.writes[at])}


def contents_lines(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    by = [f"{key} {value}" if key != "pc" else key for key, value in found["by"].items() if value]
    yield f"{name}: {found['level']}{', by ' + ' and '.join(by) if by else ''}"
    for trace in found["traces"]:
        label = trace["name"] or trace["digest"][:12]
        yield f"trace      {label}: {trace['records']:,} records, {trace['format']}, sha256 {trace['digest'][:16]}…"
    yield f"accesses   {found['records']:,}, {found['writes']:,} of them writes"
    yield f"places     {found['places']:,}: {found['subpages']:,} sub-pages in {found['pages']:,} pages"
    if found["seconds"] is not None:
        yield f"time       {found['seconds']:.3f} s"
    yield from _table(
        ("PAGE", "ACCESSES", "WRITES", "SUB-PAGES"),
        [(row["page"], row["accesses"], row["writes"], row["subpages"]) for row in found["top_pages"]],
    )
    for name_, key in (("timeline", "bucket"), ("top_writers", "pc")):
        if name_ in found:
            yield from _table(
                (key.upper(), "ACCESSES", "WRITES"),
                [(row[key], row["accesses"], row["writes"]) for row in found[name_]],
            )


# ---- costs


def ranked(costs: Mapping[str, Cost]) -> list[str]:
    """Names of policies, the cheapest first."""
    return sorted(costs, key=lambda name: (costs[name].violations, costs[name].page_granular_violations, name))


def cost_document(footprint: Footprint, question: Question, costs: Mapping[str, Cost]) -> dict[str, Any]:
    """Policies by name, the cheapest first."""
    return {
        "footprint": totals(footprint),
        **asked(question),
        "policies": {name: costed(footprint.origins, costs[name]) for name in ranked(costs)},
    }


def _head(name: str, footprint: Footprint, question: Question) -> Iterator[str]:
    yield (
        f"{name}: {footprint.records:,} accesses, {footprint.writes:,} of them writes, in {len(footprint):,} places "
        f"({footprint.level}); {question.profile}"
    )
    if question.memory_slots is None:
        yield f"{NO_SLOTS} (--memory-slots GPA:SIZE)"


def cost_lines(
    name: str, footprint: Footprint, question: Question, costs: Mapping[str, Cost], limit: int
) -> Iterator[str]:
    """The table of policies, the cheapest first."""
    yield from _head(name, footprint, question)
    order = ranked(costs)
    seconds = seconds_of(footprint)
    rows = []
    for policy in order[:limit]:
        cost = costs[policy]
        beside = [item.collateral for item in cost.by_object.values()]
        rows.append(
            (
                policy[:40],
                cost.subpages,
                cost.violations,
                "?" if None in beside else sum(item or 0 for item in beside),
                cost.page_granular_violations,
                _rate(cost.violations, footprint, seconds),
                "–" if cost.first is None else f"{cost.first.record:,}",
            )
        )
    per = "A SECOND" if seconds else "A MILLION WRITES"
    yield from _table(("POLICY", "SUB-PAGES", "EXITS", "COLLATERAL", "WHOLE PAGES", per, "FIRST"), rows)
    if len(order) > limit:
        yield f"{len(order) - limit:,} dearer policies are not shown (--limit)"
    if footprint.level == "spans":
        yield "collateral is ? where it takes bytes to tell (footprint build --level bytes)"
    unenforced = [policy for policy in order if costs[policy].unenforced_writes]
    if unenforced:
        yield f"writes land although they are refused (unenforced_writes in --json) under {len(unenforced)} policies"


def _rate(exits: int, footprint: Footprint, seconds: float | None) -> str:
    base = seconds or footprint.writes / _MILLION
    return f"{exits / base:,.1f}" if base else "–"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Columns wide enough for all of their cells: the first to the left, numbers to the right."""
    cells = [head, *([f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(head))]
    for line in cells:
        first, *others = (
            cell.ljust(width) if not at else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join([first, *others]).rstrip()


# ---- advice


def advice_lines(footprint: Footprint, policy: Protection, question: Question, report: Report) -> Iterator[str]:
    """The same for people."""
    yield from _head(policy.name, footprint, question)
    cost = report.cost
    yield f"exits      {cost.violations:,} of {cost.page_granular_violations:,} with whole pages"
    for name, neighbours in report.neighbours.items():
        item = cost.by_object[name]
        yield f"{name}: {item.collateral:,} of {item.violations:,} exits are its neighbours':"
        for beside in neighbours:
            yield f"  {beside.gpa:#x}, {beside.size} bytes: {beside.violations:,}"
    for edit in report.advice:
        what = "to sub-pages of its own" if edit.action == MOVE else "by sub-pages, not by whole pages"
        verb = "move" if edit.action == MOVE else "protect"
        yield f"{verb} {edit.object} {what}: {edit.saves:,} exits fewer, {edit.cost.violations:,} are left"
    if report.together is not None:
        yield f"all of them moved: {report.together.violations:,} exits are left"
    if not report.advice:
        yield "no object pays for neighbours that moving it would save"
    if report.cut is not None:
        cut = report.cut
        yield f"budget     {cut.budget:,.1f} exits"
        for name in cut.dropped:
            yield f"not worth it: {name}, {cost.by_object[name].violations:,} exits"
        left = "over the budget" if cut.cost.violations > cut.budget else "within the budget"
        yield f"without {len(cut.dropped)} of {len(cost.by_object)} objects: {cut.cost.violations:,} exits, {left}"
