"""ChampSim's records: order, gaps, and what else they are mistaken for."""

from __future__ import annotations

import io
import struct

import pytest

from engine.errors import TraceError
from engine.trace.readers import open_trace
from engine.trace.readers.champsim_marks import is_champsim


def instruction(pc: int, *, reads=(), writes=(), flags=(0, 0)) -> bytes:
    memory = [*writes, *[0] * (2 - len(writes)), *reads, *[0] * (4 - len(reads))]
    return struct.pack("<Q8B6Q", pc, *flags, 1, 2, 3, 0, 0, 0, *memory)


BODY = b"".join(
    (
        instruction(0x400000, reads=(0x10, 0x20), writes=(0x30,)),
        instruction(0x400004),
        instruction(0x400008, writes=(0x40, 0x50), flags=(1, 1)),
        instruction(0x40000C, reads=(0x60,)),
    )
)


def test_loads_come_before_stores(read, words, trickle) -> None:
    wanted = [(0x10, 0), (0x20, 0), (0x30, 1), (0x40, 1), (0x50, 1), (0x60, 0)]
    for body in (BODY, trickle(BODY)):
        got = read("champsim", body)
        assert got.records.tolist() == words(*((gpa, 8, access, 0) for gpa, access in wanted))
        assert got.carry["pc"].tolist() == [0x400000] * 3 + [0x400008] * 2 + [0x40000C]


def test_many_instructions(read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.trace.readers.champsim.INSTRUCTIONS", 3)
    assert read("champsim", BODY * 5).records[:, 0].tolist() == [0x10, 0x20, 0x30, 0x40, 0x50, 0x60] * 5


def test_a_body_that_ends_within_an_instruction() -> None:
    with pytest.raises(TraceError, match="ends 63 bytes into instruction 3 of 64 bytes") as caught:
        list(open_trace("champsim", io.BytesIO(BODY[:-1])))
    assert caught.value.index == 5


def test_what_is_known_as_one() -> None:
    assert is_champsim(BODY) and not is_champsim(BODY[:-1])
    assert not is_champsim(struct.pack("<64Q", *range(0x1000, 0x1000 + 512, 8)))
    assert not is_champsim(bytes(512))
    assert not is_champsim(b" S 004a9000,8\n" * 50)


def test_posted_as_addresses_they_are_noticed() -> None:
    with pytest.raises(TraceError, match="looks like a champsim trace: send it as application/octet-stream"):
        list(open_trace("packed", io.BytesIO(BODY), record="gpa8"))
