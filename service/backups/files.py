"""Machines, and footprints, as files: one machine or all of a store, for another store, another release, another place.

Layout, everything little-endian:

    8 bytes   ``SUBPAGE\\0``
    u32       format, FORMAT of the release that wrote it
    then sections until the end: u8 kind, u32 length, that many bytes, u32 CRC-32 of kind, length and bytes

Kinds: ``V`` a machine begins, JSON; ``B`` blocks of it, columns ``kind``, ``block``, ``data``; ``T`` a result of a
replay, JSON, followed by ``I`` its lookup tables and ``P`` its parts, as the store has them; ``L`` rows of the event
log, JSON; after all machines ``F`` a footprint, JSON, followed by ``D`` its Parquet file in parts; ``E`` the end, JSON
with the number of machines and of footprints. A file without its ``E`` was cut. Format 1 has no logs, 2 no footprints.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import IO

import numpy as np
import sqlalchemy as sa

from service.backups.checks import (
    BLOCK_BYTES,
    BadBackup,
    EndSection,
    FootprintSection,
    LeftOut,
    MachineSection,
    TraceSection,
    check_events,
    check_footprint,
    check_trace,
    columns_are_bounded,
    heads_differ,
    machine_of,
    section_of,
)
from service.backups.checks import event_rows as event_rows_of
from service.platform.stamps import stamp
from service.storage import event_rows, footprint_rows, rows, side_rows
from service.storage.columns import pack, unpack
from service.storage.records import Block, Change, EventRecord, FootprintRecord, LogChange, TraceRecord, VmRecord

__all__ = ["BadBackup", "LeftOut", "read_backup", "restore_footprint", "restore_machine", "write_backup"]

RESTORED = '{"change":"restored"}'

MAGIC = b"SUBPAGE\0"
FORMAT = 3

# Blocks of one section: 16 MiB before compression.
_BLOCKS = 4096
# The head of a large machine and the tables of many objects are the longest.
MAX_SECTION = 1 << 30
_SECTION = struct.Struct("<BI")


@dataclass(slots=True)
class Saved:
    """One machine of a backup."""

    record: VmRecord
    blocks: list[Block] = field(default_factory=list)
    traces: list[TraceRecord] = field(default_factory=list)
    events: list[EventRecord] = field(default_factory=list)


# Writing


def write_backup(
    file: IO[bytes],
    connection: sa.Connection,
    machines: Sequence[VmRecord],
    footprints: Sequence[FootprintRecord] = (),
) -> None:
    """Write these machines and footprints as the transaction of ``connection`` sees them."""
    file.write(MAGIC + FORMAT.to_bytes(4, "little"))
    for record in machines:
        members = asdict(record)
        del members["frames"]  # counted anew in the store that it comes to
        _write(file, b"V", json.dumps(members).encode())
        blocks = rows.vm_blocks(connection, record.number)
        while batch := list(islice(blocks, _BLOCKS)):
            _write(file, b"B", _packed(batch))
        for trace in rows.trace_records(connection, record.number):
            about = {"id": trace.id, "sequence": trace.sequence, "created": trace.created, "head": trace.head}
            _write(file, b"T", json.dumps({**about, "exit_records": trace.exit_records}).encode())
            _write(file, b"I", trace.object_index)
            for part in rows.parts_of(connection, trace.id):
                _write(file, b"P", part)
        for some in event_rows.every(connection, record.number):
            _write(file, b"L", json.dumps([asdict(event) for event in some]).encode())
    for footprint in footprints:
        members = asdict(footprint)
        del members["parts"]
        _write(file, b"F", json.dumps(members).encode())
        for part in footprint_rows.parts_of(connection, footprint.id):
            _write(file, b"D", part)
    _write(file, b"E", json.dumps({"machines": len(machines), "footprints": len(footprints)}).encode())


def _write(file: IO[bytes], kind: bytes, data: bytes) -> None:
    framed = _SECTION.pack(kind[0], len(data)) + data
    file.write(framed + zlib.crc32(framed).to_bytes(4, "little"))


def _packed(batch: Sequence[Block]) -> bytes:
    return pack(
        {
            "kind": np.array([kind.encode() for kind, _, _ in batch]),
            "block": np.array([block for _, block, _ in batch], dtype=np.uint64),
            "data": np.frombuffer(b"".join(data for _, _, data in batch), dtype=np.uint8),
        }
    )


# Reading


def _sections(file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Kinds and contents to the end. Raises BadBackup."""
    start = file.read(len(MAGIC) + 4)
    if start[: len(MAGIC)] != MAGIC:
        raise BadBackup("this is not a backup of subpage")
    version = int.from_bytes(start[len(MAGIC) :], "little")
    if version < 1:
        raise BadBackup(f"the backup has format {version}, which no release has written")
    if version > FORMAT:
        raise BadBackup(f"the backup has format {version}, written by a later release; this one reads up to {FORMAT}")
    while True:
        framed = file.read(_SECTION.size)
        if len(framed) < _SECTION.size:
            raise BadBackup("the backup was cut: its end is missing")
        kind, length = _SECTION.unpack(framed)
        if length > MAX_SECTION:
            raise BadBackup(f"the backup is damaged: a section claims {length} bytes")
        data = file.read(length)
        if zlib.crc32(framed + data).to_bytes(4, "little") != file.read(4):
            raise BadBackup("the backup is damaged: a checksum does not match")
        yield chr(kind), data
        if kind == ord("E"):
            if file.read(1):
                raise BadBackup("the backup is damaged: something follows its end")
            return


