"""Columns of Parquet files that are decoded a page at a time, and files that are decoded in several threads: what comes
out is what one reader of everything makes of them.
"""

from __future__ import annotations

import io
import itertools
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.arch import controls as ctl
from engine.arch import ve_area
from engine.cpu import host_physical_memory
from engine.errors import TraceError
from engine.trace.readers import Budget, open_trace, parquet, parquet_columns
from engine.trace.session import ReplayOptions
from engine.trace.single import AccessRequest
from tests.engine.builders import edit, machine, protect

RECORDS = 2_000
OPTIONS = {
    "plain": {"use_dictionary": False, "data_page_size": 1_000},
    "split": {"use_dictionary": False, "column_encoding": {"gva": "BYTE_STREAM_SPLIT"}, "compression": "zstd"},
    "dictionary": {"compression": "gzip"},
    "delta": {"use_dictionary": False, "column_encoding": {"gva": "DELTA_BINARY_PACKED"}},
    "version 2": {"data_page_version": "2.0", "compression": "snappy", "write_page_checksum": True},
}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a file of some thousand records has many."""
    monkeypatch.setattr(parquet, "BATCH_RECORDS", 128)


def table(gva: pa.Array | None = None, **more: pa.Array) -> pa.Table:
    rng = np.random.default_rng(1)
    columns = {
        "gpa": pa.array(rng.integers(0, 0x4000, RECORDS), pa.uint64()),
        "gva": pa.array(rng.integers(0, 1 << 64, RECORDS, dtype=np.uint64)) if gva is None else gva,
        "size": pa.array(rng.choice([1, 2, 4, 8], RECORDS), pa.uint8()),
        "vcpu": pa.array([0] * RECORDS, pa.uint8()),
        **more,
    }
    return pa.table(columns)


def file(data: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(data, sink, **{"row_group_size": 300, "max_rows_per_page": 50, **options})
    return sink.getvalue()


def replayed(body: bytes, *, late: bool, **options: object):
    vm = machine()
    protect(vm, "objects", (0x1000, 0x80), (0x2100, 0x180))
    reader = open_trace("parquet", io.BytesIO(body), late=late)
    with vm.replay(ReplayOptions(**options)) as run:
        for chunk in reader:
            assert (chunk.late is not None) is late
            if not run.feed(chunk):
                break
        return run.finish()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_late_addresses_are_those_of_the_records(options: dict[str, object]) -> None:
    data = table()
    body = file(data, **options)
    early, late = (replayed(body, late=late) for late in (False, True))
    assert early.violations == late.violations > 20
    assert late.exit_columns.has_gva
    for name in early.exit_columns.columns:
        assert np.array_equal(early.exit_columns.columns[name], late.exit_columns.columns[name]), name
    index = late.exit_columns.columns["index"]
    assert late.exit_columns.columns["gva"].tolist() == data["gva"].to_numpy()[index].tolist()


@pytest.mark.parametrize("start", [0, 450])
def test_of_a_replay_that_stops(start: int) -> None:
    body = file(table())
    early, late = (replayed(body, late=late, on_violation="stop", start=start) for late in (False, True))
    assert early.stopped_at == late.stopped_at
    assert early.exit_columns.columns["gva"].tolist() == late.exit_columns.columns["gva"].tolist()


def test_only_pages_with_an_exit_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = table(gpa=pa.array([0x1000 if n == 777 else 0x3000 for n in range(RECORDS)], pa.uint64()))
    decoded: list[int] = []
    whole = parquet.SparseColumn._decoded

    def noted(self, wanted):
        decoded.extend(placed.first for placed in wanted if self._name == "gva")
        return whole(self, wanted)

    monkeypatch.setattr(parquet.SparseColumn, "_decoded", noted)
    late = replayed(file(data, **OPTIONS["plain"]), late=True)
    assert late.exit_columns.columns["gva"].tolist() == [data["gva"][777].as_py()]
    assert len(decoded) == 1 and decoded[0] <= 777 < decoded[0] + 50


@pytest.mark.parametrize(
    ("gva", "wrong"),
    [
        (pa.array([1] * 900 + [None] + [1] * (RECORDS - 901), pa.uint64()), 900),
        (pa.array([1] * 900 + [-1] + [1] * (RECORDS - 901), pa.int64()), 900),
    ],
    ids=["null", "negative"],
)
def test_a_value_that_is_wrong_is_refused_as_ever(gva: pa.Array, wrong: int) -> None:
    """What may hold one is not late."""
    for late in (False, True):
        with pytest.raises(TraceError, match="gva must") as caught:
            for _ in open_trace("parquet", io.BytesIO(file(table(gva))), late=late):
                pass
        assert caught.value.index == wrong


def test_a_guest_that_handles_violations_itself_is_told_all_addresses() -> None:
    """The processor writes them to the area of the #VE."""
    data = table(gpa=pa.array([0x1000] * RECORDS, pa.uint64()))
    words = []
    for late in (False, True):
        vm = machine()
        vm.access(AccessRequest(0x1000))
        area = vm.tables.new_frame()
        controls = vm.vcpus.vmcs(0)["secondary_controls"] | int(ctl.SECONDARY_VE)
        vm.vcpus.set_vmcs(0, {"secondary_controls": controls, "ve_information_address": area})
        vm.tables.set_ept_entry(1, 0x1000, vm.tables.ept_entry(1, 0x1000).raw & ~2)
        with vm.replay(ReplayOptions()) as run:
            for chunk in open_trace("parquet", io.BytesIO(file(data)), late=late):
                run.feed(chunk)
            run.finish()
        place = np.int64(area)
        edit(vm, lambda m: words.append(int(host_physical_memory.read(m, place, ve_area.WORD_LINEAR)) % (1 << 64)))  # noqa: B023
    assert words == [data["gva"][0].as_py()] * 2


