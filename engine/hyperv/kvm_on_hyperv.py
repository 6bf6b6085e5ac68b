"""KVM as the guest of Hyper-V: how it has Hyper-V serve the flush hypercalls of KVM's own guests.

Each vCPU has an enlightened VMCS, or on AMD a VMCB, and runs on a CPU of its own, which has a VP assist page: both are
pages of the host and are kept as such. One partition assist page, always zero, serves the whole machine. Source: Linux
5.4, vmx.c and the series that brought KVM_CAP_HYPERV_DIRECT_TLBFLUSH; Linux 7.1, svm_onhyperv.c.

Kept as that KVM has it: with VMX enabling does not clear the clean bit of what it changes, and a vCPU's VP id is stored
after its first exit only; with SVM it does, and the id is there before VMRUN. The Hyper-V here looks at these fields at
each entry, whatever the clean bits say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.arch import controls as ctl
from engine.arch import hyperv_cpuid as leaves
from engine.arch.evmcs import CLEAN_ALL, EVMCS, NESTED_FLUSH_HYPERCALL
from engine.arch.hyperv_cpuid import CpuidEntry
from engine.arch.hyperv_pages import (
    DIRECT_HYPERCALL,
    ENLIGHTENED_VMCB,
    VMCB_CLEAN_ENLIGHTENMENTS,
    VP_ASSIST_SIZE,
    read_assist,
    write_assist,
)
from engine.arch.struct_layout import Layout
from engine.cpu import frames
from engine.cpu.frames import FIRST_VCPU_FRAME, STATE_FRAME, Machine
from engine.errors import InvalidValue
from engine.hyperv import notes
from engine.hyperv.l2_hypercalls import NestedGuest
from engine.hyperv.privileges import Privileges
from engine.kvm import state_frame as reg
from engine.state.config import VmConfig
from engine.state.profiles import kvm_version
from engine.vcpu.cpuid import entries_from_json

CAP_DIRECT_FLUSH = 175
_CLEAN_BIT = 1 << VMCB_CLEAN_ENLIGHTENMENTS
# A Linux of the time: open source, type 1.
LINUX_OS_ID = 0x8100 << 48
# Where a kernel has its own memory: the VM id is the address of the machine's structure there.
KERNEL_BASE = 0xFFFF_8880_0000_0000

_DEFAULTS = (
    CpuidEntry(leaves.LEAF_INTERFACE, eax=leaves.INTERFACE_SIGNATURE),
    CpuidEntry(
        leaves.LEAF_FEATURES,
        eax=leaves.FEATURES_EAX_ASSIST_MSR | leaves.FEATURES_EAX_HYPERCALL_MSRS | leaves.FEATURES_EAX_VP_INDEX,
        edx=leaves.FEATURES_EDX_XMM_INPUT | leaves.FEATURES_EDX_EXTENDED_RANGES,
    ),
    CpuidEntry(
        leaves.LEAF_RECOMMENDATIONS,
        eax=leaves.RECOMMEND_REMOTE_FLUSH | leaves.RECOMMEND_EX_PROCESSOR_MASKS | leaves.RECOMMEND_EVMCS,
    ),
    CpuidEntry(
        leaves.LEAF_NESTED,
        eax=leaves.EVMCS_VERSIONS | leaves.NESTED_EAX_DIRECT_FLUSH | leaves.NESTED_EAX_MSR_BITMAP,
    ),
)


@dataclass(frozen=True)
class HypervHost:
    """The Hyper-V under KVM: what its CPUID says.

    ``fail_allocation``: KVM gets no page when it enables the flush. ``enlightened`` False: KVM does not use the
    enlightened VMCS though it is recommended; a KVM of 2019 would have offered the flush all the same, and stored its
    fields in an ordinary VMCS. ``svm``: the processor is AMD's; ``ported``: this KVM asks
    for flushes there too.
    """

    privileges: Privileges
    fail_allocation: bool = False
    enlightened: bool = True
    svm: bool = False
    ported: bool = False

    @classmethod
    def under(cls, config: VmConfig) -> HypervHost | None:
        """The Hyper-V of a machine's host, None where there is none. Raises InvalidValue."""
        host = config.host
        if host.hyperv is None:
            return None
        found = cls.of(host.hyperv, enlightened=host.evmcs is not False)
        return replace(found, svm=host.vendor == "amd", ported=kvm_version(config.profile).hyperv.flushes_on_svm)

    @classmethod
    def of(cls, description: Mapping[str, Any], *, enlightened: bool = True) -> HypervHost:
        """From ``host.hyperv``: the leaves in ``cpuid``, and for those not in it what a Hyper-V of the time shows.

        Raises InvalidValue.
        """
        unknown = set(description) - {"cpuid", "fail_allocation"}
        if unknown:
            raise InvalidValue("has cpuid and fail_allocation", field="host.hyperv", value=sorted(unknown))
        given = entries_from_json(description.get("cpuid", ()), "host.hyperv.cpuid")
        entries = {entry.function: entry for entry in (*_DEFAULTS, *given)}
        fail = description.get("fail_allocation", False)
        return cls(Privileges.of(entries.values(), LINUX_OS_ID), bool(fail), enlightened)

    @property
    def evmcs(self) -> bool:
        """KVM uses the enlightened VMCS."""
        low = self.privileges.nested_eax & 0xFF
        recommended = bool(self.privileges.recommendations & leaves.RECOMMEND_EVMCS)
        return not self.svm and self.enlightened and recommended and low >= 1

    @property
    def direct_flush(self) -> bool:
        """KVM_CAP_HYPERV_DIRECT_TLBFLUSH is there."""
        able = self.ported if self.svm else self.evmcs
        return able and bool(self.privileges.nested_eax & leaves.NESTED_EAX_DIRECT_FLUSH)

    @property
    def control(self) -> Layout:
        """What tells Hyper-V of a guest of KVM's: the enlightened VMCS, or the VMCB."""
        return ENLIGHTENED_VMCB if self.svm else EVMCS


