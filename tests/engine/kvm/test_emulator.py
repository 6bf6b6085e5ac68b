"""Writes that KVM emulates, writes of the host, and the length of instructions in what user space is told."""

from __future__ import annotations

import numpy as np
import pytest

from engine.arch import access as acc
from engine.errors import InvalidValue, TraceError
from engine.kvm.slots import SlotSpec
from engine.trace.columns import TraceChunk
from engine.trace.single import AccessRequest
from tests.engine.builders import MIB, PROFILES, READ, WRITE, exits, leaf, machine, protect, refused, replay, set_map

GUEST, EMULATED, HOST = acc.GUEST, acc.EMULATED, acc.HOST
MASK = 0xFFFF_FFFD  # sub-page 1 is refused


def chunk(*rows: tuple[int, int, int, int]) -> TraceChunk:
    """Writes of (gpa, size, source, insn_len)."""
    words = [(gpa, size | WRITE << 16 | acc.record_bits(0, 1, source, length)) for gpa, size, source, length in rows]
    return TraceChunk(np.array(words, dtype=np.uint64), None, {}, kinds=True)


# (gpa, size, refused by sub-page permissions); page 5 has MASK, page 6 is full, pages 7 and 8 are read-only
EMULATED_WRITES = [
    (0x5000, 8, False),
    (0x5080, 8, True),
    (0x5078, 8, False),
    (0x5078, 9, True),
    (0x50FF, 2, True),
    (0x5100, 8, False),
    (0x4FFF, 1, False),
    (0x4F00, 0x181, True),
    (0x5F80, 0x80, False),
    (0x5F80, 0x100, False),
    (0x6000, 4096, False),
]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("gpa", "size", "denied"), EMULATED_WRITES)
def test_emulated_write(profile: str, gpa: int, size: int, denied: bool) -> None:
    """Past the permissions in 2019, which is counted; by the sub-page later, and not by the page as in v6 to v12."""
    vm = machine(profile)
    set_map(vm, 5, MASK)
    data = bytes([0x5A]) * size
    result = vm.access(AccessRequest(gpa, size, source=EMULATED, insn_len=3, data=data))
    stopped = denied and profile == "kvm-latest"
    assert (result.resolution, result.lands) == (("violation", False) if stopped else ("completed", True))
    assert result.unenforced == (denied and not stopped)
    assert (vm.read_memory(gpa, size) == data) is not stopped
    assert vm.counters()["emulated_writes"] == 1
    assert vm.counters()["exits_ept_violation"] == 0, "no processor took part"
    assert leaf(vm, gpa >> 12) is None
    if stopped:
        assert result.run is not None
        assert (result.run.name, result.run.spp_addr, result.run.insn_len) == (
            "KVM_EXIT_SPP",
            max(gpa, 0x5000),
            3,
        )
        assert result.exits.column("denied").tolist() == [2]
        assert result.exits.column("qualification").tolist() == [0x1AA]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("gpa", "source", "access", "resolution"),
    [
        (0x10_0000, EMULATED, WRITE, "mmio"),
        (0x10_0000, HOST, WRITE, "mmio"),
        (0x10_0000, EMULATED, READ, "mmio"),
        (0xF_FFFC, EMULATED, WRITE, "mmio"),
        (0x20_0000, EMULATED, WRITE, "mmio"),
        (0x20_0000, HOST, WRITE, "completed"),
        (0x20_0000, EMULATED, READ, "completed"),
        (0x5080, HOST, WRITE, "completed"),
        (0x5080, EMULATED, READ, "completed"),
    ],
)
def test_slots_and_the_host(profile: str, gpa: int, source: int, access: int, resolution: str) -> None:
    slots = [SlotSpec(0, 0, MIB), SlotSpec(1, 2 * MIB, MIB, read_only=True)]
    vm = machine(profile, slots=slots)
    set_map(vm, 5, MASK)
    set_map(vm, 0x200, MASK)
    result = vm.access(AccessRequest(gpa, access=access, source=source))
    assert (result.resolution, result.unenforced) == (resolution, False)
    assert vm.counters()["host_writes"] == (source == HOST)


