"""Footprints, and what policies cost on them, as the API and the command line tell them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import InvalidValue
from engine.footprint.advice import Report
from engine.footprint.costs import Cost, First
from engine.footprint.places import Footprint, Origin
from engine.footprint.question import Question

NO_SLOTS = "writable memory everywhere: no memory slots were given"
# Traces of one footprint that are listed; their number is told.
MOST_TRACES = 100
_MILLION = 1_000_000


def about(footprint: Footprint) -> dict[str, Any]:
    """What is in it."""
    return {
        **totals(footprint),
        "traces": [dict(origin._asdict()) for origin in footprint.origins[:MOST_TRACES]],
        "traces_total": len(footprint.origins),
    }


def totals(footprint: Footprint) -> dict[str, Any]:
    """How much of what is in it."""
    by = footprint.by
    return {
        "level": footprint.level,
        "by": {"time": by.time or None, "records": by.records or None, "pc": by.pc},
        "places": len(footprint),
        "records": footprint.records,
        "writes": footprint.writes,
        "seconds": seconds_of(footprint),
    }


def seconds_of(footprint: Footprint) -> float | None:
    """How long its traces are together; None unless all of them have times."""
    lengths = [origin.nanoseconds for origin in footprint.origins]
    return sum(lengths) / 1e9 if all(lengths) else None


def asked(question: Question) -> dict[str, Any]:
    """What was asked beside policies, and what was taken for granted where nothing was said."""
    slots = question.memory_slots
    return {
        "profile": question.profile,
        "memory_slots": None
        if slots is None
        else [
            {"gpa": f"{s.gpa:#x}", "size": f"{s.size:#x}", "read_only": s.read_only, "host_page_size": s.host_page_size}
            for s in slots
        ],
        "assumed": NO_SLOTS if slots is None else None,
    }


def budget_of(footprint: Footprint, per_second: float | None, per_million: float | None) -> float | None:
    """How many exits a policy may cost on a footprint; None for any number. Raises InvalidValue."""
    if per_second is not None and per_million is not None:
        raise InvalidValue(
            "must not stand beside per_million: one of them is the budget", field="per_second", value=per_second
        )
    if per_million is not None:
        return per_million * footprint.writes / _MILLION
    if per_second is None:
        return None
    seconds = seconds_of(footprint)
    if seconds is None:
        rule = "not every trace of the footprint has times: say per_million"
        raise InvalidValue(rule, field="per_second", value=per_second)
    return per_second * seconds


def advice_document(footprint: Footprint, question: Question, report: Report) -> dict[str, Any]:
    """All that advice says; every cost is that of the whole policy with the edit."""
    return {
        **asked(question),
        "cost": costed(footprint.origins, report.cost),
        "neighbours": {
            name: [{"gpa": f"{item.gpa:#x}", "size": item.size, "violations": item.violations} for item in items]
            for name, items in report.neighbours.items()
        },
        "advice": [
            {
                "object": item.object,
                "action": item.action,
                "to": None if item.to is None else f"{item.to:#x}",
                "saves": item.saves,
                "cost": costed(footprint.origins, item.cost),
            }
            for item in report.advice
        ],
        "all_moved": None if report.together is None else costed(footprint.origins, report.together),
        "within_budget": None
        if report.cut is None
        else {
            "exits": report.cut.budget,
            "dropped": list(report.cut.dropped),
            "cost": costed(footprint.origins, report.cut.cost),
        },
    }


def costed(origins: Sequence[Origin], cost: Cost) -> dict[str, Any]:
    """What one policy costs, without its name."""
    return {
        "violations": cost.violations,
        "page_granular_violations": cost.page_granular_violations,
        "by_object": _objects(origins, cost),
        "mmio": cost.mmio,
        "unenforced_writes": cost.unenforced_writes,
        **_first(origins, cost.first),
        "subpages": cost.subpages,
        "pages": cost.pages,
    }


def _objects(origins: Sequence[Origin], cost: Cost) -> Mapping[str, Any]:
    return {
        name: {
            "subpages": item.subpages,
            "violations": item.violations,
            "collateral": item.collateral,
            **_first(origins, item.first),
        }
        for name, item in cost.by_object.items()
    }


def _first(origins: Sequence[Origin], first: First | None) -> dict[str, Any]:
    if first is None:
        return {"first_index": None, "first_trace": None}
    origin = origins[first.trace]
    return {"first_index": first.record, "first_trace": origin.name or origin.digest}