def build(m: Machine, vcpus: Iterable[int], host: HypervHost) -> None:
    """The host's pages of new vCPUs, by position: an enlightened VMCS or VMCB and a VP assist page each."""
    for position in vcpus:
        for word in (ctl.V_HV_EVMCS, ctl.V_HV_ASSIST):
            frames.write_word(m, FIRST_VCPU_FRAME + position, word, frames.new_frame(m, frames.NESTED))
        load(m, position, host)


def load(m: Machine, cpu: int, host: HypervHost, vcpu: int | None = None) -> None:
    """Loading a vCPU on a CPU, its own unless said otherwise; both are positions.

    The assist page of the CPU names the enlightened VMCS. DirectHypercall is never taken back: neither by one that does
    not ask for it, nor on AMD, where a KVM that knows how sets it on every CPU from the start.
    """
    evmcs = _page(m, cpu if vcpu is None else vcpu, ctl.V_HV_EVMCS)
    page = bytearray(_page(m, cpu, ctl.V_HV_ASSIST))
    fields = read_assist(bytes(page))
    asks = host.svm and host.direct_flush
    if host.evmcs:
        asks = bool(EVMCS.get(evmcs, "hv_enlightenments_control") & NESTED_FLUSH_HYPERCALL)
        fields["enlighten"] = 1
        fields["evmcs"] = address(m, cpu if vcpu is None else vcpu, ctl.V_HV_EVMCS)
    fields["control"] |= DIRECT_HYPERCALL if asks else 0
    write_assist(page, fields)
    _store(m, cpu, ctl.V_HV_ASSIST, bytes(page))


def unload(m: Machine, cpu: int) -> None:
    """KVM leaves a CPU, with its module or when virtualization is switched off there: it takes all fields back."""
    page = bytearray(_page(m, cpu, ctl.V_HV_ASSIST))
    write_assist(page, {"control": 0, "enlighten": 0, "evmcs": 0})
    _store(m, cpu, ctl.V_HV_ASSIST, bytes(page))


def enable_direct_flush(m: Machine, vcpu: int, host: HypervHost) -> str | None:
    """KVM_CAP_HYPERV_DIRECT_TLBFLUSH on a vCPU: None, or the errno, and then nothing has changed."""
    if not host.direct_flush:
        return "ENOTTY"
    page = int(frames.read_word(m, STATE_FRAME, reg.PARTITION_ASSIST))
    if not page:
        if host.fail_allocation:
            return "ENOMEM"
        page = int(frames.new_frame(m, frames.NESTED))
        frames.write_word(m, STATE_FRAME, reg.PARTITION_ASSIST, page)
    seen = _page(m, vcpu, ctl.V_HV_EVMCS)
    control = host.control.get(seen, "hv_enlightenments_control") | NESTED_FLUSH_HYPERCALL
    fields = {
        "partition_assist_page": int(frames.address_of(m, page)),
        "hv_vm_id": vm_id(m),
        "hv_enlightenments_control": control,
    }
    if host.svm:
        fields["hv_clean_fields"] = ENLIGHTENED_VMCB.get(seen, "hv_clean_fields") & ~_CLEAN_BIT
    _put(m, vcpu, host, fields)
    notes.set_flag(m, vcpu, notes.DIRECT_FLUSH, True)
    load(m, vcpu, host)
    return None


