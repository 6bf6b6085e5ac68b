"""Tables H and J of the printed vectors: VM-entry checks, INVEPT and INVVPID operands; and their neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch.paging import LINEAR_48
from engine.arch.words import signed
from engine.cpu import frames, invalidate
from engine.machine import VirtualMachine
from engine.state.config import HostConfig, VmConfig
from engine.state.default_host import EPT_VPID_CAP

from . import vectors_tables as tables
from .bench_machine import SHADOW_STACK, VCPU, Processor, without
from .vectors import run_entry

ONES = (1 << 64) - 1


ENTRY = tables.chosen(tables.ENTRY)


@pytest.mark.parametrize(("setup", "access", "expected"), [r[1:] for r in ENTRY], ids=[r[0] for r in ENTRY])
def test_entry(setup: str, access: str, expected: str) -> None:
    run_entry(Processor(), setup, access, expected)


SECONDARY = ctl.SECONDARY_EPT | ctl.SECONDARY_SPP
NEEDS_EPT = [
    ctl.SECONDARY_PML,
    ctl.SECONDARY_UNRESTRICTED,
    ctl.SECONDARY_MBEC,
    ctl.SECONDARY_SPP,
    ctl.SECONDARY_TRACE_GUEST_PHYSICAL,
]


@pytest.mark.parametrize(
    ("words", "cap", "error"),
    [
        *(({ctl.V_EPTP: low}, EPT_VPID_CAP, 0 if low & 7 in (0, 6) else 7) for low in range(0x18, 0x20)),
        ({ctl.V_EPTP: 0x1E}, without(EPT_VPID_CAP, bits.CAP_WB), 7),
        ({ctl.V_EPTP: 0x18}, without(EPT_VPID_CAP, bits.CAP_UC), 7),
        ({ctl.V_EPTP: 0x1E}, without(EPT_VPID_CAP, bits.CAP_WALK_4), 7),
        ({ctl.V_EPTP: 0x26}, EPT_VPID_CAP, 0),
        ({ctl.V_EPTP: 0x26}, without(EPT_VPID_CAP, bits.CAP_WALK_5), 7),
        ({ctl.V_EPTP: 0x16}, EPT_VPID_CAP, 7),
        ({ctl.V_EPTP: 0x2E}, EPT_VPID_CAP, 7),
        ({ctl.V_EPTP: 0x5E}, EPT_VPID_CAP, 0),
        ({ctl.V_EPTP: 0x5E}, without(EPT_VPID_CAP, bits.CAP_ACCESSED_DIRTY), 7),
        ({ctl.V_EPTP: 0x9E}, EPT_VPID_CAP, 7),
        ({ctl.V_EPTP: 0x9E}, SHADOW_STACK, 0),
        *(({ctl.V_EPTP: 0x1E | 1 << bit}, SHADOW_STACK, 7) for bit in (8, 9, 10, 11, 40, 51, 52, 63)),
        ({ctl.V_EPTP: 0x1E | 1 << 39}, EPT_VPID_CAP, 0),
        *(({ctl.V_SPPTP: 1 << bit}, EPT_VPID_CAP, 7) for bit in (*range(12), 40, 51, 52, 63)),
        ({ctl.V_SPPTP: 1 << 39}, EPT_VPID_CAP, 0),
        # H04: not looked at without the control
        ({ctl.V_SPPTP: ONES, ctl.V_SECONDARY: ctl.SECONDARY_EPT}, EPT_VPID_CAP, 0),
        ({ctl.V_EPTP: ONES, ctl.V_SECONDARY: 0}, EPT_VPID_CAP, 0),
        ({ctl.V_PML_ADDRESS: 0x800, ctl.V_SECONDARY: SECONDARY}, EPT_VPID_CAP, 0),
        ({ctl.V_PML_ADDRESS: 0x800, ctl.V_SECONDARY: SECONDARY | ctl.SECONDARY_PML}, EPT_VPID_CAP, 7),
        ({ctl.V_PML_ADDRESS: 1 << 40, ctl.V_SECONDARY: SECONDARY | ctl.SECONDARY_PML}, EPT_VPID_CAP, 7),
        ({ctl.V_VE_ADDRESS: 0x800, ctl.V_SECONDARY: SECONDARY}, EPT_VPID_CAP, 0),
        ({ctl.V_VE_ADDRESS: 0x800, ctl.V_SECONDARY: SECONDARY | ctl.SECONDARY_VE}, EPT_VPID_CAP, 7),
        ({ctl.V_VE_ADDRESS: 1 << 45, ctl.V_SECONDARY: SECONDARY | ctl.SECONDARY_VE}, EPT_VPID_CAP, 7),
        ({ctl.V_VE_ADDRESS: 0x7000, ctl.V_SECONDARY: SECONDARY | ctl.SECONDARY_VE}, EPT_VPID_CAP, 0),
        *(({ctl.V_SECONDARY: control}, EPT_VPID_CAP, 7) for control in NEEDS_EPT),
        *(({ctl.V_SECONDARY: control | ctl.SECONDARY_EPT}, EPT_VPID_CAP, 0) for control in NEEDS_EPT),
        ({ctl.V_SECONDARY: ctl.SECONDARY_VE}, EPT_VPID_CAP, 0),
        ({ctl.V_SECONDARY: SECONDARY | ctl.SECONDARY_VPID, ctl.V_VPID: 0}, EPT_VPID_CAP, 7),
        ({ctl.V_SECONDARY: SECONDARY | ctl.SECONDARY_VPID, ctl.V_VPID: 1}, EPT_VPID_CAP, 0),
        ({ctl.V_SECONDARY: SECONDARY | 1 << 27}, EPT_VPID_CAP, 7),
        # nothing of them counts unless the primary controls activate them
        ({ctl.V_PRIMARY: 0, ctl.V_SECONDARY: ctl.SECONDARY_SPP, ctl.V_TERTIARY: ONES}, EPT_VPID_CAP, 0),
        ({ctl.V_PRIMARY: 3 << 31 & 0xFFFFFFFF | ctl.PRIMARY_TERTIARY, ctl.V_TERTIARY: 12}, EPT_VPID_CAP, 0),
        ({ctl.V_PRIMARY: ctl.PRIMARY_TERTIARY, ctl.V_TERTIARY: 4}, EPT_VPID_CAP, 7),
        ({ctl.V_PRIMARY: ctl.PRIMARY_TERTIARY, ctl.V_TERTIARY: 8}, EPT_VPID_CAP, 7),
        ({ctl.V_PRIMARY: ctl.PRIMARY_SECONDARY | ctl.PRIMARY_TERTIARY, ctl.V_TERTIARY: 1 << 4}, EPT_VPID_CAP, 7),
    ],
)
def test_controls(words: dict[Any, int], cap: int, error: int) -> None:
    p = Processor(cap=cap)
    p.vcpu(words)
    assert p.enter() == error


def test_tertiary_controls_need_the_capability() -> None:
    p = Processor()
    p.turn_on(ctl.V_PRIMARY, ctl.PRIMARY_TERTIARY)
    p.m.caps[frames.CAP_TERTIARY_ALLOWED] = 0
    assert p.enter() == 7


def test_a_host_without_spp_does_not_allow_the_control() -> None:
    assert HostConfig().secondary_allowed & ctl.SECONDARY_SPP
    assert not HostConfig(spp=False).secondary_allowed & ctl.SECONDARY_SPP
    assert not HostConfig(ept=False).secondary_allowed & ctl.SECONDARY_EPT
    m = VirtualMachine.create(VmConfig(host=HostConfig(spp=False))).state.current.snapshot.machine
    assert not m.caps[frames.CAP_SECONDARY_ALLOWED] & ctl.SECONDARY_SPP


def invvpid(m: Any, vcpu: int, place: int, cpl: int, *operands: Any, width: int = LINEAR_48) -> Any:
    return invalidate.invvpid(m, vcpu, place, cpl, *operands, width)


OPERANDS = [
    *((row[0], invalidate.invept, *row[1:]) for row in tables.INVEPT),
    *((row[0], invvpid, *row[1:]) for row in tables.INVVPID),
]


@pytest.mark.parametrize(
    ("instruction", "kind", "descriptor", "error"), [r[1:] for r in OPERANDS], ids=[r[0] for r in OPERANDS]
)
@pytest.mark.parametrize("model", [False, True])
def test_operands(instruction: Any, kind: int, descriptor: tuple[int, ...], error: int, model: bool) -> None:
    p = Processor(model=model)
    words = (np.int64(signed(word)) for word in descriptor)
    outcome = instruction(p.m, VCPU, invalidate.ROOT, 0, np.int64(signed(kind)), *words)
    assert outcome == ((invalidate.FAILED, error) if error else (invalidate.SUCCEEDED, 0))


@pytest.mark.parametrize(
    ("linear", "narrow", "wide"),
    [
        (1 << 47, invalidate.FAILED, invalidate.SUCCEEDED),
        (0xFFFF_7FFF_FFFF_F000, invalidate.FAILED, invalidate.SUCCEEDED),
        (0xFFFF_8000_0000_0000, invalidate.SUCCEEDED, invalidate.SUCCEEDED),
        (1 << 56, invalidate.FAILED, invalidate.FAILED),
        (0xFEFF_FFFF_FFFF_F000, invalidate.FAILED, invalidate.FAILED),
    ],
)
def test_an_address_is_canonical_in_a_width(linear: int, narrow: int, wide: int) -> None:
    for width, outcome in ((48, narrow), (57, wide)):
        operands = (np.int64(0), np.int64(1), np.int64(signed(linear)))
        assert invvpid(Processor().m, VCPU, invalidate.ROOT, 0, *operands, width=width)[0] == outcome


@pytest.mark.parametrize(
    ("cap", "instruction", "kind", "expected"),
    [
        (bits.CAP_INVEPT, invalidate.invept, 2, (invalidate.EXCEPTION, 6)),
        (bits.CAP_INVEPT_SINGLE, invalidate.invept, 1, (invalidate.FAILED, 28)),
        (bits.CAP_INVEPT_ALL, invalidate.invept, 2, (invalidate.FAILED, 28)),
        (bits.CAP_INVVPID, invvpid, 2, (invalidate.EXCEPTION, 6)),
        (bits.CAP_INVVPID_ADDRESS, invvpid, 0, (invalidate.FAILED, 28)),
        (bits.CAP_INVVPID_SINGLE, invvpid, 1, (invalidate.FAILED, 28)),
        (bits.CAP_INVVPID_ALL, invvpid, 2, (invalidate.FAILED, 28)),
        (bits.CAP_INVVPID_RETAIN_GLOBALS, invvpid, 3, (invalidate.FAILED, 28)),
    ],
)
def test_types_need_their_capability(cap: int, instruction: Any, kind: int, expected: tuple[int, int]) -> None:
    descriptor = (np.int64(0x1E),) if instruction is invalidate.invept else (np.int64(1), np.int64(0))
    lacking = Processor(cap=without(EPT_VPID_CAP, cap))
    assert instruction(lacking.m, VCPU, invalidate.ROOT, 0, np.int64(kind), *descriptor) == expected
    having = instruction(Processor().m, VCPU, invalidate.ROOT, 0, np.int64(kind), *descriptor)
    assert having == (invalidate.SUCCEEDED, 0)


@pytest.mark.parametrize(
    ("place", "cpl", "expected"),
    [
        (invalidate.OUTSIDE, 0, (invalidate.EXCEPTION, 6)),
        (invalidate.WRONG_MODE, 0, (invalidate.EXCEPTION, 6)),
        (invalidate.WRONG_MODE, 3, (invalidate.EXCEPTION, 6)),
        (invalidate.ROOT, 3, (invalidate.EXCEPTION, 13)),
        (invalidate.NON_ROOT, 3, (invalidate.EXIT, None)),
        (invalidate.NON_ROOT, 0, (invalidate.EXIT, None)),
    ],
)
def test_place_and_privilege_come_before_operands(place: int, cpl: int, expected: tuple[int, int | None]) -> None:
    p = Processor()
    kind, zero = np.int64(9), np.int64(0)
    for result, reason in (
        (invalidate.invept(p.m, VCPU, place, cpl, kind, zero), 50),
        (invvpid(p.m, VCPU, place, cpl, kind, zero, zero), 53),
    ):
        assert result == (expected[0], reason if expected[1] is None else expected[1])
