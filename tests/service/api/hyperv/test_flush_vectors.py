"""Every printed vector of the flush calls over HTTP, on translations that accesses of five VPs left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.arch import hypercall as hv
from tests.contract.client import ContractClient
from tests.engine.hyperv.flush_machine import ALL, words
from tests.engine.hyperv.vectors import LONG, ROWS, Expected, expected
from tests.service.api.hyperv.flush_vm import FlushVm, named

MakeVm = Callable[..., str]


def check(vm: FlushVm, done: Any, want: Expected) -> None:
    """The reply, and the caches afterwards."""
    assert done["outcome"] == "completed" and done["rip_advance"] == 3
    assert done["registers"] == {"rax": hex(want.result)} and done["result"]["value"] == hex(want.result)
    assert done["targeted"] == done["flushed"] == list(want.flushed)
    gone = {vp["vp_index"]: named(vp["dropped"]) for vp in done["vps"] if vp["targeted"] or vp["dropped"]}
    assert gone == dict.fromkeys(want.flushed, want.entries)
    for vp in (vp for vp in done["vps"] if vp["targeted"]):
        if want.statistic is not None:
            assert vp["tlb_flush"] == want.statistic
        assert vm.held(vp["vcpu"]) == "".join(name for name in ALL if name not in want.entries)


@pytest.mark.parametrize("policy", ["kvm", "tlfs"])
def test_printed_vectors(client: ContractClient, make_vm: MakeVm, policy: str) -> None:
    vm = FlushVm(client, make_vm, flush_policy=policy)
    for name, control, text, tlfs, kvm in ROWS:
        vm.fill()
        if name in LONG:
            text = words(*LONG[name]).hex()
        done = vm.call(int(control, 16), text)
        told = kvm if policy == "kvm" else tlfs
        if told == "U3":
            assert (done["outcome"], done["intercepted_gpa"], done["result"]) == ("intercepted", "0xdead000", None)
        elif told == "U1":
            assert done["result"]["status"] == hex(hv.Status.INVALID_HYPERCALL_INPUT)
        else:
            check(vm, done, expected(told))


@pytest.mark.parametrize("policy", ["kvm", "tlfs"])
def test_second_level_vectors(client: ContractClient, make_vm: MakeVm, policy: str) -> None:
    """P01 to P08 with another root, which nothing was derived from, and the one of the VM, from which all was."""
    vm = FlushVm(client, make_vm, flush_policy=policy)
    vm.fill()
    own = int(client.get(f"{vm.url}/vcpus/0/vmcs").json()["eptp"], 16)
    rows = [
        (0xAF, (0x30001E, 0), 0, False),
        (0xAF, (own, 1), 5, False),
        (0x1000000B0, (0x30001E, 0, 0x12345000), 1 << 32, False),
        (0x1000000B0, (own, 0, 0x1007FF), 1 << 32, False),
        (0x1FE000000B0, (own, 0, *[0x12345000] * 510), 0x1FE << 32, False),
        (0xB0, (own, 0, 0), 3, False),
        (0x1000000B0, (own, 0, 0x1800), 1 << 32, True),
        (0xAF, (own, 0), 0, True),
    ]
    for control, block, result, gone in rows:
        done = vm.call(control, words(*block).hex())
        assert int(done["result"]["value"], 16) == (2 if policy == "kvm" else result)
        dropped = {vp["vp_index"]: {entry["kind"] for entry in vp["dropped"]} for vp in done["vps"] if vp["dropped"]}
        everywhere = {key: {"combined", "physical"} for key in (0, 1, 2, 3, 65)}
        assert dropped == (everywhere if gone and policy == "tlfs" else {})
        if dropped:
            assert [vm.held(at) for at in range(5)] == [""] * 5
            vm.fill()
