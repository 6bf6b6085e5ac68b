"""``subpage trace``: files of every kind, what is said of them, and what is refused."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from typer.testing import CliRunner

from engine.arch import access as acc
from engine.trace.columns import TraceChunk
from engine.trace.option_names import FORMATS, RECORD_FORMATS, TOOL_FORMATS
from service.cli import trace_files, trace_options
from service.cli.app import app
from service.cli.trace_summary import SLOTS, Summary
from tests.support.bodies import FORMATS as BODIES
from tests.support.bodies import table

runner = CliRunner()
SAMPLES = Path(__file__).parents[2] / "data" / "tools"
# Four pages are touched: the third record is over two of them, the last reads.
TRACE = table(
    gpa=[0x1000, 0x1FF8, 0x2FFC, 0x5008, 0x5008], size=[8, 8, 8, 4, 2], access=[1, 1, 1, 1, 0], vcpu=[0, 1, 0, 0, 2]
)

# What is in the samples, worked out from how they were made (tests/data/README.md): format, records, writes, pages
# that are written, and the addresses of the first and the last write.
KNOWN = {
    "bochs-trace-mem.txt": ("bochs", 12, 12, 3, 0x4000, 0xFFD4),
    "qemu-system-execlog.txt": ("execlog", 13, 12, 3, 0x4000, 0x6F02),
    "ftrace-kvm_mmio.txt": ("ftrace", 3, 2, 1, 0x9000, 0x9004),
    "ftrace-kvm_exit-kvm_page_fault.txt": ("ftrace", 7, 5, 3, 0x2A5C6A0, 0xFEE000B0),
    "gem5-debug.txt": ("gem5", 40, 40, 2, 0x299000, 0x298070),
    "drmemtrace-view.txt": ("drmemtrace", 80, 40, 2, 0x4A9000, 0x4A8070),
    "perf-script-page-faults.txt": ("perf-script", 30, 22, 20, 0x4A6270, 0x4AA050),
    "hyperdbg-monitor.log": ("hyperdbg", 3, 3, 1, 0xFFFFF80512345680, 0xFFFFF80512345700),
}


def run(*arguments: object, status: int = 0) -> str:
    result = runner.invoke(app, ["trace", *map(str, arguments)])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output if status else result.stdout


def test_the_words_are_those_of_the_engine() -> None:
    assert {*FORMATS, *TOOL_FORMATS} == {item.value for item in trace_options.Format}
    assert set(RECORD_FORMATS) == {item.value for item in trace_options.Record}


@pytest.mark.parametrize("name", KNOWN)
def test_a_sample_is_converted(name: str, tmp_path: Path) -> None:
    format, records, writes, pages, first, last = KNOWN[name]
    out = tmp_path / "out.parquet"
    said = run("convert", SAMPLES / name, "-o", out)
    assert said.startswith(f"{SAMPLES / name}: {format}; ") and f"{records:,} records written to {out}" in said
    found = pq.read_table(out)
    written = found.filter(pa.compute.equal(found["access"], acc.WRITE))["gpa"].to_pylist()
    assert (len(found), len(written), written[0], written[-1]) == (records, writes, first, last)
    numbers = json.loads(run("info", out, "--json"))
    assert (numbers["records"], numbers["writes"], numbers["written_pages"]) == (records, writes, pages)
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


@pytest.mark.parametrize("name", BODIES)
def test_a_body_of_the_service_is_converted(name: str, tmp_path: Path, write: Callable[[str], Path]) -> None:
    out = tmp_path / "out.parquet"
    assert "5 records written" in run("convert", write(name), "-o", out)
    found = pq.read_table(out)
    assert found["gpa"].to_pylist() == [0x1000, 0x1FF8, 0x2FFC, 0x5008, 0x5008]
    assert found["size"].to_pylist() == [8, 8, 8, 4, 2] and found["vcpu"].to_pylist() == [0, 1, 0, 0, 2]
    assert found["access"].to_pylist() == [1, 1, 1, 1, 0]


def test_what_was_read_and_written_is_converted(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    run("convert", SAMPLES / "bochs-trace-mem.txt", "-o", out)
    assert pq.read_table(out)["value"].to_pylist()[7:11] == [b"\x5a", b"\x34\x12\0\0", b"\x5a\0", b"\x35\x12\0\0"]
    run("convert", SAMPLES / "ftrace-kvm_exit-kvm_page_fault.txt", "-o", out)
    found = pq.read_table(out)
    assert found["value"].to_pylist() == [None] * 6 + [bytes(4)]
    assert found["pc"].to_pylist()[0] == 0xFFFFFFFF81123456 and found["time"].to_pylist()[0] == 1204000102000
    trace = tmp_path / "wide.txt"
    trace.write_text(
        "[CPU0 WR]: LIN 0x1000 PHY 0x1000 (len=8, WB): 0x01020304 0x05060708\n"
        "[CPU0 WR]: LIN 0x1000 PHY 0x1000 (len=16, WB): 0x1 0x2 0x3 0x4\n"
        "[CPU0 WR]: LIN 0x1000 PHY 0x1000 (len=3, WB) 01 02 03\n"
    )
    run("convert", trace, "-o", out)
    assert pq.read_table(out)["value"].to_pylist() == [bytes(range(8, 0, -1)), None, None]
    assert '"value": "0807060504030201"' in run("head", trace, "--json").splitlines()[0]
    assert json.loads(run("info", out, "--json"))["records"] == 3


def test_operations_are_converted(tmp_path: Path) -> None:
    lines = [
        {"gpa": "0x1000", "vcpu": 1, "address_space": "0x5000"},
        {"op": "mov-cr3", "vcpu": 1, "arg": "0060000000000000"},
        {"gpa": "0x2000", "size": 4},
    ]
    path, out = tmp_path / "t.ndjson", tmp_path / "out.parquet"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("convert", path, "-o", out)
    found = pq.read_table(out)
    assert found["op"].to_pylist() == [0, 2, 0] and found["address_space"].to_pylist() == [0x5000, None, None]
    assert found["arg"].to_pylist() == [None, bytes.fromhex("0060000000000000"), None]
    assert json.loads(run("info", path, "--json"))["records"] == 2
    again = tmp_path / "again.parquet"
    run("convert", out, "-o", again)
    assert pq.read_table(again).equals(found)


@pytest.mark.parametrize(
    ("name", "pack"),
    [("gzip", gzip.compress), ("xz", lzma.compress), ("zstd", zstandard.ZstdCompressor().compress)],
)
@pytest.mark.parametrize("sample", ["bochs-trace-mem.txt", "lackey.txt"])
def test_a_compressed_file_is_read_as_it_is(
    name: str, pack: Callable[[bytes], bytes], sample: str, tmp_path: Path
) -> None:
    path = tmp_path / "trace"  # by its content, not by its name
    packed = pack((SAMPLES / sample).read_bytes())
    path.write_bytes(packed)
    plain = json.loads(run("info", SAMPLES / sample, "--json"))
    assert json.loads(run("info", path, "--json")) == plain
    assert f"{path}: {plain['format']}, {name}; " in run("info", path)
    path.write_bytes(packed * 2 if sample == "bochs-trace-mem.txt" else packed)  # parts one after the other
    assert json.loads(run("info", path, "--json"))["records"] == plain["records"] * (1 + (sample != "lackey.txt"))
    for damaged in (packed[: len(packed) // 2], packed[:20] + bytes(20) + packed[40:], packed + b"more"):
        path.write_bytes(damaged)
        assert f"{path}: the compressed data" in run("info", path, status=1)


def test_what_is_told_of_a_trace(tmp_path: Path, write: Callable[[str], Path]) -> None:
    found = json.loads(run("info", write("ndjson"), "--json"))
    assert found["format"] == "ndjson"
    assert [found[name] for name in ("records", "reads", "writes", "executes")] == [5, 1, 4, 0]
    # Sub-pages: 0 and 31 of page 1, 31 of page 2 and 0 of page 3, 0 of page 5.
    assert (found["pages"], found["written_pages"], found["subpages"]) == (4, 4, 5)
    assert found["bytes_written"] == 28 and found["vcpus"] == [0, 1, 2] and found["seconds"] is None
    assert found["ranges"] == [{"first": "0x1000", "last": "0x5fff", "pages": 4}]
    assert found["top_pages"][0] == {"page": "0x1000", "accesses": 2, "writes": 2, "subpages": "0x80000001"}
    assert found["top_pages"][1] == {"page": "0x5000", "accesses": 2, "writes": 1, "subpages": "0x00000001"}
    assert found["virtual"] is None and "memory_slots" not in found
    told = run("info", write("ndjson"))
    assert "sub-pages  5" in told and "ranges     0x1000 to 0x5fff, 4 pages" in told and "look virtual" not in told


def test_addresses_that_look_virtual(tmp_path: Path) -> None:
    path = tmp_path / "t.ndjson"
    path.write_text('{"gpa": "0x7ffc873cfed0"}\n{"gpa": "0x1000"}\n')
    assert "addresses look virtual: 1 of 2 pages are above 64 TiB" in run("info", path)
    assert "addresses look virtual" in run("convert", path, "-o", tmp_path / "out.parquet")
    path.write_text('{"gpa": "0xffffffff81000000"}\n')
    assert "0xffffffff81000000 is beyond the 52 bits of physical addresses" in run("info", path)


def test_the_slots_of_a_flat_trace(tmp_path: Path) -> None:
    said = run("convert", SAMPLES / "lackey.txt", "-o", tmp_path / "out.parquet")
    slots = json.loads(said[said.index('"memory_slots": ') + len('"memory_slots": ') :])
    assert slots == [
        {"slot": 0, "gpa": "0x401000", "size": "0xa9000"},
        {"slot": 1, "gpa": "0x1fff000000", "size": "0x1000"},
    ]
    assert '"maxphyaddr": 47' in run("info", SAMPLES / "perf-script-page-faults.txt")
    found = json.loads(run("info", SAMPLES / "lackey.txt", "--json"))
    assert found["memory_slots"] == slots and found["address"] == "process-virtual"
    told = run("info", SAMPLES / "hyperdbg-monitor.log", "--address", "flat")
    assert "no guest has memory at these addresses" in told


def test_which_address_is_taken(tmp_path: Path) -> None:
    trace = tmp_path / "t.ndjson"
    trace.write_text('{"gpa": "0x5000", "gva": "0x7000"}\n')
    for address, gpa in (("gpa", 0x5000), ("gva", 0x7000), ("flat", 0x7000)):
        assert f"{gpa:#x}" in run("head", trace, "--address", address).splitlines()[1].split()[0]
    trace.write_text('{"gpa": "0x5000"}\n')
    assert "has physical addresses only, no column gva" in run("head", trace, "--address", "gva", status=1)
    refused = run("info", SAMPLES / "lackey.txt", "--address", "gpa", status=1)
    assert "lackey has virtual addresses of a process, no physical ones" in refused
    said = run("convert", SAMPLES / "hyperdbg-monitor.log", "-o", tmp_path / "out.parquet")
    assert "replay it with address=gva" in said


def test_the_first_records(write: Callable[[str], Path]) -> None:
    told = run("head", SAMPLES / "bochs-trace-mem.txt", "-n", 2).splitlines()
    assert [line.split() for line in told] == [
        ["gpa", "size", "access", "vcpu", "gva", "value"],
        ["0x4000", "1", "write", "0", "0x4000", "5a"],
        ["0x4080", "1", "write", "0", "0x4080", "5a"],
    ]
    lines = run("head", write("arrow"), "-n", 99, "--json").splitlines()
    assert len(lines) == 5 and json.loads(lines[4]) == {"gpa": "0x5008", "size": 2, "access": "read", "vcpu": 2}
    assert run("head", write("arrow"), "-n", 0) == "\n"


def test_the_first_records_can_be_posted(tmp_path: Path) -> None:
    again = tmp_path / "again.ndjson"
    again.write_text(run("head", SAMPLES / "bochs-trace-mem.txt", "-n", 99, "--json"))
    one, other = (json.loads(run("info", path, "--json")) for path in (SAMPLES / "bochs-trace-mem.txt", again))
    assert one["subpages"] == other["subpages"] and one["top_pages"] == other["top_pages"]


SYSTEM_MAP = "ffffffff81000000 T _text\nffffffff81000110 t startup_64\n"


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (SYSTEM_MAP.encode(), "is a list of symbols (System.map or kallsyms), not of accesses: `subpage policy from-"),
        (SYSTEM_MAP.replace("\n", "\t[kvm]\r\n").encode(), "is a list of symbols"),
        (b"\x7fELF\x02\x01", "is an ELF file"),
        (b"PERFILE2....", "`perf script -F comm,tid,time,event,addr,ip` makes text of it"),
        (b"ARROW1\0\0", "is an Arrow file; traces are Arrow streams"),
        (b"", "is empty"),
        (b"hello\n", "is of no format that is recognised; say --format, one of json, ndjson"),
    ],
)
def test_a_file_that_is_no_trace(content: bytes, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "given"
    path.write_bytes(content)
    told = run("convert", path, "-o", tmp_path / "out.parquet", status=1)
    assert told.startswith(f"subpage trace convert: {path}: ") and rule in told.replace("\n", " ")
    assert [each.name for each in tmp_path.iterdir()] == ["given"]


def test_a_line_at_fault_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    path, out = tmp_path / "cut.txt", tmp_path / "out.parquet"
    good = (SAMPLES / "bochs-trace-mem.txt").read_text()
    path.write_text(good + "[CPU0 WR]: LIN 0x40")
    out.write_text("as it was")
    told = run("convert", path, "-o", out, status=1)
    assert f"{path}: line 13: the line is not whole; bochs has '[CPUn TYPE]: LIN 0xLINEAR PHY 0xADDRESS" in told
    assert out.read_text() == "as it was" and len(list(tmp_path.iterdir())) == 2
    path.write_text(good + "something else\n" + good)
    assert f"{path}: line 13: the line is none of bochs" in run("info", path, status=1)
    assert "skipped 1: line of no known form, first line 13" in run("info", path, "--skip-unknown")


def test_outputs_that_are_refused(tmp_path: Path, write: Callable[[str], Path]) -> None:
    path = write("parquet")
    assert "the name must end in .parquet" in run("convert", path, "-o", tmp_path / "out.csv", status=1)
    assert "is the file that is read" in run("convert", path, "-o", path, status=1)
    nowhere = tmp_path / "no" / "out.parquet"
    assert f"{nowhere}: cannot be written: No such file" in run("convert", path, "-o", nowhere, status=1)
    missing = tmp_path / "missing"
    assert f"{missing}: there is no such file" in run("info", missing, status=1)
    assert "is a folder" in run("info", tmp_path, status=1)


def test_an_interruption_leaves_nothing(
    tmp_path: Path, write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    path = write("ndjson")
    monkeypatch.setattr(Summary, "add", interrupted)
    assert "interrupted" in run("convert", path, "-o", tmp_path / "out.parquet", status=130)
    assert list(tmp_path.iterdir()) == [path]


def test_the_bar(write: Callable[[str], Path]) -> None:
    assert json.loads(run("info", write("ndjson"), "--json", "--progress"))["records"] == 5


def test_progress_is_of_the_file_as_it_is_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "trace.gz"
    path.write_bytes(gzip.compress((SAMPLES / "lackey.txt").read_bytes()))
    with trace_files.opened_trace(path) as file:
        for _ in file:
            pass
    assert file.progress.taken == path.stat().st_size and file.progress.share == 1.0


def test_pages_add_up_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cli.trace_summary.MERGE_PAGES", 10)
    rng = np.random.default_rng(1)
    gpa = rng.integers(0, 1 << 20, 500).astype(np.uint64)
    size = rng.integers(1, 9000, 500).astype(np.uint64)
    summary = Summary()
    for at in range(0, 500, 50):
        records = np.stack((gpa[at : at + 50], size[at : at + 50] | np.uint64(1 << 16)), axis=1)
        summary.add(TraceChunk(records, None, {}), records)
    touched = {
        subpage
        for first, length in zip(gpa.tolist(), size.tolist(), strict=True)
        for subpage in range(first >> 7, (first + length - 1 >> 7) + 1)
    }
    found = summary.document(0)
    assert found["subpages"] == len(touched) and found["pages"] == len({subpage >> 5 for subpage in touched})


def test_slots_are_few() -> None:
    gpa = np.arange(100, dtype=np.uint64) << np.uint64(30)
    records = np.stack((gpa, np.full(100, 8 | 1 << 16, dtype=np.uint64)), axis=1)
    summary = Summary()
    summary.add(TraceChunk(records, None, {}), records)
    slots = summary.slots()
    assert slots is not None and len(slots) <= SLOTS
    assert int(slots[-1]["gpa"], 16) + int(slots[-1]["size"], 16) == (99 << 30) + 4096


# Small policies, and their hits in the samples by what the programs do: (violations, collateral) of each object. A hit
# is collateral where it touches the object's sub-page of 128 bytes, and none of its own bytes.
HITS: dict[str, dict[tuple[int, int], tuple[int, int]]] = {
    # boot: the second of eight stores; 0x5000 is stored, 0x5008 beside it, 0x5000 incremented.
    "bochs-trace-mem.txt": {(0x4080, 1): (1, 0), (0x5000, 8): (3, 1), (0x4400, 8): (0, 0)},
    "qemu-system-execlog.txt": {(0x4080, 1): (1, 0), (0x5000, 8): (3, 1), (0x6F02, 2): (1, 0)},
    # tiny: a byte each at 0x9000 and 0x9004; what it reads there is no hit.
    "ftrace-kvm_mmio.txt": {(0x9000, 4): (2, 1), (0x9080, 4): (0, 0)},
    "ftrace-kvm_exit-kvm_page_fault.txt": {
        (0x2A5C6A0, 8): (2, 1),
        (0x2A5C700, 8): (1, 0),
        (0x3313010, 8): (1, 0),
        (0x2000360, 8): (0, 0),
    },
    # w: table[0] to table[31], then every 16th byte of flags_, from 0 on: 16 words and 8 bytes in a sub-page.
    "gem5-debug.txt": {(0x299000, 8): (16, 15), (0x299080, 128): (16, 0), (0x298000, 1): (8, 7)},
    "drmemtrace-view.txt": {(0x4A9000, 8): (16, 15), (0x4A9080, 128): (16, 0), (0x4A8000, 1): (8, 7)},
    # w: the first touch of the page of flags_.
    "perf-script-page-faults.txt": {(0x4A8000, 4096): (1, 0), (0x401000, 4096): (0, 0)},
    "lackey.txt": {(0x4A9000, 8): (9, 8)},
}


@pytest.mark.parametrize("name", HITS)
def test_the_hits_of_a_sample_are_those_worked_out_by_hand(name: str, tmp_path: Path) -> None:
    out, policy = tmp_path / "out.parquet", tmp_path / "policy.json"
    run("convert", SAMPLES / name, "-o", out)
    objects = [{"name": f"{gpa:#x}", "gpa": gpa, "size": size} for gpa, size in HITS[name]]
    slots = [{"slot": 0, "gpa": 0, "size": 1 << 26}, {"slot": 1, "gpa": 0x1FFF000000, "size": 1 << 24}]
    protections = [{"name": "p", "objects": objects}]
    policy.write_text(json.dumps({"vm": {"memory_slots": slots}, "protections": protections}))
    result = runner.invoke(app, ["replay", str(out), "--policy", str(policy), "--json", "--no-progress"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["by_object"]
    hits = {f"{gpa:#x}": hit for (gpa, _), hit in HITS[name].items()}
    assert {each: (found[each]["violations"], found[each]["collateral"]) for each in found} == hits


def test_a_table_whose_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "table.txt"
    path.write_text("when\taddr\tlen\tnote\n1\t0x1000\t4\tx\n2\t0x2000\t2\tx\n")
    names = "gpa=addr,size=len"
    lines = run("head", path, "--columns", names).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["0x1000", "4"], ["0x2000", "2"]]
    assert json.loads(run("info", path, "--columns", names, "--json"))["format"] == "csv"
    out = tmp_path / "out.parquet"
    run("convert", path, "-o", out, "--columns", names)
    assert pq.read_table(out)["size"].to_pylist() == [4, 2]
    assert "lackey" in run("info", SAMPLES / "lackey.txt", "--format", "lackey", "--columns", names, status=1)


def converted(path: Path, source: Path, *options: object) -> pa.Table:
    run("convert", source, "-o", path, *options)
    return pa.ipc.open_stream(path.read_bytes()).read_all()


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_compact_stream(tmp_path: Path, codec: str) -> None:
    """Columns as narrow as they may be, one run where all are the same; and it is the same trace."""
    count = 300_000
    source = tmp_path / "trace.parquet"
    columns = {"gpa": np.arange(count) * 8, "size": np.full(count, 8), "access": np.full(count, 1), "vcpu": [3] * count}
    pq.write_table(pa.table({**columns, "gva": np.arange(count) + (1 << 47)}), source)
    found = converted(tmp_path / "trace.arrow", source, "--compression", codec)
    assert [str(kind) for kind in found.schema.types] == [
        "uint32",
        *["run_end_encoded<run_ends: int32, values: uint8>"] * 3,
        "uint64",
    ]
    assert "gva" not in converted(tmp_path / "short.arrow", source, "--without", "gva").column_names
    assert json.loads(run("info", tmp_path / "trace.arrow", "--json"))["bytes_written"] == 8 * count
    again = tmp_path / "again.parquet"
    run("convert", tmp_path / "trace.arrow", "-o", again)
    for name in ("gpa", "size", "access", "vcpu", "gva"):
        assert pq.read_table(again)[name].to_pylist() == pq.read_table(source)[name].to_pylist(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again.parquet",
        "short.arrow",
        "trace.arrow",
        "trace.parquet",
    ]


def test_a_compact_stream_of_everything_that_a_trace_may_have(tmp_path: Path) -> None:
    sample = next(SAMPLES.glob("bochs-*"))
    found, plain = converted(tmp_path / "trace.arrow", sample), tmp_path / "trace.parquet"
    run("convert", sample, "-o", plain)
    same = pq.read_table(plain)
    assert found.column_names == same.column_names
    for name in found.column_names:
        assert found[name].to_pylist() == same[name].to_pylist(), name
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"gpa": pa.array([], pa.uint64())}), empty)
    assert converted(tmp_path / "empty.arrow", empty).num_rows == 0


def test_what_a_name_does_not_go_with(tmp_path: Path) -> None:
    source = tmp_path / "trace.parquet"
    pq.write_table(TRACE, source)
    assert ".parquet or .arrow" in run("convert", source, "-o", tmp_path / "trace.bin", status=1)
    assert "goes with -o ….arrow" in run(
        "convert", source, "-o", tmp_path / "other.parquet", "--compression", "lz4", status=1
    )


def test_columns_of_parquet_are_required_where_no_value_is_missing(tmp_path: Path) -> None:
    output = tmp_path / "trace.parquet"
    pq.write_table(TRACE, tmp_path / "given.parquet")
    run("convert", tmp_path / "given.parquet", "-o", output)
    assert not any(field.nullable for field in pq.read_schema(output))
