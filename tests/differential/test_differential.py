"""The binary ABI and the second model of it give the same answers; `make differential` asks many times more."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from tests.differential.calls import PROFILES, Answer, Call, Sequence, World
from tests.differential.search import Difference, difference, smallest
from tests.differential.sequences import drawn
from tests.differential.unsettled import unsettled

SEED = 1
SHORT = 300


@pytest.mark.parametrize("start", range(0, SHORT, 50))
def test_both_answer_the_same(start: int) -> None:
    for index in range(start, start + 50):
        found = difference(*drawn(SEED, index))
        if found:
            found = smallest(found)
            assert unsettled(found), f"sequence {index} of seed {SEED}:\n{found}"


def test_a_sequence_is_the_same_each_time() -> None:
    assert drawn(7, 3) == drawn(7, 3) != drawn(8, 3)
    assert {drawn(7, index)[0].profile for index in range(2)} == set(PROFILES)


def check(number: int) -> Call:
    return Call("KVM_CHECK_EXTENSION", "vm", arg=number)


def test_the_smallest_sequence_is_found() -> None:
    def differs(world: World, calls: Sequence) -> Difference | None:
        """As if 163 were answered wrong after 157."""
        for at, call in enumerate(calls):
            if call == check(163) and check(157) in calls[:at]:
                return Difference(world, calls[: at + 1], Answer(1), Answer(0))
        return None

    calls = tuple(check(number) for number in (10, 157, 81, 118, 163, 155))
    found = differs(World(), calls)
    assert found is not None
    least = smallest(found, differs)
    assert least.calls == (check(157), check(163))
    assert "engine 1, model 0" in str(least)


def test_what_is_unsaid_is_not_compared() -> None:
    one, other = Answer(0, data=b"\1\2\3"), Answer(0, data=b"\1\7\3", unsaid=((1, 1),))
    assert replace(one, unsaid=other.unsaid).told() == other.told() != one.told()


REGION = Call("KVM_SET_USER_MEMORY_REGION", "vm", struct.pack("<IIQQQ", 0, 0, 0, 0x4000, 0x7F00_0000_0000))
MAPS = struct.pack("<QQ", 2, 4) + struct.pack("<64I", *range(1, 65))
SETTLED: dict[str, tuple[World, Sequence]] = {
    "a SET past the last page of a slot forgets to fail after a mapped page (v4)": (
        World("kvm-2019"),
        (
            REGION,
            Call("KVM_INIT_SPP", "vm"),
            Call("TOUCH", "", arg=0x3000),
            Call("KVM_SUBPAGES_SET_ACCESS", "vm", MAPS),
            Call("KVM_SUBPAGES_GET_ACCESS", "vm", MAPS),
        ),
    ),
    "a vmcs12 that a CPUID without VMX hides from the header is copied out all the same": (
        World("kvm-latest"),
        (
            Call("KVM_SET_CPUID2", "vcpu", struct.pack("<II", 1, 0) + struct.pack("<7I12x", 1, 0, 0, 0, 0, 1 << 5, 0)),
            Call(
                "KVM_SET_NESTED_STATE",
                "vcpu",
                struct.pack("<HHIQQ", 0, 0, 4224, 0x1000, 0x2000).ljust(128, b"\0")
                + (0x11E5_7ED0).to_bytes(4, "little").ljust(4096, b"\0"),
            ),
            Call("KVM_SET_CPUID2", "vcpu", bytes(8)),
            Call("KVM_GET_NESTED_STATE", "vcpu", bytes(4) + (8320).to_bytes(4, "little") + b"\xee" * 8440),
        ),
    ),
}


@pytest.mark.parametrize("case", SETTLED)
def test_differences_that_the_sources_settled(case: str) -> None:
    found = difference(*SETTLED[case])
    assert found is None, str(found)