def entering(m: Machine, vcpu: int, vp_index: int, host: HypervHost) -> None:
    """Before a vCPU runs: it is loaded on its CPU, and a VMCB has its VP id."""
    here = read_assist(_page(m, vcpu, ctl.V_HV_ASSIST))
    if host.evmcs and not (here["enlighten"] and here["evmcs"] == address(m, vcpu, ctl.V_HV_EVMCS)):
        load(m, vcpu, host)
    if host.svm and host.direct_flush:
        _put(m, vcpu, host, {"hv_vp_id": vp_index & 0xFFFF_FFFF})


def exited(m: Machine, vcpu: int, vp_index: int, host: HypervHost) -> None:
    """After each exit of a vCPU: every field is clean, and an enlightened VMCS has its VP id."""
    if host.evmcs:
        _put(m, vcpu, host, {"hv_vp_id": vp_index & 0xFFFF_FFFF, "hv_clean_fields": CLEAN_ALL})
    elif host.svm and host.direct_flush:
        clean = ENLIGHTENED_VMCB.get(_page(m, vcpu, ctl.V_HV_EVMCS), "hv_clean_fields") | _CLEAN_BIT
        _put(m, vcpu, host, {"hv_clean_fields": clean})


def vm_id(m: Machine) -> int:
    """The VM id of the machine: the kernel address of its structure."""
    return KERNEL_BASE + int(frames.address_of(m, STATE_FRAME))


def nested_guest(m: Machine, vcpu: int, host: HypervHost) -> NestedGuest:
    """The machine's guest as Hyper-V sees it on the CPU of a vCPU: a nested guest of KVM."""
    if not host.evmcs and not host.svm:
        return NestedGuest(enlightened=False)
    page, layout = _page(m, vcpu, ctl.V_HV_EVMCS), host.control
    assist = read_assist(_page(m, vcpu, ctl.V_HV_ASSIST))
    return NestedGuest(
        svm=host.svm,
        enlightened=bool(assist["enlighten"]) and assist["evmcs"] == address(m, vcpu, ctl.V_HV_EVMCS),
        asks=bool(layout.get(page, "hv_enlightenments_control") & NESTED_FLUSH_HYPERCALL),
        direct=bool(assist["control"] & DIRECT_HYPERCALL),
        vm_id=layout.get(page, "hv_vm_id"),
        vp_id=layout.get(page, "hv_vp_id"),
        assist_page=layout.get(page, "partition_assist_page"),
    )


@dataclass(frozen=True)
class HostPages:
    """The host's memory, as far as its pages are kept: what Hyper-V reads of KVM's."""

    machine: Machine

    def read(self, address: int, size: int) -> bytes | None:
        """``size`` bytes at a host-physical address, within one page."""
        frame = (address - int(frames.address_of(self.machine, 0))) >> 12
        known = 0 <= frame < len(self.machine.kind) and self.machine.kind[frame] == frames.NESTED
        if not known or address % frames.FRAME_SIZE + size > frames.FRAME_SIZE:
            return None
        page = bytes(self.machine.rows[self.machine.row_of[frame]].tobytes())
        return page[address % frames.FRAME_SIZE :][:size]


def address(m: Machine, vcpu: int, word: np.int64) -> int:
    """Host-physical address of one of a vCPU's pages."""
    return int(frames.address_of(m, frames.read_word(m, FIRST_VCPU_FRAME + vcpu, word)))


def assist_page(m: Machine, cpu: int) -> bytes:
    """The bytes of the VP assist page of a vCPU's CPU."""
    return _page(m, cpu, ctl.V_HV_ASSIST)[:VP_ASSIST_SIZE]


def control_page(m: Machine, vcpu: int, host: HypervHost) -> bytes:
    """The bytes of a vCPU's enlightened VMCS or VMCB."""
    return _page(m, vcpu, ctl.V_HV_EVMCS)[: host.control.size]


def _page(m: Machine, vcpu: int, word: np.int64) -> bytes:
    return bytes(m.rows[m.row_of[frames.read_word(m, FIRST_VCPU_FRAME + vcpu, word)]].tobytes())


def _put(m: Machine, vcpu: int, host: HypervHost, fields: Mapping[str, int]) -> None:
    page = bytearray(_page(m, vcpu, ctl.V_HV_EVMCS))
    for name, value in fields.items():
        host.control.put(page, name, value)
    _store(m, vcpu, ctl.V_HV_EVMCS, bytes(page))


def _store(m: Machine, vcpu: int, word: np.int64, page: bytes) -> None:
    frame = int(frames.read_word(m, FIRST_VCPU_FRAME + vcpu, word))
    for position in range(0, frames.FRAME_SIZE, 8):
        value = int.from_bytes(page[position : position + 8], "little", signed=True)
        frames.write_word(m, frame, position >> 3, value)
