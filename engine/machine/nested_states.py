"""Where a machine keeps the nested state of its vCPUs, and how one of them is taken out and put back.

The state has three homes and no copies. Registers that decide about memory accesses are words of the vCPU's record, as
for everybody else. The pages (vmcs12, shadow vmcs12, VMCB) are frames of kind ``nested``. The rest is a ``Vcpu``
without pages, kept beside the frames and written to the head as far as it differs from a fresh vCPU. Two Hyper-V MSRs
belong to the partition and are kept once for all vCPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from engine.arch import controls as ctl
from engine.arch import vmx_msrs as vmx
from engine.arch.hyperv_cpuid import CpuidEntry
from engine.arch.words import signed, unsigned
from engine.cpu import frames
from engine.hyperv import modes, notes
from engine.kvm import state_frame as reg
from engine.kvm.memory_views import GuestMemory
from engine.machine import record_areas
from engine.state.config import NESTED_CAPABILITIES, VcpuConfig, VmConfig
from engine.state.frame_store import Draft
from engine.state.profiles import kvm_version
from engine.vcpu.msr_numbers import HV_GUEST_OS_ID, HV_HYPERCALL
from engine.vcpu.registers import RESET_REGISTERS
from engine.vcpu.vcpu import SvmState, Vcpu, VcpuHost, VmxState

PARTITION_MSRS = (HV_GUEST_OS_ID, HV_HYPERCALL)

# Registers by the word of the vCPU's record that holds them.
SHARED_REGISTERS = {
    "cr0": ctl.V_CR0,
    "cr3": ctl.V_CR3,
    "cr4": ctl.V_CR4,
    "ia32_efer": ctl.V_EFER,
    "rflags": ctl.V_RFLAGS,
    "pdptr0": ctl.V_PDPTE0,
    "pdptr1": ctl.V_PDPTE1,
    "pdptr2": ctl.V_PDPTE2,
    "pdptr3": ctl.V_PDPTE3,
    "interruptibility_info": ctl.V_INTERRUPTIBILITY,
}
_BLOCKING_BY_MOV_SS = 1 << 1
_DPL = 0b11 << 5
_UNUSABLE = 0x1_0000
_CODE_64, _DATA_FLAT = 0xA09B, 0xC093

# Segments of the 64-bit guest that ``birth`` makes, as the selftests leave one.
_SEGMENTS = {
    **{f"{name}_ar_bytes": _DATA_FLAT for name in ("es", "ss", "ds", "fs", "gs")},
    **{f"{name}_limit": 0xFFFF_FFFF for name in ("es", "cs", "ss", "ds", "fs", "gs")},
    "cs_selector": 0x8,
    "cs_base": 0,
    "cs_ar_bytes": _CODE_64,
    "ldtr_ar_bytes": _UNUSABLE,
}
_AFTER_RESET = {**RESET_REGISTERS, **dict.fromkeys(SHARED_REGISTERS, 0)}
_FIRST_REGISTERS = {**_AFTER_RESET, **_SEGMENTS}

_EPT_CAP_OF_HOST = vmx.EPT_WALK_5 | vmx.EPT_ACCESSED_DIRTY | 0x1


@dataclass(frozen=True)
class VmSettings:
    """What user space chose for all vCPUs: KVM_CAP_EXCEPTION_PAYLOAD, KVM_SET_BOOT_CPU_ID, KVM_CAP_MAX_VCPU_ID.

    ``vcpu_ids``: ids of vCPUs are below it; 0 while nothing was chosen.
    """

    exception_payload: bool = False
    boot_vcpu: int = 0
    vcpu_ids: int = 0


@dataclass(frozen=True)
class NestedStates:
    """What a machine keeps beside its frames. ``vcpus``: those touched, by KVM id; none is ever changed.

    ``heads`` remembers what ``states_to_head`` made of them.
    """

    vcpus: Mapping[int, Vcpu] = field(default_factory=dict)
    partition: Mapping[int, int] = field(default_factory=dict)
    lapic_in_kernel: bool = True
    settings: VmSettings = VmSettings()
    heads: dict[int, dict[str, Any]] = field(default_factory=dict, compare=False, repr=False)


def vcpu_host(config: VmConfig, *, spp_active: bool) -> VcpuHost:
    """The host as nesting sees it.

    Where ``host.nested`` is not set the module parameter is on, but for today's kernel once sub-page protection is.
    The values of the VMX capability MSRs are those of KVM, without what the described processor lacks, or as given.
    """
    host = config.host
    excluded = spp_active and kvm_version(config.profile).subpages.excludes_nesting
    return VcpuHost(
        vendor=host.vendor,
        nested=not excluded if host.nested is None else host.nested,
        ept=host.ept,
        evmcs=host.nested_evmcs,
        shadow_vmcs=bool(host.capability("procbased_ctls2") >> 32 & vmx.SEC_SHADOW_VMCS),
        maxphyaddr=config.maxphyaddr,
        smt_possible=host.smt,
        vmx_capabilities=_capabilities(config),
    )


def _capabilities(config: VmConfig) -> dict[str, int]:
    host = config.host
    rows = kvm_version(config.profile).vcpu
    must1, may1 = rows.vmx_controls["secondary"]
    may1 &= host.capability("procbased_ctls2") >> 32 | vmx.SEC_SHADOW_VMCS
    ept_vpid = rows.vmx_values["ept_vpid"] & (host.capability("ept_vpid_cap") | ~_EPT_CAP_OF_HOST)
    given = {name: value for name, value in host.vmx_capabilities.items() if name in NESTED_CAPABILITIES}
    return {"IA32_VMX_PROCBASED_CTLS2": may1 << 32 | must1, "IA32_VMX_EPT_VPID_CAP": ept_vpid, **given}


def first_identity(own: VcpuConfig) -> tuple[int, tuple[CpuidEntry, ...]]:
    """VP index and CPUID of a vCPU that nobody has touched."""
    return own.id if own.vp_index is None else own.vp_index, own.leaves


def first_mp_state(own: VcpuConfig, states: NestedStates) -> str:
    """What a vCPU that nobody has touched does: after RESET all but the bootstrap processor wait, if they can."""
    waits = own.reset and states.lapic_in_kernel and own.id != states.settings.boot_vcpu
    return "uninitialized" if waits else "runnable"


def fresh_vcpu(config: VmConfig, vcpu_id: int, states: NestedStates) -> Vcpu:
    """A vCPU that nobody has touched, without pages. CPUID is what the VM was created with, possibly nothing."""
    own = config.vcpus[config.vcpu_position(vcpu_id)]
    vp_index, cpuid = first_identity(own)
    return Vcpu(
        profile=config.profile,
        host=vcpu_host(config, spp_active=False),
        vcpu_id=vcpu_id,
        vp_index=vp_index,
        cpuid=cpuid,
        mp_state=first_mp_state(own, states),
        registers=dict(_AFTER_RESET if own.reset else _FIRST_REGISTERS),
        vmx=VmxState(vmcs12=bytearray(), shadow=bytearray()),
        svm=SvmState(vmcb12=bytearray()),
    )


def record_of(config: VmConfig, states: NestedStates, vcpu_id: int) -> Vcpu:
    """What is kept of a vCPU beside the frames: no pages, no shared registers, no partition MSRs. Not to be changed."""
    return states.vcpus.get(vcpu_id) or fresh_vcpu(config, vcpu_id, states)


def open_vcpu(config: VmConfig, states: NestedStates, machine: frames.Machine, vcpu_id: int) -> Vcpu:
    """A whole vCPU, to be read, or changed and put back with ``close_vcpu``."""
    vcpu = record_of(config, states, vcpu_id).copy()
    vcpu.host = vcpu_host(config, spp_active=bool(frames.read_word(machine, frames.STATE_FRAME, reg.SPP_ACTIVE)))
    vcpu.fail_allocation = int(frames.read_word(machine, frames.STATE_FRAME, reg.FAIL_ALLOCATION)) == 1
    vcpu.lapic_in_kernel = states.lapic_in_kernel
    vcpu.exception_payload = states.settings.exception_payload
    vcpu.boot_vcpu = states.settings.boot_vcpu
    vcpu.enforces_cpuid = notes.flag(machine, int(machine.vcpu_of_id[vcpu_id]), notes.ENFORCE_CPUID)
    vcpu.msrs.update(states.partition)
    frame = _frame_of(machine, vcpu_id)
    words = machine.rows[machine.row_of[frame]]
    for name, word in SHARED_REGISTERS.items():
        vcpu.registers[name] = unsigned(words[word])
    vcpu.registers["ss_ar_bytes"] = vcpu.registers["ss_ar_bytes"] & ~_DPL | int(words[ctl.V_CPL]) << 5
    vcpu.mov_ss_blocking = bool(vcpu.registers["interruptibility_info"] & _BLOCKING_BY_MOV_SS)
    record_areas.take(vcpu, words)
    vcpu.vmx.vmcs12, vcpu.vmx.shadow, vcpu.svm.vmcb12 = (
        _read_page(machine, int(words[word])) for word in (ctl.V_VMCS12, ctl.V_SHADOW_VMCS12, ctl.V_VMCB12)
    )
    return vcpu


def close_vcpu(draft: Draft, states: NestedStates, vcpu: Vcpu) -> NestedStates:
    """Put a vCPU back: its words and pages into the draft, the rest into the states that are returned."""
    frame = _frame_of(draft.machine, vcpu.vcpu_id)
    blocking = vcpu.registers["interruptibility_info"] & ~_BLOCKING_BY_MOV_SS
    vcpu.registers["interruptibility_info"] = blocking | (_BLOCKING_BY_MOV_SS if vcpu.mov_ss_blocking else 0)
    memory = GuestMemory(draft, int(frames.read_word(draft.machine, frame, ctl.V_SPACE)))
    modes.follow(draft.machine, frame, states.vcpus.get(vcpu.vcpu_id), vcpu, memory)
    for name, word in SHARED_REGISTERS.items():
        frames.write_word(draft.machine, frame, word, signed(vcpu.registers[name]))
    frames.write_word(draft.machine, frame, ctl.V_CPL, (vcpu.registers["ss_ar_bytes"] & _DPL) >> 5)
    frames.write_word(draft.machine, frame, ctl.V_GUEST_MODE, int(vcpu.vmx.guest_mode or vcpu.svm.guest_mode))
    draft.ensure()
    record_areas.put(draft.machine, frame, vcpu)
    for word, page in (
        (ctl.V_VMCS12, vcpu.vmx.vmcs12),
        (ctl.V_SHADOW_VMCS12, vcpu.vmx.shadow),
        (ctl.V_VMCB12, vcpu.svm.vmcb12),
    ):
        _write_page(draft.machine, frame, word, page)
    failing = int(frames.read_word(draft.machine, frames.STATE_FRAME, reg.FAIL_ALLOCATION))
    frames.write_word(draft.machine, frames.STATE_FRAME, reg.FAIL_ALLOCATION, max(0, failing - vcpu.allocations))
    registers = {**vcpu.registers, **dict.fromkeys(SHARED_REGISTERS, 0)}
    registers["ss_ar_bytes"] &= ~_DPL
    kept = replace(
        vcpu,
        registers=registers,
        msrs={number: value for number, value in vcpu.msrs.items() if number not in PARTITION_MSRS},
        vmx=replace(vcpu.vmx, vmcs12=bytearray(), shadow=bytearray()),
        svm=replace(vcpu.svm, vmcb12=bytearray()),
        lapic_in_kernel=True,
        exception_payload=False,
        boot_vcpu=0,
        lapic=b"",
        lapic_x2apic=False,
        xsave=b"",
        enforces_cpuid=False,
        mov_ss_blocking=False,
        fail_allocation=False,
        allocations=0,
    )
    return NestedStates(
        vcpus={**states.vcpus, vcpu.vcpu_id: kept},
        partition={number: vcpu.msrs[number] for number in PARTITION_MSRS if number in vcpu.msrs},
        lapic_in_kernel=states.lapic_in_kernel,
        settings=states.settings,
        heads={number: head for number, head in states.heads.items() if number != vcpu.vcpu_id},
    )


def states_to_head(config: VmConfig, states: NestedStates) -> dict[str, Any]:
    """JSON form. A vCPU is written as far as it differs from a fresh one; numbers are hex strings."""
    changed = {}
    for vcpu_id, vcpu in sorted(states.vcpus.items()):
        if vcpu_id not in states.heads:
            fresh = fresh_vcpu(config, vcpu_id, states)
            states.heads[vcpu_id] = _to_text(_difference(_plain(vcpu), _plain(fresh)))
        if states.heads[vcpu_id]:
            changed[str(vcpu_id)] = states.heads[vcpu_id]
    chosen = _difference(asdict(states.settings), asdict(VmSettings()))
    return {
        "vcpus": changed,
        "partition": _to_text({str(number): value for number, value in states.partition.items()}),
        "lapic_in_kernel": states.lapic_in_kernel,
        **({"settings": _to_text(chosen)} if chosen else {}),
    }


def states_from_head(config: VmConfig, head: Mapping[str, Any]) -> NestedStates:
    """The inverse of ``states_to_head``; a head without anything is a machine whose vCPUs are fresh."""
    empty = NestedStates(
        partition={int(number): value for number, value in _from_text(head.get("partition", {})).items()},
        lapic_in_kernel=head.get("lapic_in_kernel", True),
        settings=VmSettings(**_from_text(head.get("settings", {}))),
    )
    vcpus = {}
    for text, difference in head.get("vcpus", {}).items():
        fresh = fresh_vcpu(config, int(text), empty)
        whole = _merged(_plain(fresh), _from_text(difference))
        kept = Vcpu.from_head({**whole, "host": fresh.to_head()["host"]})
        vcpus[int(text)] = replace(
            kept,
            host=fresh.host,
            vmx=replace(kept.vmx, vmcs12=bytearray(), shadow=bytearray()),
            svm=replace(kept.svm, vmcb12=bytearray()),
        )
    return replace(empty, vcpus=vcpus)


def _frame_of(machine: frames.Machine, vcpu_id: int) -> int:
    return int(frames.FIRST_VCPU_FRAME) + int(machine.vcpu_of_id[vcpu_id])


def _read_page(machine: frames.Machine, frame: int) -> bytearray:
    if not frame:
        return bytearray(frames.FRAME_SIZE)
    return bytearray(machine.rows[machine.row_of[frame]].tobytes())


def _write_page(machine: frames.Machine, record: int, word: np.int64, page: bytearray) -> None:
    frame = int(frames.read_word(machine, record, word))
    if not any(page):
        if frame:
            frames.free_frame(machine, frame)
            frames.write_word(machine, record, word, 0)
        return
    if not frame:
        frame = int(frames.new_frame(machine, frames.NESTED))
        frames.write_word(machine, record, word, frame)
    if _read_page(machine, frame) != page:
        machine.rows[frames.own(machine, frame)] = np.frombuffer(bytes(page), dtype=np.int64)


def _plain(vcpu: Vcpu) -> dict[str, Any]:
    return {name: value for name, value in vcpu.to_head().items() if name != "host"}


def _difference(value: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in value.items():
        known = base.get(name)
        if name in base and item == known:
            continue
        found[name] = _difference(item, known) if isinstance(item, dict) and isinstance(known, dict) else item
    return found


def _merged(base: Mapping[str, Any], difference: Mapping[str, Any]) -> dict[str, Any]:
    whole = dict(base)
    for name, item in difference.items():
        whole[name] = _merged(whole[name], item) if isinstance(item, dict) and name in whole else item
    return whole


def _to_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_text(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_to_text(item) for item in value]
    return hex(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _from_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _from_text(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_from_text(item) for item in value]
    return int(value, 16) if isinstance(value, str) and value.startswith("0x") else value