def read_backup(file: IO[bytes]) -> Iterator[Saved | FootprintRecord | LeftOut]:
    """One machine after the other, then the footprints. Raises BadBackup, at the latest where the damage is."""
    machine: Saved | None = None
    footprint: FootprintRecord | None = None
    parts: list[bytes] = []
    seen: set[str] = set()
    results: set[str] = set()
    footprints: set[str] = set()
    for kind, data in _sections(file):
        if kind in "VFE" and machine is not None:
            _check_whole(machine, results)
            yield machine
            machine = None
        if kind in "VFE" and footprint is not None:
            yield check_footprint(replace(footprint, parts=parts))
            footprint, parts = None, []
        if kind == "F":
            footprint = FootprintRecord(**section_of(FootprintSection, kind, data).model_dump())
            if footprint.id in footprints:
                raise BadBackup(f"the backup is damaged: footprint {footprint.id} is in it twice")
            footprints.add(footprint.id)
        elif kind == "D" and footprint is not None:
            parts.append(data)
            if not data or sum(map(len, parts)) > footprint.size:
                raise BadBackup(f"footprint {footprint.id} of the backup is damaged: its file has not its size")
        elif kind == "V":
            if footprints:
                raise BadBackup("the backup is damaged: a machine comes after the footprints")
            machine = Saved(VmRecord(**section_of(MachineSection, kind, data).model_dump()))
            if machine.record.id in seen:
                raise BadBackup(f"the backup is damaged: machine {machine.record.id} is in it twice")
            seen.add(machine.record.id)
        elif kind == "E":
            end = section_of(EndSection, kind, data)
            if end.machines != len(seen):
                raise BadBackup("the backup is damaged: it has not the machines that it says")
            if end.footprints != len(footprints):
                raise BadBackup("the backup is damaged: it has not the footprints that it says")
        elif machine is None:
            raise BadBackup("the backup is damaged: a machine's data come before the machine")
        else:
            _add(machine, kind, data)


