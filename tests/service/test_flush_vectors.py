"""Every printed vector of the flush calls over HTTP, on translations that accesses of five VPs left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.arch import hypercall as hv
from tests.contract.client import ContractClient
from tests.engine.hyperv.flush_machine import ALL, words
from tests.engine.hyperv.test_vectors import LONG, ROWS, Expected, expected
from tests.service.flush_vm import FlushVm, named

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
