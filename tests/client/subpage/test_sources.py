"""What can be replayed, and how far it is told to be."""

from __future__ import annotations

import gzip
import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import subpage
from subpage import Vm
from subpage.bodies import body_of
from subpage.jobs import JobOperations

RECORDS = [{"gpa": 0x10040 + 128 * number, "size": 8} for number in range(64)]
GPAS = np.array([record["gpa"] for record in RECORDS], dtype=np.uint64)
TABLE = pa.table({"gpa": pa.array(GPAS)})
LINES = "".join(f"{json.dumps(record)}\n" for record in RECORDS).encode()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink)
    return sink.getvalue()


def arrow() -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue()


SOURCES: dict[str, Any] = {
    "records": lambda: RECORDS,
    "a generator of records": lambda: (record for record in RECORDS),
    "addresses": lambda: (int(gpa) for gpa in GPAS),
    "a document": lambda: {"accesses": RECORDS},
    "NDJSON": lambda: LINES,
    "pieces of it": lambda: (LINES[at : at + 100] for at in range(0, len(LINES), 100)),
    "an open file": lambda: io.BytesIO(LINES),
    "Parquet": parquet,
    "an Arrow stream": arrow,
    "a table": lambda: TABLE,
    "a reader": lambda: TABLE.to_reader(max_chunksize=10),
    "a compact stream": lambda: subpage.compact(TABLE, "zstd"),
    "an array": lambda: GPAS,
    "an array with names": lambda: np.rec.fromarrays([GPAS, np.full(64, 8, np.uint16)], names="gpa,size"),
    "a table of text": lambda: b"gpa,size\n" + b"".join(b"%#x,8\n" % gpa for gpa in GPAS),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_sources(vm: Vm, kind: str) -> None:
    trace = vm.replay(SOURCES[kind]())
    assert (trace.records, trace.violations, trace.page_granular_violations) == (64, 1, 32)


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.ndjson", "t.ndjson.gz", "t.json", "t.bin", "t.trace"])
def test_files(vm: Vm, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = {
        ".parquet": parquet,
        ".arrow": arrow,
        ".ndjson": lambda: LINES,
        ".gz": lambda: gzip.compress(LINES),
        ".json": lambda: json.dumps({"accesses": RECORDS}).encode(),
        ".bin": lambda: b"".join(int(gpa).to_bytes(8, "little") + bytes([8, 0, 1, 0, 0, 0, 0, 0]) for gpa in GPAS),
        ".trace": lambda: b"".join(b" S %08x,8\n" % gpa for gpa in GPAS),  # Valgrind's lackey
    }[path.suffix]()
    path.write_bytes(data)
    said: list[tuple[int, int | None]] = []
    trace = vm.replay(path, progress=lambda done, total: said.append((done, total)))
    assert trace.violations == 1
    assert said[0] == (0, len(data)) and said[-1] == (len(data), len(data))


def test_a_pipe(vm: Vm, tmp_path: Path) -> None:
    pipe = tmp_path / "live.ndjson"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(LINES))
    writer.start()
    assert vm.replay(pipe).records == 64
    writer.join()


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (Path(__file__).parent, "is a directory"),
        ("nothing.parquet", "No such file"),
        (b"ARROW1\0\0", "Feather"),
        ([], "there is nothing"),
        ([object()], "an iterator gives"),
        (7, "cannot be sent"),
    ],
)
def test_what_is_none(source: Any, told: str) -> None:
    with pytest.raises(subpage.BadInput, match=told):
        body_of(source)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "e.parquet").touch()
    with pytest.raises(subpage.BadInput, match="is empty"):
        body_of(tmp_path / "e.parquet")


def test_a_library_that_is_missing(vm: Vm) -> None:
    trace = vm.replay(RECORDS)
    with pytest.raises(subpage.NotInstalled, match=r"subpage-client\[polars\]"):
        trace.polars()


def test_results_in_every_form(vm: Vm) -> None:
    trace = vm.replay(RECORDS[:1])
    assert trace.arrow()["gpa"].to_pylist() == [0x10040]
    assert trace.numpy()["denied"].tolist() == [1]
    columns = trace.columns()
    assert isinstance(columns["gpa"], memoryview) and columns["objects"] == [[]]
    assert [record["gpa"] for record in vm.exits()] == ["0x10040"]


def test_jobs(vm: Vm) -> None:
    said: list[int] = []
    job = vm.submit(RECORDS)
    assert job.wait(progress=lambda done, total: said.append(done)).violations == 1
    assert job.state == "succeeded" and job["result"]
    bad = vm.submit([{"gpa": 1 << 60}])
    with pytest.raises(subpage.Problem, match="at record 0"):
        bad.wait()


def test_an_interrupted_wait_cancels(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    job = vm.submit(RECORDS)
    if job.state not in ("queued", "running"):
        job.document["state"] = "running"  # as it was when it was accepted

    async def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    async def abandoned(job: subpage.Job) -> None:
        cancelled.append(job.id)

    cancelled: list[str] = []
    monkeypatch.setattr(job._core.transport, "sleep", interrupted)
    monkeypatch.setattr(JobOperations, "cancel", abandoned)
    with pytest.raises(KeyboardInterrupt):
        job.wait()
    assert cancelled == [job.id]


def test_policies_from_files(vm: Vm, tmp_path: Path) -> None:
    (tmp_path / "kernel.toml").write_text('objects = [{name = "t", gpa = "0x20000", size = 128}]')
    assert vm.protect(tmp_path / "kernel.toml")["name"] == "kernel"
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(subpage.BadInput, match=r"broken\.json: is no policy"):
        vm.protect(tmp_path / "broken.json")
    with pytest.raises(subpage.BadInput, match="is a directory"):
        vm.protect(tmp_path)
    with pytest.raises(subpage.BadInput, match="name: must be given"):
        vm.protect([])


def test_bitmaps_take_everything(vm: Vm) -> None:
    for access in ([1, 2], ["0x1", 2], np.array([1, 2], np.uint32), subpage.Bitmap(0x30, [1, 2]), b"\1\0\0\0\2\0\0\0"):
        vm.set_subpages(0x30, access)
        found = vm.subpages(0x30, 2)
        assert found == subpage.Bitmap(0x30, [1, 2]) and found.numpy().tolist() == [1, 2]
        vm.set_subpages(0x30, [7, 7])
    with pytest.raises(subpage.BadInput, match="words of 32 bits"):
        vm.set_subpages(0x30, [1 << 32])
    stale = vm.subpages(0x30)
    vm.set_subpages(0x30, 9)
    with pytest.raises(subpage.Problem) as refused:
        vm.set_subpages(0x30, 8, etag=stale.etag)
    assert refused.value.status == 412


def test_notebooks_see_tables_and_pictures(vm: Vm) -> None:
    vm.protect([{"name": "<b>", "gpa": 0x20000, "size": 128}], name="p")
    trace = vm.replay([{"gpa": 0x20000}])
    assert "&lt;b&gt;" in trace._repr_html_() and "<b>" not in trace._repr_html_().replace("<b>memory", "")
    assert "memory_slots" in vm._repr_html_() and vm.walk(0x20000)._repr_html_().count("<table>") >= 3
    picture = vm.subpages(0x20, 3)._repr_html_()
    assert picture.startswith("<svg") and picture.count("<rect") == 96 and picture.count("#8b1a1a") == 1
    assert "more pages" in vm.subpages(0x20, 300)._repr_html_()
