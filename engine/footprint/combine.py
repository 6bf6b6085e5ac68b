"""Footprints added up, taken apart and made coarser.

Addition is associative and commutative, to the byte: places and traces have one order, whoever came first. Of first
accesses the least (trace, index) stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidValue, LimitExceeded
from engine.footprint.places import BYTES, KEYS, MAX_ORIGINS, SPANS, UNKNOWN, By, Footprint, Origin, made, ordered

Columns = dict[str, NDArray[Any]]
_LAST = np.iinfo(np.int64).max
_SLICE = 1 << 17  # places that are put together at one time
_GATHERED = 200  # memory of each meanwhile


def merge(footprints: Sequence[Footprint], check: Callable[[int], None] = lambda size: None) -> Footprint:
    """All of them as one. ``check`` is told how many bytes are about to be taken for a while, with what stays, and is
    called every moment. Raises InvalidValue unless they are of one level and apart by the same, and what ``check``
    does."""
    if not footprints:
        raise InvalidValue("must be at least one footprint", field="footprints", value=0)
    one = footprints[0]
    _check_alike(footprints)
    origins = sorted(origin for footprint in footprints for origin in footprint.origins)
    if len(origins) > MAX_ORIGINS:
        raise LimitExceeded(f"a footprint has at most {MAX_ORIGINS} traces", field="footprints", value=len(origins))
    taken = sum(footprint.nbytes for footprint in footprints)
    check(2 * taken)
    places = [_position_of(footprint, origins) for footprint in footprints]
    found: list[Columns] = []
    for begin, end in pairwise(_cuts(footprints)):
        pieces = [_between(footprint, begin, end) for footprint in footprints]
        check(2 * taken + sum(map(len, pieces)) * _GATHERED)
        parts = [_renumbered(piece, numbers) for piece, numbers in zip(pieces, places, strict=True)]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        found.append(gathered(one.level, one.by, origins, columns).columns())
    return made(one.level, one.by, origins, {name: np.concatenate([part[name] for part in found]) for name in found[0]})


def _cuts(footprints: Sequence[Footprint]) -> list[int | None]:
    """Where to cut footprints so that of all of them together some thousand places lie between two cuts; places that
    begin together stay together."""
    step = max(1, _SLICE // len(footprints))
    cuts = np.unique(np.concatenate([footprint.begin[step::step] for footprint in footprints]))
    return [None, *cuts.tolist(), None]


def _between(footprint: Footprint, begin: int | None, end: int | None) -> Footprint:
    """The places that begin from ``begin`` to before ``end``."""
    low, high = (
        None if edge is None else int(np.searchsorted(footprint.begin, np.uint64(edge))) for edge in (begin, end)
    )
    rows = {name: column[low:high] for name, column in footprint.columns().items()}
    return made(footprint.level, footprint.by, footprint.origins, rows)


def subtract(whole: Footprint, part: Footprint) -> Footprint:
    """What is left of ``whole`` without ``part``, which must have been added to it.

    Where the first access was one of a trace that is gone, the first one of the others is not known any more.
    """
    _check_alike([whole, part])
    left = Counter(whole.origins)
    left.subtract(part.origins)
    lacking = next((origin for origin, count in left.items() if count < 0), None)
    if lacking is not None:
        rule = "must have been added to the footprint: a trace of it is not there"
        raise InvalidValue(rule, field="part", value=lacking.name or lacking.digest)
    origins = sorted(left.elements())
    kept = {position for position, origin in enumerate(whole.origins) if origin in origins}
    columns = whole.columns()
    gone = ~np.isin(columns["trace"], np.array([UNKNOWN, *kept], dtype=np.int32))
    columns["trace"] = np.where(gone, np.int32(UNKNOWN), columns["trace"])
    left_over = made(whole.level, whole.by, whole.origins, columns)
    columns = _renumbered(left_over, _position_of(left_over, origins))
    taken = part.columns()
    taken["count"] = -taken["count"]
    taken["trace"] = np.full(len(part), np.iinfo(np.int32).max, dtype=np.int32)
    both = {name: np.concatenate([columns[name], taken[name]]) for name in columns}
    found = gathered(whole.level, whole.by, origins, both)
    if len(found) and int(found.count.min()) < 0:
        at = int(np.argmin(found.count))
        rule = "must have been added to the footprint: it has more accesses of a place than there are"
        raise InvalidValue(rule, field="part", value=int(found.begin[at]))
    there = found.count > 0
    return made(whole.level, whole.by, origins, {name: column[there] for name, column in found.columns().items()})


def coarser(
    footprint: Footprint,
    level: str | None = None,
    by: By | None = None,
    check: Callable[[int], None] = lambda size: None,
) -> Footprint:
    """The same accesses at a level that is the same or ``spans``, apart by less: every part of ``by`` that is not
    given is given up. ``check`` is told how many bytes are about to be taken for a while. Raises InvalidValue for what
    is not there to be had, and what ``check`` does."""
    level, by = level or footprint.level, footprint.by if by is None else by
    if (level, footprint.level) == (BYTES, SPANS):
        raise InvalidValue("must be spans: bytes are not known any more", field="level", value=level)
    for name, old, new in zip(By._fields, footprint.by, by, strict=True):
        if new not in (old, type(new)()):
            raise InvalidValue("must be as it was, or nothing", field=f"by.{name}", value=new)
    if (level, by) == (footprint.level, footprint.by):
        return footprint
    parts: list[Footprint] = []
    for begin in range(0, len(footprint) or 1, _SLICE):
        check(min(len(footprint), _SLICE) * _GATHERED)
        rows = {name: column[begin : begin + _SLICE] for name, column in footprint.columns().items()}
        parts.append(_coarser(made(footprint.level, footprint.by, footprint.origins, rows), level, by))
    if len(parts) == 1:
        return parts[0]
    check(sum(map(len, parts)) * _GATHERED)
    columns = {name: np.concatenate([part.columns()[name] for part in parts]) for name in parts[0].columns()}
    return gathered(level, by, footprint.origins, columns)


def _coarser(footprint: Footprint, level: str, by: By) -> Footprint:
    columns = footprint.columns()
    if level != footprint.level:
        columns["begin"] = footprint.first_subpage.view(np.uint64)
        columns["extent"] = footprint.last_subpage - footprint.first_subpage + 1
    if not by.buckets:
        columns.pop("bucket", None)
    if not by.pc:
        columns.pop("pc", None)
    return gathered(level, by, footprint.origins, columns)


def gathered(level: str, by: By, origins: Sequence[Origin], columns: Columns) -> Footprint:
    """A footprint of rows in any order, some of them for one place."""
    order = ordered(columns)
    columns = {name: column[order] for name, column in columns.items()}
    if not len(order):
        return made(level, by, origins, columns)
    fresh = np.zeros(len(order), dtype=np.bool_)
    fresh[0] = True
    for name in KEYS:
        if name in columns:
            fresh[1:] |= columns[name][1:] != columns[name][:-1]
    if fresh.all():
        return made(level, by, origins, columns)
    begins = np.flatnonzero(fresh)
    group = np.cumsum(fresh) - 1
    found = {name: columns[name][begins] for name in KEYS if name in columns}
    found["count"] = np.add.reduceat(columns["count"], begins)
    found["trace"] = np.minimum.reduceat(columns["trace"], begins)
    firsts = np.where(columns["trace"] == found["trace"][group], columns["first"], _LAST)
    found["first"] = np.minimum.reduceat(firsts, begins)
    return made(level, by, origins, found)


def _position_of(footprint: Footprint, origins: Sequence[Origin]) -> NDArray[np.int32]:
    """Of each trace of a footprint its position in ``origins``, and UNKNOWN for none. A trace that is there twice has
    the first of them."""
    place = {origin: position for position, origin in reversed(list(enumerate(origins)))}
    return np.array([*(place.get(origin, UNKNOWN) for origin in footprint.origins), UNKNOWN], dtype=np.int32)


def _renumbered(footprint: Footprint, numbers: NDArray[np.int32]) -> Columns:
    """The columns of a footprint, its traces by ``numbers``, the last of which is for none."""
    columns = footprint.columns()
    columns["trace"] = numbers[columns["trace"]]
    columns["first"] = np.where(columns["trace"] == UNKNOWN, UNKNOWN, columns["first"])
    return columns


def _check_alike(footprints: Sequence[Footprint]) -> None:
    one = footprints[0]
    for footprint in footprints:
        if footprint.level != one.level:
            rule = f"must be of one level: the first is of {one.level}"
            raise InvalidValue(rule, field="level", value=footprint.level)
        if footprint.by != one.by:
            rule = f"must be apart by the same: the first is by {dict(one.by._asdict())}"
            raise InvalidValue(rule, field="by", value=dict(footprint.by._asdict()))
