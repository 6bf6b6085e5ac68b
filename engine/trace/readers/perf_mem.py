"""``perf-mem``: ``perf mem -D -x, report`` and ``perf mem report -t,`` (tools/perf/builtin-mem.c, perf-report(1)).

The first has a line a sample, and a heading that names its columns: ``# PID, TID, IP, ADDR, [PHYS ADDR, ]…, DSRC,
SYMBOL``; what a sample did is in the data source (perf_event_open(2), ``mem_op``). The second has a line for all
samples that are alike, so many as its column ``Samples`` says, under a heading ``# Overhead,Samples,…``; ``Data
Symbol`` has the address where it is of no symbol, ``Data Physical Address`` the physical one. It has a part for each
event, under ``# Samples: N  of event 'NAME'``: load and store in the name say what its samples did. What says neither
is taken for a write. Physical addresses are those of the machine that perf ran on: a guest's, if it ran there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.errors import TraceError
from engine.trace.lines import patterns as p
from engine.trace.lines.patterns import (
    ACCESS,
    ADDRESS,
    GVA,
    PC,
    A,
    B,
    Line,
    Part,
    Parts,
    constant,
    copy,
    decimal,
    hexadecimal,
    keep,
    line,
    record,
    rest,
    skip,
    spaces,
    sure,
    text,
    until,
    within,
)
from engine.trace.readers.tool_format import Refinement, ToolFormat

ASSUMED_SIZE = 8
_VIRTUAL, _PHYSICAL, _CODED = 0, 1, 2  # bits of tags: which address, and whether A has the data source

# mem_op of a data source (perf_event_open(2)).
_LOAD, _STORE, _PREFETCH, _EXECUTE = 2, 4, 8, 16

_SAMPLES_HEADING = re.compile(rb"^# (PID, TID, IP, ADDR, [^\r\n]*)\r?$", re.MULTILINE)
_REPORT_HEADING = re.compile(rb"^# (Overhead *([^\s\w]) *Samples *\2[^\r\n]*)\r?$", re.MULTILINE)
_SAMPLE = re.compile(rb"^\d+([^\s\w])\d+\1", re.MULTILINE)

_EVENTS: tuple[tuple[str, int], ...] = (
    ("store", acc.WRITE),
    ("STORE", acc.WRITE),
    ("load", acc.READ),
    ("LOAD", acc.READ),
)


def _address(register: int) -> tuple[Parts, ...]:
    return (until("] "), text("] 0x"), hexadecimal(register))


# What is read of a column by its name; the rest is passed over.
_OF_SAMPLES: Mapping[str, tuple[Parts, ...]] = MappingProxyType(
    {
        "IP": (hexadecimal(PC),),
        "ADDR": (hexadecimal(ADDRESS), copy(ADDRESS, GVA)),
        "PHYS ADDR": (hexadecimal(ADDRESS),),
        "DSRC": (hexadecimal(A),),
    }
)
_OF_REPORT: Mapping[str, tuple[Parts, ...]] = MappingProxyType(
    {
        "Samples": (decimal(B),),
        "Data Symbol": (*_address(ADDRESS), copy(ADDRESS, GVA)),
        "Data Physical Address": _address(ADDRESS),
    }
)


def _columns(names: list[str], known: Mapping[str, tuple[Parts, ...]], separator: str) -> tuple[Parts, ...]:
    """The parts of a line with these columns."""
    parts: list[Parts] = []
    for number, name in enumerate(names):
        last = number == len(names) - 1
        end: tuple[Part, ...] = () if last else (text(separator),)
        if name in known:
            parts += [spaces(0), *known[name], spaces(0), *end]
        else:
            parts += [rest()] if last else [until(separator), *end]
    return tuple(parts)


def _samples(head: bytes, found: re.Match[bytes]) -> tuple[Line, ...]:
    """The lines of ``-D -x,``."""
    names = [name.strip() for name in found[1].decode("utf-8", "replace").split(",")]
    first = _SAMPLE.search(head, found.end())
    separator = "," if first is None else first[1].decode("utf-8", "replace")
    tag = (_PHYSICAL if "PHYS ADDR" in names else _VIRTUAL) | _CODED
    return (
        record(", ".join(names), *_columns(names, _OF_SAMPLES, separator), constant(B, 1), tag=tag),
        skip("heading", text("#")),
    )


def _report(found: re.Match[bytes]) -> tuple[Line, ...]:
    """The lines of ``report -t,``."""
    separator = found[2].decode()
    heading = found[1].decode("utf-8", "replace")
    names = [name.strip() for name in heading.split(separator)]
    lacking = {"Samples", "Data Symbol"} - set(names)
    if lacking:
        rule = f"perf mem report has no column {', '.join(sorted(lacking))} here: leave out --sort and -F"
        raise TraceError(rule, index=0, field="body", value=heading)
    physical = "Data Physical Address" in names
    event: tuple[Parts, ...] = (text("# Samples: "), until(" of event '"))
    return (
        record(separator.join(names), *_columns(names, _OF_REPORT, separator), tag=_PHYSICAL if physical else _VIRTUAL),
        *(
            line(
                "# Samples: N  of event 'NAME'",
                *event,
                within(word, "',"),
                constant(ACCESS, access),
                keep(ACCESS),
                rest(),
            )
            for word, access in _EVENTS
        ),
        line("# Samples: N  of event 'NAME'", *event, constant(ACCESS, acc.WRITE), keep(ACCESS), rest()),
        skip("heading", text(f"# {heading}")),
        line(f"one heading throughout, {heading!r}", text("# Overhead"), sure(), text("\0")),
        skip("heading", text("#")),
        skip(
            "samples of a symbol, without their addresses: `perf mem -D -x, report` has them",
            *(spaces(0), decimal(A), text("."), until("%"), until(separator)),
        ),
    )


def _fit(head: bytes) -> tuple[Line, ...]:
    """The lines of the one or the other, by its heading. Raises TraceError for a body without."""
    found = _SAMPLES_HEADING.search(head)
    if found is not None:
        return _samples(head, found)
    found = _REPORT_HEADING.search(head)
    if found is not None:
        return _report(found)
    rule = "there is no heading of perf mem: make it with `perf mem -D -x, report`, or `perf mem report -t, --stdio`"
    raise TraceError(rule, index=0, field="body")


class _Samples(Refinement):
    """What samples did, and whether they have a physical address."""

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows that are accesses."""
        tag = rows[:, p.TAG]
        if len(rows) and tag[0] & _PHYSICAL:
            self.address = "guest-physical"
            known = rows[:, ADDRESS] != 0
            self.drop("sample without a physical address", int((~known).sum()))
            rows, tag = rows[known], tag[known]
        coded = tag & _CODED != 0
        source = np.where(coded, rows[:, A], 0)
        read, fetch = source & _LOAD != 0, source & _EXECUTE != 0
        access = np.where(read, acc.READ, np.where(fetch, acc.EXECUTE, acc.WRITE))
        rows[coded, ACCESS] = np.where(source & _STORE != 0, acc.WRITE, access)[coded]
        prefetches = source & (_PREFETCH | _LOAD | _STORE) == _PREFETCH
        self.drop("prefetch", int(prefetches.sum()))
        kept: NDArray[np.int64] = rows[~prefetches]
        return kept


PERF_MEM = ToolFormat(
    name="perf-mem",
    tool="Linux' perf mem, its dump or its report (`perf mem report -t, --stdio`)",
    made="perf mem record PROGRAM; perf mem -D -x, report > trace.txt",
    address="process-virtual",
    reads="a data source of a load; in a report, samples of an event with load in its name",
    writes="a data source of a store, or of neither; in a report, samples of any other event",
    executes="a data source of an execution",
    columns=("gpa", "access", "gva", "pc"),
    mark=re.compile(rb"^# (?:PID, TID, IP, ADDR, |Overhead *([^\s\w]) *Samples *\1)", re.MULTILINE),
    assumed_size=ASSUMED_SIZE,
    refine=_Samples,
    fit=_fit,
    repeats=B,
)