def test_without_statistics_nothing_is_late() -> None:
    body = file(table(), write_statistics=False)
    assert all(chunk.late is None for chunk in open_trace("parquet", io.BytesIO(body), late=True))
    required = table().cast(pa.schema([pa.field(f.name, f.type, nullable=False) for f in table().schema]))
    body = file(required, write_statistics=False)
    assert all(chunk.late is not None for chunk in open_trace("parquet", io.BytesIO(body), late=True))


def test_a_null_that_the_statistics_deny() -> None:
    """It is refused where its page is decoded."""
    gva = pa.array([None if n == 777 else n for n in range(RECORDS)], pa.uint64())
    gpa = pa.array([0x1000 if n == 770 else 0x3000 for n in range(RECORDS)], pa.uint64())
    body = file(table(gva, gpa=gpa), use_dictionary=False, compression="none")
    one, none = b"\x36\x02", b"\x36\x00"  # null_count 1 and 0, behind min and max of the old fields
    assert body.count(one) >= 1
    with pytest.raises(TraceError, match="gva must not be null") as caught:
        replayed(body.replace(one, none), late=True)
    assert caught.value.index == 777


@pytest.mark.parametrize("decoders", [0, 1, 2])
@pytest.mark.parametrize("group", [50, 128, 300, 5_000])
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch, decoders: int, group: int) -> None:
    vcpu = pa.array([n // 600 for n in range(RECORDS)], pa.uint16())
    data = table(vcpu=vcpu)
    monkeypatch.setattr(parquet, "DECODERS", decoders)
    if not decoders:
        monkeypatch.setattr(parquet.ParquetReader, "_decoders", lambda *_: 0)
    body = file(data, row_group_size=group)
    parts = [chunk.copy() for chunk in open_trace("parquet", io.BytesIO(body))]
    records = np.concatenate([part.records for part in parts])
    assert records[:, 0].tolist() == data["gpa"].to_pylist()
    assert (records[:, 1] & 0xFFFF).tolist() == data["size"].to_pylist()
    assert (records[:, 1] >> 32).tolist() == vcpu.to_pylist()
    assert np.concatenate([part.gva for part in parts]).tolist() == data["gva"].to_pylist()


@pytest.mark.parametrize("value", [70_000, -1])
def test_a_column_of_one_value_is_looked_at_once_and_checked(value: int) -> None:
    with pytest.raises(TraceError, match="vcpu must be an integer from 0 to 65535") as caught:
        list(open_trace("parquet", io.BytesIO(file(table(vcpu=pa.array([value] * RECORDS, pa.int32()))))))
    assert (caught.value.index, caught.value.value) == (0, value)


def test_what_is_wrong_comes_in_its_turn() -> None:
    """A replay that stops before a damaged page does not hear of it; one that goes on is told its group."""
    data = table(gpa=pa.array([0x1000 if n == 5 else 0x3000 + 8 * (n % 100) for n in range(RECORDS)], pa.uint64()))
    body = bytearray(file(data, use_dictionary=False, compression="zstd", max_rows_per_page=300))
    at = pq.read_metadata(io.BytesIO(body)).row_group(5).column(0).data_page_offset
    body[at + 60 : at + 90] = bytes(30)
    assert replayed(bytes(body), late=True, on_violation="stop").stopped_at == 5
    with pytest.raises(TraceError, match="Parquet file is not valid") as caught:
        replayed(bytes(body), late=True)
    assert caught.value.index == 1_500


def test_ahead_only_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    ahead = parquet_columns.ahead

    def counted(decoders: list[parquet.Decoder], groups: int):
        threads.append(len(decoders))
        return ahead(decoders, groups)

    monkeypatch.setattr(parquet, "ahead", counted)
    body = file(table())
    for word, expected in ((8, 2), (2_000, 1), (16_000, 0)):
        threads.clear()
        monkeypatch.setattr(parquet, "WORD_BYTES", word)
        assert sum(len(chunk) for chunk in open_trace("parquet", io.BytesIO(body), memory=Budget(16 << 20))) == RECORDS
        assert sum(threads) == expected, word


def test_a_reader_that_is_left_leaves_no_thread() -> None:
    before = threading.active_count()
    for chunk in itertools.islice(open_trace("parquet", io.BytesIO(file(table()))), 2):
        assert len(chunk)
    assert threading.active_count() == before
