"""Malformed hypercalls over HTTP: a documented status or problem each time, and what is refused has changed nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contract.client import ContractClient
from tests.engine.hyperv.drawn_calls import calls
from tests.engine.hyperv.flush_machine import ALL, INPUT, words
from tests.service.api.hyperv.flush_vm import FlushVm
from tests.support.http import OCTETS

FUZZ = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
STATUSES = {"kvm": {0, 2, 3}, "tlfs": {0, 2, 3, 4, 5}}


@pytest.fixture(params=["kvm", "tlfs"])
def vm(request: pytest.FixtureRequest, client: ContractClient, make_vm: Callable[..., str]) -> FlushVm:
    found = FlushVm(client, make_vm, flush_policy=request.param)
    found.fill()
    return found


def caches(vm: FlushVm) -> list[Any]:
    url = f"{vm.url}/vcpus"
    return [[vm.client.get(f"{url}/{at}/{what}").json() for what in ("tlb", "activity")] for at in range(5)]


@FUZZ
@given(calls(), st.sampled_from([INPUT, INPUT + 1, INPUT + 0xFF8, 0xDEAD000]), st.booleans())
def test_any_call_ends_in_a_status(vm: FlushVm, call: tuple[int, list[int]], gpa: int, as_bytes: bool) -> None:
    control, block = call
    fast = bool(control >> 16 & 1)
    padded = (block + [0] * 14)[:14]
    before = caches(vm)
    if as_bytes and not fast:
        params = {"rcx": hex(control), "rdx": str(gpa)}
        url = f"{vm.url}/vcpus/0/hypercalls"
        reply = vm.client.post(url, content=words(*block), headers=OCTETS, params=params)
        if reply.status_code == 422:
            assert gpa == 0xDEAD000 and reply.json()["field"] == "input_gpa" and caches(vm) == before
            return
        assert reply.status_code == 200, reply.text
        done = reply.json()
    else:
        if gpa != 0xDEAD000:
            vm.store(gpa, words(*block))
        xmm = [words(*padded[at : at + 2]).hex().upper() for at in range(2, 14, 2)]
        first = hex(padded[0]) if fast else gpa
        done = vm.post({"registers": {"rcx": control, "rdx": first, "r8": str(padded[1]), "xmm": xmm}})
    if done["outcome"] == "intercepted":
        assert vm.policy == "tlfs" and done["intercepted_gpa"] == hex(gpa) and caches(vm) == before
        return
    value = int(done["result"]["value"], 16)
    status, reps = value & 0xFFFF, value >> 32
    assert (done["outcome"], done["registers"]) == ("completed", {"rax": hex(value)})
    assert (int(done["result"]["status"], 16), done["result"]["reps_completed"]) == (status, reps)
    assert status in STATUSES[vm.policy]
    if status:
        assert not reps and not done["vps"] and caches(vm) == before
    else:
        assert reps == control >> 32 & 0xFFF
        for vp in done["vps"]:
            assert {str(item) for item in vp["over_flushed"]} == {
                str(item) for item in vp["dropped"] if item not in vp["required"]
            }
        if done["flushed"]:
            vm.fill()
            assert vm.held(0) == ALL


members = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2**64), st.text(max_size=4), st.lists(st.integers(), max_size=2)
)
documents = st.dictionaries(
    st.sampled_from(["registers", "call", "input", "input_gpa", "cpl", "long_mode", "protected", "other"]),
    st.one_of(
        members,
        st.dictionaries(st.sampled_from(["rcx", "rdx", "xmm", "code", "name", "ranges", "flags", "vp_set"]), members),
    ),
    max_size=4,
)


@FUZZ
@given(documents)
def test_any_document_is_a_call_or_a_problem(client: ContractClient, session_vm: str, document: dict[str, Any]) -> None:
    revision = client.get(session_vm).json()["revision"]
    reply = client.post(f"{session_vm}/vcpus/0/hypercalls", json=document)
    assert reply.status_code in (200, 422), reply.text
    if reply.status_code == 422:
        assert reply.json()["field"] and client.get(session_vm).json()["revision"] == revision


@pytest.fixture
def session_vm(make_vm: Callable[..., str]) -> str:
    return make_vm(spp=False)