def _add(machine: Saved, kind: str, data: bytes) -> None:
    traces = machine.traces
    if kind in "IP" and (not traces or (kind == "I") == bool(traces[-1].object_index)):
        raise BadBackup(f"the backup is damaged: a section {kind} is not where it belongs")
    if kind in "BIP":
        columns_are_bounded(kind, data)
    if kind == "B":
        machine.blocks += _unpacked(machine.record.id, data)
    elif kind == "T":
        traces.append(TraceRecord(**section_of(TraceSection, kind, data).model_dump(), object_index=b"", parts=[]))
    elif kind == "I":
        traces.append(replace(traces.pop(), object_index=data))
    elif kind == "P":
        last = traces.pop()
        traces.append(replace(last, parts=[*last.parts, data]))
    elif kind == "L":
        machine.events += event_rows_of(data)
    else:
        raise BadBackup(f"the backup is damaged: there is no section {kind!r}")


def _unpacked(machine: str, data: bytes) -> list[Block]:
    try:
        columns = unpack(data)
        contents = columns["data"].tobytes()
        names = [kind.decode() for kind in columns["kind"].tolist()]
        numbers = columns["block"].tolist()
        if not len(names) == len(numbers) == len(contents) / BLOCK_BYTES or columns["block"].dtype.kind != "u":
            raise ValueError("there are as many kinds as numbers and contents")
    except (KeyError, ValueError, TypeError, AttributeError, OSError) as error:
        raise BadBackup(f"machine {machine} of the backup: its blocks cannot be read: {error!s:.300}") from None
    places = range(0, len(contents), BLOCK_BYTES)
    return [
        (kind, block, contents[at : at + BLOCK_BYTES]) for kind, block, at in zip(names, numbers, places, strict=True)
    ]


def _check_whole(machine: Saved, results: set[str]) -> None:
    """What only all of a machine shows. ``results`` are the ids of those before, and get this one's."""
    machine_of(machine.record, machine.blocks)
    check_events(machine.record, machine.events)
    for trace in machine.traces:
        if trace.id in results:
            raise BadBackup(f"the backup is damaged: result {trace.id} is in it twice")
        results.add(trace.id)
        check_trace(trace)


# Into a store


def restore_machine(connection: sa.Connection, number: int, machine: Saved, *, replace_known: bool) -> VmRecord:
    """Put a machine into a store, in the transaction of ``connection``, under its own id and a number of this store.

    Raises BadBackup when another machine has one of its results, FileExistsError when the store has that id and
    ``replace_known`` is not given.
    """
    record = machine.record
    known = next((item for item in rows.vm_records(connection) if item.id == record.id), None)
    revision, next_event = record.revision, record.next_event
    if known is not None:
        if not replace_known:
            raise FileExistsError(record.id)
        rows.write(connection, Change(known.number, known.revision, None))
        number = known.number
        revision, next_event = max(revision, known.revision), max(next_event, known.next_event)
    if taken := side_rows.kept_traces(connection, [trace.id for trace in machine.traces]):
        raise BadBackup(f"result {min(taken)} of the backup is one of another machine in the store")
    # Clients that hold a tag of either state must find it overtaken, and readers of either log a new id.
    placed = replace(record, number=number, revision=revision + 1, next_event=next_event + 1)
    log = LogChange([*machine.events, EventRecord(next_event, 1, stamp(), "lifecycle", RESTORED)])
    change = Change(number, None, placed, lambda: record.head, lambda: iter(machine.blocks), machine.traces, log=log)
    rows.write(connection, change)
    return placed


def restore_footprint(connection: sa.Connection, footprint: FootprintRecord) -> None:
    """Put a footprint into a store that may have it already: none ever changes. Raises BadBackup when the store has
    another one under its id."""
    known = footprint_rows.found(connection, [footprint.id])
    if known and known[0].tenant != footprint.tenant:
        raise BadBackup(f"footprint {footprint.id} of the backup is one of another tenant in the store")
    if known and (known[0].size != footprint.size or heads_differ(known[0].head, footprint.head) is not None):
        raise BadBackup(f"footprint {footprint.id} of the backup is another one than that of this id in the store")
    footprint_rows.write(connection, [footprint] if not known else [], [])
