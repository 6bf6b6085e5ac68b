"""Any call means what a second, independent reading of the rules says: status, VPs, translations."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.arch import hypercall as hv
from engine.hyperv.caller import Caller
from engine.state.profiles import KVM_LATEST, PROFILES
from tests.engine.hyperv.drawn_calls import ADDRESSES, calls

from . import oracle
from .flush_machine import ENTRIES, INPUT, PAGE, VP_INDICES, FlushMachine, names, words

SLOW = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
RAM_END = INPUT + 2 * PAGE


places = st.one_of(
    *[st.just(INPUT)] * 3,
    st.builds(lambda words: RAM_END - 8 * words, st.integers(0, 24)),
    st.sampled_from([INPUT + PAGE - 8, INPUT + PAGE - 24, INPUT + 4, INPUT + 1, 0xDEAD000, 1 << 46, (1 << 64) - 8]),
)


class Run:
    """One call on a fresh machine, and what the second reading says of it."""

    def __init__(self, policy: str, control: int, block: list[int], gpa: int, **options: Any) -> None:
        self.machine = FlushMachine(policy, **options)
        for at, word in enumerate(block):
            self.machine.write(words(word), gpa + 8 * at)
        self.gpa, self.fast = gpa, bool(control >> 16 & 1)
        self.registers = (block + [0] * hv.FAST_WORDS)[: hv.FAST_WORDS]
        first, second, *rest = self.registers
        xmm = tuple(low | high << 64 for low, high in zip(rest[::2], rest[1::2], strict=True))
        if policy == "kvm":
            self.answer = oracle.kvm(control, self.read, each_page=options.get("profile") == KVM_LATEST)
        else:
            self.answer = oracle.tlfs(control, self.read, gpa, memory=self.readable)
        before = self.machine.state()
        self.done = self.machine.call(Caller(rcx=control, rdx=first if self.fast else gpa, r8=second, xmm=xmm))
        self.unchanged = self.machine.state() == before

    def read(self, first: int, count: int) -> list[int] | None:
        if self.fast:
            return self.registers[first : first + count] if first + count <= hv.FAST_WORDS else None
        data = self.machine.ram.read(self.gpa + 8 * first, 8 * count)
        return None if data is None else [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]

    def readable(self, gpa: int, size: int) -> bool:
        return self.machine.ram.read(gpa, size) is not None

    def check(self) -> None:
        """The status is that of the second reading, and only a success changes anything."""
        if self.answer.status is None:
            assert (self.done.outcome, self.done.intercepted_gpa) == ("intercepted", self.gpa) and self.unchanged
            return
        assert self.done.result == self.answer.status | self.answer.reps << 32
        assert frozenset(self.done.targeted) == frozenset(self.done.flushed) == self.answer.vps
        assert self.unchanged or self.answer.status == hv.Status.SUCCESS

    def gone(self) -> dict[int, frozenset[str]]:
        """What the cache of each VP has no more."""
        held = {vp.vp_index: self.machine.held(vp.position) for vp in self.machine.vps}
        return {vp: frozenset(ENTRIES) - set(names_) for vp, names_ in held.items()}

    def answered(self) -> dict[int, frozenset[str]]:
        """What has to be gone."""
        return {vp: self.answer.entries if vp in self.answer.vps else frozenset() for vp in VP_INDICES}


@SLOW
@given(calls(), places, st.sampled_from(PROFILES))
def test_as_kvm(call: tuple[int, list[int]], gpa: int, profile: str) -> None:
    run = Run("kvm", *call, gpa, profile=profile)
    run.check()
    assert run.gone() == run.answered()


@SLOW
@given(calls(), places, st.sampled_from(["exact", "kvm", "paranoid"]))
def test_by_the_specification(call: tuple[int, list[int]], gpa: int, execution: str) -> None:
    run = Run("tlfs", *call, gpa, execution=execution)
    run.check()
    needed = run.answered()
    for effect in run.done.effects:
        assert set(names(effect.required)) == needed[effect.vp.vp_index] and not len(effect.left)
    for vp, gone in run.gone().items():
        assert gone == needed[vp] if execution == "exact" else gone >= needed[vp]


@pytest.mark.parametrize("policy", ["kvm", "tlfs"])
@pytest.mark.parametrize("code", [2, 3, 0x13, 0x14])
def test_every_length(policy: str, code: int) -> None:
    """Blocks that end with the last word of memory or after it, and as many words as registers hold, or more."""
    ex, rep = code > 3, code in (3, 0x14)
    for banks in (0, 1, 3) if ex else (0,):
        for reps in (1, 2, 8, 9, 11, 12, 15, 16) if rep else (0,):
            head = [0, 2, 0, (1 << banks) - 1, *[1] * banks] if ex else [0, 2, 1]
            block = [*head, *[ADDRESSES[0]] * reps]
            control = code | banks << 17 | reps << 32
            Run(policy, control | hv.FAST, block, INPUT).check()
            for there in {0, 1, len(head) - 1, len(head), len(block) - 1, len(block)}:
                Run(policy, control, block, RAM_END - 8 * there).check()
