"""Mutated Arrow and Parquet bodies: none ends the process, and no byte comes back that was not sent.

    python -m tests.abuse.fuzz_bodies --count 100000 [--seed N]

The bodies have every layout that Arrow knows, used, carried and ignored: nested, extension, dictionary, delta,
compressed, view and run-end encoded. A body that is accepted is held to what it can say: its records are of the length
that it claims, and its arguments are bytes that are in it, or in what it decompresses to.

Memory that was freed is filled with a mark first (MALLOC_PERTURB_ and blocks of it), so that a read past the end of a
buffer shows. The process prints the number of each hundredth body, so that one that ends it can be made again.
"""

from __future__ import annotations

import argparse
import io
import random
import resource
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.errors import TraceError
from engine.trace.readers import columnar, open_trace

MEMORY = 8 << 20
ROWS = 24
# What memory of others holds here. No body has it.
MARK = b"\xb7not-yours"

Body = tuple[str, bytes]


def _columns(rng: random.Random) -> dict[str, pa.Array]:
    """One column of each layout, and what a trace uses."""
    rows = ROWS
    ints = pa.array(range(rows), pa.uint64())
    text = pa.array([None if i % 5 == 0 else f"value-{i % 7}" for i in range(rows)])
    args = [bytes([65 + i]) * 8 if i % 2 else None for i in range(rows)]
    ops = pa.array([3 if i % 2 else 0 for i in range(rows)], pa.uint8())
    arg = rng.choice(
        [
            pa.array(args, pa.binary()),
            pa.array(args, pa.large_binary()),
            pa.array(args, pa.binary(8)),
            pa.array(args, pa.binary()).dictionary_encode(),
            pa.DictionaryArray.from_arrays(pa.array([0, 1] * (rows // 2), pa.int8()), pa.array([None, b"A" * 8])),
        ]
    )
    beside = {
        "list": pa.array([[i, None] if i % 3 else None for i in range(rows)]),
        "large_list": pa.array([[i] for i in range(rows)], pa.large_list(pa.int8())),
        "fixed": pa.array([[i, i] for i in range(rows)], pa.list_(pa.int16(), 2)),
        "struct": pa.array([{"a": i, "b": str(i)} for i in range(rows)]),
        "map": pa.array([[("k", i)] for i in range(rows)], pa.map_(pa.string(), pa.int32())),
        "text": text,
        "view": text.cast(pa.string_view()),
        "binary_view": pa.array([b"longer than twelve bytes"] * rows, pa.binary_view()),
        "union": pa.UnionArray.from_dense(
            pa.array([0] * rows, pa.int8()), pa.array(range(rows), pa.int32()), [ints, text]
        ),
        "runs": pa.RunEndEncodedArray.from_arrays(pa.array([rows], pa.int32()), pa.array([7])),
        "code": text.dictionary_encode(),
        "deep": pa.StructArray.from_arrays([text.dictionary_encode(), ints], ["code", "n"]),
        "list_view": pa.array([[i] for i in range(rows)], pa.list_view(pa.int8())),
        "nothing": pa.nulls(rows),
        "bool8": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1] * rows, pa.int8())),
        "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)] * rows, pa.binary(16))),
        "stamp": pa.array([i * 1000 for i in range(rows)], pa.timestamp("us")),
        "decimal": pa.array([None] * rows, pa.decimal128(9)),
    }
    used = {
        "gpa": rng.choice([ints, ints.dictionary_encode(), ints.cast(pa.int32()), pc.run_end_encode(ints)]),
        "gva": ints,
        "vcpu": rng.choice(
            [
                pa.array([0] * rows, pa.uint8()),
                pa.RunEndEncodedArray.from_arrays(pa.array([5, rows], pa.int16()), pa.array([0, 1])),
            ]
        ),
        "carried": rng.choice(
            [ints.cast(pa.float32()), pa.array([True, False] * (rows // 2)), pa.array([5, 6] * (rows // 2), pa.int16())]
        ),
    }
    if rng.random() < 0.7:
        used |= {"op": ops, "arg": arg}
        if rng.random() < 0.5:  # an operation whose argument says it needs none
            used["gva"] = pa.array([None if i % 2 else i for i in range(rows)], pa.uint64())
    chosen = rng.sample(sorted(beside), rng.randrange(0, 5))
    names = [*used, *chosen]
    rng.shuffle(names)
    return {name: (used | beside)[name] for name in names}


def _arrow(rng: random.Random) -> bytes:
    columns = _columns(rng)
    batch = pa.record_batch(columns)
    options = pa.ipc.IpcWriteOptions(
        compression=rng.choice([None, None, "lz4", "zstd"]),
        emit_dictionary_deltas=rng.random() < 0.5,
        use_legacy_format=rng.random() < 0.1,
    )
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        for _ in range(rng.randrange(1, 3)):
            writer.write_batch(batch.slice(rng.choice([0, 0, 1, 9])))
    return sink.getvalue()


# Layouts that Parquet does not store
_ARROW_ONLY = ("union", "runs", "view", "binary_view", "list_view", "nothing")


def _parquet(rng: random.Random) -> bytes:
    columns = {name: array for name, array in _columns(rng).items() if name not in _ARROW_ONLY}
    columns = {
        name: pc.run_end_decode(array) if pa.types.is_run_end_encoded(array.type) else array
        for name, array in columns.items()
    }
    arg = columns.get("arg")
    if arg is not None and pa.types.is_dictionary(arg.type) and arg.dictionary.null_count:
        columns["arg"] = arg.dictionary_decode()
    sink = io.BytesIO()
    pq.write_table(
        pa.table(columns),
        sink,
        compression=rng.choice(["none", "snappy", "zstd", "gzip", "lz4"]),
        use_dictionary=rng.random() < 0.5,
        data_page_version=rng.choice(["1.0", "2.0"]),
        store_schema=rng.random() < 0.7,
        row_group_size=rng.choice([7, ROWS]),
        data_page_size=rng.choice([64, 1 << 20]),
        write_page_checksum=rng.random() < 0.1,
    )
    return sink.getvalue()


_MAKERS: dict[str, Callable[[random.Random], bytes]] = {"arrow": _arrow, "parquet": _parquet}
_EDGES = [0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF]
_WORDS = [0, 1, 8, 0x7FFFFFF0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 100_000, 1 << 20]


def mutated(body: bytes, rng: random.Random) -> bytes:
    """Bytes, words and runs of it changed, mostly few: what is far off is found at once."""
    changed = bytearray(body)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(changed))
        match rng.randrange(6):
            case 0 | 1:
                changed[at] = rng.choice([*_EDGES, rng.randrange(256)])
            case 2:
                changed[at] ^= 1 << rng.randrange(8)
            case 3:
                at &= ~3
                if at + 4 <= len(changed):
                    struct.pack_into("<I", changed, at, rng.choice(_WORDS))
            case 4:
                at &= ~7
                if at + 8 <= len(changed):
                    struct.pack_into("<q", changed, at, rng.choice([*_WORDS, -1, 1 << 40, (1 << 63) - 1]))
            case _:
                source, size = rng.randrange(len(changed)), rng.randrange(1, 33)
                changed[at : at + size] = changed[source : source + size]
    return bytes(changed)


def bodies(seed: int) -> Iterator[Body]:
    """Each well-formed body once, and mutated a hundred times."""
    rng = random.Random(seed)
    while True:
        kind = rng.choice(["arrow", "arrow", "parquet"])
        body = _MAKERS[kind](rng)
        yield kind, body
        for _ in range(99):
            yield kind, mutated(body, rng)


def read(kind: str, body: bytes) -> str:
    """What becomes of a body: ``accepted`` or ``refused``. Anything else is an exception."""
    given: set[bytes] = set()
    try:
        many = len(body) % 2 == 0  # some as a replay reads them, some as one that asks
        reader = open_trace(kind, io.BytesIO(body), carry=("carried",), memory=MEMORY, late=many, ahead=many)
        for chunk in reader:
            if chunk.late is not None:
                chunk.late.at(np.arange(len(chunk)))
            for values in chunk.carry.values():
                assert len(values) == len(chunk.records)
            assert MARK[:8] not in chunk.records.tobytes()
            if chunk.operations is not None:
                given |= {item.arg for item in chunk.operations.items if item.arg}
        outcome = "accepted"
    except TraceError as error:
        outcome = "refused" if error.index is not None and "not-yours" not in str(error) else "told too much"
    assert outcome != "told too much"
    assert not any(b"not-yours" in arg for arg in given), given
    if kind == "arrow" and _is_plain(body):
        for arg in given:
            assert arg in body, f"an argument that was not sent: {arg[:64].hex()}"
    return outcome


def _is_plain(body: bytes) -> bool:
    """Whether no frame of lz4 or zstd is in it."""
    return b"\x04\x22\x4d\x18" not in body and b"\x28\xb5\x2f\xfd" not in body


def _litter() -> None:
    """Blocks of all sizes with the mark, allocated and freed: the heap of somebody else."""
    blocks = [
        np.frombuffer(MARK * (size // len(MARK) + 1), dtype=np.uint8).copy() for size in (64, 512, 4096, 65536) * 8
    ]
    buffers = [pa.allocate_buffer(len(block)) for block in blocks]
    for block, buffer in zip(blocks, buffers, strict=True):
        np.frombuffer(buffer, dtype=np.uint8)[:] = block  # type: ignore[call-overload]


def run(count: int, seed: int, report: Callable[[str], None] = lambda line: None) -> Counter[str]:
    """Read so many bodies, and count what became of them."""
    # A chunk has room for more records than a thousand such bodies, which takes longer to make than they take to read.
    columnar.CHUNK_RECORDS = columnar.ARGUMENT_RECORDS = 10
    found: Counter[str] = Counter()
    for number, (kind, body) in enumerate(bodies(seed)):
        if number == count:
            break
        if number % 100 == 0:
            _litter()
            report(f"seed {seed} body {number}")
        try:
            outcome = read(kind, body)
        except Exception:
            report(f"seed {seed} body {number} ({kind}): failed")
            raise
        assert number % 100 or outcome == "accepted", f"seed {seed} body {number} is well-formed"
        found[f"{kind} {outcome}"] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.abuse.fuzz_bodies", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    began = time.monotonic()

    def report(line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    found = run(given.count, given.seed, report)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    told = ", ".join(f"{name} {count:,}" for name, count in sorted(found.items()))
    report(f"{given.count:,} bodies in {time.monotonic() - began:.0f} s: {told}; peak memory {peak} MiB")


if __name__ == "__main__":
    main()
