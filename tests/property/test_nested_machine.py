"""Random nested operations on a machine: what is published is what is stored, and a restored machine goes on alike."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import EngineError
from engine.machine import VirtualMachine
from engine.nested import read_nested_state
from engine.vcpu.msr_numbers import HV_GUEST_OS_ID, HV_HYPERCALL, HV_VP_ASSIST_PAGE, HV_VP_INDEX
from tests.engine.builders import Durable, assert_sound, machine, picture, round_trip, store_word
from tests.engine.nested.drawn_blobs import blobs
from tests.engine.nested.support import ERAS, EV, GM, MIN32, NONE, RP, SHADOW_WORD, SHADOWING, blob, vmcs12, vmx_cpuid

VCPUS = (0, 7)
L2 = {"flags": GM, "data": vmcs12(MIN32)}
BLOBS = (
    L2,
    {**L2, "flags": GM | RP},
    {"flags": GM, "size": 8320, "data": vmcs12(SHADOWING), "shadow": vmcs12(revision=SHADOW_WORD)},
    {},
    {"flags": EV, "vmcs12_pa": NONE},
    {"vmxon": NONE, "vmcs12_pa": NONE},
    {"vmcs12_pa": 0x1000},
)
known = st.sampled_from([blob(**fields) for fields in BLOBS])
msrs = st.sampled_from([0x3A, 0x480, 0x48D, 0x277, HV_GUEST_OS_ID, HV_HYPERCALL, HV_VP_INDEX, HV_VP_ASSIST_PAGE])
values = st.sampled_from([0, 1, 5, 0x6001, 0x7F_0000_0016, (1 << 64) - 1])
vmx = st.sampled_from([("vmxon", 0x1000), ("vmclear", 0x2000), ("vmptrld", 0x2000), ("vmlaunch", 0), ("vmxoff", 0)])
operations = st.one_of(
    st.tuples(st.just("set_state"), known | blobs()),
    st.tuples(st.just("set_cpuid"), st.sampled_from([(), vmx_cpuid(), vmx_cpuid(vmx=False), vmx_cpuid(hyperv=True)])),
    st.tuples(st.just("write_msrs"), st.lists(st.tuples(msrs, values), min_size=1, max_size=3)),
    st.tuples(st.just("enable_evmcs")),
    st.tuples(st.just("set_smm"), st.booleans()),
    st.tuples(st.just("prepare_run")),
    st.tuples(st.just("execute"), vmx),
)
steps = st.lists(st.tuples(st.sampled_from(VCPUS), operations), min_size=1, max_size=12)


def do(vm: VirtualMachine, vcpu: int, name: str, *operands: Any) -> Any:
    """An operation's answer; a refusal is one, too."""
    if name == "execute":
        operands = operands[0]
    try:
        return getattr(vm.nested, name)(vcpu, *operands)
    except EngineError as error:
        return type(error), error.field, error.errno


def view(vm: VirtualMachine) -> list[Any]:
    return [
        (vm.nested.vcpu(n), vm.nested.state(n), vm.nested.msrs(n), vm.nested.evmcs(n), vm.vcpus.vmcs(n)) for n in VCPUS
    ]


@pytest.mark.parametrize("era", ERAS)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(history=steps)
def test_stored_and_restored(era: str, history: list[tuple[int, tuple[Any, ...]]]) -> None:
    vm, disk = machine(era, spp=False, vcpus=VCPUS, maxphyaddr=39), Durable()
    vm.write_memory(0x1000, vmcs12(MIN32))
    vm.write_memory(0x2000, vmcs12(MIN32))
    store_word(vm, 0x5000, SHADOW_WORD, 4)
    for vcpu in VCPUS:
        vm.nested.set_cpuid(vcpu, vmx_cpuid())
    for position, (vcpu, (name, *operands)) in enumerate(history):
        twin = round_trip(vm)
        before = picture(vm)
        answer = do(vm, vcpu, name, *operands)
        assert do(twin, vcpu, name, *operands) == answer
        assert view(twin) == view(vm)
        if isinstance(answer, tuple):
            assert picture(vm) == before
        if position % 3 == 0:
            disk.save(vm)
    disk.save(vm)
    assert disk.blocks == picture(vm)[1]
    assert view(disk.restore()) == view(vm)
    assert_sound(vm)
    for vcpu in VCPUS:
        assert read_nested_state(vm.nested.vcpu(vcpu), vm.nested.ram()) == vm.nested.state(vcpu)
