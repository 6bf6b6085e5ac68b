"""Random traces as tools would write them: one writer for each format of the table.

A writer takes accesses, writes those things of them that its format has, and says what a reader must find: the records,
as mappings from the names of columns to values.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from engine.arch import access as acc


class Access(NamedTuple):
    """One access; ``value`` is what was read or written."""

    gpa: int
    size: int
    access: int
    modifies: bool
    vcpu: int
    gva: int
    pc: int
    time: int
    value: int


class Written(NamedTuple):
    """A body, and the records that are in it."""

    body: bytes
    records: list[dict[str, int]]


Writer = Callable[[Sequence[Access]], Written]


def random_accesses(seed: int, count: int) -> list[Access]:
    """Accesses of every kind, at addresses of up to 52 bits and instructions of up to 64."""
    rng = random.Random(seed)
    time = 0
    found = []
    for _ in range(count):
        time += rng.choice((0, 1, 1_000, rng.randrange(1 << 40)))
        access = rng.choice((acc.READ, acc.WRITE, acc.WRITE, acc.EXECUTE))
        size = rng.choice((1, 2, 4, 8, 8, 16, 64, rng.randrange(1, 1 << 16)))
        found.append(
            Access(
                gpa=rng.randrange(1 << rng.choice((12, 32, 52))),
                size=size,
                access=access,
                modifies=access == acc.WRITE and rng.random() < 0.2,
                vcpu=rng.randrange(4),
                gva=rng.randrange(1 << 64),
                pc=rng.randrange(1 << rng.choice((32, 64))),
                time=time,
                value=rng.randrange(1 << 8 * min(size, 8)),
            )
        )
    return found


def lackey(accesses: Sequence[Access]) -> Written:
    """Each access after its instruction, which is an access of its own; an execution is an instruction."""
    lines = ["==4242== Lackey, an example Valgrind tool"]
    records = []
    for one in accesses:
        pc = one.gpa if one.access == acc.EXECUTE else one.pc
        lines.append(f"I  {pc:08x},{one.size}")
        records.append({"gpa": pc, "size": one.size, "access": acc.EXECUTE, "kind": acc.DATA, "pc": pc})
        if one.access == acc.EXECUTE:
            continue
        letter = "M" if one.modifies else "L" if one.access == acc.READ else "S"
        kind = acc.READ_MODIFY_WRITE if one.modifies else acc.DATA
        lines.append(f" {letter} {one.gpa:08x},{one.size}")
        records.append({"gpa": one.gpa, "size": one.size, "access": one.access, "kind": kind, "pc": pc})
    return Written("\n".join([*lines, ""]).encode(), records)


def champsim(accesses: Sequence[Access]) -> Written:
    """An instruction each, with one address; an execution is one without."""
    body, records = b"", []
    for number, one in enumerate(accesses):
        pc, gpa = one.pc or 1, one.gpa or 8
        memory = [0] * 6
        if one.access != acc.EXECUTE:
            memory[2 + number % 4 if one.access == acc.READ else number % 2] = gpa
            records.append({"gpa": gpa, "size": 8, "access": one.access, "pc": pc})
        body += struct.pack("<Q8B6Q", pc, 0, 0, 1, 0, 2, 0, 0, 0, *memory)
    return Written(body, records)


def csv(accesses: Sequence[Access]) -> Written:
    """All columns of a record, in hexadecimal where that is usual."""
    lines = ["gpa,size,access,kind,vcpu,gva,pc,time,note"]
    records = []
    for one in accesses:
        kind = int(one.modifies)
        named = ("read", "W", "2")[one.access]
        lines.append(f"{one.gpa:#x},{one.size},{named},{kind},{one.vcpu},{one.gva},{one.pc:#X},{one.time},x")
        records.append({**one._asdict(), "kind": kind})
    return Written("\n".join([*lines, ""]).encode(), records)


WRITERS: Mapping[str, Writer] = {"lackey": lackey, "champsim": champsim, "csv": csv}
