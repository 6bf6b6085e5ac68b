"""Direct flush for L2: the printed vectors and the rows of the decision table, by the rules alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.arch import controls as ctl
from engine.cpu import frames, tlb
from engine.hyperv import flush_execution
from engine.hyperv.caller import Caller
from engine.hyperv.flush_execution import Vp
from engine.hyperv.l2_hypercalls import Exit, NestedGuest
from tests.engine.ram import Ram

from .flush_machine import ENTRIES, PRIVILEGES, FlushMachine, names, words

ASSIST = 0xA000
L2_INPUT, L1_INPUT = 0x5000, 0x25000
IDS = ((1, 1), (1, 2), (1, 65), (2, 1))
N0 = NestedGuest(vm_id=1, vp_id=1, assist_page=ASSIST)
N01 = Caller(rcx=0x10002, r8=3)
VMCALL = Exit(18)
AFTER_FLUSH = Exit(0x10000031)


class DirectMachine(FlushMachine):
    """State N0: four L1 VPs run L2 vCPUs, whose translations are in a VPID of their own."""

    def __init__(self, guest: NestedGuest = N0, ids: tuple[tuple[int, int], ...] = IDS, **changes: Any) -> None:
        super().__init__(**changes)
        self.ram = Ram((ASSIST, L1_INPUT, L1_INPUT + 0x1000))
        self.vps[:] = [
            Vp(vp.position, vp.vcpu, vp.vp_index, in_nested=True, nested_ids=of)
            for vp, of in zip(self.vps, ids, strict=False)
        ]
        for vp in self.vps:
            frames.write_word(self.m, frames.FIRST_VCPU_FRAME + vp.position, ctl.V_VPID, 0x8001 + vp.position)
            for name in "ABE":
                self.fill(vp.position, *ENTRIES[name], nested=vp.nested_ids)
        self.context = replace(
            self.context,
            memory=self.ram,
            partition_memory=self.ram,
            guest=guest,
            translate=lambda gpa: gpa + 0x20000 if gpa & ~0xFFF == L2_INPUT else None,
        )


def flushed(machine: DirectMachine, done: Any) -> dict[int, str]:
    """What went from the nested translations, by L1 VP."""
    assert all(machine.held(vp.position) == "ABCDEFGH" for vp in machine.vps)
    return {effect.vp.vp_index: names(effect.dropped) for effect in done.effects if effect.targeted}


XMM_MASK = (4, 0, 0, 0, 0, 0)
SET_65 = (2 << 64, 2, 0, 0, 0, 0)
PAGE_LIST = (0x6 | 0x7F0000001000 << 64, 0, 0, 0, 0, 0)
EVERY = "ABE"


@pytest.mark.parametrize(
    ("name", "caller", "result", "gone"),
    [
        ("N01", N01, 0, {0: EVERY, 1: EVERY, 2: EVERY}),
        ("N02", Caller(rcx=0x10002, r8=2, xmm=XMM_MASK), 0, {1: EVERY}),
        ("N04", Caller(rcx=0x30013, r8=2, xmm=SET_65), 0, {2: EVERY}),
        ("N05", Caller(rcx=0x100010003, r8=2, xmm=PAGE_LIST), 0x100000000, {0: "A", 1: "A"}),
        ("N07", Caller(rcx=2, rdx=0x6000), 3, {}),
        ("N08", Caller(rcx=0x10002, r8=2), 0, {0: EVERY, 1: EVERY, 2: EVERY}),
        ("N16", Caller(rax=5, rcx=2, rdx=L2_INPUT), 0, {0: EVERY, 1: EVERY, 2: EVERY}),
        ("N16 unmapped", Caller(rax=5, rcx=2, rdx=0xDEAD000), 3, {}),
        ("N22", Caller(rax=0x10002, rsi=3, long_mode=False), 0, {0: EVERY, 1: EVERY, 2: EVERY}),
        ("EX everyone", Caller(rcx=0x10013, r8=2, xmm=(1, 0, 0, 0, 0, 0)), 0, {0: EVERY, 1: EVERY, 2: EVERY}),
    ],
)
def test_served(name: str, caller: Caller, result: int, gone: dict[int, str]) -> None:
    machine = DirectMachine()
    done = machine.call(caller)
    assert (done.outcome, done.result, done.exit, done.rip_advance, done.level) == ("completed", result, None, 3, 2)
    assert done.row == ("D10" if result & 0xFFFF == 0 else "D8")
    assert flushed(machine, done) == gone
    wide = {"rax": result} if caller.long_mode else {"rdx": result >> 32, "rax": result & 0xFFFFFFFF}
    assert done.registers == wide


@pytest.mark.parametrize(
    ("row", "guest", "privileges", "caller"),
    [
        ("D1", N0, replace(PRIVILEGES, nested_eax=0x80101), N01),  # N11
        ("D2", replace(N0, enlightened=False), PRIVILEGES, N01),
        ("D3", replace(N0, asks=False), PRIVILEGES, N01),  # N10
        ("D4", replace(N0, direct=False), PRIVILEGES, N01),
        ("D5", N0, PRIVILEGES, replace(N01, rcx=0x10008)),
        ("D5", N0, PRIVILEGES, Caller(rcx=0x10002, rax=5, long_mode=False)),
    ],
)
def test_reflected(row: str, guest: NestedGuest, privileges: Any, caller: Caller) -> None:
    machine = DirectMachine(guest, privileges=privileges)
    done = machine.call(caller)
    assert (done.outcome, done.row, done.exit, done.rip_advance, done.result) == ("reflected", row, VMCALL, 0, None)
    assert not done.effects and not done.registers
    machine = DirectMachine(replace(guest, svm=True, enlightened=True), privileges=privileges)
    if row != "D2":
        assert machine.call(caller).exit == Exit(0x81)


def test_the_lock_count_asks_for_an_exit_after_the_flush() -> None:
    machine = DirectMachine()
    machine.ram.write(ASSIST, words(1))
    done = machine.call(N01)  # N14
    assert (done.row, done.exit, done.result, done.rip_advance) == ("D11", AFTER_FLUSH, 0, 3)
    assert flushed(machine, done) == {0: EVERY, 1: EVERY, 2: EVERY}
    refused = machine.call(replace(N01, rcx=0x8010002))
    assert (refused.row, refused.exit, refused.result) == ("D8", None, 3)


def test_the_exit_of_a_vmcb() -> None:
    machine = DirectMachine(replace(N0, svm=True, enlightened=False))
    machine.ram.write(ASSIST, words(1))
    done = machine.call(N01)  # N23
    assert (done.exit, done.registers) == (Exit(0xF0000000, 1, 0), {"rax": 0})


def test_an_unreadable_partition_page_spoils_the_result_only() -> None:
    for caller, registers in ((N01, {"rax": 3}), (Caller(rax=0x10002, rsi=3, long_mode=False), {"rdx": 0, "rax": 3})):
        machine = DirectMachine(replace(N0, assist_page=0xFFFFFFFFFF000))
        done = machine.call(caller)  # N17
        assert (done.row, done.result, done.exit, done.registers) == ("D9", 3, None, registers)
        assert flushed(machine, done) == {0: EVERY, 1: EVERY, 2: EVERY}


def test_an_id_beyond_every_set_is_in_none() -> None:
    machine = DirectMachine(ids=((1, 1), (1, 0xFFFFFFFF), (1, 65), (2, 1)))
    done = machine.call(Caller(rcx=0x10002, r8=2, xmm=((1 << 64) - 1, 0, 0, 0, 0, 0)))  # N20
    assert flushed(machine, done) == {0: EVERY}
    machine = DirectMachine(ids=((1, 1), (1, 0xFFFFFFFF), (1, 65), (2, 1)))
    assert flushed(machine, machine.call(N01)) == {0: EVERY, 1: EVERY, 2: EVERY}


def test_level_2_must_be_its_kernel_too() -> None:
    done = DirectMachine().call(replace(N01, cpl=3))
    assert (done.outcome, done.row, done.rip_advance, done.exit) == ("exception", "D6", 0, None)


def test_without_an_identity_of_l1_the_call_is_kvms_own() -> None:
    done = DirectMachine(privileges=replace(PRIVILEGES, os_id=0)).call(replace(N01, rax=0xDEAD))
    assert (done.outcome, done.row, done.registers["rax"]) == ("native", "D7", (1 << 64) - 1000)
    # the row before it comes first
    done = DirectMachine(privileges=replace(PRIVILEGES, os_id=0)).call(replace(N01, cpl=3))
    assert (done.outcome, done.row) == ("exception", "D6")


def test_a_vmmcall_that_l1_lets_through_is_served() -> None:
    guest = replace(N0, svm=True, asks=False, intercepts=False)
    machine = DirectMachine(guest)
    done = machine.call(N01)
    assert (done.outcome, done.result) == ("completed", 0)
    assert flushed(machine, done) == {0: EVERY, 1: EVERY, 2: EVERY}


@pytest.mark.parametrize("execution", ["exact", "kvm", "paranoid"])
def test_nothing_required_is_left_of_other_contexts_either(execution: str) -> None:
    machine = DirectMachine(execution=execution, policy="tlfs")
    done = machine.call(Caller(rcx=0x10002, rdx=0x1000, r8=0, xmm=(6, 0, 0, 0, 0, 0)))
    assert {effect.vp.vp_index: names(effect.required) for effect in done.effects if effect.targeted} == {
        0: "ABE",
        1: "ABE",
    }
    assert not any(len(effect.left) for effect in done.effects)


ids = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 2, 65, 4095, 4096, 0xFFFFFFFF])), min_size=5, max_size=5
)
SETS = st.one_of(st.none(), st.tuples(st.integers(1, 7), st.integers(0, 3)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ids, st.integers(0, 4), SETS, st.lists(st.sampled_from([*range(5)]), max_size=3), st.booleans())
def test_whoever_runs_keeps_nothing_that_is_required(
    of: list[tuple[int, int]], caller: int, chosen: tuple[int, int] | None, away: list[int], listed: bool
) -> None:
    """Every way agrees on what has to go, by the ids on record; who is halted or in L1 has it queued."""
    wanted = None
    for way in ("exact", "kvm", "paranoid"):
        machine = DirectMachine(
            replace(N0, vm_id=of[caller][0], vp_id=of[caller][1]), tuple(of), execution=way, policy="tlfs"
        )
        machine.vps[:] = [replace(vp, running=vp.position not in away or vp.position == caller) for vp in machine.vps]
        block = (0, 2, 1, 0) if chosen is None else (0, 2, 0, 3, *chosen)
        block += (ENTRIES["A"][1],) if listed else ()
        padded = (*block, *[0] * (14 - len(block)))
        xmm = tuple(padded[at] | padded[at + 1] << 64 for at in range(2, 14, 2))
        banks = 0 if chosen is None else 2
        control = (0x100010014 if listed else 0x10013) | banks << 17
        done = machine.call(Caller(rcx=control, r8=2, xmm=xmm))
        assert done.result == (0x100000000 if listed else 0)
        meant = [
            at
            for at, (vm, vp) in enumerate(of)
            if vm == of[caller][0] and (chosen is None or (vp < 128 and chosen[vp // 64] >> vp % 64 & 1))
        ]
        assert list(done.targeted) == [machine.vps[at].vp_index for at in meant]
        required = {effect.vp.position: names(effect.required) for effect in done.effects if len(effect.required)}
        assert required == dict.fromkeys(meant, "A" if listed else EVERY)
        wanted = required if wanted is None else wanted
        assert required == wanted
        for effect in done.effects:
            assert not len(effect.left) or (effect.queued and effect.vp.position in away)
        for vp in machine.vps:
            flush_execution.service(machine.m, vp.position, True, machine.context.facts)
            assert not set(nested_of(machine, vp.position)) & set(required.get(vp.position, ""))
            assert way == "paranoid" or machine.held(vp.position) == "ABCDEFGH"


def nested_of(machine: DirectMachine, vcpu: int) -> str:
    """Names of the translations of nested guests in a vCPU's cache."""
    table = machine.m.tlb
    live = (table[:, tlb.E_GENERATION] == table[0, tlb.GENERATION]) & (table[:, tlb.E_NESTED] != 0)
    return names(row for row in table[live & (table[:, tlb.E_KIND] >> tlb.VCPU_SHIFT == vcpu)] if row[tlb.E_FRAME])
