"""The printed vectors of the flush calls, in both readings."""

from __future__ import annotations

from typing import Any

import pytest

from engine.hyperv.caller import Caller
from engine.hyperv.outcome import Outcome
from engine.state.profiles import PROFILES
from tests.engine.hyperv.vectors import LONG, ROWS, Expected, expected

from .flush_machine import ALL, INPUT, FlushMachine, names


def made(machine: FlushMachine, name: str, control: str, text: str) -> Outcome:
    if "RDX=" in text:
        given = dict(item.split("=") for item in text.split())
        xmm = [int.from_bytes(bytes.fromhex(given.get(f"XMM{i}", "")), "little") for i in range(6)]
        return machine.call(
            Caller(rcx=int(control, 16), rdx=int(given["RDX"], 16), r8=int(given["R8"], 16), xmm=tuple(xmm))
        )
    gpa = INPUT
    if text.startswith("@"):
        where, text = text.split(":")
        gpa = int(where[1:], 16)
    data = b"".join(n.to_bytes(8, "little") for n in LONG[name]) if name in LONG else bytes.fromhex(text)
    return machine.slow(int(control, 16), data, gpa)


def check(done: Outcome, machine: FlushMachine, want: Expected, *, exactly: bool) -> None:
    assert done.result == want.result
    assert done.flushed == done.targeted == want.flushed
    for vp in machine.vps:
        gone = "".join(name for name in ALL if name not in machine.held(vp.position))
        entries = want.entries if vp.vp_index in want.flushed else ""
        assert gone == entries if exactly else set(entries) <= set(gone)
    for effect in done.effects:
        assert names(effect.dropped) == (want.entries if effect.targeted else "")
        if not effect.targeted:
            continue
        if want.statistic is not None:
            assert effect.flushes == want.statistic


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("name", "control", "text", "tlfs", "kvm"), ROWS, ids=[row[0] for row in ROWS])
def test_as_kvm_reads_it(name: str, control: str, text: str, tlfs: str, kvm: str, profile: str) -> None:
    machine = FlushMachine("kvm", profile=profile)
    check(made(machine, name, control, text), machine, expected(kvm, profile), exactly=True)


@pytest.mark.parametrize("execution", ["exact", "kvm", "paranoid"])
@pytest.mark.parametrize(("name", "control", "text", "tlfs", "kvm"), ROWS, ids=[row[0] for row in ROWS])
def test_by_the_specification(name: str, control: str, text: str, tlfs: str, kvm: str, execution: str) -> None:
    machine = FlushMachine("tlfs", execution)
    done = made(machine, name, control, text)
    if tlfs == "U3":
        assert (done.outcome, done.intercepted_gpa, done.result) == ("intercepted", 0xDEAD000, None)
        assert done.rip_advance == 0
        return
    if tlfs == "U1":
        assert done.result == 3  # outside of a nested environment the bit is a reserved one
        return
    want = expected(tlfs)
    if execution == "exact":
        check(done, machine, want, exactly=True)
    assert done.result == want.result
    for effect in done.effects:
        assert names(effect.required) == (want.entries if effect.targeted else "")
        assert not len(effect.left)


@pytest.mark.parametrize(("name", "control", "text", "tlfs", "kvm"), ROWS, ids=[row[0] for row in ROWS])
def test_what_kvm_leaves_behind_is_told(name: str, control: str, text: str, tlfs: str, kvm: str) -> None:
    done = made(FlushMachine("kvm"), name, control, text)
    left = {effect.vp.vp_index: names(effect.left) for effect in done.effects if len(effect.left)}
    told: dict[str, Any] = {"X09": {0: ALL, 1: ALL, 3: ALL, 65: ALL}, "L22": {0: "G"}}
    assert left == told.get(name, {})


@pytest.mark.parametrize(("name", "control", "text", "tlfs", "kvm"), ROWS, ids=[row[0] for row in ROWS])
def test_kvms_reading_carried_out_exactly(name: str, control: str, text: str, tlfs: str, kvm: str) -> None:
    """No more goes than has to, and of what KVM does not see nothing."""
    machine = FlushMachine("kvm", "exact")
    done = made(machine, name, control, text)
    read, strict = expected(kvm), expected(tlfs) if tlfs[:1] != "U" else None
    assert (done.result, done.flushed) == (read.result, read.flushed)
    for effect in done.effects:
        needed = set(names(effect.required))
        assert set(names(effect.dropped)) == (needed & set(read.entries) if effect.targeted else set())
        if strict is not None and strict.result & 0xFFFF == 0:
            assert needed == (set(strict.entries) if effect.vp.vp_index in strict.flushed else set())
