"""Footprints add up in any order, and come back from their files."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.errors import EngineError, InvalidValue, LimitExceeded
from engine.footprint.build import Builder
from engine.footprint.combine import coarser, merge, subtract
from engine.footprint.places import BYTES, LEVELS, SPANS, UNKNOWN, By, Footprint, Origin, made
from engine.footprint.stored import HEAD, read, write
from engine.trace.columns import TraceChunk
from engine.trace.readers.budget import Budget
from tests.abuse.footers import LIES, refooted

MEMORY = 64 << 20


def footprint(seed: int, level: str = BYTES, by: By | None = None, count: int = 300) -> Footprint:
    """Of a trace made up from a seed."""
    draw = random.Random(seed)
    rows = [(draw.randrange(0, 1 << 12), draw.choice([1, 8, 64, 300]) | draw.randrange(3) << 16) for _ in range(count)]
    more = {
        "time": np.sort(np.array([draw.randrange(100) for _ in rows], dtype=np.uint64)),
        "pc": np.array([draw.choice([1, 1 << 63]) for _ in rows], dtype=np.uint64),
    }
    builder = Builder(level, by)
    builder.feed(TraceChunk(np.array(rows, dtype=np.uint64).reshape(-1, 2), None, more))
    return builder.finish(Origin(f"{seed:064x}", 0, "packed", ("gpa",), name=f"{seed}.bin"))


def file(found: Footprint) -> bytes:
    """What is written."""
    sink = io.BytesIO()
    write(found, sink)
    return sink.getvalue()


def same(one: Footprint, other: Footprint) -> bool:
    """Whether two are alike in everything."""
    return file(one) == file(other)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("by", [By(), By(time=10), By(records=7, pc=True)])
def test_a_footprint_comes_back_from_its_file(level: str, by: By) -> None:
    found = footprint(1, level, by)
    back = read(io.BytesIO(file(found)), MEMORY)
    assert (back.level, back.by, back.origins) == (found.level, found.by, found.origins)
    for name, column in found.columns().items():
        assert np.array_equal(back.columns()[name], column) and back.columns()[name].dtype == column.dtype
    assert same(back, found)


def test_an_empty_footprint_comes_back() -> None:
    found = Builder().finish(Origin("", 0, "packed", ("gpa",)))
    assert same(read(io.BytesIO(file(found)), MEMORY), found)


@pytest.mark.parametrize("by", [By(), By(time=10, pc=True)])
def test_merged_in_any_order_files_are_equal(by: By) -> None:
    """Whatever is added to what, a trace that is there twice among them."""
    parts = [footprint(seed, by=by) for seed in (3, 1, 2, 1)]
    wanted = file(merge(parts))
    for order in itertools.permutations(parts):
        assert file(merge(order)) == wanted
        assert file(merge([merge(order[:2]), merge(order[2:])])) == wanted
        assert file(merge([order[0], merge([order[1], merge(order[2:])])])) == wanted


@pytest.mark.parametrize("by", [By(), By(time=10, pc=True)])
def test_large_ones_are_merged_piece_by_piece(by: By, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [footprint(seed, by=by) for seed in (3, 1, 2)]
    wanted = file(merge(parts))
    monkeypatch.setattr("engine.footprint.combine._SLICE", 8)
    sizes: list[int] = []
    assert file(merge(parts, sizes.append)) == wanted
    assert len(sizes) > 10 and max(sizes) >= 2 * sum(part.nbytes for part in parts)


def test_the_first_access_is_the_least_of_trace_and_index() -> None:
    parts = [footprint(seed) for seed in (2, 1, 3)]
    whole = merge(parts)
    assert [origin.name for origin in whole.origins] == ["1.bin", "2.bin", "3.bin"]
    wanted: dict[tuple[int, ...], tuple[int, int]] = {}
    counts: dict[tuple[int, ...], int] = {}
    for number, part in enumerate(sorted(parts, key=lambda item: item.origins)):
        for begin, extent, what, count, first in zip(
            part.begin.tolist(), part.extent.tolist(), part.what.tolist(), part.count.tolist(), part.first, strict=True
        ):
            key = begin, extent, what
            counts[key] = counts.get(key, 0) + count
            wanted.setdefault(key, (number, int(first)))
    keys = list(zip(whole.begin.tolist(), whole.extent.tolist(), whole.what.tolist(), strict=True))
    assert dict(zip(keys, whole.count.tolist(), strict=True)) == counts
    assert dict(zip(keys, zip(whole.trace.tolist(), whole.first.tolist(), strict=True), strict=True)) == wanted
    ranks = whole.rank.tolist()
    assert sorted(range(len(keys)), key=lambda at: wanted[keys[at]]) == sorted(range(len(keys)), key=ranks.__getitem__)


def test_what_was_added_can_be_taken_away() -> None:
    one, two, three = (footprint(seed) for seed in (1, 2, 3))
    left = subtract(merge([one, two, three]), two)
    wanted = merge([one, three])
    assert left.origins == wanted.origins
    assert np.array_equal(left.begin, wanted.begin) and np.array_equal(left.count, wanted.count)
    known = left.trace != UNKNOWN
    assert known.any() and not known.all()
    assert np.array_equal(left.first[known], wanted.first[known])
    assert np.array_equal(left.trace[known], wanted.trace[known])
    assert (left.first[~known] == UNKNOWN).all() and (left.rank[~known] == UNKNOWN).all()
    assert same(read(io.BytesIO(file(left)), MEMORY), left)
    assert same(merge([left, two]), merge([two, left]))


def test_of_a_trace_that_was_there_twice_everything_stays_known() -> None:
    one = footprint(1)
    assert same(subtract(merge([one, one]), one), one)


def test_what_was_not_added_cannot_be_taken_away() -> None:
    one, two = footprint(1), footprint(2)
    with pytest.raises(InvalidValue, match="a trace of it is not there"):
        subtract(one, two)
    liar = Footprint(two.level, two.by, one.origins, **two.columns())
    with pytest.raises(InvalidValue, match="more accesses"):
        subtract(one, liar)


@pytest.mark.parametrize("by", [By(), By(pc=True), By(time=10)])
def test_bytes_become_spans_and_what_places_were_apart_by_is_forgotten(by: By) -> None:
    fine = footprint(5, BYTES, By(time=10, pc=True))
    assert same(coarser(fine, SPANS, by), footprint(5, SPANS, by))
    assert same(coarser(fine, BYTES, by), footprint(5, BYTES, by))
    assert coarser(fine) is fine


def test_coarse_ones_do_not_become_finer() -> None:
    with pytest.raises(InvalidValue, match="must be spans"):
        coarser(footprint(1, SPANS), BYTES)
    with pytest.raises(InvalidValue, match="as it was"):
        coarser(footprint(1), by=By(time=3))


def test_only_like_is_added() -> None:
    with pytest.raises(InvalidValue, match="of one level"):
        merge([footprint(1, SPANS), footprint(1, BYTES)])
    with pytest.raises(InvalidValue, match="by the same"):
        merge([footprint(1), footprint(1, by=By(pc=True))])


# ---- files of others


def changed(found: Footprint, change: Any = None, **head: Any) -> io.BytesIO:
    """The file of a footprint with changes to its table, or to what it says of itself."""
    table = pq.read_table(io.BytesIO(file(found)))
    said = {**json.loads(table.schema.metadata[HEAD]), **head}
    table = table if change is None else change(table)
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({HEAD: json.dumps(said).encode()}), sink)
    return io.BytesIO(sink.getvalue())


TRACE = dict(footprint(1).origins[0]._asdict())


def column(name: str, value: int) -> Any:
    """Replace the third value of a column."""

    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        values = table.column(at).to_pylist()
        values[2] = value
        return table.set_column(at, name, pa.array(values, type=table.schema.field(at).type))

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (column("gpa", (1 << 64) - 1), "below 2\\^52"),
        (column("gpa", 0), "in order"),
        (column("size", 0), "must be 1 to 65535"),
        (column("access", 3), "writes"),
        (column("kind", 200), "writes"),
        (column("source", 3), "read or a write of data"),
        (column("linear", 2), "must be 1"),
        (column("count", 0), "from 1"),
        (column("count", 1 << 63), "from 1"),
        (column("count", 1 << 40), "records of the traces"),
        (column("trace", 7), "position of a trace"),
        (column("first_index", 1 << 63), "below"),
        (lambda table: table.drop_columns("count"), "must have a column count"),
        (lambda table: table.slice(1), "records of the traces"),
    ],
)
def test_a_file_that_is_wrong_is_refused(change: Any, match: str) -> None:
    with pytest.raises(InvalidValue, match=match):
        read(changed(footprint(1), change), MEMORY)


@pytest.mark.parametrize(
    ("head", "match"),
    [
        ({"schema": 2}, "schema 1"),
        ({"level": "pages"}, "one of spans, bytes"),
        ({"by": {"time": -1}}, "damaged"),
        ({"by": {"pc": True}}, "damaged"),
        ({"by": {"time": 1, "records": 1, "pc": False}}, "not by both"),
        ({"traces": []}, "1 to"),
        ({"traces": [{}]}, "damaged"),
        ({"traces": 3}, "damaged"),
        ({"traces": [{**TRACE, "digest": "00" * 33}]}, "a digest is"),
        ({"traces": [{**TRACE, "digest": 7}]}, "damaged"),
        ({"traces": [{**TRACE, "format": "x" * 4000}]}, "a format"),
        ({"traces": [{**TRACE, "format": []}]}, "damaged"),
        ({"traces": [{**TRACE, "address": "hva"}]}, "what addresses are"),
        ({"traces": [{**TRACE, "columns": ["x" * 64]}]}, "columns are"),
        ({"traces": [{**TRACE, "columns": ["gpa"] * 17}]}, "columns are"),
        ({"traces": [{**TRACE, "columns": [["gpa"]]}]}, "damaged"),
        ({"traces": [{**TRACE, "name": "x" * 256}]}, "up to 255 characters"),
        ({"traces": [{**TRACE, "name": None}]}, "up to 255 characters"),
        ({"traces": [{**TRACE, "name": "half \ud800"}]}, "damaged"),
        ({"traces": [{**TRACE, "records": (1 << 46) + 1}]}, "up to 2\\^46 records"),
    ],
)
def test_a_head_that_is_wrong_is_refused(head: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidValue, match=match):
        read(changed(footprint(1), **head), MEMORY)


def test_another_parquet_file_is_no_footprint() -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"gpa": [1]}), sink)
    with pytest.raises(InvalidValue, match="footprint build"):
        read(io.BytesIO(sink.getvalue()), MEMORY)


@pytest.mark.parametrize("end", [0, 10, 500, -1])
def test_a_damaged_file_is_refused(end: int) -> None:
    with pytest.raises(EngineError):
        read(io.BytesIO(file(footprint(1))[:end]), MEMORY)


def test_memory_is_bounded() -> None:
    with pytest.raises(EngineError, match="bytes of memory"):
        read(io.BytesIO(file(footprint(1, count=3000))), 4000)


def halves(found: Footprint) -> bytes:
    """Its file, in row groups of which the first two are equally long."""
    table = pq.read_table(io.BytesIO(file(found)))
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=len(table) // 2)
    return sink.getvalue()


@pytest.mark.parametrize("lie", LIES)
def test_a_directory_that_lies_is_refused(lie: str) -> None:
    """What is decoded is what memory was reckoned for."""
    body = halves(footprint(1))
    assert same(read(io.BytesIO(refooted(body, lambda tree: None)), MEMORY), footprint(1))
    budget = Budget(MEMORY)
    with pytest.raises(EngineError, match=r"its pages \d|and the file \d|below 0|columns once"):
        read(io.BytesIO(refooted(body, LIES[lie])), budget)
    assert budget.kept >= 0


def test_counts_that_pass_what_a_sum_can_be_are_refused() -> None:
    """Beside their true sum they had one that wraps."""
    most = (1 << 63) - 1

    def change(table: pa.Table) -> pa.Table:
        counts = pa.array([most, most, 1, *table["count"].to_pylist()[3:]], type=pa.uint64())
        return table.set_column(table.schema.get_field_index("count"), "count", counts)

    traces = [{**TRACE, "records": number} for number in (most, most, 298)]
    with pytest.raises(InvalidValue, match="up to 2\\^46 records"):
        read(changed(footprint(1), change, traces=traces), MEMORY)
    with pytest.raises(InvalidValue, match="records of the traces") as refused:
        read(changed(footprint(1), change), MEMORY)
    assert refused.value.value > 1 << 64


def test_a_head_of_much_is_too_much_before_it_is_read() -> None:
    """Empty objects are the most of three bytes."""
    body = changed(footprint(1), traces=[{}] * 100_000)
    with pytest.raises(EngineError, match="the traces of a footprint may take up to 7000000 bytes"):
        read(body, 7_000_000)
    with pytest.raises(InvalidValue, match="1 to 65536 traces"):
        read(body, MEMORY)


def of_traces(count: int, name: str) -> Footprint:
    """A footprint of one access, and of so many traces more without any."""
    one = Builder()
    one.feed(TraceChunk(np.array([[0, 1 << 16 | 8]], dtype=np.uint64), None, {}))
    found = one.finish(Origin("", 0, "packed", ("gpa",)))
    others = [Origin(f"{at:064x}", 0, "packed", ("gpa", "size", "access"), name=f"{at} {name}") for at in range(count)]
    return made(found.level, found.by, (*found.origins, *others), found.columns())


def test_what_is_written_can_be_read() -> None:
    """The file has what it says of its traces once, and no more of it than is read."""
    many = of_traces(50_000, "boot")
    assert read(io.BytesIO(file(many)), 1 << 30).origins == many.origins
    sink = io.BytesIO()
    with pytest.raises(LimitExceeded, match="keep it in parts"):
        write(of_traces(50_000, "x" * 200), sink)
    assert not sink.getvalue()


def test_a_name_that_is_not_unicode_is_written() -> None:
    (origin,) = footprint(1).origins
    odd = made(BYTES, By(), (origin._replace(name="half \udcff"),), footprint(1).columns())
    assert read(io.BytesIO(file(odd)), MEMORY).origins[0].name == "half ?"


class Stopped(Exception):
    """Nobody wants it any more."""


@pytest.mark.parametrize("error", [Stopped(), OSError(errno.EIO, "the disk"), MemoryError()])
def test_what_is_not_the_files_fault_is_not_said_to_be(error: Exception) -> None:
    body = file(footprint(1))

    class Failing(io.BytesIO):
        """Fails where the first pages are read by the library."""

        failing = False

        def read(self, size: int | None = -1) -> bytes:
            if self.failing and self.tell() < 100:
                raise error
            return super().read(size)

    source = Failing(body)

    def check() -> None:
        source.failing = True

    with pytest.raises(type(error)) as raised:
        read(source, MEMORY, check)
    assert not isinstance(raised.value, EngineError)


def test_it_is_asked_between_steps_whether_to_go_on() -> None:
    asked = []
    read(io.BytesIO(halves(footprint(1))), MEMORY, lambda: asked.append(1))
    assert len(asked) > 2

    def check() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        read(io.BytesIO(file(footprint(1))), MEMORY, check)


def test_memory_of_a_place_is_that_of_both_libraries() -> None:
    found = footprint(1)
    taken: list[int] = []
    budget = Budget(MEMORY, taken.append)
    read(io.BytesIO(file(found)), budget)
    assert budget.kept > found.nbytes and sum(taken) > budget.kept + 200 * len(found)


def test_damage_is_refused_and_nothing_else() -> None:
    body = file(footprint(1, count=50))
    draw = random.Random(7)
    for _ in range(100):
        changed = bytearray(body)
        changed[draw.randrange(len(changed))] = draw.choice([0, 1, 0x7F, 0x80, 0xFF])
        with contextlib.suppress(EngineError):
            read(io.BytesIO(bytes(changed)), MEMORY)
