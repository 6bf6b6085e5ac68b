"""State N0 of the vectors on a machine: four L1 VPs, each of which has entered an L2 by its enlightened VMCS."""

from __future__ import annotations

from engine.arch.evmcs import EVMCS
from engine.arch.hyperv_cpuid import CpuidEntry
from engine.arch.vmcs12 import VMCS12
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.state.config import VcpuConfig, VmConfig
from engine.vcpu.cpuid import supported_cpuid
from tests.engine.builders import store_word
from tests.engine.nested.support import MIN64, NONE, blob

from .guests import ASSIST_MSR, CPUID, GUEST_OS_ID, OS_ID

WIDTH = 46
EVMCS_AT, ASSIST_AT = 0x40000, 0x50000
PARTITION = 0xA000
EPT12 = 0x60000
L2_INPUT, L1_INPUT = 0x5000, 0x25000
IDS = ((1, 1), (1, 2), (1, 65), (2, 1))
CLEAN_AT, CONTROL_AT, VP_AT, VM_AT, PAGE_AT = 0x338, 0x344, 0x348, 0x350, 0x358
L2_RIP, L1_RIP = 0x1000, 0x7000

FIELDS = {
    **MIN64,
    "cpu_based_vm_exec_control": 0x8400_6172,
    "secondary_vm_exec_control": 0x2,
    "ept_pointer": EPT12 | 0x1E,
    "guest_cs_ar_bytes": 0xA09B,
    "guest_ss_ar_bytes": 0xC093,
    "guest_rip": L2_RIP,
    "host_rip": L1_RIP,
    "guest_rflags": 2,
}


def evmcs(vcpu: int) -> int:
    return EVMCS_AT + 0x1000 * vcpu


def assist(vcpu: int) -> int:
    return ASSIST_AT + 0x1000 * vcpu


def write_evmcs(vm: VirtualMachine, vcpu: int) -> None:
    page = bytearray(EVMCS.size)
    EVMCS.put(page, "revision_id", 1)
    for name, value in FIELDS.items():
        if name in EVMCS.by_name:
            EVMCS.put(page, name, value)
    vm_id, vp_id = IDS[vcpu]
    EVMCS.put(page, "hv_enlightenments_control", 1)
    EVMCS.put(page, "hv_vm_id", vm_id)
    EVMCS.put(page, "hv_vp_id", vp_id)
    EVMCS.put(page, "partition_assist_page", PARTITION)
    vm.write_memory(evmcs(vcpu), bytes(page))


def prepare(vm: VirtualMachine, vcpu: int) -> None:
    """What L1 does on one VP before it enters its L2."""
    vm.nested.enable_evmcs(vcpu)
    write_evmcs(vm, vcpu)
    store_word(vm, assist(vcpu) + 32, 1)
    store_word(vm, assist(vcpu) + 40, 1)
    store_word(vm, assist(vcpu) + 48, evmcs(vcpu))
    vm.nested.write_msrs(vcpu, [(ASSIST_MSR, assist(vcpu) | 1)])
    assert vm.nested.set_state(vcpu, blob(size=128, vmcs12_pa=NONE)).returns == 0


def enter(vm: VirtualMachine, vcpu: int, *, launch: bool = True) -> None:
    result = vm.nested.execute(vcpu, "vmlaunch" if launch else "vmresume")
    assert result.result == "entered", result


def nested_machine(profile: str = "kvm-latest", **config: object) -> VirtualMachine:
    """State N0, with L2 on every VP."""
    cpuid: tuple[CpuidEntry, ...] = (
        *(e for e in supported_cpuid("intel", True, WIDTH) if e.function >> 28 != 4),
        *CPUID,
    )
    settings = VmConfig(
        profile=profile,
        vcpus=tuple(VcpuConfig(i, None, cpuid) for i in range(len(IDS))),
        translation_cache="model",
        **config,  # type: ignore[arg-type]
    )
    vm = VirtualMachine.create(settings, [SlotSpec(0, 0, 1 << 20)])
    vm.nested.write_msrs(0, [(GUEST_OS_ID, OS_ID)])
    # EPT12: L2's page 0x5000 is L1's page 0x25000, and 0x6000 is not there.
    for level, at in enumerate((EPT12, EPT12 + 0x1000, EPT12 + 0x2000)):
        store_word(vm, at, EPT12 + 0x1000 * (level + 1) | 7)
    store_word(vm, EPT12 + 0x3000 + 8 * 5, L1_INPUT | 7)
    for vcpu in range(len(IDS)):
        prepare(vm, vcpu)
        enter(vm, vcpu)
    return vm


def exit_field(vm: VirtualMachine, vcpu: int, name: str) -> int:
    """A field of the cached vmcs12, after an exit to L1."""
    return VMCS12.get(vm.nested.vcpu(vcpu).vmx.vmcs12, name)
