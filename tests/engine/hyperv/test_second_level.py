"""Flushes by second-level root, which only the specification has."""

from __future__ import annotations

import pytest

from engine.arch import controls as ctl
from engine.cpu import frames, tlb

from .flush_machine import FlushMachine, words

ROOT = 0x300000
# GPAs (frame numbers) of what the caches hold
HELD = (0x12345, 0x100, 0x8FF, 0x900)


def machine_with(
    root: int = ROOT, policy: str = "tlfs", execution: str | None = None, **changes: object
) -> FlushMachine:
    machine = FlushMachine(policy, execution, **changes)
    tlb.flush(machine.m)
    for vcpu in (0, 4):
        frames.write_word(machine.m, frames.FIRST_VCPU_FRAME + vcpu, ctl.V_EPTP, root | 0x1E)
        for page in HELD:
            machine.fill(vcpu, 0x1000, page << 12, 12, False)
            row = tlb.find(machine.m, vcpu, tlb.COMBINED, page)
            machine.m.tlb[row, tlb.E_FRAME] = page
    return machine


def left(machine: FlushMachine, vcpu: int) -> tuple[int, ...]:
    table = machine.m.tlb
    live = (table[:, tlb.E_GENERATION] == table[0, tlb.GENERATION]) & (table[:, tlb.E_KIND] >> tlb.VCPU_SHIFT == vcpu)
    return tuple(sorted(int(row[tlb.E_FRAME]) for row in table[live] if row[tlb.E_FRAME]))


@pytest.mark.parametrize(
    ("name", "control", "block", "result", "gone"),
    [
        ("P01", 0xAF, words(0x30001E, 0), 0, HELD),
        ("P02", 0xAF, words(0x30001E, 1), 5, ()),
        ("another root", 0xAF, words(0x40001E, 0), 0, ()),
        ("P04", 0x1000000B0, words(0x30001E, 0, 0x12345000), 0x100000000, (0x12345,)),
        ("P05", 0x1000000B0, words(0x30001E, 0, 0x1007FF), 0x100000000, (0x100, 0x8FF)),
        ("P07", 0x1FE000000B0, words(0x30001E, 0, *[0x12345000] * 510), 0x1FE00000000, (0x12345,)),
        ("511 ranges", 0x1FF000000B0, words(0x30001E, 0, *[0x12345000] * 511), 4, ()),
        ("P08", 0xB0, words(0x30001E, 0, 0x12345000), 3, ()),
        ("2 MiB", 0x1000000B0, words(0x30001E, 0, 0x800), 0x100000000, (0x100,)),
        ("1 GiB", 0x1000000B0, words(0x30001E, 0, 0x1800), 0x100000000, HELD),
        ("from the second", 0x10002000000B0, words(0x30001E, 0, 0x100000, 0x900000), 0x200000000, (0x900,)),
        ("too wide a root", 0xAF, words(1 << 46, 0), 5, ()),
    ],
)
def test_vectors(name: str, control: int, block: bytes, result: int, gone: tuple[int, ...]) -> None:
    for execution in ("exact", "paranoid", "kvm"):
        machine = machine_with(execution=execution)
        done = machine.slow(control, block)
        assert done.result == result
        for vcpu in (0, 4):
            expected = tuple(sorted(set(HELD) - set(gone)))
            if execution == "exact":
                assert left(machine, vcpu) == expected
            assert set(left(machine, vcpu)) <= set(expected)
        assert not any(len(effect.left) for effect in done.effects)


def test_kvm_does_not_know_them() -> None:
    for control in (0xAF, 0x1000000B0):
        machine = machine_with(policy="kvm")
        assert machine.slow(control, words(0x30001E, 0, 0x12345000)).result == 2
        assert left(machine, 0) == tuple(sorted(HELD))


def test_a_partition_that_cannot_nest_is_in_the_wrong_state() -> None:
    machine = machine_with()
    from dataclasses import replace

    machine.context = replace(machine.context, environment=replace(machine.context.environment, nesting=False))
    assert machine.slow(0xAF, words(ROOT, 0)).result == 0x15
