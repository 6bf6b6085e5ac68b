"""A footprint has the places of a trace, each with how often and the first time, whatever the trace looks like."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.arch import access as acc
from engine.errors import InvalidValue, LimitExceeded, TraceError
from engine.footprint import kernels
from engine.footprint.build import Builder
from engine.footprint.places import BYTES, LEVELS, SPANS, By, Footprint, Origin
from engine.footprint.tables import FIRST_PLOTS, FIRST_ROWS
from engine.trace.columns import TraceChunk
from engine.trace.operations import INVLPG, Operation, Operations

ORIGIN = Origin("00" * 32, 0, "packed", ("gpa",))


def chunk(rows: Sequence[tuple[int, ...]], **more: Any) -> TraceChunk:
    """Records of (gpa, size, access, kind, linear, source, vcpu, insn_len), the last ones with defaults."""
    defaults = (0, 8, 1, 0, 1, 0, 0, 0)
    words = []
    for row in rows:
        gpa, size, access, kind, linear, source, vcpu, length = (*row, *defaults[len(row) :])
        words.append((gpa, size | access << 16 | vcpu << 32 | acc.record_bits(kind, linear, source, length)))
    return TraceChunk(np.array(words, dtype=np.uint64).reshape(-1, 2), None, more, kinds=True)


def build(*chunks: TraceChunk, level: str = SPANS, by: By | None = None) -> Footprint:
    """The footprint of chunks."""
    builder = Builder(level, by)
    for part in chunks:
        builder.feed(part)
    return builder.finish(ORIGIN)


def rows(footprint: Footprint, *names: str) -> list[tuple[int, ...]]:
    """Places as tuples of the named columns."""
    columns = footprint.columns()
    return list(zip(*(columns[name].tolist() for name in names or columns), strict=True))


def test_places_are_runs_of_sub_pages() -> None:
    found = build(chunk([(0x1000, 8), (0x1078, 8), (0x107C, 8), (0x1000, 1)]))
    assert rows(found, "begin", "extent", "count", "first") == [(0x20, 1, 3, 0), (0x20, 2, 1, 2)]
    assert (found.records, found.writes, found.origins[0].records) == (4, 4, 4)


def test_places_are_runs_of_bytes() -> None:
    found = build(chunk([(0x1000, 8), (0x1000, 4), (0x1000, 8), (0x1001, 8)]), level=BYTES)
    assert rows(found, "begin", "extent", "count", "first") == [
        (0x1000, 4, 1, 1),
        (0x1000, 8, 2, 0),
        (0x1001, 8, 1, 3),
    ]


@pytest.mark.parametrize("level", LEVELS)
def test_places_are_apart_by_access_kind_and_source(level: str) -> None:
    whats = [(0, 0), (1, 0), (2, 0), (1, 1), (0, 2), (1, 3), (0, 4), (1, 4), (0, 0, 1, 1), (1, 0, 1, 1), (1, 0, 1, 2)]
    found = build(chunk([(0x1000, 8, *what) for what in whats] * 2), level=level)
    assert sorted(zip(found.access.tolist(), found.kind.tolist(), found.source.tolist(), strict=True)) == sorted(
        (what[0], what[1], what[3] if len(what) > 2 else 0) for what in whats
    )
    assert set(found.count.tolist()) == {2} and found.translated.all()


def test_only_a_paging_read_is_apart_by_whether_it_is_translated() -> None:
    found = build(chunk([(0, 8, 0, 2, 1), (0, 8, 0, 2, 0), (0, 8, 1, 0, 1), (0, 8, 1, 0, 0), (0, 8, 1, 0, 7)]))
    assert [(int(k), bool(t), int(c)) for k, t, c in zip(found.kind, found.translated, found.count, strict=True)] == [
        (0, True, 3),
        (2, True, 1),
        (2, False, 1),
    ]


def test_vcpu_and_length_of_the_instruction_do_not_count() -> None:
    assert len(build(chunk([(0, 8, 1, 0, 1, 0, 0, 0), (0, 8, 1, 0, 1, 0, 7, 3)]))) == 1


def test_the_largest_access_and_the_highest_address() -> None:
    top = (1 << 52) - 65535
    found = build(chunk([(top, 65535), ((1 << 52) - 8, 8), (127, 65535)]))
    assert found.last_subpage.max() == (1 << 45) - 1
    assert rows(found, "extent") == [(513,), (512,), (1,)]


def naive(records: Sequence[tuple[int, ...]], unit: int) -> dict[tuple[int, int, int], tuple[int, int]]:
    places: dict[tuple[int, int, int], tuple[int, int]] = {}
    for index, (gpa, size, access) in enumerate(records):
        key = gpa >> unit, ((gpa + size - 1) >> unit) - (gpa >> unit) + 1, access
        count, first = places.get(key, (0, index))
        places[key] = count + 1, first
    return places


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("length", [1, 700, 5000])
def test_any_cut_into_chunks_gives_the_same(level: str, length: int) -> None:
    """And more places than the first table has room for are in it all the same."""
    draw = random.Random(length)
    records = [
        (draw.randrange(0, 1 << 19), draw.choice([1, 2, 4, 8, 8, 16, 200, 5000]), draw.randrange(3))
        for _ in range(5000)
    ]
    parts = [chunk(records[at : at + length]) for at in range(0, min(5000, 300 * length), length)]
    seen = records[: sum(len(part.records) for part in parts)]
    found = build(*parts, level=level)
    wanted = naive(seen, 7 if level == SPANS else 0)
    assert {row[:3]: row[3:] for row in rows(found, "begin", "extent", "what", "count", "first")} == wanted
    assert list(zip(found.begin, found.extent, found.what, strict=True)) == sorted(wanted)
    assert length < 5000 or len(found) > FIRST_ROWS // 2


def test_the_hash_changes_nothing() -> None:
    part = chunk([(at * 4096, 8) for at in range(100)])
    one, other = Builder(mix=(1, 1)), Builder()
    for builder in (one, other):
        builder.feed(part)
    assert rows(one.finish(ORIGIN)) == rows(other.finish(ORIGIN))


# ---- buckets and writers


def test_places_apart_by_runs_of_records() -> None:
    found = build(chunk([(0, 8)] * 5), chunk([(0, 8)] * 5), by=By(records=4))
    assert rows(found, "bucket", "count", "first") == [(0, 4, 0), (1, 4, 4), (2, 2, 8)]


def test_places_apart_by_time_and_by_writer() -> None:
    more = {
        "time": np.array([5, 10, 19, 20], dtype=np.uint64),
        "pc": np.array([1, (1 << 64) - 1, 1, 1], dtype=np.uint64),
    }
    found = build(chunk([(0, 8)] * 4, **more), by=By(time=10, pc=True))
    assert found.origins[0].nanoseconds == 15
    assert rows(found, "bucket", "pc", "count") == [(0, 1, 1), (1, 1, 1), (1, (1 << 64) - 1, 1), (2, 1, 1)]


@pytest.mark.parametrize("by", [By(time=10), By(pc=True)])
def test_what_places_are_to_be_apart_by_must_be_there(by: By) -> None:
    with pytest.raises(TraceError, match="has no column") as caught:
        build(chunk([(0, 8)]), by=by)
    assert caught.value.index == 0


def test_buckets_are_of_one_kind() -> None:
    with pytest.raises(InvalidValue, match="not by both"):
        Builder(by=By(time=1, records=1))


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ((0, 1 << 16), "size"),
        ((0, 8 | 3 << 16), "access"),
        (((1 << 52) - 7, 8 | 1 << 16), "gpa"),
        (((1 << 64) - 8, 8 | 1 << 16), "gpa"),
        ((0, 8 | 1 << 16 | 2 << 24), "kind"),
        ((0, 8 | 1 << 16 | 3 << 48), "source"),
        ((0, 8 | 1 << 16 | 1 << 31), "record"),
    ],
)
def test_what_is_no_access_is_refused_with_its_index(words: tuple[int, int], field: str) -> None:
    builder = Builder()
    builder.feed(chunk([(0, 8)] * 3))
    with pytest.raises(TraceError) as caught:
        builder.feed(TraceChunk(np.array([(0, 8 | 1 << 16), words], dtype=np.uint64), None, {}, kinds=True))
    assert (caught.value.index, caught.value.field) == (4, field)


def test_kinds_are_refused_where_records_have_none() -> None:
    with pytest.raises(TraceError, match="reserved"):
        Builder().feed(TraceChunk(np.array([(0, 8 | 1 << 16 | 1 << 24)], dtype=np.uint64), None, {}))


@pytest.mark.parametrize(
    ("operations", "field"),
    [
        (Operations(np.array([1]), (Operation(1, INVLPG, None, 0, None),), np.zeros(0, dtype=np.uint64)), "op"),
        (Operations(np.zeros(0, dtype=np.int64), (), np.zeros(2, dtype=np.uint64)), "address_space"),
    ],
)
def test_what_depends_on_history_is_refused_with_the_reason(operations: Operations, field: str) -> None:
    with pytest.raises(TraceError, match="what was before") as caught:
        Builder().feed(replace(chunk([(0, 8), (0, 8)]), operations=operations))
    assert caught.value.field == field


def test_places_are_bounded() -> None:
    builder = Builder(most=10)
    with pytest.raises(LimitExceeded, match="at most 10 places"):
        builder.feed(chunk([(at << 12, 8) for at in range(11)]))


@pytest.mark.parametrize("level", LEVELS)
def test_even_and_uneven_places_come_in_order(level: str) -> None:
    """Stores of every size at every address, each counted as often as it is there, whatever they are counted in."""
    draw = random.Random(level)
    stores = [
        (draw.randrange(3 << 7), draw.choice([1, 2, 3, 4, 7, 8, 16, 17, 32, 200]), draw.choice([0, 1]))
        for _ in range(4000)
    ]
    found = build(chunk(stores), level=level)
    unit = 7 if level == SPANS else 0
    wanted: dict[tuple[int, int, int], list[int]] = {}
    for index, (gpa, size, access) in enumerate(stores):
        begin = gpa >> unit
        place = wanted.setdefault((begin, (gpa + size - 1 >> unit) - begin + 1, access), [0, index])
        place[0] += 1
    counted = rows(found, "begin", "extent", "what", "count", "first")
    assert counted == [(*place, *told) for place, told in sorted(wanted.items())]


@pytest.mark.parametrize("level", LEVELS)
def test_places_far_apart_go_to_the_table(level: str) -> None:
    """Where plots would stay empty no more are made, and what is in some already is counted there for ever."""
    far = [(number << 20, 8) for number in range(3 * FIRST_PLOTS) for _ in range(2)]
    near = [(number << 3, 8) for number in range(64)]
    builder = Builder(level)
    for part in (near, far, near, far[::-1], near):
        builder.feed(chunk(part))
    assert builder.nbytes < 2_000_000
    found = builder.finish(ORIGIN)
    assert builder.places == len(found) == 3 * FIRST_PLOTS - 1 + (4 if level == SPANS else 64)
    assert found.records == 3 * len(near) + 2 * len(far) and bool((np.diff(found.begin.view(np.int64)) > 0).all())


@pytest.mark.parametrize("level", LEVELS)
def test_more_records_than_a_cell_can_count_are_counted(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots begin anew after so many, wherever a chunk ends."""
    draw = random.Random(level)
    stores = [(draw.randrange(1 << 10), draw.choice([1, 4, 8, 8, 200])) for _ in range(900)]
    whole = build(chunk(stores), level=level)
    monkeypatch.setattr(kernels, "MOST_RECORDS", 70)
    for length in (900, 70, 33):
        parts = [chunk(stores[at : at + length]) for at in range(0, len(stores), length)]
        assert rows(build(*parts, level=level)) == rows(whole)


def test_an_uneven_place_comes_between_those_of_a_plot() -> None:
    found = build(chunk([(0, 8), (8, 8), (16, 8), (8, 3), (8, 12)]), level=BYTES)
    assert rows(found, "begin", "extent") == [(0, 8), (8, 3), (8, 8), (8, 12), (16, 8)]