@pytest.mark.parametrize("profile", PROFILES)
def test_sources_in_a_trace(profile: str) -> None:
    vm = machine(profile)
    protect(vm, "p", (0x5080, 8))
    rows = [(0x5080, 8, source, 5) for source in (GUEST, EMULATED, HOST)] * 2
    result = replay(vm, chunk(*rows))
    enforced = [0, 3] if profile == "kvm-2019" else [0, 1, 3, 4]
    assert exits(result, "index", "source", "insn_len") == [(i, i % 3, 5) for i in enforced]
    assert (result.violations, result.unenforced_writes) == (len(enforced), 4 - len(enforced))
    assert result.page_granular_violations == len(enforced)
    assert result.by_object["p"].violations == len(enforced)
    assert result.writes == 6


@pytest.mark.parametrize(("on_violation", "lands"), [("skip", 0), ("allow", 0), ("grant", 1), ("stop", 0)])
def test_what_becomes_of_an_emulated_write(on_violation: str, lands: int) -> None:
    vm = machine("kvm-latest")
    set_map(vm, 5, MASK)
    result = replay(vm, chunk((0x5080, 8, EMULATED, 0), (0x5080, 8, EMULATED, 0)), on_violation=on_violation)
    assert result.violations == 2 - lands - (on_violation == "stop")
    assert result.stopped_at == (0 if on_violation == "stop" else None)


def test_lengths_do_not_keep_records_from_the_fast_path() -> None:
    """The same page again and again, each time by an instruction of another length: one fault in all."""
    vm = machine("kvm-latest")
    result = replay(vm, chunk(*((0x5000 + 8 * i, 8, GUEST, i % 16) for i in range(64))))
    assert (result.writes, result.exits["ept_violation"]) == (64, 1)


def test_records_that_are_no_accesses() -> None:
    vm = machine()
    vm.access(AccessRequest(0x5000))
    word = 8 | WRITE << 16
    bad = [
        (word | 3 << 48, True, "source"),
        (word | 1 << 58, True, "record"),
        (word | 1 << 63, True, "record"),
        (word | 1 << 50, False, "record"),
        (word | 1 << 48, False, "record"),
        (word + (1 << 16) | HOST << 48, True, "source"),
        (word | acc.record_bits(acc.READ_MODIFY_WRITE, 1, HOST), True, "source"),
    ]
    for second, kinds, field in bad:
        with pytest.raises(TraceError) as caught:
            replay(vm, TraceChunk(np.array([[0x5000, second]], dtype=np.uint64), None, {}, kinds=kinds))
        assert caught.value.field == field, hex(second)


def test_requests_that_are_no_accesses() -> None:
    vm = machine()
    with refused(vm, InvalidValue, "source", 3, "must be 0 to 2"):
        vm.access(AccessRequest(0x5000, source=3))
    with refused(vm, InvalidValue, "source", "host", "a read or a write of data"):
        vm.access(AccessRequest(0x5000, access=acc.EXECUTE, source=HOST))
    with refused(vm, InvalidValue, "insn_len", 16, "0 to 15 bytes"):
        vm.access(AccessRequest(0x5000, insn_len=16))
    with refused(vm, InvalidValue, "gpa", None, "is by gpa"):
        vm.access(AccessRequest(None, gva=0x5000, source=EMULATED))


@pytest.mark.parametrize(
    ("profile", "contract"), [("kvm-2019", (28, True, None)), ("kvm-latest", (29, False, 7))], ids=PROFILES
)
def test_exit_contract(profile: str, contract: tuple[int, bool, int | None]) -> None:
    """Skipped and without a length in 2019; kept, with the length, later (kvm-spp 3.6)."""
    vm = machine(profile)
    set_map(vm, 5, 0)
    result = vm.access(AccessRequest(0x5123, 4, insn_len=7))
    assert result.run is not None
    assert (result.run.exit_reason, result.run.rip_advanced, result.run.insn_len) == contract
    assert result.run.spp_addr == 0x5123
    known = vm.access(AccessRequest(0x5123, 4))
    assert known.run is not None and known.run.insn_len == (None if profile == "kvm-2019" else 0)
